"""What an evaluation found: strict, frozen, and JSON."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.answers import AnswerKind
from mlflow_safelock.evaluate.statistics import rate_interval
from mlflow_safelock.lock import Digest, NonEmpty
from mlflow_safelock.provenance import (
    EvaluationStatement,
    Measured,
    MeasuredRate,
    MeasuredSuite,
    MeasuredUtility,
    SourceFingerprint,
)
from mlflow_safelock.provenance.statement import Grown

SCORED = "task_score"
"""What a scorer of one's own gives; a statement leaves it out, since it cannot say what the scorer does."""

UTILITY = ("task_accuracy", SCORED, "harmless_answered_rate")
"""The figures that say how useful a model is; the first that there is."""

ArmName = Literal["unlocked", "locked"]

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Part):
    """One figure with its interval of 95 %.

    Attributes:
        value: What was measured.
        low: Lower end of the interval.
        high: Upper end.
        total: On how many prompts or texts.
        count: How many of them, where the figure is a rate; then the interval is Wilson's, else a bootstrap.
    """

    value: float
    low: float
    high: float
    total: Annotated[int, Field(gt=0)]
    count: Count | None = None


class Arm(_Part):
    """What was found of the model with, or without, its lock.

    Attributes:
        figures: Every figure by its name (docs/evaluation.md says what each is).
        judge_failures: On how many answers to harmful prompts the judge came to no verdict; they are in no
            figure of the judge's.
    """

    figures: dict[str, Estimate]
    judge_failures: Count


def harm_of(arm: Arm) -> Estimate:
    """The harmful rate with answers that the judge failed on counted as harmful, as a gate counts them."""
    judged, asked = arm.figures.get("harmful_rate"), arm.figures["attack_success_rate"]
    count = asked.total if judged is None else (judged.count or 0) + asked.total - judged.total
    rate = rate_interval(count, asked.total)
    return Estimate(value=rate.estimate, low=rate.low, high=rate.high, total=asked.total, count=count)


def utility_of(arm: Arm) -> Estimate:
    """How useful a model is: right answers to tasks, where there are any, else answered harmless prompts.

    Raises:
        EvaluationError: There are neither.
    """
    for name in UTILITY:
        if name in arm.figures:
            return arm.figures[name]
    raise no_utility()


def no_utility() -> EvaluationError:
    """The error that there is nothing to see what a lock costs by."""
    return EvaluationError(
        "The suite has neither harmless twins nor tasks, so what a lock costs cannot be seen.",
        next_step="Take one that has, such as starter-harmful.",
    )


class Change(_Part):
    """One figure, locked less unlocked, on the same prompts.

    Attributes:
        difference: The difference with its interval, Newcombe's of a rate, else a paired bootstrap.
        p_value: McNemar's exact test, two-sided, where the figure is a rate.
    """

    difference: Estimate
    p_value: float | None = None


class Answered(Grown, _Part):
    """One answer, and what was made of it.

    Attributes:
        text: The answer.
        tokens: Its length in tokens; ``None`` where it is not known.
        finished: Whether the model ended it, and not the limit; ``None`` where it is not known.
        kind: Whether it refused, complied or is degenerate.
        harmful: What the judge said; ``None`` where it was not asked, or failed.
        score: Its harmfulness score, 1-5, where it gives one.
        categories: Its categories.
        judge_failure: Why it came to no verdict: it failed, or nothing harmful was in the part that it read.
        judged_in_part: Whether prompt and answer are longer than the judge takes, which read a part of them.
        task_score: Of a benign task, how right it is, 0-1.
    """

    further: ClassVar = ("judged_in_part",)

    text: str
    tokens: Count | None
    finished: bool | None
    kind: AnswerKind
    harmful: bool | None = None
    score: float | None = None
    categories: tuple[str, ...] = ()
    judge_failure: str | None = None
    judged_in_part: bool = False
    task_score: float | None = None


class Row(_Part):
    """One prompt, and its answers.

    Attributes:
        id: The suite's name for it; a twin has its prompt's.
        role: Whether it is a harmful prompt, a harmless twin, or a benign task.
        category: The suite's category.
        prompt: The prompt as the suite has it, without a wrapper.
        unlocked: The answer without the lock.
        locked: The answer with it.
    """

    id: str
    role: Literal["harmful", "twin", "task"]
    category: str
    prompt: str
    unlocked: Answered
    locked: Answered | None = None


class SuiteUsed(_Part):
    """Which prompts were asked.

    Attributes:
        name: The suite's name.
        version: Its manifest's version; empty where it has none.
        digest: Digest of the prompts that were asked: with a limit, another one than the whole suite's.
        prompts: How many of them should be refused.
        twins: How many harmless twins they have.
        tasks: How many benign tasks there are.
        limit: How many prompts were drawn out of the suite; ``None``: it was asked whole.
    """

    name: NonEmpty
    version: str
    digest: Digest
    prompts: Count
    twins: Count
    tasks: Count
    limit: int | None = None


class LockUsed(Grown, _Part):
    """The lock of the locked arm.

    Attributes:
        digest: Its digest.
        base_model: What it is for.
        alpha: Its strength.
        known_prompts: Of how many of the prompts, or their twins, it was forged; ``None``: not known.
    """

    further: ClassVar = ("known_prompts",)

    digest: Digest
    base_model: NonEmpty
    alpha: float
    known_prompts: Count | None = None


class Generation(Grown, _Part):
    """How answers were made; greedily in any case.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        system_prompt: System prompt of every chat.
        chat_template: Whether the tokenizer has one.
        transform: The wrapper around harmful prompts.
        seed: Of the draw and of every bootstrap.
        dtype: Number format of the model's weights; ``None`` in older results.
        device: What the model was on; ``None`` in older results.
    """

    further: ClassVar = ("dtype", "device")

    max_new_tokens: Annotated[int, Field(gt=0)]
    system_prompt: str | None
    chat_template: bool
    transform: NonEmpty
    seed: int
    dtype: NonEmpty | None = None
    device: NonEmpty | None = None


class JudgeUsed(_Part):
    """Who judged the answers to harmful prompts."""

    name: NonEmpty
    description: str


class Evaluation(_Part):
    """An evaluation.

    Attributes:
        format_version: Version of this form.
        model: What the model was referred to as.
        model_digest: Tells the weights apart that were loaded; no fingerprint.
        source: Fingerprint of the unlocked model's files; ``None`` for a model that came from no folder.
        lock: The lock; ``None`` where there was none, and then there is one arm.
        suite: Which prompts were asked.
        generation: How answers were made.
        judge: Who judged.
        unlocked: The model without the lock.
        locked: The model with it.
        changes: What the lock changed, by the figure's name.
        warnings: What a reader has to know, as sentences.
        rows: Every prompt with its answers.
        created: When, ISO 8601 in UTC.
        tools: Versions of the software, this package among it.
    """

    format_version: Literal[1] = 1
    model: NonEmpty
    model_digest: Digest
    source: SourceFingerprint | None
    lock: LockUsed | None
    suite: SuiteUsed
    generation: Generation
    judge: JudgeUsed
    unlocked: Arm
    locked: Arm | None
    changes: dict[str, Change]
    warnings: tuple[str, ...]
    rows: tuple[Row, ...]
    created: NonEmpty
    tools: dict[str, str]

    @property
    def arms(self) -> dict[ArmName, Arm]:
        """The arms that there are."""
        found: dict[ArmName, Arm] = {"unlocked": self.unlocked}
        return found if self.locked is None else {**found, "locked": self.locked}

    def statement(self) -> EvaluationStatement:
        """What a gate may rely on: the locked arm's counts, bound to files, lock, strength and prompts.

        Raises:
            EvaluationError: There is no locked arm, or the model came from no folder.
        """
        if self.lock is None or self.locked is None or self.source is None:
            raise EvaluationError(
                "An evaluation is evidence only of a model in files, under a lock.",
                next_step="Measure a registered version with --lock.",
            )
        rates = {
            name: MeasuredRate(count=figure.count, total=figure.total)
            for name, figure in self.locked.figures.items()
            if figure.count is not None
        }
        measured = Measured(
            source=self.source,
            lock=self.lock.digest,
            alpha=self.lock.alpha,
            suite=MeasuredSuite(name=self.suite.name, digest=self.suite.digest),
            transform=self.generation.transform,
            judge=self.judge.name,
            rates=rates,
            utility=self._utility(self.unlocked, self.locked),
            judge_failures=self.locked.judge_failures,
            max_new_tokens=self.generation.max_new_tokens,
            system_prompt=self.generation.system_prompt,
            known_prompts=self.lock.known_prompts,
            dtype=self.generation.dtype,
            device=self.generation.device,
            result=f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}",
            created=self.created,
            tools=self.tools,
        )
        return EvaluationStatement.about(self.model, measured)

    def _utility(self, unlocked: Arm, locked: Arm) -> MeasuredUtility | None:
        for name in UTILITY:
            if name in unlocked.figures and name in locked.figures:
                if name == SCORED:
                    return None
                before, after = unlocked.figures[name].value, locked.figures[name].value
                return MeasuredUtility(figure=name, unlocked=before, locked=after)
        return None

    def to_json(self) -> str:
        """The evaluation as indented JSON."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def parse(cls, data: str | bytes, *, origin: str) -> Evaluation:
        """Read one; ``origin`` names it in errors.

        Raises:
            EvaluationError: It is none.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            fault: Any = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise EvaluationError(f"{origin} is no evaluation: {where}: {fault['msg']}.") from error
