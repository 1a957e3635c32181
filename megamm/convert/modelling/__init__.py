"""The model code that exported directories carry where transformers has no class for them.

Each `modeling_<family>.py` and what it imports from beside it is copied as it stands: plain PyTorch and
transformers, nothing of megamm. Parameters have the names of the published weights.
"""
