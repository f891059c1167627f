#!/usr/bin/env bash
# The whole method on the embedded default, in at most 20 minutes on two cores:
# demonstrations, frozen features, three stages for two policies, four evaluation regimes, diagnosis, report.
# Interrupted, it goes on where it was. Everything lands in outputs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-outputs/quickstart}
DATA="--data.path $OUT/demonstrations --data.cache $OUT/cache"
mkdir -p "$OUT"

# Two processes of one thread beat one of two on two cores.
export OMP_NUM_THREADS=1
both() { # run the same command for the two arms side by side; fail if either fails
  "$@" wam & local first=$!
  "$@" agra & local second=$!
  wait $first && wait $second
}

# 1. Demonstrations by the scripted expert: a LeRobot v3.0 dataset.
agra collect tabletop --output "$OUT/demonstrations" --episodes 200 --seed 0 --workers 2

# 2. Frozen features: the codec is fit, then latents, instruction tokens and DINOv2 targets are cached.
OMP_NUM_THREADS=2 agra prepare tiny $DATA

# 3. Adapt: the video DiT alone, shared by both arms.
OMP_NUM_THREADS=2 agra train tiny --stage adapt --output "$OUT/adapt" --stage.steps 200 $DATA

# 4. Joint: the same data, steps and seed for both arms; AGRA adds its loss.
joint() {
  local recipe=tiny; [ "$1" = wam ] && recipe=tiny_wam
  agra train $recipe --stage joint --init "$OUT/adapt" --output "$OUT/$1" $DATA
}
both joint

# 5. Evaluate on the four regimes, the same trials for both.
evaluate() { agra evaluate "$OUT/$1"; }
both evaluate
agra compare "$OUT/wam/results.jsonl" "$OUT/agra/results.jsonl"

# 6. Diagnose and report.
diagnose() { agra diagnose "$OUT/$1"; }
both diagnose
agra report "$OUT/wam" "$OUT/agra" --adapt "$OUT/adapt" --output "$OUT/report.html"
