#!/usr/bin/env bash
# Makes .venv: torch, megamm with its compiled operators, and what its extras need. Does nothing when that is so.
#
#   tools/bootstrap.sh [EXTRA,...]     extras of pyproject.toml; unset: dev,hf,quickstart,eval,dali
#
# MEGAMM_TORCH_INDEX_URL   package index that torch alone is taken from (for example one with CPU builds only)
# MEGAMM_BUILD_EXT         0: without the compiled operators; 1: failing to compile them is an error
# PYTHON                   the interpreter that .venv is made from (unset: python3)
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-dev,hf,quickstart,eval,dali}
venv=.venv
python=$venv/bin/python
stamp=$venv/.megamm-stamp
log=$venv/bootstrap.log
# What the tests compare megamm with, where transformers has it not, and what these packages need beside the extras.
# They live apart from the other packages: two of them ask for torch versions of their own, and transformers
# takes another path where it finds torchvision, which on a CPU does not load by itself (tests/parity/references.py).
references=$venv/references
reference_packages="timm open_clip_torch open_flamingo torchvision ftfy wcwidth einops einops-exts peft accelerate"
torch_version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

say() { printf 'bootstrap: %s\n' "$*" >&2; }

die() {
  say "$1"
  exit 1
}

# phase NAME COMMAND...: runs the command into the log; says how long it took, or returns its failure.
phase() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null || return 1
  say "$name: $((SECONDS - start)) s"
}

# need REMEDY NAME COMMAND...: a phase without which there is no megamm.
need() {
  local remedy=$1
  shift
  phase "$@" && return
  tail -n 15 "$log" >&2
  die "$1 failed (the lines above are the end of $log); $remedy"
}

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

# What the environment was made from. A moved repository counts, because .venv holds its path, and so does a
# compiler that has come or gone.
fingerprint() {
  {
    pwd
    printf '%s %s\n' "${MEGAMM_BUILD_EXT:-}" "$(command -v "${CXX:-c++}" || true)"
    find pyproject.toml constraints.txt setup.py csrc -type f -print0 | sort -z | xargs -0 cat
  } | cksum
}

# Whether the stamp was made from the present files and holds every extra that is asked for.
up_to_date() {
  [ -x "$python" ] && [ -f "$stamp" ] || return 1
  [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ] || return 1
  local have extra
  have=",$(sed -n 2p "$stamp"),"
  for extra in ${extras//,/ }; do
    [[ $have == *,"$extra",* ]] || return 1
  done
}

make_environment() {
  [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1 && return
  local base=${PYTHON:-python3} output
  command -v "$base" >/dev/null || die "$base is not installed; install Python 3.10 or newer"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$base" --version) is too old; install Python 3.10 or newer and name it: PYTHON=python3.11 $0"
  if ! output=$("$base" -m venv --clear "$venv" 2>&1); then
    printf '%s\n' "$output" >&2
    die "$base cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)"
  fi
}

has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q GPU; }

has_torch() {
  "$python" -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null
}

install_torch() {
  if [ -n "${MEGAMM_TORCH_INDEX_URL:-}" ]; then
    pip install --index-url "$MEGAMM_TORCH_INDEX_URL" "torch==$torch_version"
  elif has_gpu; then
    pip install -c constraints.txt "torch==$torch_version"
  else
    pip install -c constraints.txt "torch==$torch_version+cpu" ||
      pip install -c constraints.txt "torch==$torch_version"
  fi
}

# The extras but DALI, which is installed on its own because it may be missing.
install_megamm() {
  local others
  others=$(printf '%s' "$extras" | tr ',' '\n' | grep -vx dali | paste -sd, -)
  pip install --verbose --no-build-isolation -c constraints.txt -e ".${others:+[$others]}"
}

install_dali() {
  local cuda
  cuda=$("$python" -c 'import torch; print("130" if (torch.version.cuda or "12") >= "13" else "120")')
  pip install -c constraints.txt "nvidia-dali-cuda$cuda"
}

install_references() {
  rm -rf "$references"
  # shellcheck disable=SC2086
  pip install --no-deps --target "$references" -c constraints.txt $reference_packages
}

check_operators() {
  "$python" -c 'import sys; from megamm import ops; sys.exit(None if ops.extension_built() else ops.extension_status())'
}

main() {
  if command -v flock >/dev/null; then # two at once: the second waits, then finds everything done
    exec 9<.
    flock 9
  fi
  up_to_date && return
  [ ! -f "$stamp" ] || extras=$(printf '%s,%s' "$(sed -n 2p "$stamp")" "$extras" | tr ',' '\n' | sort -u | paste -sd, -)
  local before network="if a package could not be fetched, check the network and the package index; then run it again"
  before=$(fingerprint) # files that change meanwhile are for the next time
  make_environment
  : >"$log"
  need "$network" "build tools" pip install -c constraints.txt setuptools wheel ninja
  if ! has_torch; then
    need "$network; MEGAMM_TORCH_INDEX_URL names another index for torch" "torch $torch_version" install_torch
  fi
  if ! command -v "${CXX:-c++}" >/dev/null && [ "${MEGAMM_BUILD_EXT:-}" != 1 ]; then
    say "no C++ compiler: going on without the compiled operators (same results, slower)"
    export MEGAMM_BUILD_EXT=0
  fi
  need "$network" "megamm [$extras]" install_megamm
  if [[ ,$extras, == *,dali,* ]] && ! phase "DALI" install_dali; then
    say "DALI cannot be installed here; pictures are decoded with Pillow (reason: $log)"
  fi
  if [ "${MEGAMM_BUILD_EXT:-}" != 0 ] && ! phase "compiled operators" check_operators; then
    say "the compiled operators are not in use: $(tail -n 1 "$log"); going on in plain torch (reason: $log)"
  fi
  if [[ ,$extras, == *,dev,* ]] && ! phase "test references" install_references; then
    say "timm, open_clip, open_flamingo or peft cannot be installed, so tests of parity will fail (reason: $log)"
    return # without a stamp: the next run tries again
  fi
  printf '%s\n%s\n' "$before" "$extras" >"$stamp"
}

main
