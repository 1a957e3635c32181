"""InternLM-7B for transformers: LLaMA with biases on all four attention projections.

Copied into exported directories; loaded with trust_remote_code=True.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


class InternLMConfig(LlamaConfig):
    """LlamaConfig under InternLM's names: `bias` for attention_bias, `rotary` for the base of the positions.

    Rotary positions of the type "dynamic" are plain ones up to max_position_embeddings, which is what is
    computed here.
    """

    model_type = "internlm"

    def __init__(self, bias: bool = True, rotary: dict[str, Any] | None = None, **values: Any) -> None:
        rotary = rotary or {"base": 10000, "type": "origin"}
        values.setdefault("vocab_size", 103168)
        values |= {"attention_bias": bias, "mlp_bias": False}
        values.setdefault("rope_parameters", {"rope_theta": float(rotary["base"]), "rope_type": "default"})
        super().__init__(**values)
        self.bias, self.rotary = bias, rotary


class InternLMForCausalLM(LlamaForCausalLM):
    """The decoder with its output layer."""

    config_class = InternLMConfig
