"""Faults that megamm has to survive, each injected for real."""
