#!/usr/bin/env bash
# AGRA on the RoboCasa GR1 demonstrations, on one machine with several GPUs. The video DiT adapts for 5k steps. The joint stage
# then runs for 80k steps on 1,000 demonstrations of each of the 24 tasks, or with PRESETS=gr1_few_shot for 40k steps on 100 of
# each. Batch, learning rates and loss weights are those of C.3. After SIGTERM or a kill, the same command resumes the run, also
# on another number of GPUs. The defaults are the layout that the plan proposes for 8 GPUs of 80 GB:
#   agra plan agra_dino_l8 --with gr1 --gpus 8 --gpu-memory 80
set -euo pipefail

PRESETS=${PRESETS:-gr1} OUT=${OUT:-outputs/gr1} GPUS=${GPUS:-8} RECIPE=${RECIPE:-agra_dino_l8}
DATA=${DATA:-}                                  # a folder with the 24 datasets; by default they come from the hub
COSMOS=${COSMOS:-nvidia/Cosmos-Predict2.5-2B}   # hub id, or a local folder in its layout
COMMON="--with $PRESETS ${DATA:+--data.path $DATA} --data.cache $OUT/cache --device cuda"
# A local folder also holds the VAE and the text encoder.
[ ! -d "$COSMOS" ] || COMMON+=" --method.model.codec.source $COSMOS --method.model.text.source $COSMOS"
CHECKPOINTING=${CHECKPOINTING:-1} MICRO_BATCHES=${MICRO_BATCHES:-2}
# Seconds from SIGTERM to SIGKILL, to finish a step and save. torchrun's default is 30. torch 2.11 does not read this variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=290
train() {
  torchrun --standalone --nproc-per-node "$GPUS" -m agra.cli train "$@" \
    --parallel.activation-checkpointing "$CHECKPOINTING" --parallel.gradient-accumulation-steps "$MICRO_BATCHES"
}

agra prepare "$RECIPE" $COMMON
train "$RECIPE" $COMMON --stage adapt --init-from "$COSMOS" --output "$OUT/adapt"
train "$RECIPE" $COMMON --stage joint --init-from "$OUT/adapt" --output "$OUT/joint"
agra export "$OUT/joint" --output "$OUT/policy"
