"""Fixtures of these tests."""

from tests.one_process import layout

__all__ = ["layout"]
