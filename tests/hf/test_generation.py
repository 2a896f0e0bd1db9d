"""``generate`` of an exported model: the cases that transformers asks of its own Llama."""

import copy

import pytest
import torch

from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from tests.hf.exported import GREEDY, PAD, PROMPTS, TOLERANCE, load, our_logits, padded, random_tokens

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("megatron_dmc.hf")


def generated(model, *args, **options):
    """The new tokens of a greedy text [B, S]."""
    return model.generate(*args, **(GREEDY | {"return_dict_in_generate": False} | options))


def alone(model, prompt, **options):
    """What is generated for one prompt by itself."""
    token_1S = torch.tensor([prompt])
    # A prompt may hold the padding token: a mask says that it is none.
    return generated(model, token_1S, attention_mask=torch.ones_like(token_1S), **options)[0, len(prompt) :].tolist()


def test_greedy_equals_the_most_likely_tokens_of_whole_forward_passes(model, ours):
    token_BS = random_tokens(3, 20)
    expected_BS = token_BS
    for _ in range(GREEDY["max_new_tokens"]):
        next_B = our_logits(ours, expected_BS)[:, -1].argmax(dim=-1)
        expected_BS = torch.cat([expected_BS, next_B.unsqueeze(-1)], dim=1)
    assert torch.equal(generated(model, token_BS), expected_BS)
    assert torch.equal(generated(model, token_BS, use_cache=False), expected_BS)
    assert torch.equal(generated(model, token_BS, cache_implementation="dynamic"), expected_BS)


def test_greedy_texts_equal_our_engine(model, ours):
    token_BS, mask_BS = padded(PROMPTS, "left")
    outputs = generated(model, token_BS, attention_mask=mask_BS, max_new_tokens=20, return_dict_in_generate=True)
    requests = Engine(ours).generate(PROMPTS, SamplingParams(max_new_tokens=20))
    assert outputs.sequences[:, token_BS.shape[1] :].tolist() == [request.output for request in requests]
    usage = outputs.past_key_values.usage()
    assert usage.num_entries == sum(request.usage.num_entries for request in requests)
    assert usage.compression_ratio > 1.2
    assert outputs.past_key_values.get_seq_length() == token_BS.shape[1] + 19


def test_what_generate_returns(model, ours):
    token_BS = random_tokens(2, 20)
    outputs = generated(
        model,
        token_BS,
        repetition_penalty=1.5,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    steps = GREEDY["max_new_tokens"]
    assert outputs.sequences.shape == (2, 20 + steps)
    expected = our_logits(ours, outputs.sequences)[:, 19:-1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), expected, **TOLERANCE)
    scores = torch.stack(outputs.scores, dim=1)
    assert torch.equal(scores.argmax(dim=-1), outputs.sequences[:, 20:])
    assert not torch.equal(scores, torch.stack(outputs.logits, dim=1))
    assert len(outputs.hidden_states) == steps
    columns = {tuple(state.shape[:2]) for step in outputs.hidden_states[1:] for state in step}
    assert (outputs.hidden_states[0][0].shape[:2], columns) == ((2, 20), {(2, 1)})
    assert outputs.past_key_values.get_seq_length() == 20 + steps - 1


def test_samples_are_drawn_from_the_model(model, ours):
    """The same draws from whole forward passes; texts of one prompt are rows of a larger batch."""
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 6, "eos_token_id": None}
    token_BS = random_tokens(2, 10)
    torch.manual_seed(1)
    found_BS = model.generate(token_BS, num_return_sequences=3, **options)
    torch.manual_seed(1)
    expected_BS = token_BS.repeat_interleave(3, dim=0)
    for _ in range(6):
        probability_BV = (our_logits(ours, expected_BS)[:, -1] / 0.7).softmax(dim=-1)
        expected_BS = torch.cat([expected_BS, torch.multinomial(probability_BV, 1)], dim=1)
    assert torch.equal(found_BS, expected_BS)
    assert len(found_BS.unique(dim=0)) == 6


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_a_padded_batch_equals_each_prompt_alone(model, chunk):
    """Whatever the chunk, in some of which short prompts have padding alone."""
    token_BS, mask_BS = padded(PROMPTS, "left")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    position_BS = (mask_BS.cumsum(dim=1) - 1).masked_fill(mask_BS == 0, 1)
    for options in ({}, {"position_ids": position_BS}, {"past_key_values": hf.DMCCache(model.config, block_size=4)}):
        found_BS = generated(model, token_BS, attention_mask=mask_BS, prefill_chunk_size=chunk, **options)
        assert found_BS[:, token_BS.shape[1] :].tolist() == expected


def test_without_a_mask_every_column_is_read(model, ours):
    token_BS = torch.tensor([[5, PAD, 7, PAD, 9]])
    expected = our_logits(ours, token_BS)[0, -1].argmax().item()
    options = GREEDY | {"max_new_tokens": 1, "pad_token_id": None}
    assert model.generate(token_BS, attention_mask=None, **options)[0, -1] == expected


def test_a_text_that_ends_leaves_the_others_alone(model):
    """A finished row is continued with padding, as transformers does."""
    token_BS, mask_BS = padded(PROMPTS, "left")
    texts = [alone(model, prompt) for prompt in PROMPTS]
    ends = [texts[0][2], texts[2][4]]
    found_BS = generated(model, token_BS, attention_mask=mask_BS, eos_token_id=ends)
    assert any(set(ends).isdisjoint(text) for text in texts), "no text goes on to the last step"
    for row, text in zip(found_BS[:, token_BS.shape[1] :].tolist(), texts, strict=True):
        length = next((place + 1 for place, token in enumerate(text) if token in ends), len(text))
        assert row == text[:length] + [PAD] * (len(row) - length)


def test_embeddings_equal_their_tokens(model):
    token_BS = random_tokens(2, 20)
    embedded_BSH = model.get_input_embeddings()(token_BS)
    expected_BS = generated(model, token_BS)
    assert torch.equal(generated(model, inputs_embeds=embedded_BSH), expected_BS[:, 20:])
    assert torch.equal(generated(model, token_BS, inputs_embeds=embedded_BSH), expected_BS)
    other_BS = generated(model, token_BS, inputs_embeds=torch.rand_like(embedded_BSH))
    assert not torch.equal(other_BS, expected_BS)


class Passes:
    """Counts the tokens of every pass through the first layer."""

    def __init__(self, model):
        self.counts = []
        self._layer = model.model.layers[0]

    def __enter__(self):
        hook = lambda layer, inputs: self.counts.append(inputs[0].shape[1])  # noqa: E731
        self._handle = self._layer.register_forward_pre_hook(hook)
        return self.counts

    def __exit__(self, *error):
        self._handle.remove()


def same_cache(found, expected):
    """Whether two caches hold the same: the lengths of all heads."""
    return found.usage().entries == expected.usage().entries and found.get_seq_length() == expected.get_seq_length()


@pytest.mark.parametrize("given", ["the whole text", "new tokens", "embeddings"])
def test_a_conversation_goes_on_at_the_cost_of_its_new_tokens(model, given):
    """Each turn is one pass over its tokens (and the last of the answer before it), and equals a fresh run."""
    cache, text_BS = hf.DMCCache(model.config, block_size=4), random_tokens(2, 12)
    for turn, length in enumerate((12, 9, 1)):
        if turn:
            text_BS = torch.cat([text_BS, random_tokens(2, length, seed=turn)], dim=1)
        num_new = text_BS.shape[1] - cache.get_seq_length()
        inputs = {
            "the whole text": {"input_ids": text_BS},
            "new tokens": {"input_ids": text_BS[:, -num_new:], "attention_mask": torch.ones_like(text_BS)},
            "embeddings": {"inputs_embeds": model.get_input_embeddings()(text_BS)},
        }[given]
        with Passes(model) as counts:
            answer_BS = generated(model, past_key_values=cache, **inputs)[:, -8:]
        assert counts == [2 * num_new] + 7 * [2]
        fresh = generated(model, text_BS, return_dict_in_generate=True)
        assert torch.equal(answer_BS, fresh.sequences[:, -8:])
        assert same_cache(cache, fresh.past_key_values)
        text_BS = fresh.sequences


def test_one_text_in_two_calls_equals_one_call(model):
    """Three steps, then one: the same tokens, logits and cache as four."""
    token_BS, mask_BS = padded(PROMPTS, "left")
    options = {"return_dict_in_generate": True, "output_logits": True}
    whole = generated(model, token_BS, attention_mask=mask_BS, max_new_tokens=4, **options)
    first = generated(model, token_BS, attention_mask=mask_BS, max_new_tokens=3, **options)
    longer_BS = torch.cat([mask_BS, mask_BS.new_ones(len(PROMPTS), 3)], dim=1)
    second = generated(
        model,
        first.sequences,
        attention_mask=longer_BS,
        past_key_values=first.past_key_values,
        max_new_tokens=1,
        **options,
    )
    assert torch.equal(second.sequences, whole.sequences)
    torch.testing.assert_close(second.logits[0], whole.logits[3], **TOLERANCE)
    assert same_cache(second.past_key_values, whole.past_key_values)


def test_later_turns_may_be_padded_too(model):
    """Rows whose second turns differ in length: padding stands between the turns, and every row equals itself alone."""
    token_BS, mask_BS = padded(PROMPTS, "left")
    cache = hf.DMCCache(model.config)
    text_BS = generated(model, token_BS, attention_mask=mask_BS, past_key_values=cache)
    turn_BS, turn_mask_BS = padded([[7, 8, 9], [11], [3, 3, 3, 3, 3], [2, 4]], "left")
    mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(PROMPTS), 8), turn_mask_BS], dim=1)
    whole_BS = torch.cat([text_BS, turn_BS], dim=1)
    found_BS = generated(model, whole_BS, attention_mask=mask_BS, past_key_values=cache)
    assert torch.equal(found_BS, generated(model, whole_BS, attention_mask=mask_BS))
    for row in range(len(PROMPTS)):
        text = whole_BS[row][mask_BS[row].bool()].tolist()
        assert found_BS[row, whole_BS.shape[1] :].tolist() == alone(model, text)


def test_a_prefix_is_read_once_and_copied(model):
    prefix_BS, cache = random_tokens(1, 24), hf.DMCCache(model.config, block_size=4)
    with torch.no_grad():
        model(prefix_BS, past_key_values=cache)
    before = cache.usage()
    for seed in (1, 2):
        text_BS = torch.cat([prefix_BS, random_tokens(1, 5, seed=seed)], dim=1)
        copied = copy.deepcopy(cache)
        with Passes(model) as counts:
            found_BS = generated(model, text_BS, past_key_values=copied)
        assert counts[0] == 5
        assert torch.equal(found_BS, generated(model, text_BS))
        copied.paged.check_integrity()
        assert cache.usage() == before


@pytest.mark.parametrize("sampled", [False, True])
def test_beams_equal_those_without_a_cache(model, sampled):
    """Beams that go on are copied; without a cache every step reads everything again."""
    token_BS, mask_BS = padded(PROMPTS, "left")
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": sampled, "attention_mask": mask_BS}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generated(model, token_BS, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert len(found[0]) == 2 * len(PROMPTS)
    if not sampled:
        assert not torch.equal(found[0][::2], generated(model, token_BS, attention_mask=mask_BS)), "beams find no more"


def test_samples_go_on_from_one_prefix(model):
    prefix_BS, cache = random_tokens(1, 24), hf.DMCCache(model.config, block_size=4)
    with torch.no_grad():
        model(prefix_BS, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    options = {"do_sample": True, "num_return_sequences": 3}
    found = []
    for past in (cache, None):
        torch.manual_seed(0)
        found.append(generated(model, torch.cat([prefix_BS, prefix_BS[:, :2]], dim=1), past_key_values=past, **options))
    assert torch.equal(*found)
    cache.paged.check_integrity()


def test_rows_of_a_cache_are_chosen(model):
    token_BS, mask_BS = padded(PROMPTS, "left")
    cache = hf.DMCCache(model.config, block_size=4)
    text_BS = generated(model, token_BS, attention_mask=mask_BS, past_key_values=cache)
    chosen = torch.tensor([2, 0, 2])
    cache.batch_select_indices(chosen)
    mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(PROMPTS), 8)], dim=1)[chosen]
    went_on_BS = generated(model, text_BS[chosen], attention_mask=mask_BS, past_key_values=cache)
    assert torch.equal(went_on_BS, generated(model, text_BS[chosen], attention_mask=mask_BS))
    cache.paged.check_integrity()


def test_a_cache_that_was_reset_is_as_new(model):
    cache, token_BS = hf.DMCCache(model.config), random_tokens(2, 10)
    assert not cache.is_initialized
    first_BS = generated(model, token_BS, past_key_values=cache)
    assert (cache.is_initialized, cache.batch_size) == (True, 2)
    cache.reset()
    assert (cache.is_initialized, cache.get_seq_length()) == (False, 0)
    assert torch.equal(generated(model, token_BS, past_key_values=cache), first_BS)
    cache.reset()
    assert torch.equal(generated(model, token_BS[:1], past_key_values=cache), first_BS[:1])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_logits_to_keep(model, kept):
    token_BS = random_tokens(2, 10)
    with torch.no_grad():
        expected = model(token_BS).logits[:, -kept:]
        torch.testing.assert_close(model(token_BS, logits_to_keep=kept).logits, expected, **TOLERANCE)
    assert torch.equal(generated(model, token_BS, logits_to_keep=kept), generated(model, token_BS))


def test_bfloat16_generates(directory):
    model = load(directory, dtype=torch.bfloat16)
    assert generated(model, random_tokens(2, 10)).shape == (2, 18)


def test_more_embeddings_than_before(directory):
    model = load(directory)
    token_BS = random_tokens(2, 10)
    expected_BS = generated(model, token_BS)
    model.resize_token_embeddings(310)
    found_BS = generated(model, token_BS, suppress_tokens=list(range(300, 310)))
    assert torch.equal(found_BS, expected_BS)


def test_saved_and_loaded_it_generates_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    token_BS = random_tokens(2, 10)
    assert torch.equal(generated(load(tmp_path / "again"), token_BS), generated(model, token_BS))
