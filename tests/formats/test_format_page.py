"""The reader on the format page reads what this package writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.formats import load_lock, lock_to_bytes
from mlflow_safelock.formats.lock_file import MAX_FILE_BYTES, MAX_HEADS
from mlflow_safelock.formats.published import NORM_TOLERANCE
from mlflow_safelock.formats.safetensors_header import MAX_HEADER_BYTES
from mlflow_safelock.formats.torch_archive import MAX_ARCHIVE_BYTES
from mlflow_safelock.lock import UNIT_NORM_TOLERANCE, LockMetadata, canonical_metadata
from tests.locks import make_full_lock, make_lock, metadata_values

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "lock-format.md").read_text(encoding="utf-8")
GOLDEN = sorted((Path(__file__).parent / "golden").iterdir())


def reader() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_reader_on_the_page_reads_every_golden_file(path):
    metadata, numbers, digest = reader()(path.read_bytes())
    lock = load_lock(path)
    assert digest == lock.digest
    assert metadata == json.loads(canonical_metadata(lock.metadata))
    assert metadata["format_version"] == int(path.name[1])
    assert {name: values.ravel().tolist() for name, values in lock.tensors().items()} == numbers


def test_reader_on_the_page_notices_damage():
    data = bytearray(lock_to_bytes(make_lock()))
    data[-1] ^= 1
    with pytest.raises(ValueError, match="changed or damaged"):
        reader()(bytes(data))


def test_page_names_every_field_and_tensor():
    rows = set(re.findall(r"(?m)^\| `(\w+)` \|", PAGE))
    assert metadata_values().keys() | {"tokenizer"} == LockMetadata.model_fields.keys()
    assert rows >= LockMetadata.model_fields.keys() | make_full_lock().tensors().keys() | {
        "format_version",
        "digest",
    }


def test_page_states_the_limits_in_force():
    assert MAX_HEADER_BYTES == MAX_ARCHIVE_BYTES == 1_048_576
    assert "at most 1,048,576" in PAGE
    assert MAX_FILE_BYTES == 64 << 20
    assert "above 64 MiB" in PAGE
    assert f"more than {MAX_HEADS:,} heads" in PAGE
    assert f"further than {UNIT_NORM_TOLERANCE:.5f} from 1" in PAGE
    assert f"Further from 1 than {NORM_TOLERANCE} is refused" in PAGE
