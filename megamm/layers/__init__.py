"""Layers that plug into megatron-core: attention core, norms, gated cross-attention, the decoder."""
