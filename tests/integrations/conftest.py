"""lmms-eval, or a stand-in for it; the checkpoints of the tests of inference."""

from __future__ import annotations

from importlib.util import find_spec

from tests.inference.conftest import checkpoints, pictures
from tests.integrations import stand_in

__all__ = ["checkpoints", "pictures"]

IS_REAL = find_spec("lmms_eval") is not None
if not IS_REAL:
    stand_in.install()
