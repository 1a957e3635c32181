"""What is checked before the first step, so that a run fails in its first minute or not for these reasons."""

from megamm.training.preflight.preflight import preflight

__all__ = ["preflight"]
