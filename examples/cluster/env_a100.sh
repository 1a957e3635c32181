#!/usr/bin/env bash
# Nodes of 8 A100 SXM with NVLink 3 and one 200 Gb/s HDR InfiniBand port for each GPU (or each pair).
# shellcheck source=examples/cluster/env_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/env_common.sh"

# GPU and network card behind the same PCIe switch (PXB) talk without the processor; farther apart it is slower than
# going through memory.
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PXB}

# Rings of different nodes stay on the same rail, as rail-optimised fabrics are built for.
export NCCL_CROSS_NIC=${NCCL_CROSS_NIC:-0}
