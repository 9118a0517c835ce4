"""A receipt is one exact sequence of bytes, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.provenance import (
    Actor,
    LocalArtifacts,
    LockReference,
    Promotion,
    Receipt,
    ReceiptPredicate,
    SourceReference,
    take_fingerprint,
)


@pytest.fixture
def receipt(tmp_path: Path) -> Receipt:
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    digest = "sha256:" + "ab" * 32
    return Receipt.about(
        ReceiptPredicate(
            source=SourceReference(
                uri="mlflow-artifacts:/1/models/m-1/artifacts",
                fingerprint=take_fingerprint(LocalArtifacts(tmp_path)),
            ),
            lock=LockReference(digest=digest, base_model="org/base", model="safelock.org--base", version=2),
            alpha=6.0,
            carrier="overlay",
            promotion=Promotion(
                model="bot",
                version=3,
                target="stage:Staging",
                policy=digest,
                actor=Actor(name="ana", verified=True),
            ),
            files={"MLmodel": "cd" * 32},
            created="2026-01-31T12:00:00+00:00",
            tools={"mlflow": "3.17.2"},
        )
    )


def test_a_receipt_survives_being_written_and_read(receipt: Receipt) -> None:
    assert Receipt.parse(receipt.to_bytes(), origin="r") == receipt


def test_a_receipt_is_an_in_toto_statement_about_the_source(receipt: Receipt) -> None:
    statement = json.loads(receipt.to_bytes())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    fingerprint = receipt.predicate.source.fingerprint.digest.removeprefix("sha256:")
    assert statement["subject"] == [{"name": "models:/bot/3", "digest": {"sha256": fingerprint}}]


def _edit(receipt: Receipt, path: tuple[Any, ...], value: Any) -> bytes:
    statement = json.loads(receipt.to_bytes())
    place = statement
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("predicate", "alpha"), "6", "alpha"),
        (("predicate", "alpha"), True, "alpha"),
        (("predicate", "lock", "digest"), "sha256:short", "digest"),
        (("predicate", "lock", "version"), 0, "version"),
        (("predicate", "lock", "version"), 2**53, "version: .* less than or equal to 9007199254740991"),
        (("predicate", "promotion", "version"), 2**53, "version: .* less than or equal to 9007199254740991"),
        (("predicate", "surprise"), 1, "surprise"),
        (("_type",), "https://in-toto.io/Statement/v0.1", "_type"),
        (("predicateType",), "urn:other", "predicateType"),
        (("subject", 0, "name"), "models:/other/1", "something else"),
        (("subject", 0, "digest", "sha256"), "00" * 32, "something else"),
    ],
)
def test_a_receipt_that_says_something_impossible_is_refused(
    receipt: Receipt, path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        Receipt.parse(_edit(receipt, path, value), origin="r")


def test_a_receipt_that_was_rewritten_is_refused(receipt: Receipt) -> None:
    data = receipt.to_bytes()
    spaced = json.dumps(json.loads(data)).encode()
    doubled = data.replace(b'"carrier":"overlay"', b'"carrier":"overlay","carrier":"overlay"')
    for rewritten in (spaced, doubled, data + b"\n"):
        with pytest.raises(VerificationError, match="not canonical"):
            Receipt.parse(rewritten, origin="r")
    for broken in (data[:-1], b"", b"\x80\x04."):
        with pytest.raises(VerificationError, match="not valid"):
            Receipt.parse(broken, origin="r")


def test_the_digest_changes_with_what_the_receipt_says(receipt: Receipt) -> None:
    other = Receipt.about(receipt.predicate.model_copy(update={"alpha": 5.0}))
    assert other.digest != receipt.digest
