#!/usr/bin/env bash
# Checks style and types, then runs the tests.
#
#   bash tests/run.sh [fast|slow|faults|gpu|all] [pytest arguments...]
#
# fast (the default): what runs in minutes on two cores. slow, faults, gpu: the tests with that mark.
# all: every test but those that need a GPU, and those too where there is one.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

set_name=fast
case "${1:-}" in
  fast | slow | faults | gpu | all)
    set_name=$1
    shift
    ;;
esac

bash tools/bootstrap.sh
# shellcheck disable=SC1091
. .venv/bin/activate

case $set_name in
  fast) marks="not slow and not faults and not gpu" ;;
  all) marks=$(python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")') ;;
  *) marks=$set_name ;;
esac

# Files go to workers of their own, but for tests that share a GPU or wait for what they break.
workers=$(env --unset=OMP_NUM_THREADS nproc) # which nproc takes for a limit
((workers <= 4)) || workers=4
case $set_name in
  fast | slow) parallel=(-n "$workers" --dist loadfile) ;;
  *) parallel=() ;;
esac

failed=()
check() {
  local start=$SECONDS
  if "$@"; then
    printf 'ok      %3d s  %s\n' $((SECONDS - start)) "${*:1:3}"
  else
    printf 'FAILED  %3d s  %s\n' $((SECONDS - start)) "$*" >&2
    failed+=("${*:1:3}")
  fi
}

mapfile -t sources < <(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
check ruff format --check --quiet .
check ruff check --quiet .
check mypy megamm
check clang-format --dry-run -Werror "${sources[@]}"
check python tests/run_pytest.py -m "$marks" "${parallel[@]}" "$@"

if ((${#failed[@]})); then
  printf 'tests/run.sh: failed: %s\n' "$(IFS=';' && echo "${failed[*]}")" >&2
  exit 1
fi
