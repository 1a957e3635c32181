"""Tests of megamm inside other tools."""
