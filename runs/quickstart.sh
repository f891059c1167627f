#!/usr/bin/env bash
# The whole method on the embedded default, on two cores. First the two bundled policies are evaluated and diagnosed, with a
# report of their own. Then two small ones are trained: demonstrations, frozen features, three stages, four evaluation regimes,
# diagnosis, and a report of all four. After an interruption the script continues. When it has finished, it writes the reports
# again. Results go to outputs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-outputs/quickstart}
DATA="--data.path $OUT/demonstrations --data.cache $OUT/cache"
mkdir -p "$OUT"

# On two cores, two processes with one thread each are faster than one process with two threads.
export OMP_NUM_THREADS=1
both() {
  "$1" wam tiny_wam & local first=$!
  "$1" agra tiny & local second=$!
  wait $first && wait $second
}

# A first result: the two bundled policies, which trained eight times as long (runs/tabletop.sh), on 10 trials of each regime.
evaluate_bundled() {
  [ -d "$OUT/tabletop-$1" ] || agra export "tabletop-$1" --output "$OUT/tabletop-$1"
  agra evaluate "$OUT/tabletop-$1" --limit 10 --videos 0
}
both evaluate_bundled
agra compare "$OUT/tabletop-wam/results.jsonl" "$OUT/tabletop-agra/results.jsonl"
diagnose() { grep -qs demonstrated_swap_shift "$OUT/$1/diagnosis/visual_reliance.json" || agra diagnose "$OUT/$1"; }
diagnose_bundled() { diagnose "tabletop-$1"; }
both diagnose_bundled
agra report "$OUT/tabletop-wam" "$OUT/tabletop-agra" --output "$OUT/bundled.html"

# 1. Demonstrations by the scripted expert: a LeRobot v3.0 dataset.
agra collect tabletop --output "$OUT/demonstrations" --episodes 300 --seed 0 --workers 2

# 2. Frozen features: the codec is fitted, then latents, instruction tokens and DINOv2 targets are cached.
OMP_NUM_THREADS=2 agra prepare tiny $DATA

# 3. Adapt: the video loss trains the video DiT alone. Both policies start from it.
# After SIGTERM a training ends with success. The next step checks that it has finished.
finished() { python runs/methods.py finished "$1"; }
OMP_NUM_THREADS=2 agra train tiny --stage adapt --output "$OUT/adapt" --stage.steps 80 $DATA
finished "$OUT/adapt"

# 4. Joint: the same data, steps and seed for both policies. AGRA adds its loss.
joint() {
  agra train "$2" --stage joint --init-from "$OUT/adapt" --output "$OUT/$1_joint" --stage.steps 300 $DATA
  finished "$OUT/$1_joint"
}
both joint

# 5. Finetune: the video DiT is frozen. The action loss trains the bridge and the action head.
finetune() {
  agra train "$2" --stage finetune --init-from "$OUT/$1_joint" --output "$OUT/$1" --stage.steps 60 $DATA
  finished "$OUT/$1"
}
both finetune

# 6. Evaluate on the four regimes, the same trials for both.
evaluate() { agra evaluate "$OUT/$1" --limit 20; }
both evaluate
agra compare "$OUT/wam/results.jsonl" "$OUT/agra/results.jsonl"

# 7. Diagnose. A finished diagnosis is not repeated. Its last file is visual_reliance.json.
both diagnose

# 8. A report on all four. Each pair is compared on its own demonstrations.
agra report "$OUT/tabletop-wam" "$OUT/tabletop-agra" "$OUT/wam" "$OUT/agra" --output "$OUT/report.html"
