#!/usr/bin/env bash
# Retrofits SmolLM2-135M-Instruct to a ratio of 2 on a CPU, from import to report; README.md shows what it prints.
#   examples/smollm2/retrofit.sh SmolLM2-135M-Instruct runs/smollm2 [flags of Megatron, such as --bf16]
# The same command continues: a step whose output is complete is left out or returns at once.
set -euo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 MODEL RUN [flags of megatron-dmc train]" >&2
  exit 1
fi
model=$1 run=$2
shift 2

program() { "${PYTHON:-python}" -m megatron_dmc "$@"; }

# Sequences of 256 tokens, 2 a step. One order of the data for the whole recipe, with room to lengthen a stage.
length=256 batch=2
zero_out=${ZERO_OUT_STEPS:-40} retrofit=${RETROFIT_STEPS:-50} consolidate=${CONSOLIDATE_STEPS:-20}
total=${TOTAL_SAMPLES:-360}
# So few steps must learn fast: decisions start nearer to merging than published (5), and the ratio weighs more (1).
decisions=(--dmc-decision-bias 3 --dmc-loss-weight 30)

# train STAGE PREVIOUS STEPS FLAG...
train() {
  local stage=$1 previous=$2 steps=$3
  shift 3
  program train --dmc-stage "$stage" --pretrained-checkpoint "$previous" --save "$run/$stage" \
    --train-data-path "$run/data/train" --data-cache-path "$run/cache" --eval-iters 0 --dmc-target-cr 2 \
    --seq-length "$length" --micro-batch-size "$batch" --global-batch-size "$batch" --train-iters "$steps" \
    --dmc-total-samples "$total" --save-interval 50 --lr-decay-style constant "$@"
}

# measure MODEL NAME: 8 held-out sequences as wholes, in float32.
measure() {
  mkdir -p "$run/evaluation"
  program evaluate --model "$1" --data "$run/data/test" --seq-length "$length" --sequences 8 --dtype float32 \
    --path teacher-forced --json > "$run/evaluation/$2.part"
  mv "$run/evaluation/$2.part" "$run/evaluation/$2.json"
}

[ -e "$run/data" ] || program data prepare --python-source --tokenizer "$model" --output "$run/data"
[ -e "$run/base" ] || program convert import "$model" "$run/base"
measure "$run/base" base
train zero_out "$run/base" "$zero_out" --lr 1e-4 --lr-warmup-iters 5 "$@"
train retrofit "$run/zero_out" "$retrofit" --lr 5e-4 --lr-warmup-iters 5 --dmc-temperature 0.6 "${decisions[@]}" "$@"
train consolidate "$run/retrofit" "$consolidate" --lr 5e-4 --lr-decay-style cosine --min-lr 5e-5 \
  "${decisions[@]}" "$@"
measure "$run/consolidate" dmc
# Token by token through the cache as well, and whether both ways agree; slow on a CPU, so a short piece.
program evaluate --model "$run/consolidate" --data "$run/data/test" --seq-length 64 --sequences 2 --dtype float32
program convert export "$run/consolidate" "$run/export" --tokenizer "$model" --overwrite
program generate --model "$run/export" --prompt "def read_lines(path):" --max-new-tokens 16
program report "$run"
