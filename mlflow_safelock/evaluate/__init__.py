"""What a model answers, and how often: suites, wrappers, refusals, intervals, and the sweep."""

from mlflow_safelock.evaluate.answers import AnswerKind, classify
from mlflow_safelock.evaluate.evaluating import Settings, evaluate
from mlflow_safelock.evaluate.evaluation import Evaluation
from mlflow_safelock.evaluate.judges import (
    ClassifierJudge,
    Exchange,
    FunctionJudge,
    Judge,
    JudgeFailure,
    Judgement,
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
    rate_interval,
)
from mlflow_safelock.evaluate.subjects import Subject, open_subject
from mlflow_safelock.evaluate.suites import Suite, SuitePrompt, load_suite, overlap
from mlflow_safelock.evaluate.sweep import Constraints, Point, Sweep, sweep
from mlflow_safelock.evaluate.transforms import TRANSFORMS, Message, Transform, find_transform

__all__ = [
    "TRANSFORMS",
    "AnswerKind",
    "BenignTask",
    "ClassifierJudge",
    "Constraints",
    "Evaluation",
    "Exchange",
    "FunctionJudge",
    "Interval",
    "Judge",
    "JudgeFailure",
    "Judgement",
    "LanguageModelJudge",
    "Measurement",
    "Message",
    "PairedTest",
    "Point",
    "PyfuncJudge",
    "RefusalMatcher",
    "Settings",
    "Subject",
    "Suite",
    "SuitePrompt",
    "Sweep",
    "Transform",
    "classify",
    "difference_interval",
    "evaluate",
    "find_judge",
    "find_transform",
    "load_suite",
    "mean_interval",
    "measure",
    "open_subject",
    "overlap",
    "paired_test",
    "rate_interval",
    "sweep",
]
