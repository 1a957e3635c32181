"""What OpenFlamingo and InfiMM have in common (Alayrac et al. 2022; Awadalla et al. 2023): a perceiver
resampler, gated cross-attention blocks, and a decoder of transformers whose layers are wrapped in them.

Shapes: B samples, S positions, N images, T images of a sample at most, M media tokens of a sample, L latents
of an image, V vision width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

GEOMETRY = {"heads": 8, "dim_head": 64, "ff_mult": 4}


class FlamingoConfig(PretrainedConfig):
    """Sizes of the parts: `visual` of the encoder, `language` of the decoder (as transformers writes it)."""

    def __init__(
        self,
        visual: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
        cross_attn_every_n_layers: int = 1,
        image_token_id: int | None = None,
        perceiver: dict[str, Any] | None = None,
        cross_attention: dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        self.visual, self.language = visual or {}, language or {}
        self.cross_attn_every_n_layers, self.image_token_id = cross_attn_every_n_layers, image_token_id
        self.perceiver = {**GEOMETRY, "depth": 6, "num_latents": 64, **(perceiver or {})}
        self.cross_attention = {**GEOMETRY, **(cross_attention or {})}
        super().__init__(**values)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        return AutoConfig.for_model(**self.language) if self.language else self


class MediaAttention(nn.Module):
    """Queries from one sequence, keys and values from another."""

    def __init__(self, width: int, media_width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, width, bias=False)

    def attend(self, x: Tensor, media: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, width] over [B, M, media width]; 0 where all of `mask` [B, S, M] is False."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), *self.to_kv(media).chunk(2, dim=-1))
        )
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            sees = mask.any(dim=-1, keepdim=True)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | ~sees)[:, None])
            out = out * sees[:, None].to(out.dtype)
        return self.to_out(out.transpose(1, 2).flatten(2))


def feed_forward(width: int, multiple: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, multiple * width, bias=False),
        nn.GELU(),
        nn.Linear(multiple * width, width, bias=False),
    )


class LatentAttention(MediaAttention):
    """Latents look at the features and at each other."""

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__(width, width, heads, dim_head)
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat([self.norm_media(features), latents], dim=1))


class PerceiverLayer(nn.ModuleList):
    """Attention and feed-forward, both residual."""

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        x = x + self[0](features, x)
        return x + self[1](x)


class Perceiver(nn.Module):
    """[N, P, V] features to [N, L, V]."""

    def __init__(self, width: int, perceiver: dict[str, Any]) -> None:
        super().__init__()
        heads, dim_head, multiple = (perceiver[key] for key in ("heads", "dim_head", "ff_mult"))
        self.latents = nn.Parameter(torch.zeros(perceiver["num_latents"], width))
        self.layers = nn.ModuleList(
            PerceiverLayer([LatentAttention(width, heads, dim_head), feed_forward(width, multiple)])
            for _ in range(perceiver["depth"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        x = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            x = layer(features, x)
        return self.norm(x)


class BlockAttention(MediaAttention):
    """Text looks at the latents of its image."""

    def __init__(self, width: int, media_width: int, heads: int, dim_head: int) -> None:
        super().__init__(width, media_width, heads, dim_head)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        return self.attend(self.norm(x), media, mask)


class GatedBlock(nn.Module):
    """x + tanh(gate) attention, then x + tanh(gate) feed-forward; nothing where `keep` is 0."""

    def __init__(self, width: int, media_width: int, geometry: dict[str, Any]) -> None:
        super().__init__()
        self.attn = BlockAttention(width, media_width, geometry["heads"], geometry["dim_head"])
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, geometry["ff_mult"])
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, media: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        x = x + keep * self.attn_gate.tanh() * self.attn(x, media, mask)
        return x + keep * self.ff_gate.tanh() * self.ff(x)


class WrappedLayer(nn.Module):
    """A layer of the decoder with the block that stands before it, if there is one.

    `seen` is set by the model before each forward pass: media, mask and keep of its gated blocks.
    """

    def __init__(self, decoder_layer: nn.Module, block: GatedBlock | None) -> None:
        super().__init__()
        self.decoder_layer, self.gated_cross_attn_layer = decoder_layer, block
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gated_cross_attn_layer is not None and self.seen is not None:
            hidden_states = self.gated_cross_attn_layer(hidden_states, *self.seen)
        return self.decoder_layer(hidden_states, *args, **kwargs)


def wrapped_decoder(config: FlamingoConfig, media_width: int) -> nn.Module:
    """The decoder of transformers that config.language names, with gated blocks before every n-th layer."""
    text = config.get_text_config()
    decoder = AutoModelForCausalLM.from_config(text)
    every, layers = config.cross_attn_every_n_layers, decoder.model.layers
    decoder.model.layers = nn.ModuleList(
        WrappedLayer(
            layer,
            GatedBlock(text.hidden_size, media_width, config.cross_attention)
            if (number + 1) % every == 0
            else None,
        )
        for number, layer in enumerate(layers)
    )
    return decoder


class FlamingoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Logits of text with images, which stand in it as one image token each.

    Subclasses have `vision_encoder`, `perceiver` and `lang_encoder` at `parts`.
    """

    config_class = FlamingoConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    skips_text_only = False  # whether samples without any image pass the blocks unchanged

    @property
    def parts(self) -> Any:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.parts.lang_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.parts.lang_encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.parts.lang_encoder.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from files; nothing is drawn."""

    def encode(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """[B, T, L, V] latents of the images of each sample, zero where it has fewer; T is at least 1.

        Args:
            pixel_values: [N, 3, height, width], in the order of the image tokens.
        """
        counts = (input_ids == self.config.image_token_id).sum(dim=1)
        latents = self.parts.perceiver.latents
        media = latents.new_zeros(len(input_ids), max(1, int(counts.max())), *latents.shape)
        found = 0 if pixel_values is None else len(pixel_values)
        if found != int(counts.sum()):
            raise ValueError(f"{int(counts.sum())} image tokens in input_ids, but {found} images")
        if pixel_values is not None and found:
            encoded = self.parts.perceiver(self.parts.vision_encoder(pixel_values))
            owner = torch.repeat_interleave(counts)
            first = counts.cumsum(0) - counts
            media[owner, torch.arange(found, device=owner.device) - first[owner]] = encoded
        return media

    def _show(self, media: Tensor, image_number: Tensor) -> None:
        """Let the gated blocks see [B, T, L, V]; image_number [B, S] is the image of a position."""
        numbers = torch.arange(1, media.shape[1] + 1, device=media.device).repeat_interleave(media.shape[2])
        mask = image_number[..., None] == numbers
        has_image = image_number.new_ones(len(media), 1, 1, dtype=torch.bool)
        if self.skips_text_only:
            has_image = (image_number.amax(dim=1) > 0)[:, None, None]
        for layer in self.parts.lang_encoder.model.layers:
            layer.seen = (media.flatten(1, 2), mask, has_image.to(media.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        media: Tensor | None = None,
        image_number: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: [B, S], one image token for each image.
            pixel_values: [N, 3, height, width] normalised images, in the order of their tokens.
            media, image_number: what `encode` has made of the images, and how many images stand up to each
                position; computed if they are not given.
            labels: [B, S], not shifted, -100 where there is no loss.
        """
        if media is None:
            media = self.encode(input_ids, pixel_values)
        if image_number is None:
            image_number = (input_ids == self.config.image_token_id).cumsum(dim=1)
        self._show(media, image_number)
        out = self.parts.lang_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        if labels is not None:
            logits, targets = out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            out.loss = F.cross_entropy(logits, targets.to(logits.device), ignore_index=-100)
        return out

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **settings: Any) -> Any:
        """As in transformers; the images are encoded once."""
        media = self.encode(input_ids, pixel_values)
        return super().generate(input_ids=input_ids, media=media, **settings)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        media: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` needs for the positions that the cache does not hold yet."""
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        image_number = (input_ids == self.config.image_token_id).cumsum(dim=1)
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:]
        return {
            "input_ids": input_ids[:, start:],
            "image_number": image_number[:, start:],
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "media": media,
            "use_cache": past_key_values is not None,
            "logits_to_keep": 1,
        }
