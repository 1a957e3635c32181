"""Using trained checkpoints: `load(path).logits(...)` and `.generate(...)`."""

from megamm.inference.model import Model, load

__all__ = ["Model", "load"]
