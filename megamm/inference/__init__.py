"""Using trained checkpoints: `load(path).logits(...)`, `.generate(...)` and `.complete(...)`."""

from megamm.inference.decoding import Decoding
from megamm.inference.model import Model, load

__all__ = ["Decoding", "Model", "load"]
