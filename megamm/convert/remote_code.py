"""Exported directories that bring their own model code: modelling files, and a model card that says so."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from megamm.convert import processor
from megamm.convert.engine import write_json
from megamm.convert.family import Target

_FOLDER = Path(__file__).parent / "modelling"
_CARD = """\
---
library_name: transformers
tags: [{tags}]
---
# {name}

{what} Trained with megamm by the recipe `{name}`, stage `{stage}`, and written by
`megamm convert export --family {family}`.

transformers has no class for this architecture. `{file}` in this directory has one, in plain PyTorch; read it
before you trust it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)
{usage}
```

{notes}"""


def write_remote_code(target: Target, family: str, what: str, usage: str, notes: str = "") -> None:
    """Copy modeling_<family>.py with the modules it imports from beside it, and write README.md.

    Args:
        what: one sentence about the architecture.
        usage: how the model is called, in Python.
        notes: what else a user of the weights should know.
    """
    file = f"modeling_{family}.py"
    for name in _with_siblings(file):
        shutil.copyfile(_FOLDER / name, target.directory / name)
    recipe = target.recipe
    card = _CARD.format(
        tags="image-text-to-text" if "pixel_values" in usage else "text-generation",
        name=recipe.name,
        stage=recipe.stage,
        family=family,
        file=file,
        what=what,
        usage=usage,
        notes=notes,
    )
    (target.directory / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def write_image_processor(target: Target) -> None:
    """What prepares pictures as megamm does, as an image processor of transformers."""
    values = processor.image_processor(target.model.vision, target.recipe.data.image)
    write_json(target.directory / processor.PREPROCESSOR_FILE, values)


def auto_map(family: str, config: str, model: str) -> dict[str, str]:
    """The entry of config.json that tells transformers where the classes are."""
    module = f"modeling_{family}"
    return {"AutoConfig": f"{module}.{config}", "AutoModelForCausalLM": f"{module}.{model}"}


def _with_siblings(file: str) -> list[str]:
    """A modelling file and, recursively, those it imports by a leading dot."""
    found = [file]
    for name in found:
        for node in ast.walk(ast.parse((_FOLDER / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                sibling = f"{node.module}.py"
                found += [sibling] * (sibling not in found)
    return found
