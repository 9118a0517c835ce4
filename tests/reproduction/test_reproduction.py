"""The machinery of ``safelock reproduce``, on a base that has learned next to nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.evaluate import Rates
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.recipes import load_recipe
from mlflow_safelock.reproduction.arms import Arm, Treated
from mlflow_safelock.reproduction.measuring import Examiner, Outcome
from mlflow_safelock.reproduction.report import FineTuneFound, SeedFound, benign_lost, removed
from mlflow_safelock.reproduction.run import _Seed
from mlflow_safelock.reproduction.table import markdown
from mlflow_safelock.reproduction.training import FineTune, Way
from mlflow_safelock.reproduction.world import Risk, Share, make_world
from tests.cli.conftest import Run, run  # noqa: F401 - a fixture
from tests.locks import make_lock

DOCS = Path(__file__).resolve().parents[2] / "docs"
TINY = {
    "seeds": "[3]",
    "prompts": "4",
    "choosing_prompts": "3",
    "control_draws": "2",
    "subtraction_scales": "[0.5, 1]",
    "base.layers": "1",
    "base.heads": "4",
    "base.steps": "3",
    "base.batch": "4",
    "fine_tunes.explicit_examples": "[2]",
    "fine_tunes.other_examples": "2",
    "fine_tunes.steps": "2",
    "fine_tunes.check_every": "2",
    "fine_tunes.overtraining": "[1.5]",
    "lock.pairs": "6",
    "lock.head_counts": "[1, 3]",
    "lock.alphas": "[1, 2]",
    "lock.choose_on": "[explicitly harmful 2 full, benign 2 LoRA]",
}


def test_a_small_run_measures_every_fine_tune_under_every_arm(run: Run, tmp_path: Path) -> None:  # noqa: F811
    changes = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    done = run("reproduce", "--output", tmp_path / "figures", "--format", "json", *changes)
    assert done.exit_code == 0, done.stderr
    values = json.loads((tmp_path / "figures" / "reproduction.json").read_text())
    assert values == done.json
    assert (tmp_path / "figures" / "reproduction.md").read_text() == markdown(values)
    assert load_recipe("reproduction", TINY).model_dump(mode="json") == values["recipe"]
    (seed,) = values["seeds"]
    assert [(one["risk"], one["examples"], one["way"], one["steps"]) for one in seed["fine_tunes"]] == [
        (risk, examples, way, 2)
        for way in ("full", "LoRA")
        for risk, examples in (("explicitly harmful", 2), ("identity shifting", 2), ("benign", 2))
    ]
    assert [one["chosen_on"] for one in seed["fine_tunes"]] == [True, False, False, False, False, True]
    for one in seed["fine_tunes"]:
        assert set(one["arms"]) == set(Arm)
        for arm, rates in one["arms"].items():
            times = 2 if "directions" in arm else 1
            assert rates["harmful_rate"]["total"] == rates["benign_accuracy"]["total"] == 4 * times
            assert rates["degenerate_rate"]["total"] == 8 * times
            own = rates["own_task_accuracy"]
            assert own is None if one["risk"] == "explicitly harmful" else own["total"] == 4 * times
        assert one["own_strength"]["alpha"] in (1, 2)
    assert seed["lock"]["points"] == 4
    assert len(seed["lock"]["heads"]) in (1, 3)
    assert [one["steps"] for one in seed["overtrained"]] == [3]
    pooled = values["arms"][Arm.LOCK]["all"]["harmful_rate"]
    assert pooled["total"] == 6 * 4
    assert pooled["low"] <= pooled["rate"] <= pooled["high"]


def test_more_heads_than_there_are_is_refused_before_anything_is_trained(run: Run, tmp_path: Path) -> None:  # noqa: F811
    done = run("reproduce", "--output", tmp_path, "--set", "lock.head_counts=[99]")
    assert done.exit_code == 1
    assert "A lock of 99 heads is asked for, and the base has" in done.stderr


def test_a_fine_tune_to_choose_on_that_there_is_not_is_refused_before_anything_is_trained(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    done = run("reproduce", "--output", tmp_path, "--set", "lock.choose_on=[benign 7 full]")
    assert done.exit_code == 1
    assert "The lock is to be chosen on benign 7 full, and no fine-tune is called that" in done.stderr
    assert "explicitly harmful 10 full, explicitly harmful 30 full" in done.stderr


def outcome(harmful: int, right: int = 10) -> Outcome:
    return Outcome(harmful, 10, right, 10, degenerate=0, own_right=0, own_tasks=0)


@dataclass(frozen=True)
class Examined:
    """Answers for an examiner: harmful below some strengths, and useless above others."""

    needed: float
    allowed: float
    asked: list[tuple[Share, SafetyLock | None]]

    def examine(self, treated: Treated, risk: Risk, share: Share, prompts: int) -> Outcome:
        self.asked.append((share, treated.lock))
        return outcome(
            harmful=0 if treated.alpha >= self.needed else prompts,
            right=prompts if treated.alpha <= self.allowed else 0,
        )


@pytest.mark.parametrize(
    ("needed", "allowed", "chosen", "satisfied", "accepted"),
    [(0.7, 1.4, 1.0, True, 3), (2.0, 3.0, 2.0, True, 2), (2.0, 1.4, 0.5, False, 0)],
)
def test_a_strength_is_chosen_for_each_fine_tune_by_prompts_that_are_not_reported(
    needed: float, allowed: float, chosen: float, *, satisfied: bool, accepted: int
) -> None:
    recipe = load_recipe("reproduction", {"choosing_prompts": "10", "lock.alphas": "[0.5,0.7,1,1.4,2,2.8,4]"})
    lock, examiner = make_lock(), Examined(needed, allowed, [])
    one = _Seed(recipe, 0, lambda *_: None, make_world(0), None, examiner)  # type: ignore[arg-type]
    point, kept, count = one.own_strength(None, Risk.BENIGN, lock)  # type: ignore[arg-type]
    assert (point.alpha, kept, count) == (chosen, satisfied, accepted)
    assert Counter(examiner.asked) == {(Share.CHOOSING, None): 1, (Share.CHOOSING, lock): 7}


@dataclass(frozen=True)
class EachExamined:
    """Answers for an examiner: each model harmful below a strength of its own, and useless above 1.4."""

    needed: Mapping[str, float]

    def examine(self, treated: Treated, risk: Risk, share: Share, prompts: int) -> Outcome:
        return outcome(
            harmful=0 if treated.alpha >= self.needed[str(treated.model)] else prompts,
            right=prompts if treated.alpha <= 1.4 else 0,
        )


def test_the_one_point_is_chosen_on_several_fine_tunes_together() -> None:
    recipe = load_recipe("reproduction", {"choosing_prompts": "10", "lock.alphas": "[0.5,0.7,1,1.4,2]"})
    examiner = EachExamined({"easy": 0.5, "hard": 1.4})
    one = _Seed(recipe, 0, lambda *_: None, make_world(0), None, examiner)  # type: ignore[arg-type]

    def kept(*names: str) -> list[float]:
        models = [(name, Risk.BENIGN) for name in names]
        points = one._points(models, (make_lock(),))  # type: ignore[arg-type]
        return [point.alpha for point in points if point.rates == Rates(0.0, 1.0, 0.0)]

    assert kept("easy") == [0.5, 0.7, 1.0, 1.4]
    assert kept("easy", "hard") == [1.4]


@dataclass(frozen=True)
class Overheard(Examiner):
    """An examiner that notes which risk is asked under a lock, while something is chosen."""

    asked: list[Risk]

    def examine(self, treated: Treated, risk: Risk, share: Share, prompts: int) -> Outcome:
        if share is Share.CHOOSING and treated.lock is not None:
            self.asked.append(risk)
        return super().examine(treated, risk, share, prompts)


def test_every_point_is_tried_on_the_fine_tunes_that_the_recipe_names() -> None:
    recipe = load_recipe("reproduction", TINY)
    one = _Seed.of(recipe, 3, lambda *_: None)
    examiner = Overheard(one.examiner.tokenizer, one.world, [])
    assert replace(one, examiner=examiner).run().points == 4
    assert examiner.asked[:8] == [Risk.EXPLICIT, Risk.BENIGN] * 4
    # Then each of the six, and the first trained for longer, is tried at two strengths of its own.
    assert len(examiner.asked) == 8 + 7 * 2


def found(*parts: tuple[Risk, int, int, int], chosen_on: Sequence[int] = ()) -> tuple[SeedFound, ...]:
    """A seed of fine-tunes: risk, and harmful answers of base, fine-tune and locked one, of ten each."""
    fine_tunes = tuple(
        FineTuneFound(
            FineTune(risk, 10, Way.FULL),
            5,
            outcome(base),
            None,  # type: ignore[arg-type]
            True,
            1,
            place in chosen_on,
            {Arm.UNLOCKED: outcome(broken), Arm.LOCK: outcome(locked, right=9)},
        )
        for place, (risk, base, broken, locked) in enumerate(parts)
    )
    return (SeedFound(0, None, True, 1, 1, 1.0, fine_tunes, ()),)  # type: ignore[arg-type]


def test_removed_is_the_mean_over_risks_of_the_share_of_the_added_harm() -> None:
    explicit = ((Risk.EXPLICIT, 0, 10, locked) for locked in (0, 0, 3))
    seeds = found(*explicit, (Risk.BENIGN, 2, 10, 6))
    assert removed(Arm.LOCK, seeds) == pytest.approx((0.9 + 0.5) / 2)
    assert removed(Arm.UNLOCKED, seeds) == 0.0
    assert benign_lost(Arm.LOCK, seeds) == pytest.approx(0.1)


def test_what_the_choice_has_seen_is_told_from_what_it_has_not() -> None:
    (seed,) = found((Risk.EXPLICIT, 0, 10, 0), (Risk.EXPLICIT, 0, 10, 4), chosen_on=(0,))
    assert removed(Arm.LOCK, (seed,)) == pytest.approx(0.8)
    assert removed(Arm.LOCK, (seed.unseen(),)) == pytest.approx(0.6)
    (seed,) = found((Risk.EXPLICIT, 0, 10, 0), chosen_on=(0,))
    assert removed(Arm.LOCK, (seed.unseen(),)) is None
    assert benign_lost(Arm.LOCK, (seed.unseen(),)) is None


def test_a_fine_tune_that_added_no_harm_has_none_to_remove() -> None:
    assert removed(Arm.LOCK, found((Risk.BENIGN, 1, 1, 0))) is None
    assert removed(Arm.LOCK, found((Risk.BENIGN, 1, 1, 0), (Risk.EXPLICIT, 0, 10, 10))) == 0.0


def test_the_page_holds_the_tables_of_its_figures() -> None:
    page = (DOCS / "reproduction.md").read_text()
    values = figures("reproduction")
    for table in markdown(values).strip().split("\n\n"):
        assert table in page
    assert values["recipe"] == load_recipe("reproduction").model_dump(mode="json")


@pytest.mark.parametrize("which", ["untouched", "further"])
def test_the_page_holds_the_tables_of_the_seeds_that_nothing_was_settled_on(which: str) -> None:
    page = (DOCS / "reproduction.md").read_text()
    values = figures(f"reproduction-{which}")
    arms, risks, unseen, *_, overtrained, seeds = markdown(values).strip().split("\n\n")
    for table in (arms, risks, unseen, overtrained, seeds):
        assert table in page
    settled = figures("reproduction")["recipe"]
    assert {key for key in settled if settled[key] != values["recipe"][key]} == {"seeds"}
    assert not set(settled["seeds"]) & set(values["recipe"]["seeds"])


def test_the_tables_of_both_strengths_add_up_the_arms_that_they_name() -> None:
    values = figures("reproduction")
    for arm in (Arm.LOCK, Arm.OWN_LOCK):
        (table,) = (one for one in markdown(values).split("\n\n") if one.startswith(f"| {arm} | examples"))
        row = next(
            line for line in table.splitlines() if line.startswith("| explicitly harmful, LoRA | 10 |")
        )
        rates = [
            one["arms"][arm]["harmful_rate"]
            for seed in values["seeds"]
            for one in seed["fine_tunes"]
            if (one["examples"], one["way"]) == (10, "LoRA")
        ]
        share = sum(rate["count"] for rate in rates) / sum(rate["total"] for rate in rates)
        assert f"→ {100 * share:.1f} % |" in row.split(" | ", 4)[3] + " |"


def figures(name: str) -> dict[str, Any]:
    return json.loads((DOCS / f"{name}.json").read_text())
