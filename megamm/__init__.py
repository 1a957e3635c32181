"""megamm: training vision-language models with tensor, pipeline, sequence and data parallelism.

Importing the package imports nothing heavy (no torch, no megatron); every part is imported where
it is used, so that `megamm --help` stays fast.
"""

__version__ = "0.1.0"
