"""One order of the data for all stages: its length is that of the recipe, not of a stage."""

from types import SimpleNamespace

import pytest

from megatron_dmc.training import data_sets


@pytest.mark.parametrize(("total", "asked"), [(500, 500), (None, 130)])
def test_the_order_is_that_of_the_whole_recipe(monkeypatch, total, asked):
    names = "seed seq_length split data_cache_path mmap_bin_files reset_position_ids reset_attention_mask eod_mask_loss"
    names += " create_attention_mask_in_dataloader dataloader_inter_document_masking mock_data"
    args = SimpleNamespace(**dict.fromkeys(names.split()), context_parallel_size=1)
    args.dmc_total_samples, args.dmc_first_sample = total, 30
    seen = []
    monkeypatch.setattr(data_sets, "get_args", lambda: args)
    monkeypatch.setattr(data_sets, "get_tokenizer", lambda: None)
    monkeypatch.setattr(data_sets, "get_blend_and_blend_per_split", lambda args: (None, [None] * 3))
    monkeypatch.setattr(data_sets, "GPTDatasetConfig", lambda **settings: settings)
    builder = SimpleNamespace(build=lambda: ("train", "valid", "test"))
    monkeypatch.setattr(
        data_sets, "BlendedMegatronDatasetBuilder", lambda kind, sizes, *_: seen.append(sizes) or builder
    )
    assert data_sets.build_data_sets((100, None, 7)) == ("train", "valid", "test")
    assert seen == [[asked, None, 7]]
