"""Tests of megamm; the folders mirror the package."""
