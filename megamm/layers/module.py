"""Base classes for modules with tensor-parallel children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import nn

__all__ = ["MegatronModule", "ShardedModuleList"]


class ShardedModuleList(nn.ModuleList):
    """A ModuleList whose tensor-parallel children are recorded as sharded in checkpoints.

    megatron-core treats a plain ModuleList as one replicated leaf, which silently saves only one
    rank's shard of every parallel linear below it.
    """

    tp_group: Any

    def __init__(self, modules: Sequence[nn.Module], tp_group: Any) -> None:
        super().__init__(modules)
        self.tp_group = tp_group

    sharded_state_dict = MegatronModule.sharded_state_dict
