"""What a model is: its parts and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

# Keys that do not make it another model: they say how it starts, or what its tokenizer says as well.
UNCOMPARED_KEYS = frozenset(
    {"preset", "init_std", "latent_std", "gate_init"}
    | {"image_token_id", "added_vocab", "dropout", "weights_image_size"}
)

Part = Literal["vision", "connector", "language", "cross_attention", "lora"]


@dataclass
class LanguageConfig:
    """Decoder-only language model (LLaMA family). Sizes may come from `preset`.

    Attributes:
        preset: name in megamm/models/presets/language.yaml; keys given beside it override it.
        vocab_size: number of token embeddings without padding for tensor parallelism.
        added_vocab: how many of these, the last ones, belong to tokens added to a pretrained vocabulary;
            IDEFICS' format keeps their embeddings apart, nothing else depends on it.
        num_kv_heads: key/value heads (grouped-query attention); None means num_heads.
        qkv_bias, out_bias: biases of the attention projections.
        sliding_window: attend to at most this many previous positions; None means all.
        tie_embeddings: output layer shares the input embedding.
        init_std: standard deviation of randomly initialised weights.
    """

    preset: Optional[str] = None
    num_layers: int = 0
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: Optional[int] = None
    ffn_hidden_size: int = 0
    vocab_size: int = 0
    added_vocab: int = 0
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    sliding_window: Optional[int] = None
    tie_embeddings: bool = False
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass
class VisionConfig:
    """Vision transformer of the CLIP family. Sizes and variants may come from `preset`.

    Attributes:
        preset: name in megamm/models/presets/vision.yaml; keys given beside it override it.
        image_size, patch_size: pixels; images are square.
        weights_image_size: that imported weights were trained at, if another: positions are interpolated.
        patch_bias, qkv_bias: which projections have biases; of EVA's, the patches' has and the keys' has not.
        sub_norm: LayerNorms before the last linear of attention and feed-forward (EVA02-CLIP-L).
        residual: branches are normalised at their start, or at their end (EVA02-CLIP-E).
        rotary_side: 2-D rotary positions, at the scale of so many patches a side (EVA02-CLIP-L: 16).
        pre_norm, post_norm: there are LayerNorms before and behind the blocks; EVA has none before.
        feature_norm: the one behind them is applied to the features (OpenFlamingo).
        feature_layer: whose output is taken, as an index into the hidden states [embeddings, block 1,
            ..., block L]: -2 is the output of the last block but one (LLaVA), -1 of the last block.
        feature_select: "patch" drops the class token, "all" keeps it.
    """

    preset: Optional[str] = None
    image_size: int = 0
    patch_size: int = 0
    width: int = 0
    num_layers: int = 0
    num_heads: int = 0
    mlp_width: int = 0
    activation: Literal["quick_gelu", "gelu", "swiglu"] = "quick_gelu"
    norm_eps: float = 1e-5
    weights_image_size: Optional[int] = None
    patch_bias: bool = False
    qkv_bias: Literal["all", "qv"] = "all"
    sub_norm: bool = False
    residual: Literal["pre_norm", "post_norm"] = "pre_norm"
    rotary_side: Optional[int] = None
    pre_norm: bool = True
    post_norm: bool = True
    feature_norm: bool = False
    feature_layer: int = -2
    feature_select: Literal["patch", "all"] = "patch"
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_features(self) -> int:
        """Feature positions that one image yields (P)."""
        return self.num_patches + (1 if self.feature_select == "all" else 0)


@dataclass
class ConnectorConfig:
    """What stands between the vision encoder and the language model.

    Attributes:
        kind: "mlp" (LLaVA: Linear, GELU, Linear), "resampler" (Flamingo's perceiver resampler) or
            "qformer" (BLIP-2's querying transformer and a linear layer).
        num_latents, depth, num_heads, head_dim, ffn_multiple: of the resampler or the Q-Former, whose
            latents are called queries and whose width is num_heads * head_dim.
        activation: of the resampler's feed-forward ("relu" in IDEFICS).
        qk_norm: LayerNorm over each head's queries and keys in the resampler (IDEFICS).
        cross_every: the Q-Former's layers 0, n, 2n, ... attend to the image.
        flag_embeddings: a frozen embedding before and one behind the queries of each image
            (InternLM-XComposer); Q-Former only.
        latent_std: standard deviation of the latents at the start.
    """

    kind: Literal["mlp", "resampler", "qformer"] = "mlp"
    num_latents: int = 64
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    ffn_multiple: int = 4
    activation: Literal["gelu", "relu"] = "gelu"
    qk_norm: bool = False
    cross_every: int = 2
    flag_embeddings: bool = False
    latent_std: float = 1.0


@dataclass
class CrossAttentionConfig:
    """Tanh-gated cross-attention blocks in front of every n-th decoder layer.

    Attributes:
        geometry: "flamingo" (LayerNorm, own heads, GELU feed-forward; OpenFlamingo, InfiMM) or "idefics"
            (RMSNorm, the language model's heads and head size, SwiGLU of its ffn_hidden_size).
        every: a block stands before decoder layer i (from 0) when (i + 1) % every == 0 (flamingo) or
            i % every == 0 (idefics).
        num_heads, head_dim, ffn_multiple: of the flamingo geometry.
        qk_norm: RMSNorm over each head's queries and keys; idefics only.
        vector_gates: gates of one value per feature instead of one in all; idefics only.
        skip_text_only: a sample without any image passes the blocks unchanged (InfiMM); flamingo only.
        gate_init: value of both gates at the start, before tanh. 0 leaves a pretrained language model as
            it is; a model that starts from random weights learns faster with open gates.
    """

    geometry: Literal["flamingo", "idefics"] = "flamingo"
    every: int = 4
    num_heads: int = 8
    head_dim: int = 64
    ffn_multiple: int = 4
    qk_norm: bool = False
    vector_gates: bool = False
    skip_text_only: bool = False
    gate_init: float = 0.0

    def stands_before(self, layer: int) -> bool:
        """Whether there is a block in front of decoder layer `layer` (from 0)."""
        return layer % self.every == (0 if self.geometry == "idefics" else self.every - 1)


@dataclass
class LoraConfig:
    """Low-rank adapters on the decoder's linears (Hu et al. 2021); they are the part "lora".

    Attributes:
        rank, alpha: rank 0 means no adapters; what they give is multiplied by alpha / rank.
        dropout: share of an adapter's inputs that is left out in training.
        targets: the linears that have one, in every layer.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = field(default_factory=list)


@dataclass
class ModelConfig:
    """A vision-language model.

    Attributes:
        assembly: "merged": image features replace their placeholders in the sequence (LLaVA);
            "cross_attention": the decoder attends to them through gated blocks (Flamingo); "language",
            "vision": a decoder, an encoder alone, imported to become part of a whole.
        image_token_id: placeholder of an image; None means the tokenizer's `<image>`. Import sets it
            where the sources bring no tokenizer.
    """

    assembly: Literal["merged", "cross_attention", "language", "vision"] = "merged"
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    image_token_id: Optional[int] = None

    @property
    def tokens_per_image(self) -> int:
        """Sequence positions that one image placeholder takes."""
        if self.assembly != "merged":
            return 1
        if self.connector.kind == "mlp":
            return self.vision.num_features
        return self.connector.num_latents + 2 * self.connector.flag_embeddings
