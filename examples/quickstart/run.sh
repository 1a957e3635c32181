#!/usr/bin/env bash
# The whole of megamm on two CPU cores, with real pictures:
# data -> tokenizer -> training on two processes, killed half way -> resumed -> evaluated -> exported.
#
#   bash examples/quickstart/run.sh [llava|flamingo] [--seed N] [--keep]
#
# --seed N   weights and order of samples (default 1)
# --keep     go on with the training run that is there instead of starting a fresh one
#
# Everything goes under runs/quickstart-SYSTEM-seedN/; data that is there already is used again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

system=llava seed=1 keep=
while (($#)); do
  case $1 in
    llava | flamingo) system=$1 ;;
    --seed)
      seed=${2-}
      (($# < 2)) || shift
      ;;
    --keep) keep=yes ;;
    *)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
  shift
done
[[ $seed =~ ^[0-9]+$ ]] || {
  echo "run.sh: --seed: give a whole number" >&2
  exit 2
}

here=examples/quickstart
work=runs/quickstart-$system-seed$seed
data=$work/data run=$work/train
recipe=$here/$system.yaml
settings=("--run_dir=$run" "--tokenizer=$work/tokenizer" "--data.train=$work/prepared" "--seed=$seed")

say() { printf '\n== %4d s  %s\n' "$SECONDS" "$*"; }

children=()
stop_children() { # torchrun ends its workers before it ends itself
  for child in "${children[@]}"; do
    kill -TERM "$child" 2>/dev/null || continue
    wait "$child" 2>/dev/null || true
  done
}
trap stop_children EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Commands that take long run in the background, because bash serves no signal while it waits for
# one in the foreground, and (set -m) in groups of their own, so that Ctrl-C reaches them once: from
# stop_children.
start() {
  set -m
  "$@" &
  children+=($!)
  set +m
}

start_training() {
  start torchrun --standalone --nproc-per-node 2 -m megamm train "$recipe" "${settings[@]}"
}

say "environment"
bash tools/bootstrap.sh
# shellcheck disable=SC1091
. .venv/bin/activate
export OMP_NUM_THREADS=1 # two processes share the cores, and the tensors are small

say "data: handwritten digits as PNG files, with questions"
mkdir -p "$work"
if [ ! -d "$data" ]; then
  rm -rf "$data.unfinished"
  python $here/make_data.py --out "$data.unfinished"
  mv "$data.unfinished" "$data"
fi
if [ ! -d "$work/tokenizer" ]; then
  megamm prepare tokenizer "$data/train.json" --format llava --vocab-size 512 --out "$work/tokenizer"
fi
megamm prepare "$data/train.json" --format llava --tokenizer "$work/tokenizer" --out "$work/prepared"

[ -n "$keep" ] || rm -rf "$run"
if [ ! -d "$run" ]; then
  say "training on two processes (tensor parallel), to be killed half way"
  start_training
  start python $here/interrupt.py "${children[0]}" "$run"
  wait "${children[1]}"
  wait "${children[0]}" 2>/dev/null || true
  children=()
  say "every process of the run was killed (SIGKILL); the same command again"
else
  say "training, from where the run in $run stands"
fi
start_training
wait "${children[0]}"
children=()
grep "resumed" "$run/log.txt" | tail -n 1
megamm verify "$run"

say "questions about pictures that were never seen in training"
megamm evaluate "$recipe" "${settings[@]}" --checkpoint "$run" --task exact_match \
  --data "$data/heldout.json" --out "$work/predictions.jsonl" --max-new-tokens 8 | tee "$work/score.txt"
python $here/show.py "$data" "$work/predictions.jsonl" --out "$work/panel.png"

if [ "$system" = llava ]; then
  say "the same model in transformers"
  rm -rf "$work/hf"
  megamm convert export --checkpoint "$run" --out "$work/hf" --family llava
  python $here/show_transformers.py "$work/hf" "$data" "$work/predictions.jsonl"
else
  say "export is left out: transformers has no class for this architecture"
fi

say "done; everything lies in $work"
LC_ALL=C awk -F '[ =)]' '/^accuracy:/ { printf "held-out accuracy: %.2f (n=%d)\n", $2, $4 }' "$work/score.txt"
