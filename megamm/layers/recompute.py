"""Activations that are computed again in the backward pass instead of being kept.

torch's non-reentrant checkpoint, not megatron-core's reentrant one: that one gives no gradient at all,
silently, to the weights of a block whose input needs none (the first trained layer above frozen
embeddings), and keeps the input also where nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, fp8: bool = False, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping only its inputs for the backward pass.

    Args:
        fp8: the function has Transformer Engine layers under FP8, whose scaling factors must not be
            updated twice; Transformer Engine's own checkpoint sees to that.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if fp8:
        from transformer_engine.pytorch import checkpoint as te_checkpoint

        return te_checkpoint(function, *args, use_reentrant=False, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)
