"""The only place (with megamm/layers) that knows megatron-core.

Importing the package prepares megatron-core for this machine: without CUDA, `engine.cpu` shows it a
torch whose "cuda" device is the CPU. Every other module of megamm reaches megatron through here.
"""

import warnings

from megamm.engine import cpu

# Said by the pinned megatron-core and torch about each other, in every run; users can do nothing about them.
for message, module in (
    ("full scope is deprecated", r"megatron\.core"),
    ("The \\.grad attribute of a Tensor that is not a leaf", r"megatron\.core"),
    ("`load_state_dict` is deprecated", r"megatron\.core"),
    (r"`torch\.distributed\..*` is deprecated", r"torch\.distributed"),
    (r"torch\.distributed is disabled, unavailable or uninitialized", r"torch\.distributed"),
):
    warnings.filterwarnings("ignore", message=message, module=module)

cpu.install_if_needed()
