"""Tests of megamm.training."""
