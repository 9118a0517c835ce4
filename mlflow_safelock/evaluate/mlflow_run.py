"""An evaluation as an MLflow run: params, metrics, a table of answers, pictures, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlflow
import pandas
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException

from mlflow_safelock.evaluate.axes import settings_of
from mlflow_safelock.evaluate.evaluation import Evaluation
from mlflow_safelock.evaluate.exploring import Exploration
from mlflow_safelock.evaluate.plots import category_plot, rates_plot
from mlflow_safelock.evaluate.subjects import RegisteredVersion

EVALUATION_FILE = "evaluation.json"
ANSWERS_FILE = "answers.json"
"""The run's table of prompts and answers, as ``mlflow.load_table`` reads it."""

RUN_TAG = "safelock.evaluation"
"""Tag of a version with the run that measured it last; for people, since anybody can set tags."""


def log_evaluation(
    evaluation: Evaluation, *, experiment: str | None = None, version: RegisteredVersion | None = None
) -> str:
    """Log an evaluation to a run of its own.

    Args:
        evaluation: What was found.
        experiment: The experiment; MLflow's current one where it is not given.
        version: The registered version that was measured. It gets a tag with the run, and where MLflow's
            logged model behind it is in the same tracking store, that is the run's input and has its metrics.

    Returns:
        The run's id.

    Raises:
        mlflow.exceptions.MlflowException: MLflow cannot be reached, or refuses.
    """
    if experiment is not None:
        mlflow.set_experiment(experiment)
    model_id = _known_here(version)
    with mlflow.start_run(run_name=f"evaluate {evaluation.suite.name}", tags=_tags(version)) as run:
        if model_id is not None:
            MlflowClient().log_inputs(run.info.run_id, models=[LoggedModelInput(model_id)])
        mlflow.log_params(params_of(evaluation))
        mlflow.log_metrics(metrics_of(evaluation), model_id=model_id)
        mlflow.log_table(table_of(evaluation), ANSWERS_FILE)
        mlflow.log_text(evaluation.to_json(), EVALUATION_FILE)
        mlflow.log_figure(rates_plot(evaluation), "rates.png")
        if any(row.role == "harmful" for row in evaluation.rows):
            mlflow.log_figure(category_plot(evaluation), "categories.png")
    if version is not None:
        MlflowClient().set_model_version_tag(version.name, str(version.version), RUN_TAG, run.info.run_id)
    return str(run.info.run_id)


def log_sweep(
    found: Exploration,
    facts: Mapping[str, Any],
    pictures: Mapping[str, Figure],
    *,
    experiment: str | None = None,
    version: RegisteredVersion | None = None,
) -> str:
    """Log a sweep to a run of its own: the chosen point as params, its honest figures as metrics.

    Args:
        found: What was found.
        facts: The same for programs, which becomes ``sweep.json``.
        pictures: By name.
        experiment: The experiment; MLflow's current one where it is not given.
        version: The registered version that was measured, to be named by a tag of the run.

    Returns:
        The run's id.

    Raises:
        mlflow.exceptions.MlflowException: MLflow cannot be reached, or refuses.
    """
    if experiment is not None:
        mlflow.set_experiment(experiment)
    confirmed, chosen = found.confirmed, found.chosen
    tags = {**_tags(version), "safelock.kind": "sweep"}
    with mlflow.start_run(run_name=f"sweep {confirmed.suite.name}", tags=tags) as run:
        kept = {name: facts[name] for name in ("satisfied", "confirmed_keeps_the_limits")}
        about = {"heads": chosen.heads, **settings_of(chosen.lock), "points_compared": len(found.tried)}
        mlflow.log_params({**params_of(confirmed), **about, **kept})
        mlflow.log_metrics(metrics_of(confirmed))
        mlflow.log_table(_points_of(found), "points.json")
        mlflow.log_dict(dict(facts), "sweep.json")
        for name, picture in pictures.items():
            mlflow.log_figure(picture, f"{name}.png")
    return str(run.info.run_id)


def _points_of(found: Exploration) -> pandas.DataFrame:
    """One line for each point that was tried."""
    lines = [
        {
            "heads": one.heads,
            **settings_of(one.lock),
            "lock": one.lock.digest,
            "alpha": one.alpha,
            "judge_failures": one.arm.judge_failures,
            **{name: figure.value for name, figure in one.arm.figures.items()},
        }
        for one in found.tried
    ]
    return pandas.DataFrame(lines)


def params_of(evaluation: Evaluation) -> dict[str, Any]:
    """What was measured, and how."""
    lock, suite, generation = evaluation.lock, evaluation.suite, evaluation.generation
    return {
        "model": evaluation.model,
        "lock": lock and lock.digest,
        "alpha": lock and lock.alpha,
        "suite": suite.name,
        "suite_digest": suite.digest,
        "limit": suite.limit,
        "judge": evaluation.judge.name,
        "transform": generation.transform,
        "max_new_tokens": generation.max_new_tokens,
        "system_prompt": generation.system_prompt,
        "seed": generation.seed,
    }


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Every figure of each arm with the ends of its interval, and what the lock changed."""
    metrics: dict[str, float] = {}
    for arm, found in evaluation.arms.items():
        metrics[f"{arm}/judge_failures"] = found.judge_failures
        for name, figure in found.figures.items():
            metrics |= {
                f"{arm}/{name}": figure.value,
                f"{arm}/{name}/low": figure.low,
                f"{arm}/{name}/high": figure.high,
            }
    for name, change in evaluation.changes.items():
        metrics[f"change/{name}"] = change.difference.value
        if change.p_value is not None:
            metrics[f"change/{name}/p_value"] = change.p_value
    return metrics


def table_of(evaluation: Evaluation) -> pandas.DataFrame:
    """One line for each prompt, with the answers of both arms side by side."""
    lines = []
    for row in evaluation.rows:
        line: dict[str, Any] = row.model_dump(mode="json", exclude={"unlocked", "locked"})
        for arm in evaluation.arms:
            for name, value in getattr(row, arm).model_dump(mode="json").items():
                line[f"{arm}_{name}"] = value
        lines.append(line)
    return pandas.DataFrame(lines)


def _tags(version: RegisteredVersion | None) -> dict[str, str]:
    tags = {"safelock.kind": "evaluation"}
    if version is not None:
        tags["safelock.model_version"] = f"models:/{version.name}/{version.version}"
    return tags


def _known_here(version: RegisteredVersion | None) -> str | None:
    """The logged model behind a version, where the tracking store knows it; a registry may be another's."""
    if version is None or not version.model_id:
        return None
    try:
        return str(mlflow.get_logged_model(version.model_id).model_id)
    except MlflowException:
        return None
