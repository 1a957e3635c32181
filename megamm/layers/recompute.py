"""Activations that are computed again in the backward pass instead of being kept.

torch's non-reentrant checkpoint, not megatron-core's reentrant one: that one gives no gradient at all,
silently, to the weights of a block whose input needs none (the first trained layer above frozen
embeddings), and keeps the input also where nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, fp8: bool = False, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping only its inputs for the backward pass.

    Args:
        function: a module or a method of one.
        fp8: it has Transformer Engine layers under FP8, whose scaling factors must not be updated twice;
            Transformer Engine's own checkpoint sees to that.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if not fp8:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)
    if not _has_backward_pass(function, args, kwargs):
        # Transformer Engine sets the scaling factors of every forward pass aside until the function is
        # computed again; where that never happens (frozen layers in front), they would pile up.
        return function(*args, **kwargs)
    from transformer_engine.pytorch import checkpoint as te_checkpoint

    # (some versions set attributes on the function, which methods refuse)
    return te_checkpoint(partial(function), *args, use_reentrant=False, **kwargs)


def _has_backward_pass(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether gradients flow through what the module or method computes."""
    owner = getattr(function, "__self__", function)
    weights = owner.parameters() if isinstance(owner, nn.Module) else ()
    tensors = (x for x in chain(args, kwargs.values(), weights) if isinstance(x, torch.Tensor))
    return any(x.requires_grad for x in tensors)
