"""Training data in one order for all stages of a recipe."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dmc.data.manifest import read_manifest


def build_data_sets(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> Any:
    """Train, validation and test data sets, as Megatron's ``pretrain()`` asks for them.

    The order of the training data depends on the seed and the number of samples of the *whole recipe*
    (``--dmc-total-samples``), not on the length of this stage, so that a stage continues where the former stopped.
    Without it they are those up to the end of this stage, also after a resume.
    """
    args = get_args()
    total = args.dmc_total_samples or args.dmc_first_sample + num_samples[0]
    sizes = [total, num_samples[1], num_samples[2]]
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if args.eod_mask_loss:
        _check_end_of_document([part for part in (blend, *(blend_per_split or ())) if part is not None])
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split if blend_per_split is None else None,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, sizes, _reads_data, config).build()


build_data_sets.is_distributed = True  # type: ignore[attr-defined]


def _check_end_of_document(blends: list[Any]) -> None:
    """The tokenizer that Megatron was given ends documents as the data does, where the data says how."""
    eod = get_tokenizer().eod
    for prefix in (prefix for prefixes, _ in blends for prefix in prefixes):
        manifest = read_manifest(prefix)
        if manifest is not None and manifest["eod"] != eod:
            raise ValueError(
                f"--eod-mask-loss: documents of {prefix} end with {manifest['eod']}, those of --tokenizer-type with "
                f"{eod}: leave --tokenizer-type out"
            )


def _reads_data() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0
