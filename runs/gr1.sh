#!/usr/bin/env bash
# AGRA on the RoboCasa GR1 demonstrations, one machine with several GPUs: the video DiT adapts for 5k steps, then the joint
# stage runs for 80k on 1,000 demonstrations of each of the 24 tasks, or with PRESETS=gr1_few_shot for 40k on 100 of each.
# Batch, rates and weights are C.3's. Interrupted, by SIGTERM or by force, it goes on where it was, also with another number
# of GPUs. What fits is said by
#   agra plan agra_dino_l8 --with gr1 --gpus 8 --gpu-memory 80
set -euo pipefail

PRESETS=${PRESETS:-gr1} OUT=${OUT:-outputs/gr1} GPUS=${GPUS:-8} RECIPE=${RECIPE:-agra_dino_l8}
DATA=${DATA:-}                                  # a folder that holds the 24 tasks' own; else they come from the hub
COSMOS=${COSMOS:-nvidia/Cosmos-Predict2.5-2B}   # hub id, or a local folder in its layout
COMMON="--with $PRESETS ${DATA:+--data.path $DATA} --data.cache $OUT/cache --device cuda"
train() { torchrun --standalone --nproc-per-node "$GPUS" -m agra.cli train "$@" --parallel.activation-checkpointing 1; }

agra prepare "$RECIPE" $COMMON
train "$RECIPE" $COMMON --stage adapt --init-from "$COSMOS" --output "$OUT/adapt"
train "$RECIPE" $COMMON --stage joint --init-from "$OUT/adapt" --output "$OUT/joint"
agra export "$OUT/joint" --output "$OUT/policy"
