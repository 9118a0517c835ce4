"""A Llama under a name that nobody knows, and with something else for an output projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.models import tiny_model

UNKNOWN = "tests-unknown"
HEADS, HEAD_DIM = 4, 8


class UnknownConfig(LlamaConfig):
    model_type = UNKNOWN


def unknown_model(projection: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> PreTrainedModel:
    """A tiny model whose output projections are what ``projection`` makes of the Llama's."""
    llama = tiny_model("llama")
    values = {name: value for name, value in llama.config.to_dict().items() if name != "model_type"}
    model = LlamaForCausalLM(UnknownConfig(**values))
    model.load_state_dict(llama.state_dict())
    for layer in model.model.layers:
        layer.self_attn.o_proj = projection(layer.self_attn.o_proj)
    return model.eval()


class Before(nn.Module):
    """Does something to the heads' outputs before they are projected."""

    def __init__(self, linear: nn.Linear, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.change = linear, change

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.linear(self.change(outputs))


class Halves(nn.Module):
    """Two projections in place of one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.first(outputs) + self.second(outputs)


class WeightOnly(nn.Module):
    """Uses the projection's weight and does not call it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(outputs, self.linear.weight)


class Squared(nn.Linear):
    """Not linear at all."""

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return super().forward(outputs) ** 2


def squared(linear: nn.Linear) -> nn.Module:
    made = Squared(linear.in_features, linear.out_features, bias=False)
    made.load_state_dict(linear.state_dict())
    return made


def reversed_heads(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.unflatten(-1, (HEADS, HEAD_DIM)).flip(-2).flatten(-2)
