"""What the formats of OpenFlamingo and InfiMM share: perceiver resampler, gated cross-attention blocks and a
decoder whose layers are wrapped, under OpenFlamingo's names."""

from __future__ import annotations

from typing import Any

from megamm.config import ConnectorConfig, CrossAttentionConfig, ModelConfig
from megamm.convert.fields import Fields
from megamm.convert.rules import KeysValues, PadRows, Rename, Rule, Skip, repeat
from megamm.convert.tables import llama
from megamm.convert.tables.clip import norm_rules
from megamm.errors import InputError

# In config.json megamm writes these; published ones have OpenFlamingo's sizes, which its code does not name.
PERCEIVER_DEFAULTS = {"depth": 6, "heads": 8, "dim_head": 64, "num_latents": 64, "ff_mult": 4}
BLOCK_DEFAULTS = {"heads": 8, "dim_head": 64, "ff_mult": 4}


def resampler_rules(model: ModelConfig, prefix: str) -> list[Rule]:
    """The perceiver resampler, under `prefix` ("perceiver.")."""
    connector, width = model.connector, model.vision.width
    heads, head_dim, ffn = connector.num_heads, connector.head_dim, connector.ffn_multiple * width
    ours, theirs = "connector.layers.{n}.", f"{prefix}layers.{{n}}."
    layer = [
        *norm_rules(f"{ours}norm_media", f"{theirs}0.norm_media", width),
        *norm_rules(f"{ours}norm_latents", f"{theirs}0.norm_latents", width),
        *_attention(f"{ours}attention.", f"{theirs}0.", width, width, heads, head_dim),
        *_feed_forward(ours, f"{theirs}1.", width, ffn),
    ]
    return [
        Rename("connector.latents", f"{prefix}latents", (connector.num_latents, width)),
        *repeat(connector.depth, layer),
        *norm_rules("connector.norm", f"{prefix}norm", width),
    ]


def gated_block_rules(model: ModelConfig, layers: str) -> list[Rule]:
    """The blocks of the wrapped layers, which start with `layers` ("lang_encoder.model.layers.")."""
    blocks, width = model.cross_attention, model.language.hidden_size
    found: list[Rule] = []
    for layer in filter(blocks.stands_before, range(model.language.num_layers)):
        ours = f"language.decoder.layers.{layer}.gated_cross_attention."
        theirs = f"{layers}{layer}.gated_cross_attn_layer."
        found += [
            Rename(f"{ours}attention_gate", f"{theirs}attn_gate", (1,)),
            Rename(f"{ours}feed_forward_gate", f"{theirs}ff_gate", (1,)),
            *norm_rules(f"{ours}attention_norm", f"{theirs}attn.norm", width),
            *_attention(
                f"{ours}attention.",
                f"{theirs}attn.",
                width,
                model.vision.width,
                blocks.num_heads,
                blocks.head_dim,
            ),
            *_feed_forward(ours, f"{theirs}ff.", width, blocks.ffn_multiple * width),
        ]
    return found


def decoder_rules(model: ModelConfig, prefix: str, padded_vocab: int | None) -> list[Rule]:
    """Embedding, wrapped layers, norm and output layer, under `prefix` ("lang_encoder.")."""
    language = model.language
    vocab = (language.vocab_size, language.hidden_size)
    found: list[Rule] = [
        PadRows(llama.EMBEDDING, f"{prefix}model.embed_tokens.weight", vocab, padded_vocab),
        *llama.body_rules(language, f"{prefix}model.", "layers.{n}.decoder_layer."),
    ]
    if not language.tie_embeddings:
        found.append(PadRows(llama.OUTPUT, f"{prefix}lm_head.weight", vocab, padded_vocab))
    return found


def skips(model: ModelConfig, prefix: str) -> list[Skip]:
    """What the wrapped decoder holds beyond the rules."""
    shared = "the same tensors once more, under the name of the list that they come from"
    return [
        *llama.skips(model.language, prefix),
        Skip(rf"{prefix}(old_decoder_blocks|gated_cross_attn_layers)\..*", shared),
    ]


def _attention(ours: str, theirs: str, width: int, media_width: int, heads: int, head_dim: int) -> list[Rule]:
    inner = heads * head_dim
    return [
        Rename(f"{ours}to_q.weight", f"{theirs}to_q.weight", (inner, width)),
        KeysValues(f"{ours}to_kv.weight", (f"{theirs}to_kv.weight",), heads, head_dim, (media_width,)),
        Rename(f"{ours}to_out.weight", f"{theirs}to_out.weight", (width, inner)),
    ]


def _feed_forward(ours: str, theirs: str, width: int, ffn: int) -> list[Rule]:
    return [
        *norm_rules(f"{ours}feed_forward_norm", f"{theirs}0", width),
        Rename(f"{ours}feed_forward.linear_1.weight", f"{theirs}1.weight", (ffn, width)),
        Rename(f"{ours}feed_forward.linear_2.weight", f"{theirs}3.weight", (width, ffn)),
    ]


def check(model: ModelConfig, family: str, features: dict[str, Any], skip_text_only: bool) -> None:
    """Raises InputError unless the model has OpenFlamingo's geometry, takes these vision features, and does
    with samples without images what the family does."""
    if model.assembly != "cross_attention" or model.cross_attention.geometry != "flamingo":
        raise InputError(
            f"model: only a cross_attention model with model.cross_attention.geometry flamingo is an {family}"
            " model; choose another --family"
        )
    llama.check(model.language)
    wanted = {
        "connector.activation": "gelu",
        "connector.qk_norm": False,
        "cross_attention.skip_text_only": skip_text_only,
        **{f"vision.{key}": value for key, value in features.items()},
    }
    if model.vision.feature_layer == model.vision.num_layers:
        del wanted["vision.feature_layer"]  # the same layer, counted from the front
    for key, value in wanted.items():
        section, name = key.split(".")
        if (found := getattr(getattr(model, section), name)) != value:
            raise InputError(
                f"model.{key}: is {found}, but an {family} model has {value}; its format has no place"
                " for this model"
            )


def geometry_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The entries of config.json about resampler and gated blocks."""
    connector, blocks = model.connector, model.cross_attention
    return {
        "cross_attn_every_n_layers": blocks.every,
        "perceiver": {
            "depth": connector.depth,
            "heads": connector.num_heads,
            "dim_head": connector.head_dim,
            "num_latents": connector.num_latents,
            "ff_mult": connector.ffn_multiple,
        },
        "cross_attention": {
            "heads": blocks.num_heads,
            "dim_head": blocks.head_dim,
            "ff_mult": blocks.ffn_multiple,
        },
    }


def geometry_from_hf(fields: Fields, skip_text_only: bool) -> tuple[ConnectorConfig, CrossAttentionConfig]:
    """Resampler and gated blocks as config.json describes them."""
    perceiver = Fields(fields.get("perceiver") or {}, PERCEIVER_DEFAULTS, f"{fields.where}, perceiver")
    blocks = Fields(fields.get("cross_attention") or {}, BLOCK_DEFAULTS, f"{fields.where}, cross_attention")
    connector = ConnectorConfig(
        kind="resampler",
        depth=perceiver.integer("depth"),
        num_heads=perceiver.integer("heads"),
        head_dim=perceiver.integer("dim_head"),
        num_latents=perceiver.integer("num_latents"),
        ffn_multiple=perceiver.integer("ff_mult"),
    )
    return connector, CrossAttentionConfig(
        every=fields.integer("cross_attn_every_n_layers"),
        num_heads=blocks.integer("heads"),
        head_dim=blocks.integer("dim_head"),
        ffn_multiple=blocks.integer("ff_mult"),
        skip_text_only=skip_text_only,
    )
