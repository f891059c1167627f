#!/usr/bin/env bash
# The two bundled policies, tabletop-wam and tabletop-agra: the same demonstrations, steps and seed, without and with AGRA.
# About two and a half hours on two cores. After an interruption the script continues. Results go to outputs/tabletop. The
# folders tabletop-* there are those of src/agra/assets.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-outputs/tabletop}
DATA="--data.path $OUT/demonstrations --data.cache $OUT/cache"
mkdir -p "$OUT"

export OMP_NUM_THREADS=1
both() {
  "$1" wam tiny_wam & local first=$!
  "$1" agra tiny & local second=$!
  wait $first && wait $second
}

agra collect tabletop --output "$OUT/demonstrations" --episodes 3000 --seed 1 --workers 2
OMP_NUM_THREADS=2 agra prepare tiny $DATA

# One adapt stage for both. The joint stage ends with the policies.
# After SIGTERM a training ends with success. The next step checks that it has finished.
finished() { python runs/methods.py finished "$1"; }
OMP_NUM_THREADS=2 agra train tiny --stage adapt --output "$OUT/adapt" --stage.steps 500 $DATA
finished "$OUT/adapt"
joint() {
  agra train "$2" --stage joint --init-from "$OUT/adapt" --output "$OUT/$1" --stage.steps 2400 $DATA
  finished "$OUT/$1"
}
both joint

export_half() { [ -d "$OUT/tabletop-$1" ] || agra export "$OUT/$1" --output "$OUT/tabletop-$1" --half; }
both export_half

# All 180 trials of the four regimes, and the diagnosis, of the exported policies.
evaluate() { agra evaluate "$OUT/tabletop-$1"; }
both evaluate
agra compare "$OUT/tabletop-wam/results.jsonl" "$OUT/tabletop-agra/results.jsonl"
diagnose() { grep -qs demonstrated_swap_shift "$OUT/tabletop-$1/diagnosis/visual_reliance.json" || agra diagnose "$OUT/tabletop-$1" --samples 160; }
both diagnose
agra report "$OUT/tabletop-wam" "$OUT/tabletop-agra" --output "$OUT/report.html"
