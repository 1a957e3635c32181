#!/usr/bin/env bash
# InternLM-XComposer-7B, captions: on this node, in a Slurm job, or small on a CPU (--preset tiny).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash examples/cluster/launch.sh examples/xcomposer_7b/pretrain.yaml "$@"
