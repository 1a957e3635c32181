"""Perceiver resampler (Flamingo, Alayrac et al. 2022, section 2.1 and figure 5), tensor-parallel.

A fixed number of learned latents reads the features of each image. OpenFlamingo's geometry: keys and
values come from the features and the latents together, one layer is attention plus feed-forward. IDEFICS
(Laurençon et al. 2023) differs by ReLU and, optionally, a LayerNorm over each head's queries and keys.
Shapes: N images, P features of an image, L latents, W width.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megamm.config import ConnectorConfig
from megamm.layers.backend import backend_by_name
from megamm.layers.cross_attention import FeedForward, MultiHeadAttention
from megamm.layers.module import MegatronModule, ShardedModuleList
from megamm.layers.norms import LayerNorm


class ResamplerLayer(MegatronModule):
    """Latents attend to [features, latents], then a feed-forward; both residual, both pre-norm."""

    def __init__(
        self, config: Any, backend: Any, connector: ConnectorConfig, width: int, tp_group: Any
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        head_norm = partial(LayerNorm, config, connector.head_dim) if connector.qk_norm else None
        activation = F.relu if connector.activation == "relu" else F.gelu
        self.norm_media = LayerNorm(config, width)
        self.norm_latents = LayerNorm(config, width)
        self.attention = MultiHeadAttention(
            config,
            backend,
            width,
            width,
            connector.num_heads,
            connector.head_dim,
            tp_group,
            head_norm=head_norm,
        )
        self.feed_forward_norm = LayerNorm(config, width)
        self.feed_forward = FeedForward(
            config, backend, width, connector.ffn_multiple, tp_group, activation=activation
        )

    def forward(self, latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        queries = self.norm_latents(latents)
        context = torch.cat([self.norm_media(features), queries], dim=0)
        latents = latents + self.attention(queries, context)
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverResampler(MegatronModule):
    """[N, P, W] features of N images to [N, L, W] media tokens."""

    def __init__(
        self, config: Any, connector: ConnectorConfig, width: int, backend_name: str, tp_group: Any
    ) -> None:
        config = copy.copy(config)
        config.sequence_parallel = False  # latents are few: every rank holds all of them
        super().__init__(config)
        self.tp_group = tp_group
        self.latents = nn.Parameter(torch.empty(connector.num_latents, width, dtype=config.params_dtype))
        backend = backend_by_name(backend_name)
        layers = [ResamplerLayer(config, backend, connector, width, tp_group) for _ in range(connector.depth)]
        self.layers = ShardedModuleList(layers, tp_group)
        self.norm = LayerNorm(config, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.transpose(0, 1)  # sequence first, as the parallel linears expect
        latents = self.latents[:, None].expand(-1, features.shape[1], -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents).transpose(0, 1)
