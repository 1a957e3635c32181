#!/usr/bin/env bash
# 65B with gated cross-attention, conversations and VQA: on this node, in a Slurm job, or small on a CPU (--preset tiny).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash examples/cluster/launch.sh examples/flamingo_65b/finetune.yaml "$@"
