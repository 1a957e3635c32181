"""Vision encoders: plain single-device PyTorch."""
