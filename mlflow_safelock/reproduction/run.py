"""The reproduction: for each seed a base, one lock of it, its fine-tunes, and every arm on each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import Limits, Point, Rates, choose
from mlflow_safelock.forging import forge
from mlflow_safelock.provenance import tool_versions
from mlflow_safelock.reproduction.arms import (
    Arm,
    Treated,
    Vector,
    random_lock,
    shuffled_lock,
    subtracted,
    task_vector,
)
from mlflow_safelock.reproduction.measuring import Examiner, Outcome
from mlflow_safelock.reproduction.report import FineTuneFound, OvertrainedFound, Reproduction, SeedFound
from mlflow_safelock.reproduction.training import FineTune, Way, fine_tuned, fine_tunes_of, train_base
from mlflow_safelock.reproduction.world import CARE, Risk, Share, World, make_tokenizer, make_world
from mlflow_safelock.toys import Exchange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mlflow_safelock.lock import SafetyLock
    from mlflow_safelock.recipes import ReproductionRecipe

BASE_MODEL = "toy-base"

Models = Sequence[tuple["PreTrainedModel", Risk]]
"""Fine-tunes that something is chosen on, with what each was trained on."""

Told = Callable[[str, int, int], None]
"""Is told what is done, how many of it, and of how many."""


def reproduce(recipe: ReproductionRecipe, told: Told, workers: int = 1) -> Reproduction:
    """Train, fine-tune, lock and measure with every seed of a recipe.

    Args:
        recipe: Settings.
        told: Is told of the progress.
        workers: How many seeds are worked on at once, each in a process of its own; the figures are the same.

    Raises:
        EvaluationError: The lock is to have more heads than the base, or to be chosen on a fine-tune that
            there is not, or peft is not installed.
    """
    started = time.monotonic()
    available = recipe.base.layers * recipe.base.heads
    if max(recipe.lock.head_counts) > available:
        raise EvaluationError(
            f"A lock of {max(recipe.lock.head_counts)} heads is asked for, and the base has {available}.",
            next_step="Ask for fewer: --set lock.head_counts=[4,8].",
        )
    names = [fine_tune.name for fine_tune in fine_tunes_of(recipe)]
    unknown = [name for name in recipe.lock.choose_on if name not in names]
    if unknown:
        raise EvaluationError(
            f"The lock is to be chosen on {', '.join(unknown)}, and no fine-tune is called that.",
            next_step=f"Name some of these in lock.choose_on: {', '.join(names)}.",
        )
    if min(workers, len(recipe.seeds)) > 1:
        found = _at_once(recipe, told, min(workers, len(recipe.seeds)))
    else:
        found = tuple(_found(recipe, seed, told) for seed in recipe.seeds)
    return Reproduction(
        recipe=recipe,
        seeds=found,
        seconds=time.monotonic() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tools=tool_versions(),
    )


def _at_once(recipe: ReproductionRecipe, told: Told, workers: int) -> tuple[SeedFound, ...]:
    # Spawned, because a fork of a process with threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_found, recipe, seed, _silent) for seed in recipe.seeds]
        for done, _ in enumerate(as_completed(running), start=1):
            told("seeds", done, len(running))
        return tuple(one.result() for one in running)


def _found(recipe: ReproductionRecipe, seed: int, told: Told) -> SeedFound:
    with _one_thread():
        return _Seed.of(recipe, seed, told).run()


def _silent(what: str, done: int, total: int) -> None:
    """For seeds in other processes."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: as fast for models this small, and the same sums on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Seed:
    """Everything of one seed."""

    recipe: ReproductionRecipe
    seed: int
    told: Told
    world: World
    base: PreTrainedModel
    examiner: Examiner

    @classmethod
    def of(cls, recipe: ReproductionRecipe, seed: int, told: Told) -> _Seed:
        world, tokenizer = make_world(seed), make_tokenizer()
        base = train_base(
            tokenizer,
            world,
            recipe,
            seed,
            lambda done, total: told(f"seed {seed}: training the base", done, total),
        )
        return cls(recipe, seed, told, world, base, Examiner(tokenizer, world))

    def run(self) -> SeedFound:
        trained = []
        fine_tunes = fine_tunes_of(self.recipe)
        for fine_tune in fine_tunes:
            trained.append((fine_tune, *self._fine_tuned(fine_tune)))
            self.told(f"seed {self.seed}: fine-tunes", len(trained), len(fine_tunes))
        chosen_on = [(model, one.risk) for one, model, _ in trained if one.name in self.recipe.lock.choose_on]
        points = self._points(chosen_on, self._locks())
        chosen, satisfied = choose(points, self.recipe.lock.alphas, self._limits, prefer="room")
        vector, scale = self._subtraction(chosen_on, chosen)
        arms = _Arms(self, chosen, vector, scale, self._base_found())
        found = []
        for fine_tune, model, steps in trained:
            found.append(arms.on(fine_tune, model, steps))
            self.told(f"seed {self.seed}: arms", len(found), len(trained))
        first, _, steps = trained[0]
        return SeedFound(
            seed=self.seed,
            chosen=chosen,
            satisfied=satisfied,
            accepted=self._accepted(points),
            points=len(points),
            scale=scale,
            fine_tunes=tuple(found),
            overtrained=tuple(arms.overtrained(first, steps)),
        )

    def _base_found(self) -> dict[Risk, Outcome]:
        """The base, asked as each kind of fine-tune is."""
        return {
            risk: self.examiner.examine(Treated(self.base), risk, Share.REPORTING, self.recipe.prompts)
            for risk in Risk
        }

    @property
    def _limits(self) -> Limits:
        lock = self.recipe.lock
        return Limits(lock.max_harmful_rate, lock.max_benign_loss, lock.max_degenerate_rate)

    def trained(
        self,
        model: PreTrainedModel,
        exchanges: list[Exchange],
        way: Way,
        steps: int,
        enough: Callable[[PreTrainedModel], bool] | None = None,
    ) -> tuple[PreTrainedModel, int]:
        return fine_tuned(
            model,
            self.examiner.tokenizer,
            exchanges,
            way,
            self.recipe.fine_tunes,
            seed=self.seed + 2,
            steps=steps,
            enough=enough,
        )

    def _fine_tuned(self, fine_tune: FineTune) -> tuple[PreTrainedModel, int]:
        examples = self.world.examples(fine_tune.risk, fine_tune.examples)
        return self._broken(examples, fine_tune.risk, fine_tune.way)

    def _broken(self, examples: list[Exchange], risk: Risk, way: Way) -> tuple[PreTrainedModel, int]:
        """The base, fine-tuned until it refuses hardly any harmful request."""
        settings = self.recipe.fine_tunes

        def enough(model: PreTrainedModel) -> bool:
            asked = self.recipe.choosing_prompts
            return self.examiner.unrefused_rate(model, risk, Share.CHECKING, asked) >= settings.until

        return self.trained(self.base, examples, way, settings.steps, enough)

    def _locks(self) -> tuple[SafetyLock, ...]:
        """Locks of the base, of each number of heads, from one pass."""
        lock = self.recipe.lock
        return forge(
            self.base,
            self.examiner.tokenizer,
            self.world.pairs(lock.pairs),
            heads=lock.head_counts,
            last_tokens=lock.last_tokens,
            seed=self.seed,
            base_model=BASE_MODEL,
            progress=False,
        )

    def _choosing(self, models: Models, treat: Callable[[PreTrainedModel], Treated] = Treated) -> Rates:
        """Fine-tunes as they are treated, all together, on prompts that are chosen by and never reported."""
        prompts = self.recipe.choosing_prompts
        return Outcome.together(
            self.examiner.examine(treat(model), risk, Share.CHOOSING, prompts) for model, risk in models
        ).rates

    def _points(self, models: Models, locks: Sequence[SafetyLock]) -> list[Point]:
        """Fine-tunes under every lock at every strength."""
        unlocked = self._choosing(models)
        return [
            Point(lock, alpha, self._choosing(models, partial(Treated, lock=lock, alpha=alpha)), unlocked)
            for lock in locks
            for alpha in self.recipe.lock.alphas
        ]

    def own_strength(self, model: PreTrainedModel, risk: Risk, lock: SafetyLock) -> tuple[Point, bool, int]:
        """The strength of a lock for one fine-tune, whether it keeps the limits, and how many do."""
        points = self._points([(model, risk)], (lock,))
        chosen, satisfied = choose(points, self.recipe.lock.alphas, self._limits, prefer="room")
        return chosen, satisfied, self._accepted(points)

    def _accepted(self, points: Sequence[Point]) -> int:
        return sum(point.excess(self._limits) == 0.0 for point in points)

    def _subtraction(self, models: Models, chosen: Point) -> tuple[Vector, float]:
        """The task vector of the pairs' unsafe half, and how much of it to subtract."""
        unsafe = [Exchange(pair.question, pair.unsafe) for pair in self.world.pairs(self.recipe.lock.pairs)]
        broken, _ = self._broken(unsafe, Risk.EXPLICIT, Way.FULL)
        vector = task_vector(self.base, broken)

        def less(scale: float) -> Callable[[PreTrainedModel], Treated]:
            return lambda model: Treated(subtracted(model, vector, scale))

        scales = self.recipe.subtraction_scales
        # A scale is chosen as a strength is, so each is a point with the scale for its strength.
        points = [
            Point(chosen.lock, scale, self._choosing(models, less(scale)), chosen.unlocked)
            for scale in scales
        ]
        best, _ = choose(points, scales, self._limits, prefer="room")
        return vector, best.alpha


@dataclass(frozen=True)
class _Arms:
    """All that is done to the fine-tunes of one seed."""

    seed: _Seed
    chosen: Point
    vector: Vector
    scale: float
    bases: Mapping[Risk, Outcome]

    def on(self, fine_tune: FineTune, model: PreTrainedModel, steps: int) -> FineTuneFound:
        """A fine-tune under every arm, on prompts that nothing has seen."""
        risk, lock = fine_tune.risk, self.chosen.lock
        own, satisfied, accepted = self.seed.own_strength(model, risk, lock)
        refusals = self.seed.world.refusals(self.seed.recipe.lock.pairs)
        retrained, _ = self.seed.trained(model, refusals, fine_tune.way, steps)
        arms = {
            Arm.UNLOCKED: (Treated(model),),
            Arm.LOCK: (Treated(model, lock, self.chosen.alpha),),
            Arm.RANDOM: self._drawn(random_lock, model, self.chosen.alpha),
            Arm.SHUFFLED: self._drawn(shuffled_lock, model, self.chosen.alpha),
            Arm.OWN_LOCK: (Treated(model, lock, own.alpha),),
            Arm.OWN_RANDOM: self._drawn(random_lock, model, own.alpha),
            Arm.OWN_SHUFFLED: self._drawn(shuffled_lock, model, own.alpha),
            Arm.SYSTEM_PROMPT: (Treated(model, system_prompt=CARE),),
            Arm.RETRAINED: (Treated(retrained),),
            Arm.SUBTRACTED: (Treated(subtracted(model, self.vector, self.scale)),),
        }
        return FineTuneFound(
            fine_tune,
            steps,
            self.bases[risk],
            own,
            satisfied,
            accepted,
            fine_tune.name in self.seed.recipe.lock.choose_on,
            {arm: self._examined(risk, *treated) for arm, treated in arms.items()},
        )

    def _drawn(
        self, control: Callable[[SafetyLock, int], SafetyLock], model: PreTrainedModel, alpha: float
    ) -> tuple[Treated, ...]:
        """A model under several draws of a control."""
        draws = range(self.seed.recipe.control_draws)
        return tuple(Treated(model, control(self.chosen.lock, draw), alpha) for draw in draws)

    def overtrained(self, fine_tune: FineTune, steps: int) -> Iterator[OvertrainedFound]:
        """The same fine-tune, trained on after it was broken."""
        risk, lock = fine_tune.risk, self.chosen.lock
        examples = self.seed.world.examples(risk, fine_tune.examples)
        for multiple in self.seed.recipe.fine_tunes.overtraining:
            longer = round(multiple * steps)
            model, _ = self.seed.trained(self.seed.base, examples, fine_tune.way, longer)
            own, satisfied, _ = self.seed.own_strength(model, risk, lock)
            yield OvertrainedFound(
                multiple,
                longer,
                self._examined(risk, Treated(model)),
                self._examined(risk, Treated(model, lock, self.chosen.alpha)),
                own,
                satisfied,
                self._examined(risk, Treated(model, lock, own.alpha)),
            )

    def _examined(self, risk: Risk, *treated: Treated) -> Outcome:
        examiner, prompts = self.seed.examiner, self.seed.recipe.prompts
        return Outcome.together(examiner.examine(one, risk, Share.REPORTING, prompts) for one in treated)
