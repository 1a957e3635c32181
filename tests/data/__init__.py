"""Tests of megamm.data."""
