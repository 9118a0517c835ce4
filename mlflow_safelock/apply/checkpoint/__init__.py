"""A locked model on disk: a folder that stock ``transformers`` loads, with the lock's biases in it."""

from mlflow_safelock.apply.checkpoint.report import CheckpointReport
from mlflow_safelock.apply.checkpoint.save import save_locked_checkpoint
from mlflow_safelock.apply.checkpoint.undo import UnlockReport, unlock_checkpoint

__all__ = ["CheckpointReport", "UnlockReport", "save_locked_checkpoint", "unlock_checkpoint"]
