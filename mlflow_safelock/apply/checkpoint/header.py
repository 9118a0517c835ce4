"""The header of a file of weights: where in the file each tensor's bytes are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_safelock.errors import CheckpointError

_LENGTH_BYTES = 8
_LONGEST = 100_000_000  # what safetensors itself reads at most


@dataclass(frozen=True)
class WeightsHeader:
    """A header.

    Attributes:
        start: Where in the file the bytes of the tensors begin.
        spans: First byte of each tensor and the one after its last, counted from the file's beginning.
    """

    start: int
    spans: Mapping[str, tuple[int, int]]


def read_header(path: Path) -> WeightsHeader:
    """Read a safetensors file's header.

    Raises:
        CheckpointError: It is none, or a tensor does not lie inside the file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > min(_LONGEST, size):
                raise ValueError("the header is longer than the file")
            entries: dict[str, Any] = json.loads(file.read(length))
        start = _LENGTH_BYTES + length
        offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        spans = {name: (start + int(begin), start + int(end)) for name, (begin, end) in offsets.items()}
        _check_gapless(sorted(spans.values()), start, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}.", next_step="Copy the fine-tune again."
        ) from error
    return WeightsHeader(start, spans)


def _check_gapless(spans: list[tuple[int, int]], start: int, size: int) -> None:
    place = start
    for begin, end in spans:
        if begin != place or end < begin:
            raise ValueError(f"a tensor begins at byte {begin}, and byte {place} was expected")
        place = end
    if place != size:
        raise ValueError(f"its tensors end at byte {place}, and it has {size}")
