#!/usr/bin/env bash
# Every method on the tabletop under one protocol (docs/methods.md): the demonstrations of runs/tabletop.sh, 92,800 windows,
# a grid of three learning rates, 180 trials with random and with zero noise. A row takes one to two hours on one core.
# Rows NAME_compute have the WAM's FLOPs of training instead of its windows, and the rate of row NAME.
# After an interruption the script continues. Finished rows go to src/agra/evaluation/measured/tabletop, and so do finished grids.
# What is there already is skipped, so the table can grow over several days or machines. Checkpoints and logs go to outputs/methods.
#   LANES=1     rows side by side, by default 2
#   DEVICE=cuda device of training, evaluation and diagnosis
#   SEEDS="0 1" training seeds, by default 0
#   ROWS="dit4dit_0 uwm_0"  only these rows, each with its seed
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-outputs/tabletop}
OUT=${OUT:-outputs/methods}
MEASURED=${MEASURED:-src/agra/evaluation/measured/tabletop}
DEVICE=${DEVICE:-cpu} SEEDS=${SEEDS:-0}
TIMEFORMAT="%U %S" # seconds of CPU time, user and system
LC_ALL=C.UTF-8     # with a decimal point
export BASE OUT MEASURED DEVICE TIMEFORMAT LC_ALL OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
DATA="--data.path $BASE/demonstrations --data.cache $BASE/cache"
export DATA
mkdir -p "$OUT"

# NAME SEED RECIPE START. START is `adapt` for a method with an adapt stage, which takes 5/29 of its steps, `scratch` for the
# others, or a bundled policy that has had the same budget. AGRA has the WAM's FLOPs within 4 %. All seeds take the rate of seed 0.
rows() {
  local seed name recipe start
  for seed in $SEEDS; do
    if [ "$seed" = 0 ]; then
      echo "wam 0 tiny_wam tabletop-wam"
      echo "agra 0 tiny tabletop-agra"
    else
      echo "wam $seed tiny_wam adapt"
      echo "agra $seed tiny adapt"
    fi
    while read -r name recipe start; do echo "$name $seed $recipe $start"; done <<'ROWS'
diffusion_policy tiny_diffusion_policy scratch
dit4dit tiny_dit4dit adapt
dit4dit_attached tiny_dit4dit_attached adapt
flare tiny_flare adapt
flare_frozen tiny_flare_frozen scratch
flare_policy_only tiny_flare_policy_only scratch
uwm tiny_uwm scratch
vla tiny_vla scratch
lda_scratch tiny_lda_scratch scratch
lda_scratch_vae tiny_lda_scratch_vae scratch
diffusion_policy_compute tiny_diffusion_policy scratch
dit4dit_compute tiny_dit4dit adapt
dit4dit_attached_compute tiny_dit4dit_attached adapt
flare_compute tiny_flare adapt
flare_frozen_compute tiny_flare_frozen scratch
flare_policy_only_compute tiny_flare_policy_only scratch
uwm_compute tiny_uwm scratch
vla_compute tiny_vla scratch
lda_scratch_compute tiny_lda_scratch scratch
lda_scratch_vae_compute tiny_lda_scratch_vae scratch
ROWS
  done
}

source runs/rows.sh

row() {
  local name=$1 seed=$2 recipe=$3 start=$4
  local run="$OUT/${name}_$seed" grid="$OUT/${name}_grid" init=() steps=2900 made=() rate adapt
  rate=$(python runs/methods.py chosen "$MEASURED/${name%_compute}_0")
  # The bundled pair has no grid. Its rate is the recipe's.
  case "$name" in wam | agra) rate=$(python runs/methods.py rates "$recipe" | cut -d " " -f 2) ;; esac
  if [ -z "$rate" ] && { [[ "$name" = *_compute ]] || [ "$seed" != 0 ]; }; then
    echo "${name}_$seed: its learning rate is that of row ${name%_compute}_0, whose grid of rates is not finished" >&2
    exit 1
  fi
  if [[ "$name" = *_compute ]]; then
    steps=$(python runs/methods.py steps "$recipe" "$start")
  fi
  case "$start" in
    adapt)
      adapt="$OUT/${name}_adapt"
      [ "$seed" = 0 ] || adapt+="_$seed"
      agra train "$recipe" --stage adapt --output "$adapt" --stage.steps $((steps * 5 / 29)) --stage.seed "$seed" \
        --device "$DEVICE" $DATA
      python runs/methods.py finished "$adapt"
      init=(--init-from "$adapt") steps=$((steps - steps * 5 / 29)) ;;
    scratch) ;;
    *) agra export "$start" --output "$run" ;;
  esac
  if [ "$start" = adapt ] || [ "$start" = scratch ]; then
    if [ -z "$rate" ]; then
      for rate in $(python runs/methods.py rates "$recipe"); do
        agra train "$recipe" --stage joint "${init[@]}" --output "$grid/$rate" --stage.steps 300 --stage.learning-rate "$rate" \
          --stage.validate-every 300 --stage.save-every 300 --device "$DEVICE" $DATA
        python runs/methods.py finished "$grid/$rate"
      done
      rate=$(python runs/methods.py choose "$grid" "$MEASURED/${name}_0")
    fi
    echo start >>"$run.seconds"
    { time agra train "$recipe" --stage joint "${init[@]}" --output "$run" --stage.steps "$steps" --stage.seed "$seed" \
      --stage.learning-rate "$rate" --stage.validate-every 300 --device "$DEVICE" $DATA 2>&3; } 3>&2 2>>"$run.seconds"
    python runs/methods.py finished "$run"
    made=(--data "$BASE/demonstrations")
  fi
  agra evaluate "$run" --name "$name" --videos 0 --device "$DEVICE" --output "$run/results.jsonl" --action-noise random
  agra evaluate "$run" --name "$name" --videos 0 --device "$DEVICE" --output "$run/zero.jsonl" --action-noise zero
  grep -qs demonstrated_swap_shift "$run/diagnosis/visual_reliance.json" || agra diagnose "$run" --samples 40 --device "$DEVICE" --action-noise random
  python runs/methods.py record "$run" "$MEASURED/${name}_$seed" --recipe "$recipe" "${made[@]}"
}
export -f row

todo=$(open_rows)
if [ -n "$todo" ]; then
  [ -d "$BASE/demonstrations" ] ||
    agra collect tabletop --output "$BASE/demonstrations" --episodes 3000 --seed 1 --workers 2
  echo "$todo" | while read -r _ _ recipe start; do
    case "$start" in adapt | scratch) agra prepare "$recipe" --device "$DEVICE" $DATA ;; esac
  done
  play() { xargs -r -P "${LANES:-2}" -I{} bash -euc "row {}"; }
  # A row that fails does not stop the others. Rates of further seeds and of rows of equal compute come from the first ones.
  failed=0
  awk '$1 !~ /_compute$/ && $2 == 0' <<<"$todo" | play || failed=1
  awk '$1 !~ /_compute$/ && $2 != 0' <<<"$todo" | play || failed=1
  awk '$1 ~ /_compute$/' <<<"$todo" | play || failed=1
  [ "$failed" = 0 ]
fi
python runs/methods.py table
agra leaderboard --benchmark tabletop
