"""Faults injected for real: killed ranks, damaged files, full disks, pickles that would run code."""
