"""The audit says locked on evidence only, in the database and through the server."""

from __future__ import annotations

import re
from dataclasses import fields
from datetime import datetime

import pytest

from mlflow_safelock.audit import AuditRow, audit
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from tests.audit.conftest import Audited, Rows
from tests.registries import BASE

DAMAGED = ("no-biases", "other-config", "cut-weights", "with-more")
"""Copies of a standalone model, with its receipt and something else changed."""

WAYS = pytest.mark.parametrize("way", ["database", "http"])


def rows_of(audited: Audited, way: str) -> Rows:
    rows: Rows = getattr(audited, way)
    return rows


@WAYS
def test_every_version_that_is_not_deleted_and_no_lock_is_reported_once(audited: Audited, way: str) -> None:
    expected = {("bot", number) for number in (1, 2, 3)} | {("hidden", 1), ("hidden", 2)}
    single = (
        "by-hand",
        "churn",
        "copy",
        "copy-of-copy",
        "new-name",
        "other-loader",
        "other-lock",
        "standalone",
        "standalone-with-biases",
        "unlocking",
        *DAMAGED,
    )
    assert set(rows_of(audited, way)) == expected | {(name, 1) for name in single}


@WAYS
def test_a_promoted_version_is_locked_and_says_how_when_and_by_whom(audited: Audited, way: str) -> None:
    row = rows_of(audited, way)["bot", 1]
    assert (row.state, row.stage, row.aliases) == ("locked", "Staging", ("blue", "champion"))
    assert (row.lock_name, row.lock_version) == (lock_model_name(BASE), 1)
    assert (row.lock_digest, row.base_model, row.alpha) == (audited.lock.digest, BASE, 6.0)
    assert datetime.fromisoformat(row.when or "").utcoffset() is not None
    assert (row.by, row.by_verified) == ("anonymous", False)
    assert row.evidence == {"database": "ledger", "http": "receipt"}[way]
    assert row.drift == (), "the tags that the gate sets are the ones that the audit expects"
    assert row.workspace == "default"


@WAYS
@pytest.mark.parametrize("name", ["standalone", "standalone-with-biases"])
def test_a_promoted_standalone_version_is_locked_like_any_other(
    audited: Audited, way: str, name: str
) -> None:
    row = rows_of(audited, way)[name, 1]
    assert (row.state, row.stage, row.lock_digest, row.alpha) == ("locked", "Staging", audited.lock.digest, 6)
    assert row.evidence == {"database": "ledger", "http": "receipt"}[way]
    assert row.drift == ()


@WAYS
@pytest.mark.parametrize("name", DAMAGED)
def test_a_standalone_model_that_is_not_as_its_receipt_says_is_unlocked(
    audited: Audited, way: str, name: str
) -> None:
    assert rows_of(audited, way)[name, 1].state == "unlocked"


@WAYS
def test_a_model_that_is_no_llm_is_unlocked_even_in_staging(audited: Audited, way: str) -> None:
    row = rows_of(audited, way)["churn", 1]
    assert (row.state, row.stage, row.evidence, row.drift) == ("unlocked", "Staging", "none", ())
    about_the_lock = (
        "lock_name",
        "lock_version",
        "lock_digest",
        "base_model",
        "alpha",
        "when",
        "by",
        "by_verified",
    )
    assert {getattr(row, name) for name in about_the_lock} == {None}


@WAYS
def test_tags_copied_from_a_locked_version_lock_nothing(audited: Audited, way: str) -> None:
    row = rows_of(audited, way)["bot", 2]
    assert (row.state, row.evidence, row.lock_digest) == ("unlocked", "none", None)
    assert row.drift == ("The tag safelock.state says 'locked', and no promotion is on record.",)


@WAYS
def test_a_locked_version_whose_tags_were_tampered_with_stays_locked_and_shows_it(
    audited: Audited, way: str
) -> None:
    row = rows_of(audited, way)["bot", 3]
    source = {"database": "ledger", "http": "receipt"}[way]
    assert row.state == "locked"
    assert row.drift == (
        f"The tag safelock.state says 'unlocked', and the {source} 'locked'.",
        f"The tag safelock.lock_digest is missing; the {source} says {audited.lock.digest!r}.",
    )


@WAYS
@pytest.mark.parametrize("name", ["copy", "copy-of-copy"])
def test_a_copy_of_a_locked_version_is_not_shown_as_promoted(audited: Audited, way: str, name: str) -> None:
    row = rows_of(audited, way)[name, 1]
    assert (row.state, row.lock_digest) == ("locked (copy)", audited.lock.digest)
    assert row.drift == ("It serves the locked model of 'bot' version 1 and was never promoted itself.",)


@WAYS
def test_a_renamed_model_stays_locked_and_says_what_it_was_called(audited: Audited, way: str) -> None:
    row = rows_of(audited, way)["new-name", 1]
    assert (row.state, row.stage) == ("locked", "Staging")
    assert row.drift == ("It was promoted as 'old-name' version 1 and renamed since.",)


@WAYS
@pytest.mark.parametrize("name", ["by-hand", "other-lock", "unlocking", "other-loader"])
def test_a_locked_model_that_no_promotion_wrote_is_unlocked(audited: Audited, way: str, name: str) -> None:
    row = rows_of(audited, way)[name, 1]
    assert (row.state, row.evidence, row.by) == ("unlocked", "none", None)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("by-hand", "saved by hand"),
        ("other-lock", "the registered one has"),
        ("unlocking", "states alpha -6, which unlocks"),
        ("other-loader", "is not loaded as a locked model"),
        ("no-biases", "'model/model-safelock.safetensors' at .* is missing"),
        ("other-config", "is not loaded as a locked model"),
        ("cut-weights", "and the fine-tune's had"),
        ("with-more", "'model/more.txt' at .* is not in its receipt"),
    ],
)
def test_through_a_server_it_says_why_a_receipt_does_not_count(audited: Audited, name: str, why: str) -> None:
    assert re.search(why, audited.http[name, 1].drift[0])


@WAYS
def test_a_tag_hides_no_version_from_the_audit(audited: Audited, way: str) -> None:
    # Version 2 is tagged as a prompt, which hides both from MLflow's own searches.
    assert {rows_of(audited, way)["hidden", number].state for number in (1, 2)} == {"unlocked"}


def test_a_name_pattern_chooses_models_and_can_show_the_locks(audited: Audited) -> None:
    for registry in (audited.server.registry_uri, audited.server.url):
        assert [row.version for row in audit(registry, models="bo?")] == [1, 2, 3]
        assert [row.model for row in audit(registry, models="safelock.*")] == [lock_model_name(BASE)]
        assert audit(registry, models="BOT") == ()


def test_a_lock_that_cannot_be_read_leaves_the_state_unknown(audited: Audited) -> None:
    (lock_file,) = (
        path
        for path in audited.server.artifacts.rglob("lock.safetensors")
        if (path.parent / "head_scores.png").exists()
    )
    away = lock_file.with_suffix(".away")
    lock_file.rename(away)
    try:
        (row, *_) = audit(audited.server.url, models="bot")
    finally:
        away.rename(lock_file)
    assert (row.state, row.lock_digest) == ("unknown", None)
    assert f"The lock models:/{lock_model_name(BASE)}/1" in row.drift[0]
    assert row.drift[-1] == "The tag safelock.state says 'locked', and no promotion is on record."


def test_the_fields_of_a_row_are_stable() -> None:
    assert [field.name for field in fields(AuditRow)] == [
        "workspace",
        "model",
        "version",
        "stage",
        "aliases",
        "state",
        "lock_name",
        "lock_version",
        "lock_digest",
        "base_model",
        "alpha",
        "when",
        "by",
        "by_verified",
        "evidence",
        "drift",
        "own_biases",
        "violation",
        "lock_faults",
    ]
