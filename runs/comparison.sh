#!/usr/bin/env bash
# A comparison of WAM and AGRA over three training seeds, and one seed of the frozen backbone and of the two other passes of
# Table 2. The budget is small: 1,000 steps of 32 windows, from the demonstrations and the adapt stage of runs/tabletop.sh.
# About an hour and a half on two cores. After an interruption the script continues. Results go to outputs/comparison.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-outputs/tabletop}
OUT=${OUT:-outputs/comparison}
export BASE OUT OMP_NUM_THREADS=1
mkdir -p "$OUT"

# NAME SEED RECIPE [flags]: train, evaluate on 20 trials of each regime, diagnose on 40 samples.
run_arm() {
  local run="$OUT/$1_$2" seed=$2 recipe=$3
  shift 3
  agra train "$recipe" --stage joint --init-from "$BASE/adapt" --output "$run" --stage.steps 1000 --stage.seed "$seed" \
    --data.path "$BASE/demonstrations" --data.cache "$BASE/cache" "$@"
  python runs/methods.py finished "$run"
  agra evaluate "$run" --limit 20 --videos 0
  grep -qs demonstrated_swap_shift "$run/diagnosis/visual_reliance.json" || agra diagnose "$run" --samples 40
}
export -f run_arm

xargs -P "${LANES:-2}" -I{} bash -euc "run_arm {}" <<'ARMS'
wam 0 tiny_wam
agra 0 tiny
wam 1 tiny_wam
agra 1 tiny
wam 2 tiny_wam
agra 2 tiny
agra_video_pass 0 tiny --method.objective.aligned-pass DENOISING --method.objective.video-batch-fraction 1
agra_shared_denoising_pass 0 tiny --method.objective.guidance-pass DENOISING --method.objective.aligned-pass DENOISING --method.objective.video-batch-fraction 1
freeze_backbone 0 tiny_wam --stage.frozen video_dit --method.objective.video-weight 0
ARMS

python runs/comparison.py "$OUT" wam agra freeze_backbone agra_video_pass agra_shared_denoising_pass
