"""Tests of conversations in the terminal and in the browser."""
