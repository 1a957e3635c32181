#!/usr/bin/env bash
# Nodes of 8 H100 or H200 SXM with NVLink 4 and NVSwitch 3, and one 400 Gb/s NDR InfiniBand port for each GPU.
# shellcheck source=examples/cluster/env_common.sh
. "$(dirname "${BASH_SOURCE[0]}")/env_common.sh"

# NVSwitch 3 adds up all-reduces on its way (NVLink SHARP), about half of the traffic of tensor parallelism. It takes
# some hundred MB on each GPU: 0 gives them back where memory is short.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-1}

# Two connections for each peer, so that adaptive routing has paths to choose from; more help on 400 Gb/s only with
# very large messages.
export NCCL_IB_QPS_PER_CONNECTION=${NCCL_IB_QPS_PER_CONNECTION:-2}

# GPU and network card behind the same PCIe switch, as on HGX boards, talk without the processor.
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL:-PXB}

# Rings of different nodes stay on the same rail, as rail-optimised fabrics are built for.
export NCCL_CROSS_NIC=${NCCL_CROSS_NIC:-0}
