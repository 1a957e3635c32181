"""Faults that are injected for real, and what must come of them; README.md has the table."""
