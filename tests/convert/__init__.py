"""Conversion, both ways, against transformers."""
