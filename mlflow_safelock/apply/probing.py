"""Numerical proof that a model's attention heads are where somebody says they are.

Two things have to be true of the modules that are taken for output projections. Their input has to be the
heads' outputs side by side: the results of attention are replaced by numbers that say which head and which
place in it they belong to, and these have to arrive. And adding ``v`` to the input has to be the same as
adding ``W v`` to the output, as far as the whole model can tell, and not be the same as doing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm"}

_TOKENS = (11, 13)
"""How many tokens a probe has: two primes, of which one is not the width of a head."""

_EXACT, _ROUNDED = 1e-3, 0.1
"""Accepted difference between two ways to displace the heads, relative to what that changes: in float32, and
in dtypes of 16 bits, whose rounding many layers add up."""

_SIZE = 0.5
"""Size of the probing displacement, in standard deviations of the heads' outputs."""


def takes_head_outputs(
    model: PreTrainedModel, modules: Sequence[nn.Module], geometry: AttentionGeometry
) -> list[bool]:
    """Tell of each module whether its input is the outputs of the attention heads, side by side.

    Args:
        model: The model, with its weights in memory.
        modules: Modules of it.
        geometry: Its heads; the number of layers does not matter here.

    Returns:
        ``True`` for a module that runs once in a forward pass, with head ``h``'s output, and nothing else, at
        ``h * head_dim : (h + 1) * head_dim`` of its input. ``False`` also where attention runs in a kernel
        that is neither a matrix product nor ``scaled_dot_product_attention``.
    """
    heads = torch.arange(1.0, geometry.heads + 1)[:, None].expand(-1, geometry.head_dim)
    places = torch.arange(1.0, geometry.head_dim + 1).expand(geometry.heads, -1)
    found = [True] * len(modules)
    # Two passes, because float16 and bfloat16 cannot tell all places of all heads apart.
    for marks in (heads, places):
        seen: list[list[torch.Tensor]] = [[] for _ in modules]
        hooks = [
            module.register_forward_pre_hook(_keep_in(inputs), prepend=True)
            for module, inputs in zip(modules, seen, strict=True)
        ]
        tokens = _probe_tokens(model, geometry)
        with _removing(hooks), _Marked(marks, tokens.shape[1]):
            _outputs(model, tokens)
        expected = marks.flatten()
        for index, inputs in enumerate(seen):
            found[index] &= len(inputs) == 1 and _is_all(inputs[0], expected)
    return found


def check_displacing(
    model: PreTrainedModel, projections: Sequence[nn.Module], geometry: AttentionGeometry, name: str
) -> None:
    """Make sure that displacing the input of the projections is adding a constant to their output.

    Args:
        model: The model, with its weights in memory.
        projections: What is taken for its attention output projections.
        geometry: Its attention shape.
        name: What the projections are, for the error.

    Raises:
        UnsupportedArchitectureError: It is not, as the model's outputs show; or a projection does not run
            once in a forward pass, or gets the same input for all tokens, or has no influence.
    """
    tokens = _probe_tokens(model, geometry)
    seen: list[list[torch.Tensor]] = [[] for _ in projections]
    hooks = [
        projection.register_forward_pre_hook(_keep_in(inputs), prepend=True)
        for projection, inputs in zip(projections, seen, strict=True)
    ]
    with _removing(hooks):
        before = _outputs(model, tokens)
    for layer, inputs in enumerate(seen):
        _check_inputs(inputs, layer, geometry, name)
    generator = torch.Generator().manual_seed(0)
    pushes = [_SIZE * float(inputs[0].float().std()) * _random_like(inputs[0], generator) for inputs in seen]
    with torch.no_grad():
        constants = [
            projection(push[None]) - projection(torch.zeros_like(push)[None])
            for projection, push in zip(projections, pushes, strict=True)
        ]
    pairs = list(zip(projections, pushes, constants, strict=True))
    with _removing(p.register_forward_pre_hook(_add_before(push), prepend=True) for p, push, _ in pairs):
        displaced = _outputs(model, tokens)
    with _removing(p.register_forward_hook(_add_after(constant[0])) for p, _, constant in pairs):
        shifted = _outputs(model, tokens)
    change, difference = float((displaced - before).norm()), float((displaced - shifted).norm())
    allowed = (_EXACT if seen[0][0].dtype in (torch.float32, torch.float64) else _ROUNDED) * change
    if not change > 1e-6 * float(before.norm()) or not difference <= allowed:
        raise UnsupportedArchitectureError(
            f"Adding v to the input of {name} and adding W v to its output are not the same: the first "
            f"changes the model's outputs by {change:.3g}, and the two differ by {difference:.3g}."
        )


def _check_inputs(inputs: Sequence[torch.Tensor], layer: int, geometry: AttentionGeometry, name: str) -> None:
    if len(inputs) != 1:
        raise UnsupportedArchitectureError(
            f"In layer {layer}, {name} runs {len(inputs)} times in a forward pass, and not once."
        )
    width = geometry.heads * geometry.head_dim
    if inputs[0].shape[-1] != width:
        raise UnsupportedArchitectureError(
            f"In layer {layer}, the input of {name} is {inputs[0].shape[-1]} wide, and {geometry.heads} "
            f"heads x {geometry.head_dim} are {width}."
        )
    rows = inputs[0].reshape(-1, width)
    if not torch.isfinite(rows).all() or torch.equal(rows, rows[:1].expand_as(rows)):
        raise UnsupportedArchitectureError(
            f"In layer {layer}, the input of {name} is not finite, or the same for all tokens."
        )


class _Marked(TorchFunctionMode):
    """While it is on, the result of attention is replaced by marks, ``[heads, head_dim]`` for every token."""

    def __init__(self, marks: torch.Tensor, tokens: int) -> None:
        super().__init__()
        self._marks, self._tokens = marks, tokens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_attention(func, args, result):
            return result
        with torch._C.DisableTorchFunction():
            return self._marks[:, None].expand(-1, self._tokens, -1).reshape(result.shape).to(result)

    def _is_attention(self, func: Callable[..., Any], args: Any, result: Any) -> bool:
        heads, head_dim = self._marks.shape
        if not isinstance(result, torch.Tensor) or result.shape[-2:] != (self._tokens, head_dim):
            return False
        if result.shape[:-2].numel() != heads:
            return False
        if func is functional.scaled_dot_product_attention:
            return True
        # Probabilities, [.., tokens, tokens], times values.
        return func.__name__ in _MATRIX_PRODUCTS and args[0].shape[-2:] == (self._tokens, self._tokens)


def _probe_tokens(model: PreTrainedModel, geometry: AttentionGeometry) -> torch.Tensor:
    try:
        module: Any = model.get_input_embeddings()
        embeddings, offloaded = module.weight, hasattr(module, "_hf_hook")
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no table of token embeddings, so it cannot be run on tokens to find "
            f"something out about it: {str(error).strip() or type(error).__name__}."
        ) from error
    if embeddings.device.type == "meta" and not offloaded:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is loaded without its weights, so nothing can be found out about it."
        )
    width = next(width for width in _TOKENS if width != geometry.head_dim)
    drawn = torch.randint(embeddings.shape[0], (1, width), generator=torch.Generator().manual_seed(0))
    return drawn if offloaded else drawn.to(embeddings.device)


@torch.no_grad()
def _outputs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head, in float64 where the device has it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        outputs: torch.Tensor = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, return_dict=True
        )[0]
    except Exception as error:  # each model class has its own ways to fail
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} does not run on {tokens.shape[1]} random tokens: {error}."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    return outputs.double() if outputs.device.type != "mps" else outputs.float()


@contextmanager
def _removing(hooks: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield


def _keep_in(inputs: list[torch.Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _module, arguments: inputs.append(arguments[0].detach())


def _add_before(push: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, arguments: (arguments[0] + push, *arguments[1:])


def _add_after(constant: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    return lambda _module, _arguments, output: output + constant


def _random_like(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(inputs.shape[-1], generator=generator).to(inputs)


def _is_all(inputs: torch.Tensor, expected: torch.Tensor) -> bool:
    if inputs.shape[-1] != len(expected):
        return False
    rows = inputs.reshape(-1, len(expected)).float().cpu()
    return torch.equal(rows, expected.expand_as(rows))
