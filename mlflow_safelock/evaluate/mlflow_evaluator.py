"""``mlflow.models.evaluate(..., evaluators="safelock")``: refusals and compliance among MLflow's own results.

MLflow gives a model and a table of prompts. A row with a target is a benign task, and one without is a prompt
that should be refused. There is one arm, the model as it is: for two, and for all that needs the loaded model
(perplexity, divergence), there is ``safelock evaluate``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from mlflow import MlflowClient
from mlflow.models.evaluation import EvaluationResult, ModelEvaluator

from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode

PREFIX = "safelock/"
ANSWERS_FILE = "safelock_answers.json"
OPTIONS = ("judge", "prompt_column", "seed")
"""Keys of ``evaluator_config``: a judge or what ``find_judge`` takes, the column of prompts where there are
several, and the seed of the intervals."""

ANSWER_COLUMNS = ("answer", "output", "outputs", "prediction", "predictions")
"""What a model that gives several columns may call its answers, where ``predictions`` names none."""


class SafelockEvaluator(ModelEvaluator):  # type: ignore[misc]
    """The evaluator that MLflow knows as ``safelock``."""

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Any = None, **_: Any) -> bool:
        """Whether it is for models of a type: those that answer in text."""
        return model_type in ("text", "question-answering", "safelock")

    def evaluate(
        self,
        *,
        dataset: Any,
        run_id: str,
        evaluator_config: dict[str, Any] | None = None,
        model: Any = None,
        predictions: str | None = None,
        **more: Any,
    ) -> EvaluationResult:
        """Ask, judge, count, and log.

        Args:
            dataset: MLflow's, with the prompts, and targets where there are any.
            run_id: The run to log to.
            evaluator_config: See ``OPTIONS``.
            model: A pyfunc model; ``None`` where the dataset has its answers.
            predictions: Which column of what the model gives holds its answers, where there are several.
            more: What else MLflow gives; ``model_id`` is used.

        Raises:
            EvaluationError: There are no prompts, answers of another number, or such as are no texts, or an
                option cannot be used.
        """
        import mlflow

        from mlflow_safelock.apply.checkpoint.progress import silent
        from mlflow_safelock.evaluate.figures import figures_of, judged, values_of
        from mlflow_safelock.evaluate.judges import as_judge
        from mlflow_safelock.evaluate.statistics import check_seed

        options = dict(evaluator_config or {})
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise EvaluationError(
                f"The evaluator safelock has no option {unknown[0]!r}.",
                next_step=f"There are {', '.join(OPTIONS)}.",
            )
        seed = options.get("seed", 0)
        check_seed(seed)
        judge = as_judge(options.get("judge", "refusal-match"))
        asked = _asked(dataset, options.get("prompt_column"))
        said = dataset.predictions_data if model is None else model.predict(dataset.features_data)
        answers = _texts(said, predictions)
        if len(answers) != len(asked):
            raise EvaluationError(f"{len(asked)} prompts were answered {len(answers)} times.")
        by_key = {one.key: answer for one, answer in zip(asked, answers, strict=True)}
        answered = judged(asked, by_key, judge, None, progress=silent)
        figures = figures_of(values_of(asked, answered), seed)
        metrics: dict[str, float] = {}
        for name, figure in figures.items():
            metrics |= {f"{PREFIX}{name}": figure.value}
            metrics |= {f"{PREFIX}{name}/low": figure.low, f"{PREFIX}{name}/high": figure.high}
        failures = sum(one.judge_failure is not None for one in answered.values())
        in_part = sum(one.judged_in_part for one in answered.values())
        metrics |= {f"{PREFIX}judge_failures": float(failures), f"{PREFIX}judged_in_part": float(in_part)}
        # MLflow logs nothing of what an evaluator returns.
        client = MlflowClient()
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, model_id=more.get("model_id"))
        lines = [
            {"role": one.role, "prompt": one.prompt, **answered[one.key].model_dump(mode="json")}
            for one in asked
        ]
        mlflow.log_table(pandas.DataFrame(lines), ANSWERS_FILE, run_id=run_id)
        return EvaluationResult(metrics=metrics, artifacts={}, run_id=run_id)


def _asked(dataset: Any, column: Any) -> list[Any]:
    from mlflow_safelock.evaluate.figures import Asked

    features = dataset.features_data
    table = features if isinstance(features, pandas.DataFrame) else pandas.DataFrame(features)
    names = list(table.columns)
    places = [place for place, name in enumerate(names) if column is None or name == column]
    if len(places) != 1:
        raise EvaluationError(
            f"Which of the columns {', '.join(map(str, names))} holds the prompts is not known.",
            next_step="Name one that is there once: evaluator_config={'prompt_column': ...}.",
        )
    cells = table.iloc[:, places[0]]
    missing = cells.isna()
    if missing.any():
        raise EvaluationError(
            f"Row {int(missing.to_numpy().argmax())} of the column {names[places[0]]!r} has no prompt.",
            next_step="Fill it in, or take the row out.",
        )
    prompts = [str(prompt) for prompt in cells]
    if not prompts:
        raise EvaluationError("There are no prompts to evaluate.", next_step="Give a table with some.")
    labels = [None] * len(prompts) if dataset.labels_data is None else list(dataset.labels_data)
    expected = _expected(labels)
    return [
        Asked(str(number), "harmful" if right is None else "task", "", prompt, [], right)
        for number, (prompt, right) in enumerate(zip(prompts, expected, strict=True))
    ]


def _expected(labels: Sequence[Any]) -> list[str | None]:
    """The right answers that targets are; ``None``: there is none, so the prompt should be refused."""
    for row, label in enumerate(labels):
        if not pandas.api.types.is_scalar(label):
            raise EvaluationError(
                f"The target of row {row} is no text or number, but of type {type(label).__name__!r}.",
                next_step="Give one right answer for each task.",
            )
    there = [label for label in labels if not pandas.isna(label)]
    # pandas makes whole numbers floats where a row has none.
    were_whole = len(there) < len(labels) and all(
        isinstance(label, float | np.floating) and float(label).is_integer() for label in there
    )
    texts = ["" if pandas.isna(one) else str(int(one) if were_whole else one) for one in labels]
    return [text if text.strip() else None for text in texts]


def _texts(said: Any, column: str | None) -> list[Any]:
    """What a model predicts, as answers of which nothing but the text is known."""
    from mlflow_safelock.evaluate.figures import TextAlone

    if said is None:
        raise EvaluationError(
            "There are no answers to evaluate.",
            next_step="Give a model, or name the column that holds its answers: predictions=...",
        )
    if isinstance(said, pandas.DataFrame):
        said = said.iloc[:, _place_of_answers(list(said.columns), column)]
    values = said.tolist() if hasattr(said, "tolist") else said
    several = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
    texts = list(values) if several else []
    if not several or not all(isinstance(text, str) for text in texts):
        raise EvaluationError(
            "The model's answers are no texts, one for each prompt.",
            next_step="Evaluate a model that answers in text, such as one of mlflow.transformers.",
        )
    # The table itself is read by MLflow, which takes no such text.
    broken = next((row for row, text in enumerate(texts) if not is_unicode(text)), None)
    if broken is not None:
        raise EvaluationError(
            f"The answer to row {broken} {HALF_A_CHARACTER}: {texts[broken][:60]!r}.",
            next_step="Have the model give whole characters, or take the row out.",
        )
    return [TextAlone(text) for text in texts]


def _place_of_answers(names: Sequence[Any], column: str | None) -> int:
    if column is not None:
        places = [place for place, name in enumerate(names) if name == column]
    elif len(names) == 1:
        places = [0]
    else:
        places = [place for place, name in enumerate(names) if name in ANSWER_COLUMNS]
    if len(places) != 1:
        raise EvaluationError(
            f"Which of the columns {', '.join(map(str, names))} of what the model gives holds its answers is "
            "not known.",
            next_step="Name it: mlflow.models.evaluate(..., predictions=...).",
        )
    return places[0]
