"""Layers in megatron-core's slots, against megatron-core's own."""
