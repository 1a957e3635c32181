#!/usr/bin/env bash
# Installs what the GPU backend needs, compiled against the torch that is there: flash-attn, Transformer Engine,
# and with --apex NVIDIA's Apex. What imports already is left alone.
#
#   bash tools/install_gpu.sh [--apex] [--dry-run]
#
# The order matters: torch comes first (tools/bootstrap.sh), because all three are compiled against it and must never
# replace it; flash-attn before Transformer Engine, which looks for it when it is imported; Apex last, which nothing
# else needs. Needs nvcc of the same CUDA release as torch, cuDNN, and half an hour.
#
# PYTHON    the interpreter to install for (unset: that of .venv, else python3)
# MAX_JOBS  compilers at once (unset: one for each 8 GiB of memory, at most one for each core)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

apex='' dry=''
for argument in "$@"; do
  case $argument in
    --apex) apex=yes ;;
    --dry-run) dry=yes ;;
    *)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
done

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

say() { printf 'install_gpu: %s\n' "$*" >&2; }

die() {
  say "$1"
  exit 2
}

run() {
  if [ -n "$dry" ]; then
    echo "$*"
  else
    say "$*"
    "$@"
  fi
}

imports() { "$python" -c "import $1" >/dev/null 2>&1; }

cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') ||
  die "torch does not import with $python; run tools/bootstrap.sh first"
[ -n "$cuda" ] || die "torch is a build without CUDA; install one with CUDA (https://pytorch.org) into the same environment"
command -v nvcc >/dev/null || die "nvcc is not on the PATH; install the CUDA toolkit $cuda that torch was built with"
toolkit=$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
[ "${toolkit%%.*}" = "${cuda%%.*}" ] ||
  die "nvcc is of CUDA $toolkit and torch of CUDA $cuda; put the toolkit of CUDA ${cuda%%.*} first on the PATH"

if [ -z "${MAX_JOBS-}" ]; then
  by_memory=$(awk '/MemTotal/ { print int($2 / 8388608) }' /proc/meminfo)
  cores=$(env --unset=OMP_NUM_THREADS nproc) # which nproc takes for a limit
  MAX_JOBS=$((by_memory < cores ? by_memory : cores))
fi
export MAX_JOBS=$((MAX_JOBS > 0 ? MAX_JOBS : 1))

# What their setup needs; with --no-build-isolation pip does not fetch it, and takes the torch that is installed.
torch_version=$("$python" -c 'import torch; print(torch.__version__)')
run "$python" -m pip install "setuptools>=77" wheel packaging ninja pybind11 psutil einops
pip_build=("$python" -m pip install --no-build-isolation "torch==$torch_version")

if [ -n "$dry" ] || ! imports flash_attn; then
  run "${pip_build[@]}" "flash-attn>=2.7,<3"
fi
if [ -n "$dry" ] || ! imports transformer_engine.pytorch; then
  # the name without [..] is an empty package
  run "${pip_build[@]}" "transformer-engine[core_cu${cuda%%.*},pytorch]>=2.9,<2.12"
fi
if [ -n "$apex" ] && { [ -n "$dry" ] || ! imports amp_C; }; then
  # not the package of that name, which is another project's
  run env APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${pip_build[@]}" "apex @ git+https://github.com/NVIDIA/apex"
fi

[ -n "$dry" ] || "$python" -m megamm doctor
