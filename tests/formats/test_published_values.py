"""The content of a published pickle: the one form that NumPy writes, and no other."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.inert_pickle import Call, Global, read_inert
from mlflow_safelock.formats.published_values import (
    DTYPE,
    ENCODE,
    MAX_HEADS,
    NDARRAY,
    PUBLISHED_GLOBALS,
    RECONSTRUCT,
    SCALAR,
    PublishedHead,
    published_heads,
)
from tests.formats.published_files import direction, entry, layer_key, pickled

STATE = (3, "<", None, None, None, -1, -1, 0)


def heads_of(content: object) -> tuple[PublishedHead, ...]:
    data = pickled(content)
    return published_heads(read_inert(data, allowed=PUBLISHED_GLOBALS, origin="z"), "z")


def dtype(name: str = "f2", *, arguments: tuple[Any, ...] | None = None, state: Any = STATE) -> Call:
    return Call(DTYPE, (name, False, True) if arguments is None else arguments, state)


def encoded(data: bytes, codec: str = "latin1") -> Call:
    return Call(ENCODE, (data.decode("latin1"), codec))


def array(**changes: Any) -> Call:
    values = np.eye(4, dtype="<f2")[0]
    parts: dict[str, Any] = {
        "kind": NDARRAY,
        "empty": (0,),
        "code": encoded(b"b"),
        "version": 1,
        "shape": (4,),
        "dtype": dtype(),
        "fortran": False,
        "content": encoded(values.tobytes()),
    } | changes
    return Call(
        RECONSTRUCT,
        (parts["kind"], parts["empty"], parts["code"]),
        (parts["version"], parts["shape"], parts["dtype"], parts["fortran"], parts["content"]),
    )


def number(code: str, value: float) -> Call:
    return Call(SCALAR, (dtype(code), encoded(np.array(value, dtype=f"<{code}").tobytes())))


def content(**changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "head": number("i8", 3),
        "direction": array(),
        "std": number("f2", 0.5),
    } | changes
    return {layer_key(2): [(parts["head"], parts["direction"], parts["std"])]}


def refused(value: object, match: str) -> None:
    with pytest.raises(LockFormatError, match=match):
        published_heads(value, "z")


def test_only_the_five_published_globals_are_let_through():
    assert sorted(map(str, PUBLISHED_GLOBALS)) == [
        "_codecs.encode",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
    ]


def test_heads_are_read_as_they_are_and_sorted():
    written = {
        layer_key(10): [entry(3, 1), entry(0, 2, std=0.25)],
        layer_key(9): [entry(5, 3)],
    }
    heads = heads_of(written)
    assert [(h.layer, h.head) for h in heads] == [(9, 5), (10, 0), (10, 3)]
    assert [h.std for h in heads] == [0.5, 0.25, 0.5]
    for head, seed in zip(heads, (3, 2, 1), strict=True):
        assert head.direction.dtype == np.float16
        assert head.direction.tobytes() == direction(seed).tobytes()


def test_the_plain_form_is_what_numpy_writes():
    written = {layer_key(2): [(np.int64(3), np.eye(4, dtype=np.float16)[0], np.float16(0.5))]}
    (by_numpy,), (by_hand,) = heads_of(written), published_heads(content(), "z")
    assert (
        (by_hand.layer, by_hand.head, by_hand.std)
        == (by_numpy.layer, by_numpy.head, by_numpy.std)
        == (2, 3, 0.5)
    )
    assert by_hand.direction.tobytes() == by_numpy.direction.tobytes()


@pytest.mark.parametrize("value", [None, [], {}, (), "x", array(), SCALAR])
def test_content_that_is_no_dict_of_layers_is_refused(value):
    refused(value, "does not hold a dict of layers")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "model.layers.2.self_attn",
        "model.layers.2.self_attn.head_out.weight",
        "model.layers.02.self_attn.head_out",
        "model.layers.-2.self_attn.head_out",
        "model.layers.２.self_attn.head_out",
        "model.layers.99999.self_attn.head_out",
        "model.layers.2.self_attn.head_out\n",
        "model_layers.2.self_attn.head_out",
        "transformer.h.2.attn.head_out",
    ],
)
def test_other_keys_are_refused(key):
    refused({key: content()[layer_key(2)]}, "published locks have keys such as")


@pytest.mark.parametrize("held", [None, (), [], {}, "x"])
def test_layer_that_is_no_list_of_heads_is_refused(held):
    refused({layer_key(2): held}, "Layer 2 of z is not a list of heads")


@pytest.mark.parametrize("held", [None, (), (1, 2), (1, 2, 3, 4), [1, 2, 3]])
def test_entry_that_is_no_triple_is_refused(held):
    refused({layer_key(2): [held]}, r"is not \(head, direction, std\)")


def test_head_twice_is_refused():
    refused({layer_key(2): content()[layer_key(2)] * 2}, "head 3 of layer 2 twice")


@pytest.mark.parametrize(
    "head",
    [
        None,
        True,
        "3",
        3.0,
        -1,
        65536,
        2**31,
        number("i8", -1),
        number("i8", 2**40),
        number("f2", 3.0),
        array(),
        SCALAR,
    ],
    ids=repr,
)
def test_head_that_is_no_index_is_refused(head):
    refused(content(head=head), "a head that is not a whole number")


@pytest.mark.parametrize("std", [None, 1, True, "0.5", number("i8", 1), array(), DTYPE], ids=repr)
def test_std_that_is_no_float_is_refused(std):
    refused(content(std=std), "a std that is not a floating-point number")


@pytest.mark.parametrize(
    "direction",
    [
        None,
        [1.0],
        number("f2", 1.0),
        array(kind=DTYPE),
        array(kind=Global("numpy", "matrix")),
        array(empty=(10**12,)),
        array(empty=()),
        array(code=encoded(b"O")),
        array(code="b"),
        array(version=2),
        array(shape=()),
        array(shape=(2, 2)),
        array(shape=(0,), content=encoded(b"")),
        array(shape=(-4,)),
        array(shape=(5,)),
        array(shape=(10**12,)),
        array(shape=(True,)),
        array(shape=4),
        array(shape=("4",)),
        array(shape=(1025,), content=encoded(bytes(2050))),
        array(dtype="f2"),
        array(dtype=dtype("f4"), content=encoded(bytes(16))),
        array(dtype=dtype("O8"), content=encoded(bytes(32))),
        array(dtype=dtype("i2")),
        array(dtype=dtype("V2")),
        array(dtype=dtype(arguments=("f2", True, True))),
        array(dtype=dtype(arguments=("f2",))),
        array(dtype=dtype(arguments=(("f2", "f2"), False, True))),
        array(dtype=dtype(state=None)),
        array(dtype=dtype(state=(3, ">", None, None, None, -1, -1, 0))),
        array(dtype=dtype(state=(3, "|", None, ("a",), {"a": ()}, 2, 1, 27))),
        array(fortran=True),
        array(fortran=0),
        array(content=bytes(8)),
        array(content=[1.0, 0.0, 0.0, 0.0]),
        array(content=encoded(bytes(7))),
        array(content=encoded(bytes(9))),
        array(content=encoded(bytes(8), "rot13")),
        array(content=encoded(bytes(8), "zlib_codec")),
        array(content=Call(ENCODE, ("\u0100" * 8, "latin1"))),
        array(content=Call(ENCODE, ("\ud800" * 8, "latin1"))),
        array(content=Call(ENCODE, (b"12345678", "latin1"))),
        array(content=Call(ENCODE, ("\0" * 8,))),
        array(content=Call(ENCODE, ("\0" * 8, "latin1", "ignore"))),
        array(content=Call(ENCODE, ("\0" * 8, "latin1"), ("state",))),
        array(content=Call(SCALAR, ("\0" * 8, "latin1"))),
        Call(RECONSTRUCT, (NDARRAY, (0,), encoded(b"b"))),
        Call(RECONSTRUCT, (NDARRAY, (0,), encoded(b"b")), (1, (4,))),
        Call(RECONSTRUCT, (NDARRAY, (0,)), array().state),
        Call(NDARRAY, ((10**12,),)),
        Call(SCALAR, array().arguments, array().state),
    ],
    ids=range(51),
)
def test_direction_in_any_other_form_is_refused(direction):
    refused(content(direction=direction), "not a float16 vector as NumPy writes it")


@pytest.mark.parametrize(
    "std",
    [
        Call(SCALAR, (dtype("O8"), encoded(bytes(8)))),
        Call(SCALAR, (dtype("f2"), encoded(bytes(4)))),
        Call(SCALAR, (dtype("f2"),)),
        Call(SCALAR, (dtype("f2"), encoded(bytes(2))), ("state",)),
        Call(SCALAR, (dtype("f2", state=None), encoded(bytes(2)))),
        Call(DTYPE, (dtype("f2"), encoded(bytes(2)))),
        Call(SCALAR, ("f2", encoded(bytes(2)))),
        Call(SCALAR, (dtype("f2"), b"\0\0")),
    ],
    ids=range(8),
)
def test_scalar_in_any_other_form_is_refused(std):
    refused(content(std=std), "not a floating-point number")


def test_numpy_arrays_of_other_kinds_are_refused_end_to_end():
    for vector in (
        np.zeros(4, dtype=np.float32),
        np.zeros(4, dtype=">f2"),
        np.zeros((2, 2), dtype=np.float16),
        np.zeros(4, dtype=np.float16)[None],
        np.array([None] * 4, dtype=object),
        np.zeros(4, dtype=[("a", "<f2")]),
    ):
        with pytest.raises(LockFormatError):
            heads_of({layer_key(0): [(np.int64(0), vector, np.float16(0.5))]})


def test_one_long_text_that_many_entries_share_takes_no_memory():
    # A megabyte of text, named once and used by thousands of arrays: gigabytes, if each took a copy.
    shared = Call(ENCODE, ("\0" * 1_000_000, "latin1"))
    vector = array(shape=(500_000,), content=shared)
    held = [(index, vector, 0.5) for index in range(3000)]
    tracemalloc.start()
    try:
        refused({layer_key(0): held}, "not a float16 vector")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_one_list_that_many_layers_share_ends_at_the_bound():
    held = [(index, array(), 0.5) for index in range(1000)]
    refused({layer_key(layer): held for layer in range(10_000)}, f"more than {MAX_HEADS} heads")


def test_hostile_pickles_are_refused_by_name_on_the_whole_path():
    class Hostile:
        def __init__(self, *reduced: Any) -> None:
            self.reduced = reduced

        def __reduce__(self):
            return self.reduced

    import codecs
    import os

    for value, name in (
        (Hostile(os.system, ("true",)), "posix.system"),
        (Hostile(eval, ("1",)), "__builtin__.eval"),
        (Hostile(np.load, ("x",)), "numpy.load"),
        (Hostile(codecs.decode, (b"", "zip")), "_codecs.decode"),
        (pickle.PickleBuffer, "PickleBuffer"),
    ):
        with pytest.raises(LockFormatError, match=name):
            heads_of({layer_key(0): [(0, value, 0.5)]})
