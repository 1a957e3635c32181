"""megatron-core on this machine, checkpoints' manifests, optimizer and schedule."""
