"""Pickles are read as documents: nothing in one is ever imported, called or built."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.inert_pickle import Call, Global, read_inert

MKDIR = Global("posix", "mkdir")
SCALAR = Global("numpy.core.multiarray", "scalar")
PROTO = b"\x80\x02"


def read(data: bytes, *allowed: Global) -> object:
    return read_inert(data, allowed=frozenset(allowed), origin="x.safelock")


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31 - 1)
    | st.floats(allow_nan=False)
    | st.text("ab€😀"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("ab€"), inner, max_size=4)
        | st.lists(inner, min_size=1, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


class MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestReading:
    @settings(deadline=None)
    @given(PLAIN)
    def test_plain_values_come_out_as_pickle_reads_them(self, value):
        data = pickle.dumps(value, protocol=2)
        assert read(data) == pickle.loads(data)
        assert repr(read(data)) == repr(value)

    def test_global_is_two_texts(self):
        assert read(PROTO + b"cposix\nmkdir\n.", MKDIR) == MKDIR
        assert str(MKDIR) == "posix.mkdir"

    def test_call_is_kept_and_not_made(self, tmp_path):
        marker = tmp_path / "it ran"
        data = pickle.dumps(MakesFolder(marker), protocol=2)
        call = read(data, MKDIR)
        assert isinstance(call, Call)
        assert (call.function, call.arguments, call.state) == (MKDIR, (str(marker),), None)
        assert not marker.exists()
        pickle.loads(data)
        assert marker.exists(), "the pickle was harmless, so the test showed nothing"

    def test_state_is_kept_and_not_set(self):
        call = read(PROTO + b"cposix\nmkdir\n" + text("a") + b"\x85R" + text("state") + b"\x85b.", MKDIR)
        assert (call.arguments, call.state) == (("a",), ("state",))

    def test_remembered_values_are_the_same_object(self):
        first, second = read(PROTO + b"]q\x00h\x00\x86.")
        assert first is second


class TestRefusals:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_any_other_global_is_named_and_refused(self, tmp_path, protocol):
        data = pickle.dumps(MakesFolder(tmp_path / "it ran"), protocol)
        with pytest.raises(
            LockFormatError, match=r"names posix\.mkdir.*Nothing was run.*Do not open this file"
        ):
            read(data, SCALAR)
        assert not (tmp_path / "it ran").exists()

    @pytest.mark.parametrize(
        ("data", "name"),
        [
            (b"cos\nsystem\n", "os.system"),
            (b"c__builtin__\neval\n", "__builtin__.eval"),
            (b"cnumpy.core.multiarray\nscalar.__class__\n", "numpy.core.multiarray.scalar.__class__"),
            (b"cnumpy.core\nmultiarray.scalar\n", "numpy.core.multiarray.scalar"),
            (b"cnumpy.core.multiarray \nscalar\n", "numpy.core.multiarray"),
            (b"c\n\n", r"names \."),
        ],
    )
    def test_names_are_compared_whole(self, data, name):
        with pytest.raises(LockFormatError, match=name):
            read(PROTO + data + b".", SCALAR)

    def test_a_global_that_is_never_used_is_refused_too(self):
        with pytest.raises(LockFormatError, match=r"names os\.system"):
            read(PROTO + b"cos\nsystem\n0N.")

    @pytest.mark.parametrize(
        ("opcode", "data"),
        [
            ("INST", b"(iposix\nmkdir\n"),
            ("OBJ", b"(cposix\nmkdir\no"),
            ("NEWOBJ", b"cposix\nmkdir\n)\x81"),
            ("NEWOBJ_EX", b"cposix\nmkdir\n)}\x92"),
            ("STACK_GLOBAL", text("posix") + text("mkdir") + b"\x93"),
            ("EXT1", b"\x82\x01"),
            ("EXT2", b"\x83\x01\x00"),
            ("EXT4", b"\x84\x01\x00\x00\x00"),
            ("PERSID", b"P1\n"),
            ("BINPERSID", b"NQ"),
            ("NEXT_BUFFER", b"\x97"),
            ("READONLY_BUFFER", b"\x97\x98"),
            ("FRAME", b"\x95" + bytes(8)),
            ("MEMOIZE", b"N\x94"),
            ("BINBYTES", b"B\x01\x00\x00\x00x"),
            ("BYTEARRAY8", b"\x96\x01" + bytes(7) + b"x"),
            ("LONG", b"L" + b"9" * 1000 + b"L\n"),
            ("LONG1", b"\x8a\x01\x01"),
            ("LONG4", b"\x8b\x01\x00\x00\x00\x01"),
            ("INT", b"I1\n"),
            ("FLOAT", b"F1.5\n"),
            ("STRING", b"S'a'\n"),
            ("UNICODE", b"Va\n"),
            ("EMPTY_SET", b"\x8f"),
            ("FROZENSET", b"(\x91"),
            ("EMPTY_TUPLE", b")"),
            ("LIST", b"(l"),
            ("DICT", b"(d"),
            ("GET", b"Np0\ng0\n"),
            ("DUP", b"N2"),
            ("POP", b"NN0"),
            ("POP_MARK", b"N(1"),
        ],
    )
    def test_instructions_that_no_published_lock_has_are_refused(self, opcode, data):
        assert any(known.name == opcode for known, _, _ in pickletools.genops(PROTO + data + b"."))
        with pytest.raises(LockFormatError, match="is not one that a published lock has"):
            read(PROTO + data + b".", MKDIR)

    @pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5, 6, 255])
    def test_other_protocols_are_refused(self, protocol):
        with pytest.raises(LockFormatError, match=f"protocol {protocol} is not 2"):
            read(b"\x80" + bytes([protocol]) + b"N.")

    @pytest.mark.parametrize("data", [b"N.", PROTO + PROTO + b"N.", PROTO + b"N\x80\x02."])
    def test_protocol_comes_first_and_once(self, data):
        with pytest.raises(LockFormatError, match="PROTO must come first"):
            read(data)

    @pytest.mark.parametrize("tail", [b".", b"\0", PROTO + b"N.", b"cos\nsystem\n."])
    def test_bytes_after_the_end_are_refused(self, tail):
        with pytest.raises(LockFormatError, match="bytes follow its end"):
            read(PROTO + b"N." + tail)

    @pytest.mark.parametrize(
        ("data", "fault"),
        [
            (b"", "0 values at its end"),
            (b"NN", "2 values at its end"),
            (b"(", "1 values at its end"),
            (b"N\x86", "more values than there are"),
            (b"(N\x86", "more values than there are"),
            (b"R", "more values than there are"),
            (b"NNR", "not a global"),
            (b"cposix\nmkdir\nNR", "not a global"),
            (b"N)b", "not one that"),
            (b"NN\x85b", "needs a Call"),
            (b"cposix\nmkdir\nN\x85b", "needs a Call"),
            (b"cposix\nmkdir\nN\x85RNb", "no tuple, or a second one"),
            (b"cposix\nmkdir\nN\x85RN\x85bN\x85b", "no tuple, or a second one"),
            (b"t", "needs a mark"),
            (b"Ne", "needs a mark"),
            (b"N(Ne", "needs a list"),
            (b"NNa", "needs a list"),
            (b"(NNa", "needs a list"),
            (b"](NNu", "needs a dict"),
            (b"}(Nu", "no value"),
            (b"}NNs", "key that is not text"),
            (b"}(" + text("a") + b"N" + text("a") + b"Nu", "key 'a' twice"),
            (b"}" + text("a") + b"Ns" + text("a") + b"Ns", "key 'a' twice"),
            (b"q\x00", "needs a object"),
            (b"(q\x00", "needs a object"),
            (b"Nq\x00q\x00", "slot 0 is written twice"),
            (b"h\x00", "slot 0 is read before"),
            (b"j\xff\xff\xff\xff", "slot 4294967295 is read before"),
        ],
    )
    def test_machine_faults_are_refused(self, data, fault):
        with pytest.raises(LockFormatError, match=fault):
            read(PROTO + data + b".", MKDIR)

    @pytest.mark.parametrize(
        "data",
        [
            b"\xff.",
            b"X\xff\xff\xff\xff.",
            b"X\x01\x00\x00\x00\xff.",
            b"K",
            b"G\0.",
            b"cnumpy",
            b"c\xff\n\xff\n.",
            b"N",
        ],
    )
    def test_damaged_pickles_are_refused(self, data):
        with pytest.raises(LockFormatError, match="damaged"):
            read(PROTO + data)

    @settings(deadline=None, max_examples=300)
    @given(st.binary(max_size=60), st.booleans())
    def test_noise_is_read_or_refused_and_nothing_else(self, noise, whole):
        try:
            read(PROTO + noise + (b"." if whole else b""), MKDIR, SCALAR)
        except LockFormatError:
            return

    @settings(deadline=None)
    @given(PLAIN, st.data())
    def test_cut_pickles_are_refused(self, value, data):
        whole = pickle.dumps(value, protocol=2)
        with pytest.raises(LockFormatError):
            read(whole[: data.draw(st.integers(0, len(whole) - 1))])


class TestBounds:
    def test_deep_nesting_is_no_danger(self):
        value = read(PROTO + b"N" + b"\x85" * 200_000 + b".")
        assert isinstance(value, tuple)

    def test_list_that_holds_itself_is_no_danger(self):
        value = read(PROTO + b"]q\x00h\x00a.")
        assert value[0] is value

    def test_shared_lists_are_not_copied(self):
        # Each list holds the one before it twice: written out it would have 2**60 elements.
        data = (
            PROTO
            + b"]q\x00"
            + b"".join(
                b"](h" + bytes([index]) + b"h" + bytes([index]) + b"eq" + bytes([index + 1])
                for index in range(60)
            )
        )
        tracemalloc.start()
        try:
            with pytest.raises(LockFormatError, match="61 values at its end"):
                read(data + b".")
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()

    def test_memo_slots_take_no_room(self):
        tracemalloc.start()
        try:
            read(PROTO + b"Nr\xff\xff\xff\xff.")
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()
