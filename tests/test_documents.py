"""YAML files of people are read in one way only."""

from __future__ import annotations

import pytest

from mlflow_safelock.documents import read_document, read_value
from mlflow_safelock.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24", 24),
        ("-3", -3),
        ("0", 0),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("5E2", 500.0),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("pair", "pair"),
        ("'24'", "24"),
        ('"a\\n"', "a\n"),
        ("[4, 5.0, [a]]", (4, 5.0, ("a",))),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        # Texts, and not, as in YAML 1.1, booleans, octal and base-60 numbers, dates, infinities.
        ("no", "no"),
        ("on", "on"),
        ("True", "True"),
        ("010", "010"),
        ("010.5", "010.5"),
        ("0x10", "0x10"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("<<", "<<"),
    ],
)
def test_plain_values_are_read_without_surprises(text, value):
    read = read_value(text, "It", RecipeError)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is there twice"),
        (b"x:\n  - a: 1\n    a: 1\n", "line 3: the key 'a' is there twice"),
        (b"a: 1\n'a': 1\n", "line 2: the key 'a' is there twice"),
        (b"a: &x [1]\nb: *x\n", "line 2: .*aliases are not used"),
        (b"a: &x {}\nb: {<<: *x}\n", "aliases are not used"),
        (b'a: 1\nb: "c\\ud800"\n', r"line 2: 'c\\ud800' has half a character in it"),
        (b'a:\n  - "c\\udfff": 1\n', "line 2: .* has half a character in it"),
        (b"a: !!python/object/apply:os.mkdir [x]\n", "line 1: the tag .*python.* is not used"),
        (b"a: !!set {b}\n", "the tag"),
        (b"a: !!binary aGk=\n", "the tag"),
        (b"a: !mine 1\n", "the tag"),
        (b"1: a\n", "line 1: a key must be text"),
        (b"true: a\n", "a key must be text"),
        (b"? [a, b]\n: c\n", "a key must be text"),
        (b"a: [1\nb: 2\n", "line 2"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"a: b: c\n", "line 1"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
        (b"a: '\xff'\n", "is not YAML"),
        (b"a: \x00\n", "is not YAML"),
        (b"a: " + b"9" * 5000 + b"\n", "is not YAML"),
        (b"a: " + b"[" * 5000 + b"]" * 5000 + b"\n", "too deeply"),
        (b"a: " + b"x" * (1 << 18) + b"\n", "more than 262144 bytes"),
        (b"", "not a YAML mapping"),
        (b"- a\n", "not a YAML mapping"),
        (b"a\n", "not a YAML mapping"),
    ],
)
def test_anything_else_is_refused_with_its_line(text, message):
    with pytest.raises(RecipeError, match=f"(?s)^my.yaml.*{message}"):
        read_document(text, "my.yaml", RecipeError)


def test_place_of_every_value_is_known():
    document = read_document(b"a: 1\nb:\n  c:\n    - 2\n    - d: 3\n", "my.yaml", RecipeError)
    assert document.values == {"a": 1, "b": {"c": (2, {"d": 3})}}
    assert document.where(("a",)) == "my.yaml, line 1"
    assert document.where(("b", "c")) == "my.yaml, line 3"
    assert document.where(("b", "c", 1, "d")) == "my.yaml, line 5"


def test_what_is_not_there_is_placed_at_what_is_around_it():
    document = read_document(b"a: 1\nb:\n  c: 2\n", "my.yaml", RecipeError)
    assert document.where(("b", "x", "y")) == "my.yaml, line 2"
    assert document.where(("z",)) == "my.yaml, line 1"


def test_nothing_in_a_recipe_is_run(tmp_path):
    marker = tmp_path / "it ran"
    with pytest.raises(RecipeError, match="tag"):
        read_document(f"a: !!python/object/apply:os.mkdir ['{marker}']\n".encode(), "my.yaml", RecipeError)
    assert not marker.exists()
