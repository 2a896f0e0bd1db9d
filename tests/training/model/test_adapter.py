"""Which tensors belong to an adapter, and what learns where adapters alone do."""

import torch

from megatron_dmc.training.model.adapter import is_of_adapter, train_adapters_alone


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_qkv = torch.nn.Linear(4, 4)
        self.decision_norm = torch.nn.RMSNorm(4)
        self.decision = torch.nn.Linear(4, 2, bias=False)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = Attention()


class Model(torch.nn.Module):
    pre_process = True

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(3, 4)
        self.layer = Layer()


def test_names():
    prefix = "decoder.layers.0.self_attention."
    assert is_of_adapter(prefix + "decision.weight")
    assert is_of_adapter(prefix + "decision_norm.weight")
    assert not is_of_adapter(prefix + "linear_qkv.weight")
    assert not is_of_adapter("decision.weight")


def test_everything_else_is_frozen_and_gradients_pass_through_it():
    model = Model()
    train_adapters_alone(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"layer.self_attention.decision_norm.weight", "layer.self_attention.decision.weight"}
    hidden = model.embedding(torch.tensor([0, 2]))
    assert hidden.requires_grad
    with torch.no_grad():
        assert not model.embedding(torch.tensor([1])).requires_grad
