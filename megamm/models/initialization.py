"""How random weights are drawn: one table over the checkpoint names of all parameters.

Every tensor is drawn whole from a generator seeded by its name, then sliced: all parallel layouts start
from the same weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch

from megamm.config import ModelConfig

_ROWS_AT_ONCE = 1024  # that are held in double precision

Draw = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _constant(value: float) -> Draw:
    return lambda x, generator: x.fill_(value)


def _normal(std: float) -> Draw:
    return lambda x, generator: x.normal_(0.0, std, generator=generator)


def _fan_in(gain: float) -> Draw:
    """Normal with variance gain^2 / fan-in."""
    return lambda x, generator: x.normal_(0.0, gain / math.sqrt(x[0].numel()), generator=generator)


def initialization_table(model: ModelConfig) -> list[tuple[str, Draw]]:
    """(pattern, draw) pairs; the first pattern that matches the whole name wins.

    Language model: normal(0, init_std), residual outputs divided by sqrt(2 layers) (GPT-2). Vision: class
    and position embeddings normal(0, init_std), residual outputs divided by sqrt(2 layers). Whatever else
    is linear (patches, connector, cross-attention): variance 1 / fan-in (LeCun). Latents (queries of a
    Q-Former) and gates as their configuration says (standard normal and zero in Flamingo). Flag embeddings
    like those of tokens. Adapters: B zero, A Gaussian (Hu et al. 2021, section 4.1) with the variance that
    the authors' code gives it, 1 / (3 fan-in).
    """
    std = model.language.init_std
    residual_std = std / math.sqrt(2 * model.language.num_layers)
    vision_residual = 1 / math.sqrt(2 * model.vision.num_layers)
    lecun = _fan_in(1.0)
    return [
        (r".*norm\w*?[._]weight", _constant(1.0)),
        (r".*_gate", _constant(model.cross_attention.gate_init)),
        (r".*bias", _constant(0.0)),
        (r"language\.(embedding\.word_embeddings|output_layer)\.weight", _normal(std)),
        (r"language\..*\.lora\..*\.a", _fan_in(1 / math.sqrt(3))),
        (r"language\..*\.lora\..*\.b", _constant(0.0)),
        (r"language\..*\.gated_cross_attention\..*\.weight", lecun),
        (r"language\..*\.(linear_qkv|linear_fc1)\.weight", _normal(std)),
        (r"language\..*\.(linear_proj|linear_fc2)\.weight", _normal(residual_std)),
        (r"vision\.(class|position)_embedding", _normal(model.vision.init_std)),
        (r"vision\..*\.(attention\.proj|mlp\.fc2)\.weight", _fan_in(vision_residual)),
        (r"vision\..*\.weight", lecun),
        (r"connector\.(latents|queries)", _normal(model.connector.latent_std)),
        (r"connector\.flag_(start|end)", _normal(std)),
        (r"connector\..*\.weight", lecun),
    ]


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    """[V, H] embeddings (or output rows) to [1, H], where those of a new token start: neither favoured nor
    ruled out."""
    total = sum(some.double().sum(dim=0, keepdim=True) for some in rows.split(_ROWS_AT_ONCE))
    assert isinstance(total, torch.Tensor), "no rows"
    return (total / len(rows)).to(rows.dtype)


def weight_drawer(model: ModelConfig, seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """The function from a parameter's name and whole shape to its initial value (fp32, CPU).

    Rows that pad the vocabulary are zero, so that the others do not depend on the padding.
    """
    table = initialization_table(model)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        value = torch.zeros(shape)
        is_vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
        rows = model.language.vocab_size if is_vocabulary else shape[0]
        value[:rows] = _draw_weight(name, (rows, *shape[1:]), seed, table)
        return value

    return draw


def _draw_weight(name: str, shape: tuple[int, ...], seed: int, table: list[tuple[str, Draw]]) -> torch.Tensor:
    for pattern, draw in table:
        if re.fullmatch(pattern, name):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return draw(torch.empty(shape), generator)
    raise KeyError(f"models/initialization.py has no rule for {name}")
