"""Headers are refused before anything they describe is touched."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats import lock_from_bytes
from tests.formats.lock_files import LockFile, raw_file


class TestHeader:
    @pytest.mark.parametrize("length", [(1 << 20) + 1, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
    def test_header_beyond_the_bound_is_refused_unread(self, length):
        with pytest.raises(LockFormatError, match=f"claims a header of {length} bytes"):
            lock_from_bytes(raw_file(b'{"a":1}', length=length))

    def test_header_beyond_the_bound_is_refused_even_where_it_is_there(self):
        header = b'{"__metadata__":{"format":"mlflow-safelock"}' + b" " * (1 << 20) + b"}"
        with pytest.raises(LockFormatError, match="at most 1048576"):
            lock_from_bytes(raw_file(header))

    @pytest.mark.parametrize(
        "header",
        [b"", b" ", b"[]", b"null", b"\n{}", b" {}", b"{}\n", b"{} x", b"{", b"{}}", b"{'a': 1}", b'{"a":}'],
    )
    def test_header_that_is_no_json_object_is_refused(self, header):
        with pytest.raises(LockFormatError):
            lock_from_bytes(raw_file(header))

    def test_byte_order_mark_is_refused(self):
        with pytest.raises(LockFormatError, match="byte order mark"):
            lock_from_bytes(raw_file(b"\xef\xbb\xbf{}"))

    def test_invalid_utf8_is_refused(self):
        with pytest.raises(LockFormatError, match="not UTF-8"):
            lock_from_bytes(raw_file(b'{"\xff":1}'))

    def test_deep_nesting_is_refused(self):
        with pytest.raises(LockFormatError, match="too deeply"):
            lock_from_bytes(raw_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"))

    @pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
    def test_constants_that_are_no_json_are_refused(self, constant):
        with pytest.raises(LockFormatError, match=f"holds {constant}"):
            lock_from_bytes(raw_file(f'{{"__metadata__":{{}},"stds":{constant}}}'.encode()))

    def test_number_of_a_million_digits_is_refused(self):
        with pytest.raises(LockFormatError, match="not JSON"):
            lock_from_bytes(raw_file(b'{"a":' + b"9" * 1_000_000 + b"}"))

    def test_duplicate_tensor_is_refused(self):
        header = json.dumps(LockFile.of().header())
        twice = header[:-1] + ',"stds":' + json.dumps(LockFile.of().header()["stds"]) + "}"
        with pytest.raises(LockFormatError, match="key 'stds' twice"):
            lock_from_bytes(raw_file(twice.encode(), LockFile.of().data()))

    @pytest.mark.parametrize(
        ("once", "twice"),
        [
            ('"format": "mlflow-safelock"', '"format": "pt", "format": "mlflow-safelock"'),
            ('"dtype": "F64"', '"dtype": "F32", "dtype": "F64"'),
            ('"__metadata__": {', '"__metadata__": {}, "__metadata__": {'),
        ],
    )
    def test_duplicate_key_at_any_depth_of_the_header_is_refused(self, once, twice):
        header = json.dumps(LockFile.of().header())
        assert header.count(once) == 1
        with pytest.raises(LockFormatError, match="twice"):
            lock_from_bytes(raw_file(header.replace(once, twice).encode(), LockFile.of().data()))

    def test_escaped_duplicate_key_is_refused(self):
        header = json.dumps(LockFile.of().header()).replace('"stds"', r'"std\u0073": 0, "stds"')
        with pytest.raises(LockFormatError, match="key 'stds' twice"):
            lock_from_bytes(raw_file(header.encode(), LockFile.of().data()))

    @pytest.mark.parametrize("value", [None, 1, 1.5, True, ["a"], {"a": "b"}])
    def test_metadata_that_is_not_text_is_refused(self, value):
        parts = LockFile.of()
        parts.metadata["digest"] = value
        with pytest.raises(LockFormatError, match="must be text only"):
            lock_from_bytes(parts.to_bytes())

    @pytest.mark.parametrize("metadata_", [[], "x", 3])
    def test_metadata_that_is_no_object_is_refused(self, metadata_):
        with pytest.raises(LockFormatError, match="must be text only"):
            lock_from_bytes(raw_file(json.dumps({"__metadata__": metadata_}).encode()))

    @pytest.mark.parametrize("entry", [None, 7, "x", [], {}, {"dtype": "F64"}])
    def test_entry_of_another_form_is_refused(self, entry):
        header = LockFile.of().header() | {"stds": entry}
        with pytest.raises(LockFormatError, match="dtype, shape and data_offsets, and nothing else"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    def test_entry_with_more_in_it_is_refused(self):
        header = LockFile.of().header()
        header["stds"]["strides"] = [8]
        with pytest.raises(LockFormatError, match="and nothing else"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    @pytest.mark.parametrize("key", ["shape", "data_offsets"])
    @pytest.mark.parametrize(
        "value",
        [None, 4, "4", [], [4.0], [True, 4], [-1, 3], [0, -1], ["0", "4"], [10**400], [1] * 3, [2**53, 1]],
    )
    def test_counts_that_are_none_are_refused(self, key, value):
        header = LockFile.of().header()
        header["stds"][key] = value
        with pytest.raises(LockFormatError, match=r"'stds'"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    @pytest.mark.parametrize("dtype", ["BF16", "I8", "U64", "U8", "BOOL", "f64", "", "O", None, 4, ["F64"]])
    def test_dtype_that_no_lock_holds_is_refused(self, dtype):
        header = LockFile.of().header()
        header["stds"]["dtype"] = dtype
        with pytest.raises(LockFormatError, match="a lock holds F64, F32, F16, I64, I32 only"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    def test_shape_larger_than_its_bytes_is_refused(self):
        header = LockFile.of().header()
        header["directions"]["shape"] = [2**40, 2**10]
        with pytest.raises(LockFormatError, match="offsets leave 80 bytes"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    def test_overlapping_tensors_are_refused(self):
        header = LockFile.of().header()
        header["heads"]["data_offsets"] = header["layers"]["data_offsets"]
        with pytest.raises(LockFormatError, match="overlaps the one before"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    def test_tensors_out_of_order_are_refused(self):
        header = OrderedDict(LockFile.of().header())
        header.move_to_end("layers")
        with pytest.raises(LockFormatError, match="out of order"):
            lock_from_bytes(LockFile.of().to_bytes(header))

    def test_gap_between_tensors_is_refused(self):
        parts = LockFile.of()
        header = parts.header()
        header["scores"]["data_offsets"] = [offset + 8 for offset in header["scores"]["data_offsets"]]
        with pytest.raises(LockFormatError, match="leaves a gap"):
            lock_from_bytes(raw_file(json.dumps(header).encode(), parts.data() + bytes(8)))

    def test_offsets_beyond_the_file_are_refused(self):
        parts = LockFile.of()
        with pytest.raises(LockFormatError, match="cut short, or its offsets are wrong"):
            lock_from_bytes(raw_file(json.dumps(parts.header()).encode(), parts.data()[:-4]))

    def test_a_thousand_empty_tensors_are_refused(self):
        header = LockFile.of().header()
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        for index in range(1000):
            header[f"t{index}"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        with pytest.raises(LockFormatError, match="unknown"):
            lock_from_bytes(LockFile.of().to_bytes(header))
