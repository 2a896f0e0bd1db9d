#!/usr/bin/env bash
# Teaches SmolLM2-135M-Instruct on a CPU to evict three of four tokens from its cache (DMS), from import to report;
# README.md shows what it prints.
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

# Sequences of 256 tokens, 2 a step. Tokens stay for 32 positions whatever was decided.
length=256 batch=2 window=32
target=${TARGET_CR:-4} pace=${STEPS_PER_UNIT:-50} steps=${RETROFIT_STEPS:-150}
# One order of the data for the whole recipe, with room to go on.
total=${TOTAL_SAMPLES:-2000}

# measure NAME MODEL FLAG...: 16 held-out sequences in float32, beside the same weights without compression.
measure() {
  local name=$1 measured=$2
  shift 2
  mkdir -p "$run/evaluation"
  program evaluate --model "$measured" --data "$run/data/test" --seq-length "$length" --sequences 16 --dtype float32 \
    --reference none --match-tokens 32 --json "$@" > "$run/evaluation/$name.part"
  mv "$run/evaluation/$name.part" "$run/evaluation/$name.json"
}

[ -e "$run/data" ] || program data prepare --python-source --tokenizer "$model" --output "$run/data"
[ -e "$run/base" ] || program convert import "$model" "$run/base"

# Only the adapters that decide learn, from the logits of the same model without eviction.
program train --dmc-stage retrofit --dmc-method dms --dmc-decision-source adapter --dmc-train decisions \
  --dmc-distill forward --dmc-window-size "$window" --dmc-target-cr "$target" --dmc-steps-per-unit "$pace" \
  --pretrained-checkpoint "$run/base" --save "$run/retrofit" --save-interval "$pace" \
  --train-data-path "$run/data/train" --data-cache-path "$run/cache" --eval-iters 0 --seq-length "$length" \
  --micro-batch-size "$batch" --global-batch-size "$batch" --train-iters "$steps" --dmc-total-samples "$total" \
  --lr "${LEARNING_RATE:-1e-4}" --lr-decay-style constant "$@"

# Whole sequences and decoding through the cache, which must agree; then policies that need no training, whose budget
# gives as many resident entries on average as the model above at its ratio of 4.
measure dms "$run/retrofit" --tokens-trained "$((length * batch * steps))"
for policy in h2o tova; do
  measure "$policy" "$run/base" --path decode --policy "$policy" --budget "${BUDGET:-63}" --tokens-trained 0
done
program convert export "$run/retrofit" "$run/export" --tokenizer "$model" --overwrite
program generate --model "$run/export" --prompt "def read_lines(path):" --max-new-tokens 16
program report "$run"
program report "$run"/evaluation/*.json --output "$run/quality"
