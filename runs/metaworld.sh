#!/usr/bin/env bash
# Meta-World's 50 tasks (docs/reproductions/metaworld.md): demonstrations of the scripted experts, WAM, AGRA and Diffusion Policy,
# and ten trials of each task. The simulator has a Python environment of its own, without torch: make env-metaworld.
# After an interruption the script continues. Finished rows go to src/agra/evaluation/measured/metaworld, the rest to
# outputs/metaworld. A row that is there already is skipped, so the table can grow over several days or machines.
#   LANES=1      rows side by side, by default 2
#   DEVICE=cuda  device of preparation, training and the policy's answers
#   ROWS="wam_0 agra_0"  only these rows
#   TASKS="reach-v3 push-v3"  only these tasks, for experiments. Data and rows then go to outputs/metaworld-tasks
#   PER_TASK=50 HELD_OUT=8  demonstrations of each task to train on, and to validate on
#   STEPS=12000 SHORT_STEPS=3000  steps of 32 windows
#   TRIALS=10 EXECUTE=4 NOISES="zero random"  trials of each task, executed rows of each chunk of 8, action noise
#   FLAGS="--stage.learning-rate 5e-4"  further flags of every preparation and training. Give such runs another OUT
# BASE is the folder of the demonstrations, OUT of the runs, MEASURED of the rows, SIMULATOR the simulator's interpreter.
# Finished rows are written by runs/metaworld.py.
set -euo pipefail
cd "$(dirname "$0")/.."

TASKS=${TASKS:-}
BASE=${BASE:-outputs/metaworld${TASKS:+-tasks}}
OUT=${OUT:-$BASE/runs}
if [ -n "$TASKS" ]; then rows_folder=$OUT/rows; else rows_folder=src/agra/evaluation/measured/metaworld; fi
MEASURED=${MEASURED:-$rows_folder}
SIMULATOR=${SIMULATOR:-.venv-metaworld/bin/python}
LANES=${LANES:-2} DEVICE=${DEVICE:-cpu} FLAGS=${FLAGS:-}
PER_TASK=${PER_TASK:-50} HELD_OUT=${HELD_OUT:-8} STEPS=${STEPS:-12000} SHORT_STEPS=${SHORT_STEPS:-3000}
TRIALS=${TRIALS:-10} EXECUTE=${EXECUTE:-4} NOISES=${NOISES:-zero random}
TIMEFORMAT="%U %S" # seconds of CPU time, user and system
LC_ALL=C.UTF-8     # with a decimal point
export TASKS BASE OUT MEASURED SIMULATOR DEVICE FLAGS PER_TASK HELD_OUT TRIALS EXECUTE NOISES TIMEFORMAT LC_ALL
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -x "$SIMULATOR" ] || { echo "$SIMULATOR: no such interpreter; install it with: make env-metaworld" >&2; exit 1; }
mkdir -p "$BASE" "$OUT"

# NAME SEED STEPS SET RECIPE [flags]. SET: clean, or noisy, with noise on the executed actions and the expert's own in the rows.
rows() {
  echo "wam 0 $STEPS clean metaworld_wam"
  echo "agra 0 $STEPS clean metaworld"
  echo "diffusion_policy 0 $STEPS clean metaworld_diffusion_policy"
  for seed in 0 1 2; do
    echo "wam_short $seed $SHORT_STEPS clean metaworld_wam"
    echo "agra_short $seed $SHORT_STEPS clean metaworld"
  done
  echo "wam_short_shift 0 $SHORT_STEPS clean metaworld_wam --data.shift 4 --data.cached frames"
  echo "wam_noisy 0 $STEPS noisy metaworld_wam"
  echo "agra_noisy 0 $STEPS noisy metaworld"
}

source runs/rows.sh

# Run a command and add its seconds of CPU time to FILE.seconds.
timed() {
  echo start >>"$1.seconds"
  { time "${@:2}" 2>&3; } 3>&2 2>>"$1.seconds"
}

# The flags of a set. The last HELD_OUT demonstrations of each task are held out.
data() {
  echo "--data.path $BASE/$1 --data.cache $BASE/cache --device $DEVICE" \
    "--data.validation-fraction $(awk "BEGIN { printf \"%.6f\", $HELD_OUT / ($PER_TASK + $HELD_OUT) }") $FLAGS"
}

collect() {
  local noise=()
  [ "$1" = noisy ] && noise=(--noise 'hand_d*' 0.25)
  timed "$BASE/$1.collect" "$SIMULATOR" -m agra.cli collect metaworld_20hz --output "$BASE/$1" ${TASKS:+--tasks $TASKS} \
    --per-task $((PER_TASK + HELD_OUT)) --workers "$LANES" "${noise[@]}"
}

row() {
  local name=$1 seed=$2 steps=$3 set=$4 recipe=$5
  shift 5
  local run="$OUT/${name}_$seed" tasks noise
  timed "$run" agra train "$recipe" --stage joint --output "$run" --stage.steps "$steps" --stage.seed "$seed" $(data "$set") "$@"
  python runs/methods.py finished "$run"
  agra export "$run" --output "$run/average" --ema
  if [ "$recipe" != metaworld_diffusion_policy ] && [ ! -f "$run/average/diagnosis/diagnosis.json" ]; then
    agra diagnose "$run/average" --probes "$BASE/probes" --action-noise random --device "$DEVICE"
  fi
  tasks=$(wc -w <<<"$TASKS")
  for noise in $NOISES; do
    timed "$run/$noise" agra evaluate "$run/average" --simulator metaworld_20hz --simulator-python "$SIMULATOR" --name "${name}_$seed" \
      ${TASKS:+--tasks $TASKS} --limit $((TRIALS * (tasks ? tasks : 50))) --execute-steps "$EXECUTE" --action-noise "$noise" \
      --videos 0 --device "$DEVICE" --output "$run/$noise.jsonl"
  done
  python -m runs.metaworld record "$run" "$MEASURED/${name}_$seed" --recipe "$recipe" --data "$BASE/$set" --action-noises $NOISES
}
export -f row data timed

todo=$(open_rows)
if [ -n "$todo" ]; then
  for set in $(awk '{ print $4 }' <<<"$todo" | sort -u); do
    [ -f "$BASE/$set/collection.json" ] || collect "$set"
  done
  # The features of each set, recipe and flags, once.
  echo "$todo" | cut -d ' ' -f 4- | sort -u | while read -r set recipe flags; do
    timed "$BASE/$set.prepare" agra prepare "$recipe" $(data "$set") $flags </dev/null
  done
  # Two moments of each task with masks, for the diagnosis.
  if [ ! -f "$BASE/probes/samples.json" ]; then
    tasks=$(wc -w <<<"$TASKS")
    timed "$BASE/probes" agra probes metaworld_wam --data.path "$BASE/$set" --simulator metaworld_20hz \
      --simulator-python "$SIMULATOR" ${TASKS:+--tasks $TASKS} --samples $((2 * (tasks ? tasks : 50))) --output "$BASE/probes"
  fi
  echo "$todo" | xargs -P "$LANES" -I{} bash -euc "row {}"
fi
python -m runs.metaworld table "$MEASURED"
if [ -z "$TASKS" ]; then agra leaderboard --benchmark metaworld; fi
