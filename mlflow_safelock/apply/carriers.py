"""How a model in memory carries a lock: as a bias of an output projection, or as a hook on its input.

A carrier sits on one attention output projection and is the only thing that changes it. It is kept as an
attribute of that module, so a deep copy of a model carries working copies of its carriers.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from mlflow_safelock.apply.architectures import Architecture, Attention
from mlflow_safelock.apply.displacement import (
    Displacement,
    HeadWeight,
    StoredBiases,
    Workspace,
    head_weight_of,
    input_displacement,
    output_bias,
    output_biases,
)
from mlflow_safelock.apply.hooks import AddToInput, AddUnlessWrapped, Seats, input_dtype, wrapped_by
from mlflow_safelock.errors import VerificationError
from mlflow_safelock.lock import AttentionGeometry, SafetyLock

_ATTRIBUTE = "safelock_carrier"

_ROUNDINGS = 3.0
"""Accepted distance of a bias from its expected value, in roundings of that to its dtype."""

_UNITS_OF_A_CAST = 1.25
"""The same for what rounding the weights adds to it, in units of each weight of the narrowest dtype: more
than four times what there is in the mean, for the sum of a single row may be nearly all of it."""

_NOISE = 8 * torch.finfo(torch.float32).eps
"""The same relative to the expected value, for sums of float32 that are made in another order."""

_FORWARDS = (nn.Linear.forward, Conv1D.forward)
"""Forwards that are known to add the bias."""

_NARROWER = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that a model may have been cast to and back."""

_MOST_LOST = 0.75
"""Part of a push that may be lost beside a bias of the model's own, where it was cast after locking."""


@dataclass(frozen=True, eq=False)
class AppliedLock:
    """Which lock a model carries, and how strongly: one object for all its carriers, and for its copies."""

    lock: SafetyLock
    alpha: float

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedLock:
        return self


class Carrier(ABC):
    """What carries a layer's share of a lock.

    Attributes:
        applied: The lock that it is a share of.
        displacement: The layer's share.
        projection: The attention output projection that it sits on.
    """

    def __init__(self, applied: AppliedLock, displacement: Displacement, projection: nn.Module) -> None:
        self.applied = applied
        self.displacement = displacement
        self.projection = projection

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier:
        # With its projection. A copy of a module that the projection wraps stays with the wrapper.
        if id(self.projection) not in memo:
            return self
        twin: Carrier = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that this sits on: the projection, and whatever may come to stand in its place."""
        return (self.projection,)

    @property
    def attached(self) -> bool:
        """Whether the projection carries this."""
        return self.projection.__dict__.get(_ATTRIBUTE) is self

    def attach(self) -> None:
        """Put the layer's share of the lock in place."""
        self._put_in_place()
        for module in self.modules:
            module.__dict__[_ATTRIBUTE] = self  # no parameter, buffer or module, for which setattr would look

    def detach(self) -> None:
        """Leave the projection as it was before ``attach``.

        Raises:
            VerificationError: What is in place is not what ``attach`` put there; nothing is changed then.
        """
        self.check_untouched()
        self._take_away()
        for module in self.modules:
            del module.__dict__[_ATTRIBUTE]

    @property
    def is_bypassed(self) -> bool:
        """Whether the projection may run without what ``attach`` put in place."""
        return False

    @abstractmethod
    def check_untouched(self) -> None:
        """Raise VerificationError unless exactly what ``attach`` put in place is there."""

    @abstractmethod
    def verify(self) -> None:
        """Raise VerificationError unless the layer is displaced as the lock says, by its present weights."""

    @abstractmethod
    def _put_in_place(self) -> None: ...

    @abstractmethod
    def _take_away(self) -> None: ...

    def _fault(self, what: str, next_step: str) -> VerificationError:
        return VerificationError(f"Layer {self.displacement.layer}: {what}.", next_step=f"{next_step}.")


class BiasCarrier(Carrier):
    """Carries a displacement as a bias of the projection: no cost when the model runs.

    The bias is a new parameter, in the dtype and on the device of the weight, that asks for no gradient. A
    bias that was there is added to, and its parameter kept for when the lock is removed.
    """

    def __init__(
        self,
        applied: AppliedLock,
        displacement: Displacement,
        projection: nn.Module,
        architecture: Architecture,
        geometry: AttentionGeometry,
        bias: torch.Tensor,
        parameter: torch.Tensor,
    ) -> None:
        super().__init__(applied, displacement, projection)
        self._architecture = architecture
        self._geometry = geometry
        self._original: nn.Parameter | None = _bias_of(projection)
        # Apart from each other, so that this carrier notices when the parameter is edited in place.
        self._placed, self._parameter = bias, parameter

    @property
    def bias(self) -> torch.Tensor:
        """The bias that ``attach`` puts in place: of shape ``[hidden]``, in the weight's dtype."""
        return self._placed

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that the model has of its own, ``[hidden]``; ``None`` where it has none."""
        return None if self._original is None else self._original.detach()

    def in_place(self) -> nn.Parameter | None:
        """The bias in place.

        Raises:
            VerificationError: It, or the weight, is somewhere else between two uses, or it is made of others.
        """
        if "bias" not in self.projection._parameters:
            raise self._fault(
                "the bias that carries the lock was deleted, or is made anew of other tensors",
                "Take what makes it off first, such as torch.nn.utils.parametrize.remove_parametrizations",
            )
        bias, weight = _bias_of(self.projection), _weight_of(self.projection)
        if any(hasattr(tensor, "full_tensor") for tensor in (weight, bias)):
            raise self._fault(
                "its output projection was sharded after it was locked, so there is no looking at it, nor "
                "taking the lock off",
                "Shard the model first, as by fully_shard, and then lock it",
            )
        if weight.is_meta or (bias is not None and bias.is_meta):
            raise self._fault(
                "its output projection was offloaded after it was locked, so there is no looking at it, nor "
                "taking the lock off",
                "Take accelerate's hooks off first, accelerate.hooks.remove_hook_from_module(model, "
                "recurse=True); a model that is offloaded before it is locked is looked at as any other",
            )
        return bias

    @property
    def is_bypassed(self) -> bool:
        """Whether the projection has another forward than that of its class, which may leave the bias out."""
        return type(self.projection).forward not in _FORWARDS or _has_another_forward(self.projection)

    def check_untouched(self) -> None:
        """Raise VerificationError unless the bias in place is, to the last bit, the one put there.

        But for casts, of which the last ones show in it.
        """
        bias = self.in_place()
        if bias is None or self._cast_through(bias) is None:
            raise self._fault(
                "the bias that carries the lock was changed or taken away, so there is no saying what "
                "removing the lock would leave",
                "Put the bias back as it was, or load the model again",
            )

    def verify(self) -> None:
        """Raise VerificationError unless the bias is ``W_o v`` (plus the bias before), but for rounding."""
        bias = self.in_place()
        if bias is None:
            raise self._fault("the bias that carries the lock is gone", "Apply the lock again")
        push = self._pushed()
        expected = push if self._original is None else push + self._original.detach().to(push)
        # Where the model was cast, weights and bias have the rounding of the narrowest dtype on the way.
        ways = self._cast_through(bias)
        dtypes = (bias.dtype, *(ways or ()))
        narrowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        size = torch.linalg.vector_norm(expected)
        rounding = torch.linalg.vector_norm(expected.to(narrowest).to(expected) - expected)
        distance = torch.linalg.vector_norm(bias.detach().to(expected) - expected)
        allowed = _ROUNDINGS * rounding + _NOISE * size
        if ways and torch.finfo(narrowest).eps > torch.finfo(self._placed.dtype).eps:
            allowed = allowed + self._lost_by_weights(dtypes)
        allowed = torch.minimum(allowed, _MOST_LOST * torch.linalg.vector_norm(push))
        if not distance <= allowed:
            raise self._fault(
                f"the bias in place is {distance:.3g} away from the one that the lock and the weights make, "
                f"and {allowed:.3g} is allowed",
                "Take the lock off and apply it anew, to the weights as they are now",
            )

    def _put_in_place(self) -> None:
        # The name is there, with None, where there was no bias: all that registering does is this.
        self.projection._parameters["bias"] = nn.Parameter(self._parameter, requires_grad=False)

    def _take_away(self) -> None:
        original, current = self._original, _bias_of(self.projection)
        if original is not None and current is not None:
            # The model may have been moved or cast in the meantime, and this parameter was not in it. It may
            # always have had another dtype than the weight.
            dtype = original.dtype if current.dtype == self._placed.dtype else current.dtype
            original.data = original.data.to(current.device, dtype)
        self.projection.register_parameter("bias", original)

    def _cast_through(self, bias: torch.Tensor) -> tuple[torch.dtype, ...] | None:
        """The dtypes by which the bias that was placed came to be this one; ``None`` where it is another."""
        placed, found = self._placed.to(bias.device), bias.detach()
        for first, second in product((placed.dtype, *_NARROWER), repeat=2):
            if torch.equal(found, placed.to(first).to(second).to(found.dtype)):
                return placed.dtype, first, second
        return None

    def _pushed(self) -> torch.Tensor:
        return output_bias(self._columns(), self.displacement)

    def _columns(self) -> HeadWeight:
        return head_weight_of(_weight_of(self.projection), self._geometry.head_dim, self._architecture.layout)

    def _lost_by_weights(self, dtypes: Iterable[torch.dtype]) -> torch.Tensor:
        """How far the bias may be from the one of these weights, since they were cast as well."""
        # Each weight was rounded by itself, by at most half a unit: errors that add up as their squares do,
        # to the root of the sum of (w v)^2 in a row, times a unit and 0.29, whatever becomes of the sum.
        infos, displaced = [torch.finfo(dtype) for dtype in dtypes], self.displacement
        columns = self._columns()
        squares = output_bias(
            # Not in float64, which not every device has.
            lambda head: columns(head).float().square(),
            replace(displaced, values=displaced.values.square()),
        )
        eps = max(info.eps for info in infos)
        smallest = eps * max(info.tiny for info in infos)  # below it units become no smaller
        units: torch.Tensor = squares.sqrt() * eps + smallest * float(displaced.values.norm())
        lost: torch.Tensor = torch.linalg.vector_norm(_UNITS_OF_A_CAST * units)
        return lost


class HookCarrier(Carrier):
    """Carries a displacement as a hook that adds it to the projection's input.

    Right for any projection whose weight is not a plain matrix in memory: quantised, wrapped by an adapter,
    or offloaded. An adapter computes ``W x + scale B A x`` or something else of its input, so adding to that
    input is right for every kind of adapter, for several, and for whichever is switched on. When an adapter
    is merged and its wrapper taken away, a module that it wrapped stands in its place, so those have a hook
    too, which rests while the wrapper stands.
    """

    def __init__(
        self,
        applied: AppliedLock,
        displacement: Displacement,
        projection: nn.Module,
        geometry: AttentionGeometry,
        seats: Seats,
    ) -> None:
        super().__init__(applied, displacement, projection)
        self._geometry = geometry
        self._push = AddToInput(input_displacement(displacement, geometry), displacement.layer, applied.alpha)
        self._push.check(input_dtype(projection))
        self._inner = tuple(
            (module, AddUnlessWrapped(self._push, *seats.of(projection), wrappers))
            for module, wrappers in wrapped_by(projection)
        )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The projection, and the modules that it wraps."""
        return (self.projection, *(module for module, _ in wrapped_by(self.projection)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next_hook": RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Torch numbers hooks from 0 in every process, and one of the same number would take this one's place.
        RemovableHandle.next_id = max(RemovableHandle.next_id, state.pop("_next_hook"))
        self.__dict__.update(state)

    def check_untouched(self) -> None:
        """Raise VerificationError unless the hook is in place and adds what the lock says."""
        in_place = all(self._hooks_on(module) for module in self.modules)
        if not in_place or not torch.equal(self._push.displacement, self._expected()):
            raise self._fault(
                "the hook that carries the lock was changed or taken away", "Load the model again"
            )

    def verify(self) -> None:
        """Raise VerificationError unless the hook is in place and adds what the lock says."""
        self.check_untouched()

    def _put_in_place(self) -> None:
        self.projection.register_forward_pre_hook(self._push, with_kwargs=True)
        for module, hook in self._inner:
            module.register_forward_pre_hook(hook, with_kwargs=True)

    def _take_away(self) -> None:
        for module in self.modules:
            for number in self._hooks_on(module):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)

    def _hooks_on(self, module: nn.Module) -> list[int]:
        """Numbers of this carrier's hooks among a module's hooks.

        Looked up instead of kept: torch's handle for a hook does not follow a deep copy of its module.
        """
        return [
            number
            for number, hook in module._forward_pre_hooks.items()
            if hook is self._push or (isinstance(hook, AddUnlessWrapped) and hook.push is self._push)
        ]

    def _expected(self) -> torch.Tensor:
        return input_displacement(self.displacement, self._geometry)


def carriers_for(
    applied: AppliedLock, displacements: Iterable[Displacement], attention: Attention, model: nn.Module
) -> tuple[Carrier, ...]:
    """Make the carriers that fit the projections of a model, without putting them in place.

    Args:
        applied: The lock.
        displacements: Its shares, of different layers.
        attention: The model's attention.
        model: The model.

    Returns:
        The carrier of each share, in order.

    Raises:
        AlphaError: A bias would be infinite in the weight's dtype, or lost in it.
    """
    shares, geometry = tuple(displacements), attention.geometry
    projections = attention.projections
    plain = [share for share in shares if is_plain_matrix(projections[share.layer], geometry)]
    biased = {carrier.displacement.layer: carrier for carrier in bias_carriers(applied, plain, attention)}
    seats = Seats(model)
    return tuple(
        biased.get(share.layer) or HookCarrier(applied, share, projections[share.layer], geometry, seats)
        for share in shares
    )


@torch.no_grad()
def bias_carriers(
    applied: AppliedLock, displacements: Iterable[Displacement], attention: Attention
) -> list[BiasCarrier]:
    """Make the carriers of projections that are plain matrices, without putting them in place.

    What they carry is computed together for all whose weights are of one dtype on one device.

    Raises:
        AlphaError: A bias would be infinite in the weight's dtype, or lost in it.
    """
    architecture, geometry, workspace = attention.architecture, attention.geometry, Workspace()
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Displacement, nn.Module, torch.Tensor]]] = {}
    for displacement in displacements:
        projection = attention.projections[displacement.layer]
        weight = _weight_of(projection)
        groups.setdefault((weight.device, weight.dtype), []).append((displacement, projection, weight))
    carriers: list[BiasCarrier] = []
    checked: list[tuple[StoredBiases, list[int]]] = []
    for (_, dtype), members in groups.items():
        pushes = output_biases(
            [
                (head_weight_of(weight, geometry.head_dim, architecture.layout), displacement)
                for displacement, _, weight in members
            ],
            workspace,
        )
        owns = [
            None if (own := _bias_of(projection)) is None else own.detach() for _, projection, _ in members
        ]
        biases = StoredBiases(pushes, owns, dtype)
        checked.append((biases, [displacement.layer for displacement, _, _ in members]))
        placed = biases.stored.unbind()
        # Each in memory of its own, as parameters that are saved have to be, but copied in one step.
        copied = [torch.empty_like(bias) for bias in placed]
        torch.split_with_sizes_copy(biases.stored.view(-1), [len(bias) for bias in placed], out=copied)
        carriers += [
            BiasCarrier(applied, displacement, projection, architecture, geometry, bias, parameter)
            for (displacement, projection, _), bias, parameter in zip(members, placed, copied, strict=True)
        ]
    for biases, layers in checked:
        biases.check(layers, applied.alpha)
    return carriers


def carrier_on(projection: nn.Module) -> Carrier | None:
    """The carrier that sits on a projection, or on what it wraps, if any."""
    own = projection.__dict__.get(_ATTRIBUTE)
    if own is None and projection._modules:
        found = (module.__dict__.get(_ATTRIBUTE) for module, _ in wrapped_by(projection))
        own = next((carrier for carrier in found if carrier is not None), None)
    return own if isinstance(own, Carrier) else None


def compile_anew(carriers: Iterable[Carrier]) -> None:
    """Have compiled models compiled again, after carriers were attached or detached, where that is needed.

    ``torch.compile`` notices another bias, but not a hook that comes or goes: a model that ran compiled would
    go on as it was.
    """
    if "torch._dynamo" in sys.modules and any(isinstance(carrier, HookCarrier) for carrier in carriers):
        torch.compiler.reset()


def is_plain_matrix(projection: nn.Module, geometry: AttentionGeometry) -> bool:
    """Whether the weight is a matrix of floats in memory, and the bias a parameter that is added."""
    # Exact classes: a subclass may hold its weight packed, and its forward may ignore a bias. A bias that is
    # made anew of others, as by pruning, would come before a parameter.
    if type(projection) not in (nn.Linear, Conv1D) or "bias" not in projection._parameters:
        return False
    if type(projection).forward not in _FORWARDS or _has_another_forward(projection):
        return False
    weight = projection._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and weight.device.type != "meta"
        and weight.numel() == geometry.heads * geometry.head_dim * geometry.hidden
    )


def _has_another_forward(projection: nn.Module) -> bool:
    """Whether somebody put another forward on this very module.

    A hook of accelerate's runs the one that was there, and leaves that on the module when it is taken off.
    """
    own = projection.__dict__
    forward: Any = own.get("forward")
    if "_hf_hook" in own:
        is_partial = isinstance(forward, partial) and forward.args[:1] == (projection,)
        if not (is_partial and getattr(forward.func, "__module__", "") == "accelerate.hooks"):
            return True
        forward = own.get("_old_forward")
    if forward is None:
        return False
    is_its_class_s = getattr(forward, "__func__", None) is type(projection).forward
    return not (is_its_class_s and forward.__self__ is projection)


def _weight_of(projection: nn.Module) -> torch.Tensor:
    return cast("torch.Tensor", projection.weight)


def _bias_of(projection: nn.Module) -> nn.Parameter | None:
    return cast("nn.Parameter | None", projection.bias)
