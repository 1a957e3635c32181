#!/usr/bin/env bash
# Trains a model of a billion parameters for a few steps in bf16 and in FP8 on the GPU at hand, and compares.
#
#   bash tools/fp8_check.sh [FOLDER] [OPTIONS of tools/benchmark/fp8.py]     results go to FOLDER (fp8_check/)
#
# PYTHON names the interpreter (default: that of .venv, else python3); it needs torch with CUDA and Transformer
# Engine. Exit code 1: FP8's loss departs from that of bf16; 2: FP8 does not work here.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=fp8_check
if (($#)) && [[ $1 != -* ]]; then
  out=$1
  shift
fi
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tools/benchmark/fp8.py --out "$out" "$@"
