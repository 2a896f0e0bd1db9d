"""An exported model in transformers, and batches for it."""

import torch

from megatron_dmc.config import DMCConfig
from tests.inference.model_directory import VOCAB_SIZE

SETTINGS = DMCConfig(decision_bias=-1.0, window_size=12)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
PAD = 0
TOLERANCE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD}


def load(directory, **options):
    """The model in ``directory``, ready for inference."""
    import transformers

    import megatron_dmc.hf  # noqa: F401  registers the classes

    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def random_tokens(batch=3, length=50, seed=0):
    """Token ids [B, S]."""
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def our_logits(ours, token_BS):
    """[B, S, V] of our engine's model."""
    return ours.logits(ours.forward(token_BS.T)).transpose(0, 1)


def padded(prompts, side):
    """Token ids [B, S] and attention mask with padding on one side."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        padding, zeros = [PAD] * (longest - len(prompt)), [0] * (longest - len(prompt))
        rows.append(padding + prompt if side == "left" else prompt + padding)
        masks.append(zeros + [1] * len(prompt) if side == "left" else [1] * len(prompt) + zeros)
    return torch.tensor(rows), torch.tensor(masks)
