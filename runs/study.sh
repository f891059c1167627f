#!/usr/bin/env bash
# The study (docs/study.md): what alignment changes on the tabletop, with several seeds and variants. Every row is a training from
# one adapt stage of its data and seed, 180 trials with random and 180 with zero noise, and a diagnosis on 40 samples.
# A row of 2,400 steps takes about an hour on a quiet core, one of 1,600 steps 40 minutes. After an interruption the script
# continues. Finished rows go to docs/study, and a row that is there already is skipped. The rest goes to outputs/study.
#   LANES=1      rows side by side, by default 2
#   DEVICE=cuda  device of training, evaluation and diagnosis
#   ROWS="wam_1 agra_1"  only these rows
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-outputs/tabletop}
OUT=${OUT:-outputs/study}
MEASURED=${MEASURED:-docs/study}
DEVICE=${DEVICE:-cpu}
export BASE OUT MEASURED DEVICE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$OUT"

# NAME SEED STEPS DATA RECIPE [flags]. The bundled pair is seed 0 of wam and agra (runs/methods.sh recorded it). Names with
# "short" have two thirds of its steps. DATA: robot, all demonstrations; few, the first 300; both, these and those of a human hand.
rows() {
  for seed in 1 2 3 4; do
    echo "wam $seed 2400 robot tiny_wam"
    echo "agra $seed 2400 robot tiny"
  done
  for seed in 0 1 2; do
    echo "wam_short $seed 1600 robot tiny_wam"
    echo "agra_short $seed 1600 robot tiny"
    echo "wam_short_no_video_loss $seed 1600 robot tiny_wam --method.objective.video-weight 0"
    echo "agra_short_no_video_loss $seed 1600 robot tiny --method.objective.video-weight 0"
  done
  for seed in 0 1 2; do
    echo "wam_few $seed 1600 few tiny_wam"
    echo "agra_few $seed 1600 few tiny"
    echo "wam_both $seed 1600 both tiny_wam"
    echo "agra_both $seed 1600 both tiny"
  done
  for seed in 0 1 2; do
    echo "agra_short_whole_episode $seed 1600 robot tiny --data.target-steps None"
  done
  # One seed each, for orientation only.
  cat <<'ROWS'
agra_short_observation 0 1600 robot tiny --method.alignment.include-future False
agra_short_irepa 0 1600 robot tiny --method.alignment.projector conv --method.alignment.spatial-normalization True
agra_short_class_token 0 1600 robot tiny --method.alignment.teacher.token class
freeze_short 0 1600 robot tiny_wam --stage.frozen video_dit --method.objective.video-weight 0
agra_short_video_pass 0 1600 robot tiny --method.objective.aligned-pass DENOISING --method.objective.video-batch-fraction 1
agra_short_shared_pass 0 1600 robot tiny --method.objective.guidance-pass DENOISING --method.objective.aligned-pass DENOISING --method.objective.video-batch-fraction 1
agra_short_reads_layer_2 0 1600 robot tiny --method.model.bridge.layers 2 2 2 2
wam_short_reads_layer_0 0 1600 robot tiny_wam --method.model.bridge.layers 0 0 0 0
wam_short_reads_layer_2 0 1600 robot tiny_wam --method.model.bridge.layers 2 2 2 2
wam_short_reads_layer_5 0 1600 robot tiny_wam --method.model.bridge.layers 5 5 5 5
agra_short_aligns_layer_0 0 1600 robot tiny --method.alignment.layers 0
agra_short_aligns_layer_1 0 1600 robot tiny --method.alignment.layers 1
agra_short_aligns_layer_3 0 1600 robot tiny --method.alignment.layers 3
agra_short_aligns_layer_4 0 1600 robot tiny --method.alignment.layers 4
agra_short_aligns_layer_5 0 1600 robot tiny --method.alignment.layers 5
ROWS
}

source runs/rows.sh

# The flags of a kind of data.
data() {
  case "$1" in
    robot) echo "--data.path $BASE/demonstrations --data.cache $BASE/cache" ;;
    few) echo "--data.path $BASE/demonstrations --data.cache $BASE/cache --data.training-episodes 300" ;;
    both) echo "--mixture $OUT/both.json --data.path $BASE --data.cache $BASE/cache" ;;
  esac
}

row() {
  local name=$1 seed=$2 steps=$3 data=$4 recipe=$5
  shift 5
  local run="$OUT/${name}_$seed" adapt="$OUT/adapt_${data}_$seed" flags
  flags="$(data "$data") --device $DEVICE --stage.seed $seed"
  # Rows side by side share an adapt stage: the second one waits and finds it finished.
  flock "$adapt.lock" agra train tiny_wam --stage adapt --output "$adapt" --stage.steps 500 $flags
  python runs/methods.py finished "$adapt"
  agra train "$recipe" --stage joint --init-from "$adapt" --output "$run" --stage.steps "$steps" --stage.validate-every 400 $flags "$@"
  python runs/methods.py finished "$run"
  agra evaluate "$run" --name "$name" --videos 0 --device "$DEVICE" --output "$run/results.jsonl" --action-noise random
  agra evaluate "$run" --name "$name" --videos 0 --device "$DEVICE" --output "$run/zero.jsonl" --action-noise zero
  grep -qs demonstrated_swap_shift "$run/diagnosis/visual_reliance.json" || agra diagnose "$run" --samples 40 --device "$DEVICE" --action-noise random
  python runs/methods.py record "$run" "$MEASURED/${name}_$seed" --recipe "$recipe"
}
export -f row data

todo=$(open_rows)
if [ -n "$todo" ]; then
  [ -d "$BASE/demonstrations" ] ||
    agra collect tabletop --output "$BASE/demonstrations" --episodes 3000 --seed 1 --workers 2
  if grep -q " both " <<<"$todo"; then
    agra collect tabletop_human --output "$BASE/human" --episodes 1500 --seed 2 --workers 2
    cat >"$OUT/both.json" <<'JSON'
[{"path": "demonstrations", "embodiment": "tabletop", "frame_stride": 4, "normalization": "mean_std", "training_episodes": 300},
 {"path": "human", "embodiment": "tabletop_human", "frame_stride": 4, "normalization": "mean_std"}]
JSON
  fi
  # The features of each kind of data and target, once.
  echo "$todo" | awk '{ data = $4; whole = /target-steps/; class = /teacher.token/; print data, whole, class }' | sort -u |
    while read -r kind whole class; do
      extra=()
      [ "$whole" = 1 ] && extra=(--data.target-steps None)
      [ "$class" = 1 ] && extra=(--method.alignment.teacher.token class)
      agra prepare tiny $(data "$kind") --device "$DEVICE" "${extra[@]}"
    done
  echo "$todo" | xargs -P "${LANES:-2}" -I{} bash -euc "row {}"
fi
python runs/study.py
python -m runs.noise tabletop-agra tabletop-wam
