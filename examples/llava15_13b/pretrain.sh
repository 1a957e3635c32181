#!/usr/bin/env bash
# LLaVA-1.5-13B, feature alignment: on this node, in a Slurm job, or small on a CPU (--preset tiny).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash examples/cluster/launch.sh examples/llava15_13b/pretrain.yaml "$@"
