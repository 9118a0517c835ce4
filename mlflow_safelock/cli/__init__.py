"""The command line, ``safelock``: one module per command or group of commands.

No module here imports PyTorch, transformers or MLflow before a command needs it, so that help comes at once.
"""

from mlflow_safelock.cli.main import main

__all__ = ["main"]
