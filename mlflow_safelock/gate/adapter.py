"""What a PEFT adapter's own weights tell of the base that it goes onto.

An adapter that is promoted without its base holds no configuration of it. But a low-rank update of a
projection is as wide as the projection's input and as high as its output, and is named after the layer that
it is in.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_safelock.apply.architectures import Architecture, architecture_of
from mlflow_safelock.errors import SourceError, UnsupportedArchitectureError
from mlflow_safelock.gate.stored_weights import StoredWeight, StoredWeights, is_of_senses
from mlflow_safelock.lock import AttentionGeometry, SafetyLock
from mlflow_safelock.provenance import ArtifactReader, read_header

_UPDATE = re.compile(r"\.(?P<layer>\d+)\.(?P<module>[A-Za-z_][\w.]*)\.lora_(?P<side>[AB])\.weight$")

_BIAS_OF_A_LAYER = re.compile(r"\.\d+\..*[._]bias$")


@dataclass(frozen=True)
class Update:
    """Half of a low-rank update of a module of a layer.

    Attributes:
        name: The tensor's name.
        layer: The layer's number.
        module: The module's path in the layer.
        side: ``A``, ``[rank, inputs]``, or ``B``, ``[outputs, rank]``.
        shape: The tensor's shape.
    """

    name: str
    layer: int
    module: str
    side: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scaling:
    """What PEFT multiplies low-rank updates by.

    Attributes:
        lora_alpha: The configuration's.
        by_root: Whether the root of the rank counts in place of the rank.
    """

    lora_alpha: float
    by_root: bool

    def of(self, rank: int) -> float:
        """The factor for an update of some rank."""
        return self.lora_alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclass(frozen=True)
class Updates:
    """What an adapter does to one module in each layer.

    Attributes:
        pairs: Layer, ``A`` of shape ``[rank, inputs]`` and ``B`` of shape ``[outputs, rank]``.
        untold: Layers in which it has something else for the module, or numbers that cannot be read here.
    """

    pairs: tuple[tuple[int, StoredWeight, StoredWeight], ...]
    untold: frozenset[int]


@dataclass(frozen=True)
class Adapter:
    """The low-rank updates of an adapter.

    Attributes:
        updates: The halves of the updates.
        biases: Names of the biases of layers that it has besides.
        weights: Its tensors; ``None`` where they are not to be looked at.
        scaling: What its updates are multiplied by; ``None`` where that is not told by their rank alone, or
            something else than adding is done with them.
    """

    updates: tuple[Update, ...]
    biases: tuple[str, ...] = ()
    weights: StoredWeights | None = None
    scaling: Scaling | None = None

    def updates_of(self, module: str) -> Updates:
        """What the adapter does to a module in each layer.

        Args:
            module: Its path in a layer.

        Raises:
            SourceError: It has two updates for one of them, of which PEFT would load one, or none.
        """
        tensors = {} if self.weights is None else self.weights.tensors
        pairs, told = {}, set()
        for update in self.updates:
            if update.side != "A" or update.module != module:
                continue
            name = update.name.removesuffix("A.weight") + "B.weight"
            down, up = tensors[update.name], tensors.get(name)
            if update.layer in pairs:
                raise SourceError(
                    f"The adapter has two updates for {module} of layer {update.layer}, {update.name!r} and "
                    "another.",
                    next_step="Log it as peft's save_pretrained writes it.",
                )
            if up is not None and len(up.shape) == 2 and up.shape[1] == down.shape[0] > 0:
                pairs[update.layer] = update.layer, down, up
                told |= {update.name, name} if down.is_plain and up.is_plain else set()
        inside = re.compile(rf"\.(?P<layer>\d+)\.{re.escape(module)}\.")
        untold = {
            int(found["layer"])
            for name in tensors.keys() - told
            if (found := inside.search(name)) and not is_of_senses(name[: found.start()])
        }
        return Updates(tuple(pairs.values()), frozenset(untold))

    def misfit(self, lock: SafetyLock) -> str:
        """What shows that the adapter was not trained on a model of a lock's shape, in words; empty: nothing.

        Only what is certain is compared: the numbers of layers, and the widths of the attention projections.
        """
        try:
            architecture = architecture_of({"model_type": lock.metadata.architecture})
        except UnsupportedArchitectureError:
            return ""
        widths = _widths(architecture, lock.geometry)
        return next(
            (
                fault
                for update in self.updates
                for fault in _faults(update, architecture, lock.geometry, widths)
            ),
            "",
        )


def read_adapter(reader: ArtifactReader, path: str, config: Mapping[str, Any]) -> Adapter:
    """Read the shapes of an adapter's weights, out of the header of their file.

    Args:
        reader: The artifacts.
        path: The file of its weights.
        config: Its configuration.

    Raises:
        SourceError: The file is damaged.
    """
    header = read_header(reader, path)
    tensors = {
        name: StoredWeight(path, dtype, shape, header.tensors[name])
        for name, (dtype, shape) in header.kinds.items()
    }
    # Halves that are blocks on a diagonal (BD-LoRA) are narrower than the projection.
    is_whole = not config.get("use_bdlora")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    biases = tuple(sorted(name for name in shapes if _BIAS_OF_A_LAYER.search(name)))
    weights = StoredWeights(reader, tensors)
    return Adapter(tuple(_updates(shapes)) if is_whole else (), biases, weights, _scaling(config))


def _scaling(config: Mapping[str, Any]) -> Scaling | None:
    """How an adapter's updates are scaled, where they are LoRA's own."""
    lora_alpha = config.get("lora_alpha")
    is_plain = (
        config.get("peft_type") == "LORA"
        # PEFT sets the base's weights anew for other ways to begin, such as PiSSA's.
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not any(config.get(name) for name in ("use_dora", "alpha_pattern", "layer_replication"))
    )
    if not is_plain or isinstance(lora_alpha, bool) or not isinstance(lora_alpha, int | float):
        return None
    if not abs(lora_alpha) <= sys.float_info.max:
        return None
    return Scaling(float(lora_alpha), bool(config.get("use_rslora")))


def _updates(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Update]:
    for name, shape in shapes.items():
        found = _UPDATE.search(name)
        if found is not None and len(shape) == 2 and not is_of_senses(name[: found.start()]):
            yield Update(name, int(found["layer"]), found["module"], found["side"], shape)


def _widths(architecture: Architecture, geometry: AttentionGeometry) -> Mapping[tuple[str, str], int]:
    """How many inputs (``A``) and outputs (``B``) projections have, where the geometry says it."""
    heads = geometry.heads * geometry.head_dim
    output = architecture.output_projection
    widths = {(output, "A"): heads, (output, "B"): geometry.hidden}
    if "self_attn.q_proj" in architecture.biased_with_output:
        widths |= {(f"self_attn.{name}_proj", "A"): geometry.hidden for name in "qkv"}
        widths[("self_attn.q_proj", "B")] = heads
    return widths


def _faults(
    update: Update,
    architecture: Architecture,
    geometry: AttentionGeometry,
    widths: Mapping[tuple[str, str], int],
) -> Iterator[str]:
    within = f"{architecture.layers.rsplit('.', 1)[-1]}.{update.layer}.{update.module}."
    if within in update.name and update.layer >= geometry.layers:
        yield f"it changes layer {update.layer}, and the lock is for {geometry.layers} layers"
    width = update.shape[1] if update.side == "A" else update.shape[0]
    expected = widths.get((update.module, update.side), width)
    if width != expected:
        what = "inputs" if update.side == "A" else "outputs"
        where = f"{update.module} of layer {update.layer}"
        yield f"{where} has {width} {what} there, and {expected} in the lock's base"
