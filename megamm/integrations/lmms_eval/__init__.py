"""megamm as a model of lmms-eval (0.7 and newer): `lmms_eval --model megamm --model_args checkpoint=...`.

model.py     the model
requests.py  what a request of lmms-eval asks for

lmms-eval looks for entry points of the group `lmms_eval.models` while its own package of models is being
imported; so this file imports none of it but the class of what it returns.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval has to know: a name, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("megamm", simple_class_path="megamm.integrations.lmms_eval.model.Megamm")
