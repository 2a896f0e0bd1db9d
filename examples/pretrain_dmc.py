"""A Megatron pretraining script that retrofits DMC.

Five lines differ from a script that trains a plain GPT; they are numbered. Flags are Megatron's, and ``--dmc-*``:

    torchrun --nproc-per-node 8 examples/pretrain_dmc.py --dmc-stage zero_out --pretrained-checkpoint BASE \
        --save RUN/zero_out --tensor-model-parallel-size 8 --train-data-path DATA/train ...
"""

import sys

from megatron_dmc.training.pretrain import prepare


def main() -> None:
    """Run one stage, or this rank's part of it."""
    # 1. Before Megatron is imported: check the base checkpoint and add the flags of a Llama.
    run = prepare(sys.argv[1:])
    sys.argv[1:] = run.argv

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dmc.training.arguments import add_dmc_arguments
    from megatron_dmc.training.data_sets import build_data_sets
    from megatron_dmc.training.forward_step import forward_step
    from megatron_dmc.training.metrics import watch_steps
    from megatron_dmc.training.model_config import dmc_model_config

    # 2. Parse our flags beside Megatron's.
    args = parse_and_validate_args(extra_args_provider=add_dmc_arguments)
    # 3. Our model configuration, instead of gpt_config_from_args(args).
    model_config = dmc_model_config(args, start=run.start)
    # 4. metrics.jsonl in --save, and the early stops: --dmc-stop-file, --dmc-stop-at-cr.
    watch_steps(args)
    pretrain(
        cfg_container=pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_dataset_provider=build_data_sets,
        model_type=ModelType.encoder_or_decoder,
        # 5. A forward step that hands the micro-batch's coordinates to the layers.
        forward_step_func=forward_step,
    )


if __name__ == "__main__":
    main()
