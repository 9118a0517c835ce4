"""``safelock evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.guarded import destination_option, open_guarded, use_destination
from mlflow_safelock.cli.measuring import Measuring, measuring_options
from mlflow_safelock.cli.options import (
    MlflowAddress,
    checked_strength,
    format_option,
    lines_of,
    mlflow_options,
    model_options,
    output_file_option,
    refuse_keys_without,
)
from mlflow_safelock.cli.output import counting, new_table, show_json, show_lines, show_table, shown
from mlflow_safelock.evaluate.transforms import TRANSFORMS
from mlflow_safelock.loading import ModelLoading

if TYPE_CHECKING:
    from mlflow_safelock.evaluate import Evaluation, Subject
    from mlflow_safelock.evaluate.evaluation import Estimate
    from mlflow_safelock.evaluate.subjects import RegisteredVersion
    from mlflow_safelock.lock import SafetyLock
    from mlflow_safelock.provenance import EvaluationStatement, MeasuredForm
    from mlflow_safelock.registry.stores import GuardedStore


@click.command(
    cls=Command,
    short_help="Measure a model with and without its lock.",
    examples=(
        "safelock evaluate models:/support-bot/3 --suite starter-harmful",
        "safelock evaluate ./my-fine-tune --lock llama-3-8b.safetensors --alpha 4 \\",
        "    --suite behaviors.csv --column goal --judge guard:./llama-guard --no-mlflow",
    ),
)
@click.argument("model")
@measuring_options
@click.option(
    "--alpha",
    type=float,
    callback=checked_strength,
    help="Strength.  [default: that of a locked version, else the lock's own]",
)
@click.option(
    "--transform",
    type=click.Choice(list(TRANSFORMS)),
    default="plain",
    show_default=True,
    help="Wrapper around the harmful prompts.",
)
@click.option(
    "--text",
    "text_file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Benign texts for perplexity, one per line.  [default: the suite's harmless prompts and answers]",
)
@output_file_option(
    "File for the whole result, every answer in it. Answers are kept beside it as they come.",
    default="evaluation.json",
)
@click.option(
    "--file",
    "filed",
    is_flag=True,
    help="Put the result on record, as evidence for promotions of MODEL.",
)
@destination_option
@model_options
@format_option
@mlflow_options
def evaluate(
    model: str,
    measuring: Measuring,
    alpha: float | None,
    transform: str,
    text_file: TextIO | None,
    output: Path,
    filed: bool,
    artifacts_destination: str | None,
    loading: ModelLoading,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Ask MODEL the prompts of a suite, with and without a lock, and say how often it complies.

    MODEL is a local folder, a hub id, or an MLflow URI such as models:/name/3. Of a locked version the
    fine-tune behind it is measured without and with the lock that the version carries. Answers are greedy, so
    the lock is the only difference.

    With --file, the result counts as evidence where a policy asks for it, and only for the lock and strength
    that a promotion would apply. It is signed where SAFELOCK_SIGNING_KEY names a key, or
    SAFELOCK_SIGSTORE_SIGNING has it signed by an identity. Through the registry's server it must be, by a
    key or an identity of the policy's; on its own database (--registry-uri safelock+...) only where the
    policy says so.

    After an interruption the same command goes on where it was.
    """
    from mlflow_safelock.evaluate import evaluate as measure
    from mlflow_safelock.evaluate.evaluating import form_of

    refuse_keys_without({"--forged-from": measuring.forged_from})
    suite, pairs = measuring.suite(), measuring.pairs()
    texts = lines_of(text_file, "--text")
    measuring.reach(model, mlflow_address)
    settings = replace(measuring.settings(output), transform=transform, texts=texts, pairs=pairs)
    subject = measuring.open(model, alpha, loading, every_byte=filed)
    if subject.lock is None and pairs:
        raise click.BadParameter("there is no lock that was; name one.", param_hint="--forged-from")
    if subject.lock is None and alpha is not None:
        raise click.BadParameter(
            "there is no lock that could have it: name one, --lock.", param_hint="--alpha"
        )
    record = _record_of(subject, mlflow_address, artifacts_destination) if filed else None
    if record is not None:
        # Now, and not after hours of generation.
        record.check(form_of(subject, suite, settings))
    with counting() as progress:
        found = measure(subject, suite, settings, progress=progress)
    output.write_text(found.to_json(), encoding="utf-8")
    evidence = record.file(found.statement()) if record is not None else None
    run = None
    if measuring.experiment is not None:
        from mlflow_safelock.evaluate.mlflow_run import log_evaluation

        run = log_evaluation(found, experiment=measuring.experiment, version=subject.version)
    if form == "json":
        facts = found.model_dump(mode="json", exclude={"rows", "source"})
        show_json({"output": str(output), "run": run, "evidence": evidence, **facts})
        return
    _show(found)
    if evidence is not None:
        show_lines("", f"On record as evidence: {evidence}")
    show_lines("", f"Every answer is in {output}" + (f", and in the MLflow run {run}." if run else "."))


@dataclass(frozen=True)
class _Record:
    """Where evidence of a version under a lock goes: to the guarded store of this process, or to a server."""

    version: RegisteredVersion
    lock: SafetyLock
    alpha: float
    store: GuardedStore | None

    def check(self, form: MeasuredForm) -> None:
        """Refuse before anything is measured that would never count."""
        about = (self.version.name, self.version.version, form, self.lock.digest, self.alpha)
        if self.store is not None:
            self.store.check_measured(*about)
            return
        from mlflow_safelock.registry.asking import check_through_server

        check_through_server(*about)

    def file(self, statement: EvaluationStatement) -> str:
        """Put a statement on record, signed where there is a key; its digest."""
        name, version = self.version.name, self.version.version
        if self.store is not None:
            from mlflow_safelock.provenance import sign_evaluation

            self.store.file_evaluation(name, version, statement, sign_evaluation(statement))
        else:
            from mlflow_safelock.registry.asking import file_through_server

            file_through_server(name, version, statement)
        return statement.digest


def _record_of(subject: Subject, mlflow_address: MlflowAddress, artifacts_destination: str | None) -> _Record:
    import mlflow

    if subject.version is None or subject.lock is None or subject.strength is None:
        raise click.UsageError("--file is for a version in the registry, under a lock.")
    use_destination(artifacts_destination)
    mlflow_address.connect()
    through_server = str(mlflow.get_registry_uri()).startswith(("http://", "https://"))
    store = None if through_server else open_guarded(mlflow_address)
    return _Record(subject.version, subject.lock, subject.strength, store)


def _show(found: Evaluation) -> None:
    alpha = f"locked (alpha {found.lock.alpha:g})" if found.lock else None
    table = new_table(None, "figure", "unlocked", *([alpha, "p"] if alpha else []))
    names = dict.fromkeys((*found.unlocked.figures, *(found.locked.figures if found.locked else ())))
    for name in names:
        cells = [_cell(arm.figures.get(name)) for arm in found.arms.values()]
        change = found.changes.get(name)
        tested = (
            []
            if not alpha
            else ["-" if change is None or change.p_value is None else f"{change.p_value:.2g}"]
        )
        table.add_row(name.replace("_", " "), *cells, *tested)
    show_table(table)
    asked = f"{found.suite.prompts} harmful prompts, {found.suite.twins} twins, {found.suite.tasks} tasks"
    show_lines("", f"{shown(found.suite.name)}: {asked}. Judge: {shown(found.judge.description)}")
    show_lines(*(f"Warning: {shown(warning)}" for warning in found.warnings))


def _cell(figure: Estimate | None) -> str:
    if figure is None:
        return "-"
    if figure.count is not None:
        return f"{figure.value:.1%} ({figure.low:.1%} to {figure.high:.1%})"
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"
