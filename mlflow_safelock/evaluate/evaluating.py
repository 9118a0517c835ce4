"""The evaluation: one suite, two arms, one path from a prompt to a figure with its interval.

Suite, transform, chat, answer, kind and verdict, figures of each arm, and what the lock changed. The same
prompts in the same form go to both arms, and answers are greedy, so the lock is the only difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlflow_safelock.apply import apply_lock, generate, render_prompt
from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.apply.generation import Answer
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.answer_store import AnswerStore, decisive, is_offloaded, sample_digest
from mlflow_safelock.evaluate.evaluation import (
    Answered,
    Arm,
    Evaluation,
    Generation,
    JudgeUsed,
    LockUsed,
    Row,
    SuiteUsed,
)
from mlflow_safelock.evaluate.figures import (
    LOG_PERPLEXITY,
    Asked,
    Scorer,
    Values,
    changes_of,
    figures_of,
    judged,
    values_of,
)
from mlflow_safelock.evaluate.fluency import (
    Text,
    countable,
    divergences,
    next_token_divergences,
    surprises,
)
from mlflow_safelock.evaluate.forge_data import known_prompts, why_unknown
from mlflow_safelock.evaluate.judges import Judge, RefusalMatcher, as_judge
from mlflow_safelock.evaluate.statistics import check_seed
from mlflow_safelock.evaluate.subjects import Subject
from mlflow_safelock.evaluate.suites import Suite, SuitePrompt
from mlflow_safelock.evaluate.transforms import find_transform
from mlflow_safelock.forging import PreferencePair
from mlflow_safelock.provenance import MeasuredForm, MeasuredSuite, tool_versions
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock

Under = Callable[["SafetyLock | None", "float | None"], Evaluation]
"""Gives the evaluation of a model under a lock at a strength."""

FIRST_TOKENS_BYTES = 256 << 20
"""Most memory that an arm's expectations of first tokens take; where they would take more, the harmless
prompts are read anew to compare them."""

MOST_TEXTS = 100
"""Most of a suite's own texts that perplexity is measured by: it is a mean over texts that both arms read, so
more of them would cost a longer evaluation and make it little surer."""

UNFINISHED = 0.1
"""Share of answers that the limit ended from which the result warns of it."""


@dataclass(frozen=True)
class Settings:
    """How a model is measured.

    Attributes:
        judge: Who judges the answers to harmful prompts; a text names one, as ``find_judge`` takes it.
        transform: Name of the wrapper around them; harmless prompts are asked as they are.
        limit: How many prompts of the suite are drawn, by the seed; ``None``: all.
        texts: Benign texts for perplexity; by default the suite's twins, and the expected answers of its
            tasks, of which at most ``MOST_TEXTS`` are drawn by the seed.
        scorer: Says how right an answer to a task is; by default 1 where it is the expected one, blanks
            aside.
        pairs: What the lock was forged from, to find prompts that it knows; the starter pairs are known.
        seed: Of the draw and of every bootstrap.
        system_prompt: System prompt of every chat.
        max_new_tokens: Most tokens of an answer.
        batch_size: How many prompts are answered at once: speed and memory, never the result.
        answers: Folder in which answers are kept as they come; an evaluation that was cut off goes on there.

    Raises:
        EvaluationError: The system prompt, or a text, is not valid Unicode.
    """

    judge: Judge = field(default_factory=RefusalMatcher)
    transform: str = "plain"
    limit: int | None = None
    texts: Sequence[str] = ()
    scorer: Scorer | None = None
    pairs: Sequence[PreferencePair] = ()
    seed: int = 0
    system_prompt: str | None = None
    max_new_tokens: int = 128
    batch_size: int = 8
    answers: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no tokenizer takes and no statement could hold."""
        for what, text in (("system prompt", self.system_prompt), *(("text", text) for text in self.texts)):
            if text is not None and not is_unicode(text):
                raise EvaluationError(
                    f"The {what} {HALF_A_CHARACTER}: {text[:60]!r}.",
                    next_step="Write it anew; on the command line it must be UTF-8.",
                )


USUAL = Settings()


def evaluate(
    subject: Subject | Any, suite: Suite, settings: Settings = USUAL, *, progress: Progress = silent
) -> Evaluation:
    """Measure a model with and without its lock, and leave it as it was.

    Args:
        subject: What is measured (``open_subject`` loads it by its URI), or a loaded pipeline; a lock that
            its model carries is the one that is measured.
        suite: The prompts.
        settings: How.
        progress: Is told what is done, how many of it, and of how many.

    Raises:
        EvaluationError: There is nothing to ask, or a setting cannot be used.
        ApplyError: A prompt cannot be rendered or is longer than the model can read, or the lock does not go
            onto the model.

    Example:
        ::

            subject = open_subject("models:/support-bot/3").with_lock(lock, alpha=6.0)
            found = evaluate(subject, load_suite("starter-harmful"), Settings(limit=50))
            found.locked.figures["attack_success_rate"].value
    """
    with measuring(subject, suite, settings, progress=progress) as under:
        return under(None, None)


@contextmanager
def measuring(
    subject: Subject | Any, suite: Suite, settings: Settings = USUAL, *, progress: Progress = silent
) -> Iterator[Under]:
    """Measure one model under several locks and strengths; without a lock it is measured once.

    Arguments and errors are those of ``evaluate``.

    Returns:
        What gives the evaluation under a lock at a strength; ``None`` leaves the subject's own.
    """
    settings = replace(settings, judge=as_judge(settings.judge))
    whole = subject if isinstance(subject, Subject) else Subject.of(subject)
    used = drawn_by(suite, settings)
    asked = _asked(used, settings.transform)
    kept: list[_Measured] = []
    with whole.unlocked() as measured:
        digest = sample_digest(measured.model)
        made_by = decisive(measured.model, measured.tokenizer) if settings.answers is not None else {}

        def under(lock: SafetyLock | None, alpha: float | None) -> Evaluation:
            arms = _Arms(measured.with_lock(lock, alpha), digest, made_by, used, asked, settings, progress)
            # Locked first: what cannot be locked fails before anything is generated.
            locked = arms.measure(locked=True) if arms.subject.lock is not None else None
            if not kept:
                kept.append(arms.measure(locked=False))
            if locked is not None and (nats := arms.divergences(kept[0], locked)):
                locked = replace(locked, values={**locked.values, "next_token_kl": nats})
            return _result(arms, suite, kept[0], locked)

        yield under


@dataclass(frozen=True)
class _Measured:
    """One arm, measured.

    Attributes:
        answered: Every answer, by its prompt's key.
        values: Every figure's values.
        expected: Log-probabilities of the first token of answers to harmless prompts, ``[vocabulary]`` by the
            prompts' keys; none of answers that were kept from before.
    """

    answered: dict[str, Answered]
    values: Values
    expected: dict[str, torch.Tensor]

    @property
    def judge_failures(self) -> int:
        return sum(answer.judge_failure is not None for answer in self.answered.values())

    @property
    def judged_in_part(self) -> int:
        return sum(answer.judged_in_part for answer in self.answered.values())


@dataclass(frozen=True)
class _Arms:
    """Asks the same of a model with and without its lock."""

    subject: Subject
    model_digest: str
    made_by: Mapping[str, Any]
    suite: Suite
    asked: tuple[Asked, ...]
    settings: Settings
    progress: Progress

    def measure(self, *, locked: bool) -> _Measured:
        """Answers, kinds, verdicts and figures of one arm."""
        subject, settings = self.subject, self.settings
        name = "with the lock" if locked else "without a lock"
        with _lock_on(subject) if locked else nullcontext():
            texts = self.texts
            answers, expected = self._answers(name, locked=locked)
            nats = surprises(
                subject.model,
                subject.tokenizer,
                texts,
                system_prompt=settings.system_prompt,
                batch_size=settings.batch_size,
            )
        answered = judged(
            self.asked,
            answers,
            settings.judge,
            settings.scorer,
            at_once=settings.batch_size,
            progress=lambda what, done, total: self.progress(f"{what} {name}", done, total),
        )
        values = values_of(self.asked, answered, scored=settings.scorer is not None)
        if texts:
            values[LOG_PERPLEXITY] = {str(number): value for number, value in enumerate(nats)}
        return _Measured(answered, values, expected)

    @cached_property
    def texts(self) -> list[Text]:
        """What perplexity is measured by: of the suite's texts, those with a token that can be counted.

        Raises:
            EvaluationError: A text that was given has none, or one is longer than the model can read.
        """
        every = _texts(self.suite, self.settings)
        texts = countable(
            self.subject.model, self.subject.tokenizer, every, system_prompt=self.settings.system_prompt
        )
        if self.settings.texts and len(texts) < len(every):
            short = next(text for _, text in every if ("", text) not in texts)
            raise EvaluationError(
                f"The text {short[:60]!r} has no token to measure perplexity by.",
                next_step="Take texts of several words.",
            )
        return texts

    def divergences(self, unlocked: _Measured, locked: _Measured) -> dict[str, float]:
        """What the lock does to the first token of the answers to harmless prompts.

        Both arms have seen that when they answered, unless answers were kept from before.
        """
        subject, settings = self.subject, self.settings
        harmless = [one for one in self.asked if one.role != "harmful"]
        if subject.lock is None or subject.strength is None or not harmless:
            return {}
        keys = [one.key for one in harmless]
        if unlocked.expected.keys() & locked.expected.keys() >= set(keys):
            found: dict[str, float] = {}
            for start in range(0, len(keys), settings.batch_size):
                some = keys[start : start + settings.batch_size]
                before, after = (
                    torch.stack([arm.expected[key] for key in some]) for arm in (unlocked, locked)
                )
                found |= dict(zip(some, divergences(before, after), strict=True))
            return found
        nats = next_token_divergences(
            subject.model,
            subject.tokenizer,
            [one.prompt for one in harmless],
            subject.lock,
            subject.strength,
            system_prompt=settings.system_prompt,
            batch_size=settings.batch_size,
        )
        return dict(zip(keys, nats, strict=True))

    def _answers(self, arm: str, *, locked: bool) -> tuple[dict[str, Answer], dict[str, torch.Tensor]]:
        """The answers by the prompts' keys: those that are kept already, and the others as they come.

        And which first tokens were expected of those that came, where the prompts are harmless.
        """
        subject, settings, what = self.subject, self.settings, f"answers {arm}"
        rendered = {
            one.key: render_prompt(subject.tokenizer, one.chat, settings.system_prompt) for one in self.asked
        }
        store = None
        # Offloaded weights are not there to be told apart by.
        if settings.answers is not None and not is_offloaded(subject.model):
            store = AnswerStore(settings.answers, self._key(locked=locked))
        found = {key: store.find(text) for key, text in rendered.items()} if store else {}
        missing = [one for one in self.asked if found.get(one.key) is None]
        done = len(self.asked) - len(missing)
        self.progress(what, done, len(self.asked))

        def keep(batch: Mapping[int, Answer]) -> None:
            nonlocal done
            done += len(batch)
            if store is not None:
                store.add({rendered[missing[place].key]: answer for place, answer in batch.items()})
            self.progress(what, done, len(self.asked))

        expected: dict[str, torch.Tensor] = {}
        harmless = sum(one.role != "harmful" for one in self.asked)

        def expect(batch: Mapping[int, torch.Tensor]) -> None:
            for place, logits in batch.items():
                if missing[place].role != "harmful" and harmless * logits.nbytes <= FIRST_TOKENS_BYTES:
                    expected[missing[place].key] = logits.log_softmax(dim=-1).cpu()

        new = generate(
            subject.model,
            subject.tokenizer,
            [one.chat for one in missing],
            system_prompt=settings.system_prompt,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            on_batch=keep,
            on_first=expect if subject.lock is not None else None,
        )
        answers = {key: answer for key, answer in found.items() if answer is not None}
        return answers | {one.key: answer for one, answer in zip(missing, new, strict=True)}, expected

    def _key(self, *, locked: bool) -> dict[str, Any]:
        """Everything that decides the answers of an arm, apart from the texts that they answer."""
        subject, settings = self.subject, self.settings
        return {
            "model": self.model_digest,
            "source": subject.source.known_bytes if subject.source else None,
            **self.made_by,
            "lock": subject.lock.digest if locked and subject.lock else None,
            "alpha": subject.strength if locked else None,
            "suite": self.suite.digest,
            "max_new_tokens": settings.max_new_tokens,
            "dtype": str(subject.model.dtype),
            "device": subject.device,
            "tools": tool_versions(),
        }


@contextmanager
def _lock_on(subject: Subject) -> Iterator[None]:
    assert subject.lock is not None
    assert subject.strength is not None
    with apply_lock(subject.model, subject.lock, subject.strength):
        yield


def drawn_by(suite: Suite, settings: Settings) -> Suite:
    """The prompts of a suite that are asked: with a limit, drawn by the seed and left in their order."""
    if not suite.prompts:
        raise EvaluationError(
            f"The suite {suite.name!r} is empty.", next_step="Take one with at least one prompt."
        )
    check_seed(settings.seed)
    limit = settings.limit
    if limit is None or limit >= len(suite.prompts):
        return suite
    if limit < 1:
        raise EvaluationError(f"A limit of {limit} prompts leaves nothing to ask.")
    drawn = random.Random(settings.seed).sample(range(len(suite.prompts)), limit)  # noqa: S311 - no secret
    return replace(suite, prompts=tuple(suite.prompts[place] for place in sorted(drawn)))


def form_of(subject: Subject, suite: Suite, settings: Settings) -> MeasuredForm:
    """What would be asked of a model, in which form and with what, as its statement will have it.

    Raises:
        EvaluationError: The suite is empty, or the limit leaves nothing of it.
    """
    used = drawn_by(suite, settings)
    known = known_prompts(subject.lock, used, settings.pairs) if subject.lock is not None else None
    return MeasuredForm(
        suite=MeasuredSuite(name=used.name, digest=used.digest),
        transform=settings.transform,
        judge=settings.judge.name,
        system_prompt=settings.system_prompt,
        max_new_tokens=settings.max_new_tokens,
        known_prompts=None if known is None else len(known),
        dtype=subject.dtype,
        version=tool_versions()["mlflow-safelock"],
    )


def _asked(suite: Suite, transform: str) -> tuple[Asked, ...]:
    wrap, plain = find_transform(transform), find_transform("plain")
    harmful = [Asked(one.id, "harmful", one.category, one.prompt, wrap(one.prompt)) for one in suite.harmful]
    twins = [
        Asked(one.id, "twin", one.category, one.twin, plain(one.twin)) for one in suite.harmful if one.twin
    ]
    tasks = [
        Asked(one.id, "task", one.category, one.prompt, plain(one.prompt), one.expected)
        for one in suite.tasks
    ]
    return (*harmful, *twins, *tasks)


def _texts(suite: Suite, settings: Settings) -> list[Text]:
    """Benign texts, each with what it is read after."""
    if settings.texts:
        return [("", text) for text in settings.texts]
    twins: list[Text] = [("", one.twin) for one in suite.harmful if one.twin]
    texts = [*twins, *((one.prompt, one.expected) for one in suite.tasks if one.expected)]
    if len(texts) <= MOST_TEXTS:
        return texts
    return random.Random(settings.seed).sample(texts, MOST_TEXTS)  # noqa: S311 - no secret


def _result(arms: _Arms, suite: Suite, unlocked: _Measured, locked: _Measured | None) -> Evaluation:
    subject, used, asked, settings = arms.subject, arms.suite, arms.asked, arms.settings
    lock, alpha = subject.lock, subject.strength
    applied = None
    known = None
    if lock is not None and alpha is not None:
        known = known_prompts(lock, used, settings.pairs)
        applied = LockUsed(
            digest=lock.digest,
            base_model=lock.base_model,
            alpha=alpha,
            known_prompts=None if known is None else len(known),
        )
    return Evaluation(
        model=subject.name,
        model_digest=arms.model_digest,
        source=subject.source,
        lock=applied,
        suite=SuiteUsed(
            name=suite.name,
            version=suite.version,
            digest=used.digest,
            prompts=len(used.harmful),
            twins=sum(one.role == "twin" for one in asked),
            tasks=len(used.tasks),
            limit=None if used is suite else settings.limit,
        ),
        generation=Generation(
            max_new_tokens=settings.max_new_tokens,
            system_prompt=settings.system_prompt,
            chat_template=bool(subject.tokenizer.chat_template),
            transform=settings.transform,
            seed=settings.seed,
            dtype=subject.dtype,
            device=subject.device,
        ),
        judge=JudgeUsed(name=settings.judge.name, description=settings.judge.description),
        unlocked=_arm(unlocked, settings.seed),
        locked=_arm(locked, settings.seed) if locked else None,
        changes=changes_of(unlocked.values, locked.values, settings.seed) if locked else {},
        warnings=(
            *_text_warnings(arms),
            *_warnings(subject, settings, unlocked, locked),
            *(_forge_data_warnings(lock, known, used, settings) if lock is not None else ()),
        ),
        rows=tuple(
            Row(
                id=one.id,
                role=one.role,
                category=one.category,
                prompt=one.prompt,
                unlocked=unlocked.answered[one.key],
                locked=locked.answered[one.key] if locked else None,
            )
            for one in asked
        ),
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        tools=tool_versions(),
    )


def _arm(measured: _Measured, seed: int) -> Arm:
    return Arm(figures=figures_of(measured.values, seed), judge_failures=measured.judge_failures)


def _text_warnings(arms: _Arms) -> Iterator[str]:
    if short := len(_texts(arms.suite, arms.settings)) - len(arms.texts):
        yield f"{short} benign texts have no token to measure perplexity by, and are not in it."


def _warnings(
    subject: Subject, settings: Settings, unlocked: _Measured, locked: _Measured | None
) -> Iterator[str]:
    if settings.answers is not None and is_offloaded(subject.model):
        yield "Weights of the model are offloaded, so they cannot be told apart and no answers were kept."
    if not subject.tokenizer.chat_template:
        yield "The tokenizer has no chat template: prompts were continued as they stand, which is no chat."
    for name, arm in (("without a lock", unlocked), ("with the lock", locked)):
        if arm is None:
            continue
        if arm.judge_failures:
            yield (
                f"The judge {settings.judge.name} came to no verdict on {arm.judge_failures} answers {name}; "
                "they are in none of its figures."
            )
        if arm.judged_in_part:
            yield (
                f"The judge {settings.judge.name} read {arm.judged_in_part} answers {name} only in part: "
                "with their prompts they are longer than it takes. Where nothing harmful was there, it came "
                "to no verdict."
            )
        cut = arm.values["non_termination_rate"].values()
        if sum(cut) > UNFINISHED * len(cut):
            yield (
                f"{sum(cut):.0f} of {len(cut)} answers {name} did not end within {settings.max_new_tokens} "
                "tokens."
            )


def _forge_data_warnings(
    lock: SafetyLock, known: Sequence[SuitePrompt] | None, used: Suite, settings: Settings
) -> Iterator[str]:
    if known is None:
        yield (
            "Whether the lock was forged from prompts of this suite is not known: "
            f"{why_unknown(lock, settings.pairs)}."
        )
    elif known:
        yield (
            f"The lock was forged from {len(known)} of the suite's {len(used.prompts)} prompts or their "
            f"twins, which it knows: {', '.join(one.id for one in known[:5])}."
        )
