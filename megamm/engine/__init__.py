"""The only place (with megamm/layers) that knows megatron-core.

Importing the package prepares megatron-core for this machine: without CUDA, `engine.cpu` shows it a
torch whose "cuda" device is the CPU. Every other module of megamm reaches megatron through here.
"""

from megamm.engine import cpu

cpu.install_if_needed()
