"""The paper's claims in small: toys are trained to be safe, fine-tuned until they are not, and locked."""

from mlflow_safelock.reproduction.report import Reproduction
from mlflow_safelock.reproduction.run import reproduce
from mlflow_safelock.reproduction.table import markdown

__all__ = ["Reproduction", "markdown", "reproduce"]
