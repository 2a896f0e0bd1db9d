# shellcheck shell=bash disable=SC2034 # STAGES and FLAGS are read by the scripts that source this file
# Sourced by train.sh and train.sbatch, which say how to run the program once (`program MODULE ARGUMENT`). It turns the
# variables of README.md into stages and flags, and knows where a stage stands.

# Two variables that other tools leave behind and that lead astray.
unset TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS=1

order=$(program megatron_dmc.recipes.launch)
mapfile -t STAGES <<< "$order"

# stage_flags STAGE: fills the array FLAGS.
stage_flags() {
  local lines
  lines=$(program megatron_dmc.recipes.launch "$1")
  mapfile -t FLAGS <<< "$lines"
}

# stopped STAGE STATUS: leaves after a stage that is not finished, with 75 where the same command continues. Neither
# torchrun nor srun hands on the status of a process: the stage itself has recorded how it ended.
stopped() {
  local status=0
  program megatron_dmc.runs.completeness "$RUN/$1" || status=$?
  if [ "$status" -eq 75 ]; then
    echo "$1 was interrupted: the same command continues" >&2
    exit 75
  fi
  exit "$2"
}
