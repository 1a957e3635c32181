"""Tests that run in several processes (gloo on the CPU), and the harness they share."""
