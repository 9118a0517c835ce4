"""The statement of an evaluation: what was measured, of which model under which lock, for a gate to rely on.

It names the model by its whole fingerprint, which can be checked against the artifacts, and the full result
by its digest. It has counts and no answers: it lies beside the model, and answers may be harmful to read.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.lock import Count, Digest, Natural, NonEmpty
from mlflow_safelock.provenance.fingerprint import SourceFingerprint
from mlflow_safelock.provenance.statement import Form, Grown, Statement

STATEMENT_FILE = "evaluation.json"


class MeasuredRate(Form):
    """How many prompts had an outcome, out of how many."""

    count: Count
    total: Natural

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.count > self.total:
            raise ValueError("has a count above its total")
        return self

    @property
    def value(self) -> float:
        """The rate, 0-1."""
        return self.count / self.total


class MeasuredSuite(Form):
    """Which prompts were asked; the digest is of exactly those."""

    name: NonEmpty
    digest: Digest


class MeasuredUtility(Form):
    """How useful the model is without its lock and with it.

    Attributes:
        figure: Which figure that is, such as the accuracy on benign tasks.
        unlocked: The figure without the lock, 0-1.
        locked: The figure with it.
    """

    figure: NonEmpty
    unlocked: Annotated[float, Field(ge=0.0, le=1.0)]
    locked: Annotated[float, Field(ge=0.0, le=1.0)]

    @property
    def drop(self) -> float:
        """What the lock costs, -1 to 1; rounded, so that 1 less 0.97 is no more than 0.03."""
        return round(self.unlocked - self.locked, 9)


class MeasuredForm(Grown, Form):
    """What was asked, in which form, and with what; known before anything is measured, and a policy's matter.

    Attributes:
        suite: The prompts.
        transform: The wrapper around the harmful ones.
        judge: Who called answers harmful.
        system_prompt: System prompt of every chat.
        max_new_tokens: Most tokens of an answer.
        known_prompts: Of how many of the prompts, or their twins, the lock was forged; ``None``: not known.
        dtype: Number format of the model; ``None``: not known.
        version: Version of this package; ``None``: not known.
    """

    further: ClassVar = ("known_prompts", "dtype", "version")

    suite: MeasuredSuite
    transform: NonEmpty
    judge: NonEmpty
    system_prompt: str | None
    max_new_tokens: Natural
    known_prompts: Count | None = None
    dtype: NonEmpty | None = None
    version: NonEmpty | None = None


class Measured(Grown, Form):
    """What an evaluation found of a locked model.

    Attributes:
        source: Fingerprint of the fine-tune's artifacts.
        lock: Digest of the lock.
        alpha: Its strength.
        suite: The prompts.
        transform: The wrapper around the harmful ones.
        judge: Who called answers harmful.
        rates: The locked model's rates, by figure.
        utility: What the lock costs; ``None`` where the suite shows nothing of it, and in older statements.
        judge_failures: On how many answers the judge came to no verdict.
        max_new_tokens: Most tokens of an answer.
        system_prompt: System prompt of every chat.
        known_prompts: Of how many of the prompts, or their twins, the lock was forged; ``None``: not known.
        dtype: Number format of the model's weights; ``None`` in older statements.
        device: What the model was on; ``None`` in older statements.
        result: Digest of the full result.
        created: When it was measured, ISO 8601 in UTC.
        tools: Versions of the software, this package among it.
    """

    further: ClassVar = ("utility", "known_prompts", "dtype", "device")

    source: SourceFingerprint
    lock: Digest
    alpha: float
    suite: MeasuredSuite
    transform: NonEmpty
    judge: NonEmpty
    rates: dict[str, MeasuredRate]
    utility: MeasuredUtility | None = None
    judge_failures: Count
    max_new_tokens: Natural
    system_prompt: str | None
    known_prompts: Count | None = None
    dtype: NonEmpty | None = None
    device: NonEmpty | None = None
    result: Digest
    created: NonEmpty
    tools: dict[str, str]

    @property
    def form(self) -> MeasuredForm:
        """What was asked, in which form, and with what."""
        return MeasuredForm(
            suite=self.suite,
            transform=self.transform,
            judge=self.judge,
            system_prompt=self.system_prompt,
            max_new_tokens=self.max_new_tokens,
            known_prompts=self.known_prompts,
            dtype=self.dtype,
            version=self.tools.get("mlflow-safelock") or None,
        )

    @field_validator("created")
    @classmethod
    def _is_a_time_with_its_zone(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("must be a time with its zone")
        return value

    @model_validator(mode="after")
    def _judges_what_was_asked(self) -> Self:
        judged, asked = self.rates.get("harmful_rate"), self.rates.get("attack_success_rate")
        if judged is not None and asked is not None and judged.total > asked.total:
            raise ValueError(f"rates: {judged.total} answers were judged, and {asked.total} prompts asked")
        return self

    @property
    def time(self) -> datetime:
        """When it was measured."""
        return datetime.fromisoformat(self.created)

    @property
    def harmful(self) -> MeasuredRate | None:
        """Harmful answers, with those that the judge failed on counted as such; ``None`` without prompts."""
        judged, asked = self.rates.get("harmful_rate"), self.rates.get("attack_success_rate")
        if asked is None:
            return None
        count = asked.total if judged is None else judged.count + asked.total - judged.total
        return MeasuredRate(count=count, total=asked.total)


class _Subject(Form):
    name: NonEmpty
    digest: dict[Literal["sha256"], str]


class EvaluationStatement(Statement):
    """An in-toto statement about a fine-tune, by its fingerprint: how it answers under a lock."""

    subject: tuple[_Subject]
    predicate_type: Literal["urn:mlflow-safelock:evaluation:v1"] = Field(
        default="urn:mlflow-safelock:evaluation:v1", alias="predicateType"
    )
    predicate: Measured

    @classmethod
    def about(cls, name: str, measured: Measured) -> EvaluationStatement:
        """The statement that makes ``measured`` about the model it was measured of, called ``name``."""
        digest = measured.source.digest.removeprefix("sha256:")
        return cls(subject=(_Subject(name=name, digest={"sha256": digest}),), predicate=measured)

    @classmethod
    def parse(cls, data: bytes, *, origin: str) -> EvaluationStatement:
        """Read one; ``origin`` names it in errors.

        Raises:
            VerificationError: It is none, is not canonical JSON, or is about something else than it measured.
        """
        try:
            statement = cls.model_validate_json(data)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise VerificationError(f"{origin} is no evaluation: {where}: {fault['msg']}.") from error
        if statement.to_bytes() != data:
            raise VerificationError(f"{origin} is not canonical JSON: somebody rewrote it.")
        if statement != cls.about(statement.subject[0].name, statement.predicate):
            raise VerificationError(f"{origin} is about something else than the model it was measured of.")
        return statement

    @property
    def digest(self) -> str:
        """``sha256:…`` over the canonical JSON."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"
