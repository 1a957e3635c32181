"""InternLM-XComposer for transformers (Zhang et al. 2023): an EVA-CLIP encoder, a Q-Former (Li et al. 2023)
between two flag embeddings, and InternLM with low-rank adapters (Hu et al. 2021).

Copied into exported directories; loaded with trust_remote_code=True.

Shapes: B samples, S positions, N images, P features of an image, Q queries, W width of the Q-Former, V vision
width, H hidden size, I positions that images take in a sample at most.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .vision_eva import EvaVisionTransformer

_BERT_EPS = 1e-12
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_ADAPTED = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "ffn": ("mlp.up_proj", "mlp.down_proj"),
}


class InternLMXComposerConfig(PretrainedConfig):
    """Sizes of the decoder at the top level, as published; `visual` has the keys of EVA-CLIP's model
    configurations, `qformer` the sizes of the Q-Former, `internlm_lora` the adapters."""

    model_type = "InternLMXComposer"

    def __init__(
        self,
        visual: dict[str, Any] | None = None,
        qformer: dict[str, Any] | None = None,
        internlm_lora: dict[str, Any] | None = None,
        num_query_token: int = 64,
        kqvo_bias: bool = True,
        image_token_id: int | None = None,
        rope_theta: float = 10000.0,
        **values: Any,
    ) -> None:
        self.visual, self.qformer, self.internlm_lora = visual or {}, qformer or {}, internlm_lora
        self.num_query_token, self.kqvo_bias, self.image_token_id = num_query_token, kqvo_bias, image_token_id
        self.rope_theta = rope_theta
        super().__init__(**values)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        sizes = {key: getattr(self, key) for key in _TEXT_KEYS if hasattr(self, key)}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return LlamaConfig(**sizes, rope_parameters=rope, attention_bias=self.kqvo_bias, mlp_bias=False)


# --- Q-Former -----------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Attention up to its output projection."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """A linear, the residual, a norm."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=_BERT_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    """Attention and what follows it."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.self = Projections(width, context_width, heads)
        self.output = AddAndNorm(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.output(self.self(x, context), x)


class Widening(nn.Module):
    """The first half of a feed-forward."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Queries look at each other, in some layers at the image, then a feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, vision_width: int | None) -> None:
        super().__init__()
        self.attention = BertAttention(width, width, heads)
        if vision_width is not None:
            self.crossattention = BertAttention(width, vision_width, heads)
        self.intermediate_query = Widening(width, inner)
        self.output_query = AddAndNorm(inner, width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        x = self.attention(x, x)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, features)
        return self.output_query(self.intermediate_query(x), x)


class Embeddings(nn.Module):
    """The norm that queries go through first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(width, eps=_BERT_EPS)

    def forward(self, queries: Tensor) -> Tensor:
        return self.LayerNorm(queries)


class Encoder(nn.Module):
    """All layers; every n-th one looks at the image."""

    def __init__(self, sizes: dict[str, Any], vision_width: int) -> None:
        super().__init__()
        heads, every = sizes["heads"], sizes["cross_every"]
        width = heads * sizes["dim_head"]
        self.layer = nn.ModuleList(
            BertLayer(width, heads, sizes["ff_mult"] * width, vision_width if layer % every == 0 else None)
            for layer in range(sizes["depth"])
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, features)
        return x


class Bert(nn.Module):
    """Norm and layers, under the names that they have in the weights."""

    def __init__(self, sizes: dict[str, Any], vision_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes["heads"] * sizes["dim_head"])
        self.encoder = Encoder(sizes, vision_width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        return self.encoder(self.embeddings(queries), features)


class QFormer(nn.Module):
    """[N, Q, W] queries and [N, P, V] normed features to [N, Q, W]."""

    def __init__(self, sizes: dict[str, Any], vision_width: int) -> None:
        super().__init__()
        self.bert = Bert(sizes, vision_width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        return self.bert(queries, features)


# --- adapters -----------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """W x + (alpha / r) B A x."""

    def __init__(self, inputs: int, outputs: int, bias: bool, lora: dict[str, Any]) -> None:
        super().__init__(inputs, outputs, bias)
        self.scale = lora["lora_alpha"] / lora["lora_r"]
        self.dropout = nn.Dropout(lora.get("lora_dropout", 0.0))
        self.lora_A = nn.Linear(inputs, lora["lora_r"], bias=False)
        self.lora_B = nn.Linear(lora["lora_r"], outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.dropout(x).to(self.lora_A.weight.dtype)
        return super().forward(x) + (self.scale * self.lora_B(self.lora_A(kept))).to(x.dtype)


def add_adapters(decoder: Any, lora: dict[str, Any]) -> None:
    """Put adapters on the linears that the configuration names, in every layer."""
    for layer in decoder.model.layers:
        for learned in lora["learn_param"]:
            for path in _ADAPTED[learned]:
                parent, name = path.split(".")
                plain = getattr(getattr(layer, parent), name)
                adapted = LoraLinear(plain.in_features, plain.out_features, plain.bias is not None, lora)
                setattr(getattr(layer, parent), name, adapted)


# --- the model ----------------------------------------------------------------------------------------


class InternLMXComposerForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of text with images, whose embeddings take the place of their tokens."""

    config_class = InternLMXComposerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _tied_weights_keys = {  # noqa: RUF012 (transformers reads it from the class)
        "internlm_model.lm_head.weight": "internlm_model.model.embed_tokens.weight"
    }

    def __init__(self, config: InternLMXComposerConfig) -> None:
        super().__init__(config)
        sizes, vision_width = config.qformer, config.visual["width"]
        width, hidden = sizes["heads"] * sizes["dim_head"], config.hidden_size
        self.visual_encoder = EvaVisionTransformer(config.visual, config.visual["has_norm"])
        self.ln_vision = nn.LayerNorm(vision_width)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, width))
        self.Qformer = QFormer(sizes, vision_width)
        self.internlm_proj = nn.Linear(width, hidden)
        if sizes["flag_embeddings"]:
            self.flag_image_start = nn.Parameter(torch.zeros(1, 1, hidden), requires_grad=False)
            self.flag_image_end = nn.Parameter(torch.zeros(1, 1, hidden), requires_grad=False)
        self.internlm_model = LlamaForCausalLM(config.get_text_config())
        if config.internlm_lora is not None:
            add_adapters(self.internlm_model, config.internlm_lora)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.internlm_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.internlm_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.internlm_model.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from files; nothing is drawn."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, height, width] images to [N, Q, H] embeddings, or [N, Q + 2, H] with flags."""
        features = self.ln_vision(self.visual_encoder(pixel_values))
        queries = self.query_tokens.expand(len(features), -1, -1)
        found = self.internlm_proj(self.Qformer(queries, features))
        if not self.config.qformer["flag_embeddings"]:
            return found
        flags = (self.flag_image_start, self.flag_image_end)
        start, end = (flag.expand(len(found), -1, -1).to(found.dtype) for flag in flags)
        return torch.cat([start, found, end], dim=1)

    def by_sample(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor | None:
        """[B, I, H]: the embeddings for the image positions of each sample, zero behind them."""
        if pixel_values is None or not len(pixel_values):
            return None
        embeddings = self.encode(pixel_values).flatten(0, 1)
        counts = (input_ids == self.config.image_token_id).sum(dim=1)
        if int(counts.sum()) != len(embeddings):
            raise ValueError(
                f"{int(counts.sum())} image positions for {len(embeddings)} embeddings of images"
            )
        found = embeddings.new_zeros(len(input_ids), int(counts.max()), embeddings.shape[-1])
        found[self._filled(counts, found.shape[1])] = embeddings
        return found

    @staticmethod
    def _filled(counts: Tensor, length: int) -> Tensor:
        return torch.arange(length, device=counts.device) < counts[:, None]

    def _embed(self, input_ids: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings, with those of images in their places."""
        embedded = self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        if image_embeds is None or not is_image.any():
            return embedded
        chosen = image_embeds[self._filled(is_image.sum(dim=1), image_embeds.shape[1])]
        return embedded.masked_scatter(is_image[..., None], chosen.to(embedded.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: [B, S]; an image's token stands there once for each position that the image takes.
            pixel_values: [N, 3, height, width] normalised images, in the order of their tokens.
            image_embeds: what `by_sample` makes of them; computed if it is not given.
            labels: [B, S], not shifted, -100 where there is no loss.
        """
        if image_embeds is None:
            image_embeds = self.by_sample(input_ids, pixel_values)
        return self.internlm_model(
            inputs_embeds=self._embed(input_ids, image_embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **settings: Any) -> Any:
        """As in transformers; the images are encoded once."""
        image_embeds = self.by_sample(input_ids, pixel_values)
        return super().generate(input_ids=input_ids, image_embeds=image_embeds, **settings)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` needs for the positions that the cache does not hold yet."""
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
        return {
            "input_ids": input_ids[:, start:],
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "image_embeds": image_embeds,
            "use_cache": past_key_values is not None,
            "logits_to_keep": 1,
        }
