"""What travels with the weights: no file of a tokenizer is lost on any way, token ids are checked."""

import json
import shutil

import pytest

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from megatron_dmc.checkpoint.companions import COMPANION_NAMES, companion_files, token_ids
from megatron_dmc.data.corpus import Corpus
from megatron_dmc.data.prepare import Split, prepare_directory
from tests.checkpoints_convert.models import write_model

UNVERIFIED = Options(verify=False)


@pytest.fixture
def chat_model(tmp_path, tokenizer_directory):
    """A model with every file that a tokenizer may have."""
    directory = write_model(tmp_path / "hf")
    for name in COMPANION_NAMES:
        (directory / name).write_text(json.dumps({name: 360}))  # also a token that was added behind the others
    shutil.copytree(tokenizer_directory, directory, dirs_exist_ok=True)
    return directory


def _contents(directory):
    return {path.name: path.read_bytes() for path in companion_files(directory)}


def test_every_file_survives_the_way_through_megatron(chat_model, tmp_path):
    import_checkpoint(chat_model, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert _contents(tmp_path / "back") == _contents(chat_model)
    assert "chat_template.jinja" in _contents(tmp_path / "back")


def test_every_file_survives_the_way_through_prepared_data(chat_model, tmp_path, text_files):
    """The way of the quickstart: data are prepared with the user's tokenizer, the export takes the copy beside them."""
    prepare_directory(Corpus(tuple(text_files)), tmp_path / "data", tokenizer=chat_model, split=Split(1, 0, 0))
    import_checkpoint(chat_model, tmp_path / "megatron", options=UNVERIFIED)
    tokenizer = tmp_path / "data" / "tokenizer"
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", tokenizer=tokenizer, options=UNVERIFIED)
    assert _contents(tmp_path / "back") == _contents(tokenizer) == _contents(chat_model)


def test_ids_of_generation_count_more_than_those_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert token_ids(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 3]}


@pytest.mark.parametrize("value", ["2", 1.5, True, [2, "3"], {}])
def test_what_is_no_token_id_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match="eos_token_id"):
        token_ids(tmp_path)
