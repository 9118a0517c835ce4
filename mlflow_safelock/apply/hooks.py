"""Hooks that add a lock's displacement to what goes into an output projection, whatever the projection is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mlflow_safelock.apply.displacement import check_kept
from mlflow_safelock.errors import AlphaError


class AddToInput:
    """A forward pre-hook that adds a constant to a module's first input, positional or by name.

    Args:
        displacement: What is added, float64 of shape ``[features]``.
        layer: The layer that it is for, for the error.
        alpha: The strength that it was computed for, for the error.

    Attributes:
        displacement: What is added.
    """

    def __init__(self, displacement: torch.Tensor, layer: int, alpha: float) -> None:
        self.displacement = displacement
        self._cast = displacement
        # Found out beforehand: a model that runs compiled cannot look at numbers.
        self._faults = dict(_faults(displacement, layer, alpha))

    def check(self, dtype: torch.dtype | None) -> None:
        """Raise AlphaError if an input of this dtype cannot be pushed: the displacement would be lost."""
        if dtype in self._faults:
            raise self._faults[dtype]

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> tuple[Any, ...]:
        """Return the inputs with the displacement added to the first, in that one's dtype.

        Without those by name where the hook was carried to another module as one that does not get them.

        Raises:
            AlphaError: The displacement is lost in that dtype.
        """
        if named is None:
            first, *others = inputs
            return (self._added_to(first), *others)
        if inputs:
            first, *others = inputs
            return (self._added_to(first), *others), named
        name = next(iter(named))
        return inputs, {**named, name: self._added_to(named[name])}

    def _added_to(self, first: torch.Tensor) -> torch.Tensor:
        if self._cast.dtype == first.dtype and self._cast.device == first.device:
            return first + self._cast
        self.check(first.dtype)
        cast = self.displacement.to(first)
        if type(cast) is torch.Tensor:  # and not what stands for one while a model is traced
            self._cast = cast
        return first + cast


def _faults(displacement: torch.Tensor, layer: int, alpha: float) -> Iterator[tuple[torch.dtype, AlphaError]]:
    """The dtypes in which a displacement is lost."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        try:
            check_kept(displacement, dtype, layer, alpha)
        except AlphaError as error:
            yield dtype, error


def input_dtype(projection: nn.Module) -> torch.dtype | None:
    """The dtype in which a projection takes its input, as far as its numbers tell."""
    numbers = (*projection.parameters(), *projection.buffers())
    return next((tensor.dtype for tensor in numbers if tensor.is_floating_point()), None)


class AddUnlessWrapped:
    """Adds to the input of a wrapped module, once no wrapper of it stands in the model any more.

    As long as one does, the push was added to that one's input.

    Args:
        push: The hook that adds it.
        parent: The module in which the outermost wrapper stands.
        name: What that wrapper is called there.
        wrappers: All that are around the wrapped module, from outside in.

    Attributes:
        push: The hook that adds it.
    """

    def __init__(
        self, push: AddToInput, parent: nn.Module, name: str, wrappers: tuple[nn.Module, ...]
    ) -> None:
        self.push = push
        self._parent = parent
        self._name = name
        self._wrappers = wrappers

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> Any:
        """Return what ``push`` makes of the inputs, or ``None``, which leaves them as they are."""
        for standing in getattr(self._parent, self._name).modules():
            for wrapper in self._wrappers:
                if standing is wrapper:
                    return None
        return self.push(module, inputs, named)

    def __deepcopy__(self, memo: dict[int, Any]) -> AddUnlessWrapped:
        # With the whole model. PEFT copies a wrapped module for another adapter: it has the same wrappers.
        if id(self._parent) not in memo:
            return self
        copied = copy.deepcopy((self.push, self._parent, self._name, self._wrappers), memo)
        return AddUnlessWrapped(*copied)


class Seats:
    """Where modules stand in a model; looked up once, and only if somebody asks.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, module: nn.Module) -> tuple[nn.Module, str]:
        """The module that has another one as a child, and the child's name."""
        return self._table[module]

    @cached_property
    def _table(self) -> dict[nn.Module, tuple[nn.Module, str]]:
        return {
            child: (parent, name)
            for parent in self._model.modules()
            for name, child in parent.named_children()
        }


def wrapped_by(
    projection: nn.Module, around: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """The modules that a projection wraps, as PEFT's layers do, from outside in, and what is around each."""
    wrappers = (*around, projection)
    trained = projection._modules.get("modules_to_save")
    inner = [projection._modules.get(name) for name in ("base_layer", "original_module")]
    inner += trained.values() if isinstance(trained, nn.ModuleDict) else ()
    for module in inner:
        if module is not None:
            yield module, wrappers
            yield from wrapped_by(module, wrappers)
