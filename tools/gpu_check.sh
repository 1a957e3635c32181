#!/usr/bin/env bash
# Builds the fused operators for the GPU at hand, runs the tests that need one, and measures what
# tools/benchmark/gpu.py says; compares the losses of FP8 with those of bf16 where it works and time is left.
#
#   bash tools/gpu_check.sh [FOLDER]      at most ten minutes; results go to FOLDER (default gpu_check/)
#
# PYTHON names the interpreter (default: that of .venv, else python3); it needs torch with CUDA, megamm's
# dependencies and pytest. Each step has a time limit, a failed one does not stop the next; the exit code is 1
# if any failed.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-gpu_check}
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

failed=()
step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1; then
    printf 'ok      %3d s  %s\n' $((SECONDS - start)) "$name"
  else
    printf 'FAILED  %3d s  %s: %s\n' $((SECONDS - start)) "$name" "$(tail -n 1 "$out/$name.log")" >&2
    failed+=("$name")
  fi
}

capability=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())
') || capability=
if [ -z "$capability" ]; then
  echo "tools/gpu_check.sh: $python sees no GPU; run it where torch.cuda.is_available() is true" >&2
  exit 2
fi
if [ "$capability" = 9.0 ]; then capability=9.0a; fi

"$python" -c '
import torch
print(torch.cuda.get_device_name(), "| torch", torch.__version__, "| CUDA", torch.version.cuda)
' | tee "$out/machine.txt"
step build 180 env MEGAMM_BUILD_EXT=1 TORCH_CUDA_ARCH_LIST="$capability" MAX_JOBS="$(nproc)" \
  "$python" setup.py build_ext --inplace
step loads 30 "$python" -c '
import torch
from megamm import ops
assert ops.extension_built(), ops.extension_status()
assert "cuda" in ops.fused_devices("rms_norm"), "the extension was built without its CUDA half"
'
step tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
step many_tensors 60 "$python" tools/benchmark/many_tensors.py --device cuda
cat "$out/many_tensors.log"
# what building and testing have left; alone, tools/benchmark/gpu.py takes up to ten minutes for all experiments
left=$((560 - SECONDS))
step gpu "$left" "$python" tools/benchmark/gpu.py --out "$out/gpu" --seconds "$((left - 20))"
cat "$out/gpu.log"
left=$((590 - SECONDS))
if ! "$python" -c '
from megamm.device import fp8_status
assert fp8_status()["delayed"].works
' 2>/dev/null; then
  echo "left out: fp8, which does not work here (megamm doctor says why)"
elif ((left < 60)); then
  echo "left out: fp8, for which $left s are too few; run tools/fp8_check.sh"
else
  step fp8 "$left" env PYTHON="$python" bash tools/fp8_check.sh "$out/fp8"
  cat "$out/fp8.log"
fi

if ((${#failed[@]})); then
  printf 'tools/gpu_check.sh: failed: %s (logs are in %s)\n' "${failed[*]}" "$out" >&2
  exit 1
fi
