"""Lock files: what is written comes back, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_safelock.errors import LockError, LockFormatError, LockValidationError, SafelockError
from mlflow_safelock.formats import load_lock, lock_from_bytes, lock_to_bytes, save_lock
from mlflow_safelock.lock import AttentionGeometry, LockedHead, SafetyLock
from tests.formats.lock_files import LockFile, raw_file
from tests.locks import any_lock, heads, make_full_lock, make_lock, metadata, scores


class TestRoundTrip:
    @settings(deadline=None, max_examples=100)
    @given(any_lock())
    def test_every_lock_comes_back_as_it_was(self, lock):
        twin = lock_from_bytes(lock_to_bytes(lock))
        assert twin == lock
        assert twin.digest == lock.digest
        assert twin.metadata == lock.metadata
        for name, values in lock.tensors().items():
            assert twin.tensors()[name].tobytes() == values.tobytes()

    @settings(deadline=None, max_examples=50)
    @given(any_lock())
    def test_equal_locks_give_equal_bytes(self, lock):
        biases = None if lock.unit_biases is None else lock.unit_biases[::-1]
        twin = SafetyLock(tuple(reversed(lock.heads)), lock.metadata, lock.scores, biases, lock.sketch)
        assert lock_to_bytes(twin) == lock_to_bytes(lock)
        assert lock_to_bytes(lock_from_bytes(lock_to_bytes(lock))) == lock_to_bytes(lock)

    def test_bytes_do_not_depend_on_the_process(self):
        script = (
            "import sys; from tests.locks import make_lock; "
            "from mlflow_safelock.formats import lock_to_bytes; "
            "sys.stdout.buffer.write(lock_to_bytes(make_lock()))"
        )
        for seed in ("0", "1"):
            environment = os.environ | {"PYTHONHASHSEED": seed}
            root = Path(__file__).resolve().parents[2]
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, check=True
            )
            assert done.stdout == lock_to_bytes(make_lock())

    def test_file_comes_back(self, tmp_path):
        save_lock(make_lock(), tmp_path / "a.safetensors")
        assert load_lock(tmp_path / "a.safetensors") == make_lock()
        assert load_lock(str(tmp_path / "a.safetensors")) == make_lock()
        assert (tmp_path / "a.safetensors").read_bytes() == lock_to_bytes(make_lock())

    def test_the_safetensors_library_reads_the_same_numbers(self, tmp_path):
        lock = make_lock()
        save_lock(lock, tmp_path / "a.safetensors")
        with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
            assert file.metadata()["digest"] == lock.digest
            assert file.metadata()["format"] == "mlflow-safelock"
            assert set(file.keys()) == set(lock.tensors())
            for name, values in lock.tensors().items():
                assert file.get_tensor(name).tobytes() == values.tobytes()

    def test_a_file_that_the_safetensors_library_wrote_is_read(self):
        parts = LockFile.of()
        assert lock_from_bytes(safetensors.numpy.save(parts.tensors, parts.metadata)) == make_lock()

    def test_a_file_put_together_from_the_format_page_is_read(self):
        assert lock_from_bytes(LockFile.of().to_bytes()) == make_lock()

    def test_digest_can_be_computed_without_this_package(self):
        data = lock_to_bytes(make_lock())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        stated = header.pop("__metadata__")
        names = {"F64": "float64", "F32": "float32", "I32": "int32"}
        tensors = {}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = {
                "dtype": names[entry["dtype"]],
                "shape": entry["shape"],
                "sha256": hashlib.sha256(data[begin:end]).hexdigest(),
            }
        text = json.dumps(
            [stated["lock"], tensors], sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )
        assert stated["digest"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def test_tensors_begin_aligned(self):
        data = lock_to_bytes(make_lock(base_model="x" * 3))
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        widths = {"F64": 8, "F32": 4, "I32": 4}
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0


class TestDamage:
    @pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF], ids=hex)
    def test_no_flipped_byte_goes_unnoticed(self, flip):
        lock = make_lock()
        data = lock_to_bytes(lock)
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= flip
            assert_refused_or_equal(bytes(damaged), lock)

    @settings(deadline=None, max_examples=100)
    @given(any_lock(), st.data())
    def test_no_changed_byte_of_any_lock_goes_unnoticed(self, lock, data):
        damaged = bytearray(lock_to_bytes(lock))
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        assert_refused_or_equal(bytes(damaged), lock)

    def test_a_file_cut_anywhere_is_refused(self):
        data = lock_to_bytes(make_lock())
        for end in range(len(data)):
            with pytest.raises(LockFormatError):
                lock_from_bytes(data[:end])

    @settings(deadline=None, max_examples=300)
    @given(st.binary(max_size=400) | st.binary(max_size=300).map(lambda tail: raw_file(tail)))
    def test_noise_is_refused(self, noise):
        with pytest.raises(LockFormatError):
            lock_from_bytes(noise)

    @pytest.mark.parametrize("tail", [b"\0", b" ", b"PK\x03\x04", lock_to_bytes(make_lock())])
    def test_trailing_bytes_are_refused(self, tail):
        with pytest.raises(LockFormatError, match="trailing bytes"):
            lock_from_bytes(lock_to_bytes(make_lock()) + tail)


def assert_refused_or_equal(data: bytes, lock: SafetyLock) -> None:
    try:
        read = lock_from_bytes(data)
    except SafelockError:
        return
    assert read == lock


class TestHostileMetadata:
    @pytest.mark.parametrize("key", ["format", "lock", "digest"])
    def test_missing_file_metadata_is_refused(self, key):
        parts = LockFile.of()
        del parts.metadata[key]
        with pytest.raises(LockFormatError):
            lock_from_bytes(parts.to_bytes())

    def test_unknown_file_metadata_is_refused(self):
        parts = LockFile.of()
        parts.metadata["note"] = "hello"
        with pytest.raises(LockFormatError, match="'note'"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("version", [3, 4, 10**6])
    def test_newer_format_asks_for_an_upgrade(self, version):
        parts = LockFile.of().with_lock_metadata(format_version=version, colour="from the future")
        parts.metadata["signature"] = "also from the future"
        parts.with_tensors({"ranks": np.zeros(4, dtype=np.float32)})
        with pytest.raises(
            LockFormatError, match=f"lock format {version}, .* up to 2.*upgrade mlflow-safelock"
        ):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("version", [..., None, 0, -1, 1.0, "1", True, [1]])
    def test_version_that_is_none_is_refused(self, version):
        with pytest.raises(LockFormatError, match="no format version"):
            lock_from_bytes(LockFile.of().with_lock_metadata(format_version=version).to_bytes())

    @pytest.mark.parametrize("name", ["base_model", "geometry", "created", "tools", "default_alpha", "seed"])
    def test_missing_lock_metadata_is_refused(self, name):
        with pytest.raises(LockValidationError, match=f"lock: .*{name}: Field required"):
            lock_from_bytes(LockFile.of().with_lock_metadata(**{name: ...}).to_bytes())

    def test_unknown_lock_metadata_is_refused(self):
        with pytest.raises(LockValidationError, match="colour"):
            lock_from_bytes(LockFile.of().with_lock_metadata(colour="red").to_bytes())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("seed", "0"),
            ("seed", 0.5),
            ("seed", 2**60),
            ("default_alpha", -6),
            ("pairs", True),
            ("geometry", []),
        ],
    )
    def test_lock_metadata_of_the_wrong_type_is_refused(self, name, value):
        with pytest.raises(LockValidationError, match=name):
            lock_from_bytes(LockFile.of().with_lock_metadata(**{name: value}).to_bytes())

    @pytest.mark.parametrize(
        ("once", "twice"),
        [
            ('"seed":0', '"seed":1,"seed":0'),
            ('"layers":3', '"layers":9,"layers":3'),
            ('"torch":"2.13.0"', '"torch":"0","torch":"2.13.0"'),
        ],
    )
    def test_duplicate_key_at_any_depth_of_the_lock_metadata_is_refused(self, once, twice):
        parts = LockFile.of()
        assert parts.metadata["lock"].count(once) == 1
        parts.metadata["lock"] = parts.metadata["lock"].replace(once, twice)
        with pytest.raises(LockFormatError, match="twice"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize(
        ("canonical", "other"),
        [
            ('"default_alpha":6,', '"default_alpha":6.0,'),
            ('"default_alpha":6,', '"default_alpha": 6,'),
            ('"seed":0', '"seed":-0'),
            ('"split":"pair"', r'"split":"\u0070air"'),
        ],
    )
    def test_lock_metadata_that_is_not_canonical_is_refused(self, canonical, other):
        parts = LockFile.of()
        assert parts.metadata["lock"].count(canonical) == 1
        parts.metadata["lock"] = parts.metadata["lock"].replace(canonical, other)
        with pytest.raises(LockFormatError, match="canonical"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("text", ["", "null", "[]", "{", "\ufeff{}", '{"a":NaN}', "9" * 5000])
    def test_lock_metadata_that_is_no_json_object_is_refused(self, text):
        parts = LockFile.of()
        parts.metadata["lock"] = text
        with pytest.raises(LockFormatError, match="lock metadata"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("place", ["lock", "digest", "format"])
    def test_half_a_character_is_refused(self, place):
        parts = LockFile.of()
        parts.metadata[place] += "\ud800"
        with pytest.raises(LockFormatError, match="lone surrogate"):
            lock_from_bytes(parts.to_bytes())

    def test_half_a_character_within_the_lock_metadata_is_refused(self):
        parts = LockFile.of()
        parts.metadata["lock"] = parts.metadata["lock"].replace("example/", r"\ud800")
        with pytest.raises(LockFormatError, match="lone surrogate"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("digest", ["", "sha256:" + "0" * 64, make_lock(seed=1).digest])
    def test_other_digest_is_refused(self, digest):
        parts = LockFile.of()
        parts.metadata["digest"] = digest
        with pytest.raises(LockValidationError, match="changed or damaged"):
            lock_from_bytes(parts.to_bytes())


class TestHostileTensors:
    @pytest.mark.parametrize("name", ["layers", "heads", "directions", "stds"])
    def test_missing_tensor_is_refused(self, name):
        with pytest.raises(LockFormatError, match=rf"missing \['{name}'\]"):
            lock_from_bytes(LockFile.of().with_tensors({name: None}).to_bytes())

    @pytest.mark.parametrize("name", ["weights", "Scores", "__metadata"])
    def test_extra_tensor_is_refused(self, name):
        with pytest.raises(LockFormatError, match=rf"unknown \['{name}'\]"):
            lock_from_bytes(LockFile.of().with_tensors({name: np.zeros(2, dtype=np.float32)}).to_bytes())

    @pytest.mark.parametrize("name", ["sketch_layers", "sketch_offsets", "sketch_values"])
    def test_part_of_a_sketch_is_refused(self, name):
        with pytest.raises(LockFormatError, match=rf"missing \['{name}'\]"):
            lock_from_bytes(LockFile.of(make_full_lock()).with_tensors({name: None}).to_bytes())

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("unit_biases", "f2"),
            ("sketch_layers", "i8"),
            ("sketch_offsets", "i4"),
            ("sketch_values", "f4"),
        ],
    )
    def test_what_is_kept_of_the_base_has_one_dtype(self, name, dtype):
        parts = LockFile.of(make_full_lock())
        with pytest.raises(LockValidationError, match=f"Tensor '{name}'"):
            lock_from_bytes(parts.with_tensors({name: parts.tensors[name].astype(dtype)}).to_bytes())

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("unit_biases", (20, 4)),
            ("sketch_layers", (2, 1)),
            ("sketch_offsets", (3, 2)),
            ("sketch_values", (6, 4)),
            ("sketch_values", (4, 3, 2)),
        ],
    )
    def test_what_is_kept_of_the_base_has_one_shape(self, name, shape):
        parts = LockFile.of(make_full_lock())
        with pytest.raises(LockValidationError, match=r"Tensor 'sketch_values'|must be [IF]"):
            lock_from_bytes(parts.with_tensors({name: parts.tensors[name].reshape(shape)}).to_bytes())

    @pytest.mark.parametrize(
        ("name", "place", "value", "message"),
        [
            ("unit_biases", (1, 1), np.nan, "Unit biases must be finite"),
            ("unit_biases", (1, 1), np.inf, "Unit biases must be finite"),
            ("sketch_layers", (1,), 0, "out of order"),
            ("sketch_layers", (0,), -1, "out of order"),
            ("sketch_layers", (1,), 3, "outside the declared"),
            ("sketch_offsets", (0, 0), -1, "out of order"),
            ("sketch_offsets", (1, 2), 397, "outside the declared"),
            ("sketch_values", (0, 0, 0), np.inf, "that no weights are"),
            ("sketch_values", (slice(None),), 0, "that no weights are"),
        ],
    )
    def test_what_is_kept_of_the_base_must_make_sense(self, name, place, value, message):
        parts = LockFile.of(make_full_lock())
        changed = parts.tensors[name].copy()
        changed[place] = value
        with pytest.raises(LockValidationError, match=message):
            lock_from_bytes(parts.with_tensors({name: changed}).to_bytes())

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("layers", "f4"), ("heads", "f4"), ("directions", "i4"), ("stds", "f4"), ("scores", "f8")],
    )
    def test_tensor_of_another_dtype_is_refused(self, name, dtype):
        parts = LockFile.of()
        with pytest.raises(LockValidationError, match=f"Tensor '{name}'"):
            lock_from_bytes(parts.with_tensors({name: parts.tensors[name].astype(dtype)}).to_bytes())

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("layers", (2, 2)),
            ("heads", (2, 2)),
            ("directions", (5, 4)),
            ("directions", (20,)),
            ("stds", (1, 4)),
            ("scores", (4, 3)),
            ("scores", (12,)),
        ],
    )
    def test_tensor_of_another_shape_is_refused(self, name, shape):
        parts = LockFile.of()
        with pytest.raises(LockValidationError, match=r"must be [IF]"):
            lock_from_bytes(parts.with_tensors({name: parts.tensors[name].reshape(shape)}).to_bytes())

    @pytest.mark.parametrize("name", ["layers", "heads", "directions", "stds"])
    def test_tensors_of_unequal_length_are_refused(self, name):
        parts = LockFile.of()
        with pytest.raises(LockValidationError, match=r"must be [IF]"):
            lock_from_bytes(parts.with_tensors({name: parts.tensors[name][:-1]}).to_bytes())

    def test_lock_without_heads_is_refused(self):
        parts = LockFile.of()
        empty = {name: parts.tensors[name][:0] for name in ("layers", "heads", "directions", "stds")}
        with pytest.raises(LockValidationError, match="at least one head"):
            lock_from_bytes(parts.with_tensors(empty).to_bytes())

    @pytest.mark.parametrize(
        ("name", "index", "value", "message"),
        [
            ("directions", (1, 0), np.nan, "NaN or infinity"),
            ("directions", (1, 0), np.inf, "NaN or infinity"),
            ("directions", (2, 1), 0.9, "norm is 0.9"),
            ("directions", (2, 1), 0.0, "norm is 0"),
            ("stds", 0, np.nan, "finite"),
            ("stds", 0, np.inf, "finite"),
            ("stds", 0, 0.0, "above zero"),
            ("stds", 3, -1.0, "above zero"),
            ("scores", (0, 0), np.nan, "between 0 and 1"),
            ("scores", (0, 0), 1.5, "between 0 and 1"),
            ("layers", 3, 3, "outside the declared"),
            ("layers", 0, -1, "whole number from 0"),
            ("heads", 3, 4, "outside the declared"),
            ("heads", 3, -1, "whole number from 0"),
            ("heads", 2, 0, "in the lock twice"),
        ],
    )
    def test_number_that_no_lock_has_is_refused(self, name, index, value, message):
        parts = LockFile.of()
        values = parts.tensors[name].copy()
        values[index] = value
        with pytest.raises(LockValidationError, match=f"^lock: .*{message}"):
            lock_from_bytes(parts.with_tensors({name: values}).to_bytes())

    def test_heads_that_are_not_sorted_are_refused(self):
        parts = LockFile.of()
        rows = [1, 0, 2, 3]
        moved = {name: parts.tensors[name][rows] for name in ("layers", "heads", "directions", "stds")}
        with pytest.raises(LockValidationError, match="not sorted by layer, then head"):
            lock_from_bytes(parts.with_tensors(moved).to_bytes())

    def test_more_heads_than_any_model_has_are_refused_early(self):
        count = (1 << 16) + 1
        parts = LockFile.of().with_tensors(
            {
                "layers": np.zeros(count, dtype=np.int32),
                "heads": np.arange(count, dtype=np.int32),
                "directions": np.ones((count, 5), dtype=np.float32),
                "stds": np.ones(count),
            }
        )
        with pytest.raises(LockFormatError, match="at most 65536"):
            lock_from_bytes(parts.to_bytes())

    def test_lock_of_too_many_heads_is_not_written(self):
        count = (1 << 16) + 1
        direction = np.ones(1, dtype=np.float32)
        geometry = AttentionGeometry(layers=1, heads=count, head_dim=1, hidden=1)
        lock = SafetyLock(
            tuple(LockedHead(0, index, direction, 1.0) for index in range(count)), metadata(geometry=geometry)
        )
        with pytest.raises(LockFormatError, match="at most 65536 heads"):
            lock_to_bytes(lock)

    def test_every_error_names_the_file(self, tmp_path):
        path = tmp_path / "odd.safetensors"
        parts = LockFile.of()
        for data in (b"x", parts.with_lock_metadata(seed=-1).to_bytes(), lock_to_bytes(make_lock())[:-1]):
            path.write_bytes(data)
            with pytest.raises(LockError, match=r"odd\.safetensors"):
                load_lock(path)


def test_room_needs_no_torch_and_no_mlflow():
    script = (
        "import sys, mlflow_safelock.formats; print([m for m in ('torch', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scores_are_optional():
    lock = SafetyLock(heads(), metadata())
    assert lock_from_bytes(lock_to_bytes(lock)).scores is None
    assert lock_from_bytes(lock_to_bytes(make_lock())).scores.tobytes() == scores().tobytes()
