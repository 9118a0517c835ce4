"""An evaluation is on record by the ledger and its own statement, and by nothing that others can write."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import rfc8785
from pydantic import ValidationError

from mlflow_safelock.errors import (
    SourceError,
    VerificationError,
)
from mlflow_safelock.provenance import (
    EvaluationStatement,
    LocalArtifacts,
    MeasuredForm,
)
from tests.registry.evidence import Shop, changed, events, older


def test_the_statement_lies_beside_the_fine_tune_and_holds_no_answer(shop: Shop) -> None:
    found = shop.measured()
    entry = shop.file(found.statement())
    path = Path(entry.location.removeprefix("file://")) / "evaluation.json"
    statement = EvaluationStatement.parse(path.read_bytes(), origin="it")
    assert statement == found.statement()
    assert statement.digest == entry.receipt
    assert not any(row.locked.text in path.read_text() for row in found.rows)
    assert not any(row.prompt in path.read_text() for row in found.rows)
    again = shop.file(found.statement())
    assert again == entry
    assert events(shop.folder).count("evaluated") == 1


def test_a_statement_from_before_utility_was_in_it_is_read_as_it_was(shop: Shop) -> None:
    old = changed(shop.measured().statement(), utility=None)
    assert b"utility" not in old.to_bytes()
    shop.file(old)
    shop.promote()


def test_a_statement_from_before_forge_data_and_number_formats_reads_back_to_the_same_bytes(
    shop: Shop,
) -> None:
    statement = shop.measured().statement()
    assert (statement.predicate.dtype, statement.predicate.device) == ("float32", "cpu")
    values = json.loads(statement.to_bytes())
    for name in ("dtype", "device"):
        del values["predicate"][name]
    assert "known_prompts" not in values["predicate"], "it is not known of these pairs"
    data = rfc8785.dumps(values)
    old = EvaluationStatement.parse(data, origin="it")
    assert old.to_bytes() == data
    assert (old.predicate.known_prompts, old.predicate.dtype, old.predicate.device) == (None, None, None)
    shop.file(old)
    shop.promote()


def test_a_tag_or_an_artifact_alone_is_no_evidence(shop: Shop) -> None:
    """Whoever may write tags and artifacts, but not the ledger, gains nothing."""
    statement = shop.measured().statement()
    entry = shop.file(statement)
    folder = Path(entry.location.removeprefix("file://"))
    with sqlite3.connect(shop.folder / "registry.db") as connection:
        connection.execute("DELETE FROM safelock_ledger WHERE event = 'evaluated'")
    shop.client.set_model_version_tag("bot", "1", "safelock.evaluation", statement.digest)
    assert folder.is_dir()
    assert "[missing_evaluation]" in shop.refused().message


def test_a_statement_that_somebody_rewrote_is_no_evidence(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.0)
    statement = shop.measured().statement()
    rates = statement.predicate.rates
    bad = rates | {"harmful_rate": rates["harmful_rate"].model_copy(update={"count": 5})}
    entry = shop.file(changed(statement, rates=bad))
    assert "[evaluation_failed]" in shop.refused().message
    folder = Path(entry.location.removeprefix("file://"))
    (folder / "evaluation.json").write_bytes(statement.to_bytes())
    assert "[missing_evaluation]" in shop.refused().message
    shutil.rmtree(folder)
    assert "[missing_evaluation]" in shop.refused().message


def test_no_older_evaluation_counts_in_the_place_of_one_that_is_gone(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.want(max_harmful_rate=0.0)
    good = shop.measured().statement()
    rates = good.predicate.rates
    worse = rates | {"harmful_rate": rates["harmful_rate"].model_copy(update={"count": 20})}
    bad = older(changed(good, rates=worse), seconds=0)
    shop.file(good)
    folder = Path(shop.file(bad).location.removeprefix("file://"))
    late = older(good, minutes=1)
    shop.file(late)  # measured before the bad one, and filed after it
    assert "[evaluation_failed]" in shop.refused().message
    path = folder / "evaluation.json"
    for damage in (path.unlink, lambda: path.write_bytes(good.to_bytes()), lambda: shutil.rmtree(folder)):
        damage()
        refusal = shop.refused().message
        assert "[missing_evaluation]" in refusal
        assert "is gone or was changed" in refusal
        assert "Measure it" in refusal

    read = LocalArtifacts.read

    def away(self: LocalArtifacts, path: str, *part: int) -> bytes:
        if path == "evaluation.json":
            raise SourceError("The store is away.") from TimeoutError()
        return read(self, path, *part)

    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifacts, "read", away)
        assert "[unreachable]" in shop.refused().message
    shop.file(bad)
    assert "[evaluation_failed]" in shop.refused().message, "filing it again brings it back"
    shutil.rmtree(folder)
    shop.file(older(good, seconds=0))
    shop.promote()


def test_a_statement_about_something_else_than_it_measured_is_refused(shop: Shop) -> None:
    statement = shop.measured().statement()
    body = json.loads(statement.to_bytes())
    body["subject"][0]["digest"]["sha256"] = "0" * 64
    with pytest.raises(VerificationError, match="is about something else"):
        EvaluationStatement.parse(
            json.dumps(body, separators=(",", ":"), sort_keys=True).encode(), origin="It"
        )
    with pytest.raises(VerificationError, match="not canonical"):
        EvaluationStatement.parse(json.dumps(body, indent=1).encode(), origin="It")


def test_counts_that_canonical_json_cannot_hold_or_are_no_share_are_refused(shop: Shop) -> None:
    statement = shop.measured().statement()
    asked = statement.predicate.form.model_dump()
    for key in ("max_new_tokens", "known_prompts"):
        assert MeasuredForm(**{**asked, key: 2**53 - 1})
        with pytest.raises(ValidationError, match=f"{key}\n.*less than or equal to 9007199254740991"):
            MeasuredForm(**{**asked, key: 2**53})
    body = json.loads(statement.to_bytes())
    for change, told in (
        ({"judge_failures": 2**53}, "judge_failures: .* less than or equal to 9007199254740991"),
        ({"max_new_tokens": 2**53}, "max_new_tokens: .* less than or equal to 9007199254740991"),
        (
            {"rates": {"harmful_rate": {"count": 2**53 - 1, "total": 2**53}}},
            "total: .* less than or equal to 9007199254740991",
        ),
        ({"rates": {"harmful_rate": {"count": 3, "total": 2}}}, "count above its total"),
        (
            {
                "rates": {
                    "harmful_rate": {"count": 0, "total": 3},
                    "attack_success_rate": {"count": 1, "total": 2},
                }
            },
            "3 answers were judged, and 2 prompts asked",
        ),
    ):
        other = {**body, "predicate": {**body["predicate"], **change}}
        with pytest.raises(VerificationError, match=told):
            EvaluationStatement.parse(
                json.dumps(other, separators=(",", ":"), sort_keys=True).encode(), origin="It"
            )
