#!/usr/bin/env bash
# InfiMM-Zephyr-7B, pairs and documents: on this node, in a Slurm job, or small on a CPU (--preset tiny).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash examples/cluster/launch.sh examples/infimm_zephyr_7b/pretrain.yaml "$@"
