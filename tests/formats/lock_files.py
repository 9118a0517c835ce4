"""Lock files put together by hand, sound and hostile, without the package's own writer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_safelock.lock import SafetyLock, canonical_metadata
from tests.locks import make_lock

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "bool": "BOOL"}


def raw_file(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header and any claimed header length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@dataclass
class LockFile:
    """The parts of a lock file, each of which a test may spoil before it takes the bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @classmethod
    def of(cls, lock: SafetyLock | None = None) -> LockFile:
        lock = lock or make_lock()
        return cls(
            {
                "format": "mlflow-safelock",
                "lock": canonical_metadata(lock.metadata).decode(),
                "digest": lock.digest,
            },
            dict(lock.tensors()),
        )

    def with_lock_metadata(self, **changes: Any) -> LockFile:
        """The same file with other lock metadata; the value ``...`` removes a key."""
        values = json.loads(self.metadata["lock"]) | changes
        values = {key: value for key, value in values.items() if value is not ...}
        self.metadata["lock"] = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return self

    def with_tensors(self, tensors: Mapping[str, np.ndarray | None]) -> LockFile:
        """The same file with other tensors; ``None`` removes one."""
        self.tensors = {k: v for k, v in (self.tensors | dict(tensors)).items() if v is not None}
        return self

    def header(self) -> dict[str, Any]:
        position, described = 0, {"__metadata__": self.metadata}
        for name, values in self.tensors.items():
            described[name] = {
                "dtype": CODES[values.dtype.name],
                "shape": list(values.shape),
                "data_offsets": [position, position + values.nbytes],
            }
            position += values.nbytes
        return described

    def data(self) -> bytes:
        return b"".join(values.tobytes() for values in self.tensors.values())

    def to_bytes(self, header: Mapping[str, Any] | None = None) -> bytes:
        return raw_file(json.dumps(header or self.header()).encode(), self.data())
