"""A gate by tag compares what it asks with what was asked of a promotion: nothing, if its row is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.gate.asked import asked_of, was_asked_as_much
from mlflow_safelock.gate.guard import meets
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.policy import DEFAULT_POLICY, EvaluationRule, GateRule, LockRule, SignatureRule
from mlflow_safelock.provenance import Actor
from tests.keys import write_keys

HIGH = {"risk": "high"}


def promoted(asked: dict[str, Any] | None, place: str = "0" * 32) -> LedgerEntry:
    """The row of a promotion of which this was asked, as the ledger has it."""
    row = LedgerEntry(
        event="promoted",
        workspace="default",
        model="bot",
        version=1,
        target="stage:Staging",
        actor=Actor(name="alice", verified=False),
        policy=DEFAULT_POLICY.digest,
        location=f"/models/bot-safelock/{place}",
        asked=asked,
    )
    return LedgerEntry.model_validate_json(row.model_dump_json())


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, ...]:
    """Two public keys."""
    return tuple(write_keys(tmp_path, name=name).public.read_text() for name in ("ours", "theirs"))


def test_a_gate_that_asks_for_none_of_it_leaves_the_row_as_it_was() -> None:
    assert asked_of(GateRule(kinship={"min_cosine": 0.9}, carrier="standalone")) is None
    assert was_asked_as_much(GateRule(tags=HIGH), promoted(None))


def test_what_was_asked_through_the_same_gate_is_as_much(keys: tuple[str, ...]) -> None:
    rule = GateRule(
        tags=HIGH,
        lock=LockRule(max_age_days=30),
        signature=SignatureRule(required=True, public_keys=keys),
        evaluation=EvaluationRule(max_harmful_rate=0.0, max_age_days=7),
    )
    assert was_asked_as_much(rule, promoted(asked_of(rule)))
    assert not was_asked_as_much(rule, promoted(None))


@pytest.mark.parametrize(
    ("asked", "asks"),
    [
        ({"max_age_days": 31}, {"max_age_days": 30}),
        ({"max_age_days": None}, {"max_age_days": 30}),
    ],
)
def test_of_a_lock_its_age(asked: dict[str, Any], asks: dict[str, Any]) -> None:
    before = asked_of(GateRule(lock=LockRule(**asked)))
    assert not was_asked_as_much(GateRule(tags=HIGH, lock=LockRule(**asks)), promoted(before))
    younger = asked_of(GateRule(lock=LockRule(max_age_days=29)))
    assert was_asked_as_much(GateRule(tags=HIGH, lock=LockRule(**asks)), promoted(younger))


def test_of_a_signature_whose_it_is(keys: tuple[str, ...]) -> None:
    ours, either = keys[:1], keys
    rule = GateRule(tags=HIGH, signature=SignatureRule(required=True, public_keys=ours))
    for asked in ({"required": True, "public_keys": either}, {"required": False, "public_keys": ours}):
        before = asked_of(GateRule(signature=SignatureRule(**asked), evaluation=EvaluationRule()))
        assert not was_asked_as_much(rule, promoted(before))
    of_either = rule.model_copy(update={"signature": SignatureRule(required=True, public_keys=either)})
    assert was_asked_as_much(of_either, promoted(asked_of(rule)))


@pytest.mark.parametrize(
    "looser", [{"max_harmful_rate": 0.06}, {"judge": "a-kind-one"}, {"min_new_tokens": 8}]
)
def test_of_an_evaluation_each_key(looser: dict[str, Any]) -> None:
    rule = GateRule(tags=HIGH, evaluation=EvaluationRule())
    assert not was_asked_as_much(rule, promoted(asked_of(GateRule(evaluation=EvaluationRule(**looser)))))
    stricter = asked_of(GateRule(evaluation=EvaluationRule(max_harmful_rate=0.01)))
    assert was_asked_as_much(rule, promoted(stricter))


def test_of_own_biases_that_they_were_looked_at() -> None:
    ignored = asked_of(GateRule(own_biases="ignore"))
    assert not was_asked_as_much(GateRule(tags=HIGH), promoted(ignored))
    assert was_asked_as_much(GateRule(tags=HIGH, own_biases="ignore"), promoted(ignored))
    assert was_asked_as_much(GateRule(tags=HIGH), promoted(asked_of(GateRule())))


@pytest.mark.parametrize(("carrier", "other"), [("overlay", "standalone"), ("standalone", "overlay")])
def test_of_a_carrier_that_it_is_that_one(carrier: Any, other: Any) -> None:
    places = {"overlay": "0" * 32, "standalone": f"standalone-{'0' * 32}"}
    rule = GateRule(tags=HIGH, carrier=carrier)
    assert was_asked_as_much(rule, promoted(None, places[carrier]))
    assert not was_asked_as_much(rule, promoted(None, places[other]))


def test_what_another_version_wrote_there_counts_for_nothing() -> None:
    odd = promoted({"evaluation": {"max_harmful_rate": 0.01, "vibes": "good"}})
    assert not was_asked_as_much(GateRule(tags=HIGH, evaluation=EvaluationRule()), odd)
    assert was_asked_as_much(GateRule(tags=HIGH), odd)


def test_a_gate_without_tags_asks_itself() -> None:
    assert was_asked_as_much(GateRule(evaluation=EvaluationRule(), carrier="standalone"), promoted(None))


@pytest.mark.parametrize(("first", "floor", "is_met"), [(None, 2, True), (None, 3, False), (1, 2, False)])
def test_a_row_from_before_first_numbers_were_told_counts_by_the_one_it_has(
    first: int | None, floor: int, is_met: bool
) -> None:
    digest = f"sha256:{'1' * 64}"
    lock = LockInForce(model="safelock.base", version=2, digest=digest, base_model="base")
    found = {"lock": lock, "first_version": first, "alpha": 6.0, "kinship": 1.0, "tokenizer": "same"}
    decision = promoted(None).model_copy(update=found)
    assert meets(GateRule(tags=HIGH, lock=LockRule(min_version=floor)), decision) is is_met
