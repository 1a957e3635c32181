#!/usr/bin/env bash
# Starts one stage where it is called:
#   on a machine with GPUs         one process for each GPU, by torchrun
#   on several, without Slurm      the same command on each, with NNODES and RDZV_ENDPOINT
#   in a Slurm job                 one task for each GPU of the job, by srun
#   anywhere, with --preset tiny   a small model on made-up data, on two CPU cores
#
#   bash examples/cluster/launch.sh RECIPE [--preset tiny] [--a.b=c ...]
#
# PROCESSES_PER_NODE  unset: the GPUs of this machine (in a Slurm job: its tasks per node)
# NNODES              machines (unset: 1)
# RDZV_ENDPOINT       HOST:PORT of one of them
# MAX_RESTARTS        how often torchrun starts processes again after a lost rank (unset: 3)
# STOP_GRACE_S        seconds that a signalled run gets to save (unset: 600)
# SRUN_ARGS           more options of srun (a container, say)
# CLUSTER_ENV         a file of environment settings (unset: none; examples/cluster/env_*.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

die() {
  echo "launch.sh: $1" >&2
  exit 2
}

(($#)) || usage
recipe=$1
shift
[ -f "$recipe" ] || die "$recipe: no such recipe; give the YAML file of a stage"

tiny=
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  case ${!i} in
    --preset=*) preset=${!i#*=} ;;
    --preset) preset=${!next-} ;;
    *) continue ;;
  esac
  [ "$preset" = tiny ] || die "--preset: '$preset' is none; give tiny"
  tiny=yes
done

if [ -n "$tiny" ]; then
  bash tools/bootstrap.sh
fi
if [ -f .venv/bin/activate ]; then # a container has megamm without one
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
command -v megamm >/dev/null || die "megamm is not installed; run tools/bootstrap.sh, and tools/install_gpu.sh for GPUs"
if [ -n "${CLUSTER_ENV-}" ]; then
  [ -f "$CLUSTER_ENV" ] || die "CLUSTER_ENV: $CLUSTER_ENV is not a file; give one of examples/cluster/env_*.sh"
  # shellcheck disable=SC1090
  . "$CLUSTER_ENV"
fi

if [ -n "$tiny" ]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tensors are small
  system=$(basename "$(dirname "$recipe")")
  python examples/tiny/make.py "$system"
  processes=${PROCESSES_PER_NODE:-2}
elif [ -n "${SLURM_JOB_ID-}" ] && [ -z "${SLURM_STEP_NUM_TASKS-}" ]; then
  processes=
else
  processes=${PROCESSES_PER_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
  [ "$processes" -gt 0 ] || die "no GPU is here; add --preset tiny to try the stage on a CPU, or set PROCESSES_PER_NODE"
fi

if [ -z "$processes" ]; then
  # All tasks of all nodes meet at the first node. srun hands on the signals that it gets, and ends the step when
  # one task has failed, so that none waits for it.
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  # shellcheck disable=SC2086  # SRUN_ARGS holds several words
  exec srun --kill-on-bad-exit=1 ${PROCESSES_PER_NODE:+"--ntasks-per-node=$PROCESSES_PER_NODE"} ${SRUN_ARGS-} \
    python -m megamm train "$recipe" "$@"
elif [ "${NNODES:-1}" -gt 1 ]; then
  [ -n "${RDZV_ENDPOINT-}" ] || die "RDZV_ENDPOINT: not set; give HOST:PORT of one of the $NNODES machines to all of them"
  exec python examples/cluster/torchrun.py --nnodes "$NNODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --max-restarts "${MAX_RESTARTS:-3}" \
    -m megamm train "$recipe" "$@"
else
  exec python examples/cluster/torchrun.py --standalone --nproc-per-node "$processes" \
    --max-restarts "${MAX_RESTARTS:-3}" -m megamm train "$recipe" "$@"
fi
