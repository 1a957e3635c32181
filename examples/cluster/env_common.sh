#!/usr/bin/env bash
# What every GPU node needs; env_a100.sh and env_h100.sh read this file first. Each line has its reason; what your
# cluster's administrators say about NCCL comes before it.

# One thread for each process of numerical libraries; decoding has threads of its own (data.image.num_workers).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Kernels start in the order in which they were queued: with more hardware queues a tensor-parallel collective can
# start behind the matrix multiplication that it should overlap with. (megamm sets it too.)
export CUDA_DEVICE_MAX_CONNECTIONS=1

# Activations of different lengths leave holes in fixed segments; growing segments keep memory whole.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# A collective that hangs leaves a record of what each rank was waiting for, written when the watchdog fires.
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# Errors only; INFO once, to see in the log whether "NET/IB" and "GDRDMA" were chosen: NCCL_DEBUG=INFO sbatch ...
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The InfiniBand ports that carry data. Nodes also have ports for storage and Ethernet, which NCCL would use as well:
# name yours as `ibdev2netdev` lists them, for example NCCL_IB_HCA="=mlx5_0:1,mlx5_1:1" (= means exactly these).
if [ -n "${CLUSTER_IB_HCA-}" ]; then export NCCL_IB_HCA=$CLUSTER_IB_HCA; fi

# The interface for the first handshake (not for data), where a node has several: NCCL_SOCKET_IFNAME=eth0, and the
# same for gloo: GLOO_SOCKET_IFNAME=eth0.
if [ -n "${CLUSTER_SOCKET_IFNAME-}" ]; then
  export NCCL_SOCKET_IFNAME=$CLUSTER_SOCKET_IFNAME GLOO_SOCKET_IFNAME=$CLUSTER_SOCKET_IFNAME
fi

# A link that flaps for a moment should cost a retry, not the run: 4.096 us x 2^22 = 17 s for each of 7 retries.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
