"""The whole of megamm against transformers: the same logits, losses, gradients and answers."""
