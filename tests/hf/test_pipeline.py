"""Exported models where scripts use them: pipelines and streamers, with a tokenizer of words."""

import threading

import pytest

from tests.hf.exported import GREEDY, PAD, load
from tests.inference.model_directory import VOCAB_SIZE

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("megatron_dmc.hf")


PROMPTS = ["w5 w6 w7 w8 w9 w10", "w11", "w12 w13 w14"]


@pytest.fixture(scope="module")
def tokenizer():
    """One word for every id, so that any text can be read back."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    by_word = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    by_word.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token=f"w{PAD}", padding_side="left", clean_up_tokenization_spaces=False
    )


def continued(model, tokenizer, prompt):
    """The new text of one prompt by itself."""
    tokens = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**tokens, **GREEDY)[0, tokens["input_ids"].shape[1] :]
    return tokenizer.decode(found)


def test_a_pipeline_continues_a_batch(directory, tokenizer):
    model = load(directory)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    answers = pipeline(PROMPTS, return_full_text=False, **GREEDY)
    expected = [continued(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [answer[0]["generated_text"].strip() for answer in answers] == expected
    assert all(len(text.split()) == GREEDY["max_new_tokens"] for text in expected)


def test_a_text_streams(model, tokenizer):
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = tokenizer(PROMPTS[0], return_tensors="pt")
    thread = threading.Thread(target=model.generate, kwargs={**tokens, "streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == continued(model, tokenizer, PROMPTS[0])
    assert len(pieces) > GREEDY["max_new_tokens"] // 2
