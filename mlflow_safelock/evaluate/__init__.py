"""What a model answers, and how often: suites, wrappers, judges, intervals, evaluations and the search.

The names below load what they need when they are first used: a registry server can ask for a suite's
digest without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.evaluate.answers import AnswerKind, classify
    from mlflow_safelock.evaluate.choosing import Limits, Point, Rates, choose
    from mlflow_safelock.evaluate.evaluating import Settings, evaluate
    from mlflow_safelock.evaluate.evaluation import Evaluation
    from mlflow_safelock.evaluate.exploring import Exploration, explore, fewer_heads
    from mlflow_safelock.evaluate.judges import (
        ClassifierJudge,
        FunctionJudge,
        Judge,
        LanguageModelJudge,
        PyfuncJudge,
        RefusalMatcher,
        find_judge,
    )
    from mlflow_safelock.evaluate.measurement import BenignTask, Measurement, measure
    from mlflow_safelock.evaluate.statistics import (
        Interval,
        PairedTest,
        difference_interval,
        mean_interval,
        paired_test,
        rate_difference_interval,
        rate_interval,
    )
    from mlflow_safelock.evaluate.subjects import Subject, open_subject
    from mlflow_safelock.evaluate.suites import Suite, SuitePrompt, load_suite, overlap
    from mlflow_safelock.evaluate.transforms import TRANSFORMS, Message, Transform, find_transform
    from mlflow_safelock.evaluate.verdicts import Exchange, JudgeFailure, Judgement

_HOMES = {
    "AnswerKind": "answers",
    "BenignTask": "measurement",
    "ClassifierJudge": "judges",
    "Evaluation": "evaluation",
    "Exchange": "verdicts",
    "Exploration": "exploring",
    "FunctionJudge": "judges",
    "Interval": "statistics",
    "Judge": "judges",
    "JudgeFailure": "verdicts",
    "Judgement": "verdicts",
    "LanguageModelJudge": "judges",
    "Limits": "choosing",
    "Measurement": "measurement",
    "Message": "transforms",
    "PairedTest": "statistics",
    "Point": "choosing",
    "PyfuncJudge": "judges",
    "Rates": "choosing",
    "RefusalMatcher": "judges",
    "Settings": "evaluating",
    "Subject": "subjects",
    "Suite": "suites",
    "SuitePrompt": "suites",
    "TRANSFORMS": "transforms",
    "Transform": "transforms",
    "choose": "choosing",
    "classify": "answers",
    "difference_interval": "statistics",
    "evaluate": "evaluating",
    "explore": "exploring",
    "fewer_heads": "exploring",
    "find_judge": "judges",
    "find_transform": "transforms",
    "load_suite": "suites",
    "mean_interval": "statistics",
    "measure": "measurement",
    "open_subject": "subjects",
    "overlap": "suites",
    "paired_test": "statistics",
    "rate_difference_interval": "statistics",
    "rate_interval": "statistics",
}

__all__ = [
    "TRANSFORMS",
    "AnswerKind",
    "BenignTask",
    "ClassifierJudge",
    "Evaluation",
    "Exchange",
    "Exploration",
    "FunctionJudge",
    "Interval",
    "Judge",
    "JudgeFailure",
    "Judgement",
    "LanguageModelJudge",
    "Limits",
    "Measurement",
    "Message",
    "PairedTest",
    "Point",
    "PyfuncJudge",
    "Rates",
    "RefusalMatcher",
    "Settings",
    "Subject",
    "Suite",
    "SuitePrompt",
    "Transform",
    "choose",
    "classify",
    "difference_interval",
    "evaluate",
    "explore",
    "fewer_heads",
    "find_judge",
    "find_transform",
    "load_suite",
    "mean_interval",
    "measure",
    "open_subject",
    "overlap",
    "paired_test",
    "rate_difference_interval",
    "rate_interval",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
