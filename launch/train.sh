#!/usr/bin/env bash
# All three stages on one node, with torchrun. Settings come from variables (README.md), Megatron's flags from the
# command line: BASE=... DATA=... RUN=... launch/train.sh --bf16 --tensor-model-parallel-size 8
set -euo pipefail

program() { "${PYTHON:-python}" -m "$@"; }
# shellcheck source-path=SCRIPTDIR source=settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for stage in "${STAGES[@]}"; do
  stage_flags "$stage"
  # A stage that is finished returns at once, one that was interrupted continues.
  "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "${GPUS_PER_NODE:-1}" \
    -m megatron_dmc train "${FLAGS[@]}" "$@" || stopped "$stage" $?
done
