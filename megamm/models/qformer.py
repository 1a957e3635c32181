"""Q-Former (BLIP-2, Li et al. 2023, section 3.1), tensor-parallel, and its linear into the language model.

A BERT (post-norm, biases everywhere) whose sequence is a fixed number of learned queries; some of its
layers also attend to the features of an image. It has the query path only: the text path of BLIP-2's
pretraining takes no part in a vision-language model. There is no dropout (BLIP-2 trains with 0.1).
Shapes: N images, P features of an image, L queries, W width (heads times head size), V vision width,
H hidden size of the language model.
"""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
from torch import nn

from megamm.config import ConnectorConfig
from megamm.layers.backend import backend_by_name
from megamm.layers.cross_attention import FeedForward, MultiHeadAttention
from megamm.layers.module import MegatronModule, ShardedModuleList
from megamm.layers.norms import LayerNorm

_EPS = 1e-12  # of BERT's norms


class QFormerLayer(MegatronModule):
    """Queries attend to each other, then (in some layers) to the image; then a feed-forward. All residual,
    normed behind the sum."""

    def __init__(
        self,
        config: Any,
        backend: Any,
        connector: ConnectorConfig,
        vision_width: int,
        sees_image: bool,
        tp_group: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        heads, head_dim = connector.num_heads, connector.head_dim
        width = heads * head_dim

        def attention(context_size: int) -> MultiHeadAttention:
            return MultiHeadAttention(
                config, backend, width, context_size, heads, head_dim, tp_group, bias=True
            )

        self.self_attention = attention(width)
        self.self_attention_norm = LayerNorm(config, width, _EPS)
        self.cross_attention: Optional[MultiHeadAttention] = None
        if sees_image:
            self.cross_attention = attention(vision_width)
            self.cross_attention_norm = LayerNorm(config, width, _EPS)
        self.feed_forward = FeedForward(config, backend, width, connector.ffn_multiple, tp_group, bias=True)
        self.feed_forward_norm = LayerNorm(config, width, _EPS)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[L, N, W] queries and [P, N, V] normed features to [L, N, W]."""
        queries = self.self_attention_norm(queries + self.self_attention(queries, queries))
        if self.cross_attention is not None:
            queries = self.cross_attention_norm(queries + self.cross_attention(queries, features))
        return self.feed_forward_norm(queries + self.feed_forward(queries))


class QFormer(MegatronModule):
    """[N, P, V] features of N images to [N, L, H] embeddings of the language model; [N, L + 2, H] with flag
    embeddings (InternLM-XComposer), which are never trained."""

    def __init__(
        self,
        config: Any,
        connector: ConnectorConfig,
        vision_width: int,
        hidden_size: int,
        backend_name: str,
        tp_group: Any,
    ) -> None:
        config = copy.copy(config)
        config.sequence_parallel = False  # queries are few: every rank holds all of them
        super().__init__(config)
        self.tp_group = tp_group
        dtype, width = config.params_dtype, connector.num_heads * connector.head_dim
        backend = backend_by_name(backend_name)
        self.norm_vision = LayerNorm(config, vision_width)
        self.queries = nn.Parameter(torch.empty(connector.num_latents, width, dtype=dtype))
        self.norm_queries = LayerNorm(config, width, _EPS)
        layers = [
            QFormerLayer(config, backend, connector, vision_width, n % connector.cross_every == 0, tp_group)
            for n in range(connector.depth)
        ]
        self.layers = ShardedModuleList(layers, tp_group)
        self.proj = nn.Linear(width, hidden_size, dtype=dtype)
        self.has_flags = connector.flag_embeddings
        if self.has_flags:
            self.flag_start = self._flag(hidden_size, dtype)
            self.flag_end = self._flag(hidden_size, dtype)

    @staticmethod
    def _flag(hidden_size: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        num_images = features.shape[0]
        # sequence first, as the parallel linears expect
        features = self.norm_vision(features.transpose(0, 1))
        queries = self.norm_queries(self.queries)[:, None].expand(-1, num_images, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        embeddings = self.proj(queries.transpose(0, 1))
        if not self.has_flags:
            return embeddings
        start, end = (flag.expand(num_images, 1, -1) for flag in (self.flag_start, self.flag_end))
        return torch.cat([start, embeddings, end], dim=1)
