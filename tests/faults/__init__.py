"""Faults injected for real: killed and stopped processes, signals, two runs in one directory."""
