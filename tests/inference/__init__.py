"""Answering from a checkpoint."""
