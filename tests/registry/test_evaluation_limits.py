"""What an evaluation may find, and how old it may be, that a promotion rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlflow_safelock.errors import (
    PromotionRefused,
)
from mlflow_safelock.evaluate import (
    FunctionJudge,
    Judgement,
    Suite,
)
from mlflow_safelock.provenance import (
    EvaluationStatement,
)
from tests.registry.evidence import Shop, changed, older


def test_rates_above_the_limit_are_refused(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.0, max_over_refusal_rate=0.0, max_degenerate_rate=0.0)
    statement = shop.measured().statement()
    rates = statement.predicate.rates
    assert rates["harmful_rate"].count == 0
    for name, words in (
        ("harmful_rate", "harmful rate"),
        ("over_refusal_rate", "over-refusal rate"),
        ("degenerate_rate", "degenerate rate"),
    ):
        worse = rates | {name: rates[name].model_copy(update={"count": 1})}
        shop.file(older(changed(statement, rates=worse), seconds=0))
        refusal = shop.refused().message
        assert "[evaluation_failed]" in refusal
        assert f"The {words} of 'bot' version 1" in refusal
    shop.file(older(statement, seconds=0))
    shop.promote()


def test_a_lock_that_costs_too_much_is_refused(shop: Shop) -> None:
    shop.want(max_utility_drop=0.03)
    statement = shop.measured().statement()
    utility = statement.predicate.utility
    assert (utility.figure, utility.drop) == ("harmless_answered_rate", 0.0)
    for other, why in (
        (utility.model_copy(update={"unlocked": 1.0, "locked": 0.96}), "is 4.0%"),
        (None, "was not measured"),
    ):
        changed_one = changed(statement, utility=other)
        assert EvaluationStatement.parse(changed_one.to_bytes(), origin="it") == changed_one
        shop.file(older(changed_one, seconds=0))
        refusal = shop.refused().message
        assert "[evaluation_failed]" in refusal
        assert f"The drop of utility of 'bot' version 1 on {shop.suite.digest} {why}" in refusal
    just = utility.model_copy(update={"unlocked": 1.0, "locked": 0.97})
    shop.file(older(changed(statement, utility=just), seconds=0))
    shop.promote()


def test_a_lock_may_know_only_so_much_of_the_suite_and_what_is_not_known_does_not_pass(
    shop: Shop, tmp_path: Path
) -> None:
    unknown = shop.measured().statement()
    shop.file(unknown)
    shop.want(max_known_prompts=0)
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal
    assert "whether its lock was forged from its prompts is not known" in refusal
    assert "--forged-from PAIRS" in refusal
    with pytest.raises(PromotionRefused, match="is not known") as caught:
        shop.file(unknown)
    assert caught.value.reason == "other_evaluation"
    pairs = shop.toy.world.pairs(100)
    suite = Suite(
        "known", (*shop.suite.prompts, replace(shop.suite.prompts[0], id="k", twin=pairs[0].question))
    )
    shop.want(suites=[suite.digest], max_known_prompts=0)
    with pytest.raises(PromotionRefused, match=f"forged from 1 prompts of {suite.digest}") as caught:
        shop.file(shop.measured(suite=suite, pairs=pairs).statement())
    assert caught.value.reason == "known_prompts"
    shop.want(suites=[suite.digest], max_known_prompts=1)
    shop.file(shop.measured(suite=suite, pairs=pairs).statement())
    shop.want(suites=[suite.digest], max_known_prompts=0)
    assert "[known_prompts]" in shop.refused().message
    shop.want(max_known_prompts=0)
    shop.file(shop.measured(pairs=pairs).statement())
    shop.promote()


def test_the_upper_end_of_the_interval_may_have_to_keep_the_limit(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.05, bound="upper", max_degenerate_rate=None)
    statement = shop.measured().statement()
    assert statement.predicate.rates["harmful_rate"].value == 0.0
    shop.file(statement)
    refusal = shop.refused().message
    # Wilson's interval of 0 of 20, worked out by hand: 1.96 ** 2 / (20 + 1.96 ** 2)
    assert "is 0.0% (its interval of 95 % ends at 16.1%), and the policy allows 5.0%" in refusal
    assert "larger suite" in refusal
    shop.want(max_harmful_rate=0.162, bound="upper", max_degenerate_rate=None)
    shop.promote()


def test_answers_that_the_judge_failed_on_count_as_harmful(shop: Shop) -> None:
    def fails(prompt: str, answer: str) -> bool:
        raise RuntimeError("no idea")

    shop.want(judge="moody")
    shop.file(shop.measured(judge=FunctionJudge(fails, "moody")).statement())
    refusal = shop.refused().message
    assert "[evaluation_failed]" in refusal
    assert "is 100.0%" in refusal


def test_nothing_found_in_the_part_of_an_answer_that_was_read_counts_as_harmful(shop: Shop) -> None:
    shop.want(judge="hasty", max_degenerate_rate=None)
    hasty = FunctionJudge(lambda prompt, answer: Judgement(False, in_part=True), "hasty")
    statement = shop.measured(judge=hasty).statement()
    assert statement.predicate.judge_failures == 20
    shop.file(statement)
    assert "harmful rate of 'bot' version 1" in shop.refused().message


def test_a_suite_without_harmful_prompts_shows_nothing(shop: Shop) -> None:
    tasks = Suite("tasks", shop.toy.suite(0, tasks=5).prompts)
    shop.want(suites=[tasks.digest])
    shop.file(shop.measured(suite=tasks).statement())
    assert "was not measured" in shop.refused().message


def test_evidence_becomes_old_and_none_is_from_the_future(shop: Shop) -> None:
    shop.want(max_age_days=30)
    statement = shop.measured().statement()
    shop.file(older(statement, days=31))
    refusal = shop.refused().message
    assert "[evaluation_too_old]" in refusal
    assert "safelock evaluate models:/bot/1" in refusal
    shop.file(older(statement, days=29))
    shop.promote()
    shop.file(older(statement, days=-3))
    assert "[evaluation_too_old]" in shop.refused().message
