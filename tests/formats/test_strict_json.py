"""JSON in lock files is read in one way only."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_safelock.errors import LockFormatError
from mlflow_safelock.formats.strict_json import parse_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aé😀\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab😀"), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text("ab😀"), VALUES), st.booleans())
def test_ordinary_objects_are_read(values, ascii_only):
    assert parse_object(json.dumps(values, ensure_ascii=ascii_only).encode(), "It") == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":1,"a":1}', "key 'a' twice"),
        (b'{"b":[{"c":{"a":1,"a":2}}]}', "key 'a' twice"),
        (b'{"a":1,"\\u0061":2}', "key 'a' twice"),
        (b'{"a":NaN}', "holds NaN"),
        (b'{"a":[-Infinity]}', "holds -Infinity"),
        (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
        (b'{"a":"\xff"}', "not UTF-8: byte 6 is 0xff"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":"\\ud800"}', "lone surrogate"),
        (b'{"\\udfff":1}', "lone surrogate"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a":01}', "not JSON"),
        (b'{"a":1,}', "not JSON"),
        (b'{"a":"\n"}', "not JSON"),
        (b'{"a":1}{}', "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"a"', "not a JSON object"),
    ],
)
def test_anything_else_is_refused_and_says_why(text, message):
    with pytest.raises(LockFormatError, match=f"^The header of x .*{message}"):
        parse_object(text, "The header of x")
