# shellcheck shell=bash disable=SC2034 # STAGES and FLAGS are read by the scripts that source this file
# Sourced by train.sh and train.sbatch: the settings of a retrofit, and the flags of one stage. Table: README.md.
: "${BASE:?checkpoint made by megatron-dmc convert import}"
: "${DATA:?directory made by megatron-dmc data prepare}"
: "${RUN:?output directory}"
: "${TARGET_CR:=4}" "${SEQ_LENGTH:=4096}" "${GLOBAL_BATCH_SIZE:=1024}" "${MICRO_BATCH_SIZE:=1}"
: "${ZERO_OUT_STEPS:=250}" "${RETROFIT_STEPS:=18000}" "${CONSOLIDATE_STEPS:=2000}" "${SAVE_INTERVAL:=500}"

STAGES=(zero_out retrofit consolidate)
# Two variables that other tools leave behind and that lead astray.
unset TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS=1

# stage_flags STAGE PREVIOUS: fills the array FLAGS.
stage_flags() {
  local stage=$1 previous=$2
  local steps_name="${stage^^}_STEPS"
  local total=$(((ZERO_OUT_STEPS + RETROFIT_STEPS + CONSOLIDATE_STEPS) * GLOBAL_BATCH_SIZE))
  FLAGS=(
    --dmc-stage "$stage" --dmc-target-cr "$TARGET_CR" --dmc-total-samples "$total"
    --pretrained-checkpoint "$previous" --save "$RUN/$stage" --save-interval "$SAVE_INTERVAL"
    --train-data-path "$DATA/train" --valid-data-path "$DATA/validation" --test-data-path "$DATA/test"
    --data-cache-path "$RUN/cache" --train-iters "${!steps_name}" --eval-iters "${EVAL_ITERS:-0}"
    --seq-length "$SEQ_LENGTH" --global-batch-size "$GLOBAL_BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE"
  )
}
