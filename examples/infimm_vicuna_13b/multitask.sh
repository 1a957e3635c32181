#!/usr/bin/env bash
# InfiMM-Vicuna-13B, captions and questions: on this node, in a Slurm job, or small on a CPU (--preset tiny).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash examples/cluster/launch.sh examples/infimm_vicuna_13b/multitask.yaml "$@"
