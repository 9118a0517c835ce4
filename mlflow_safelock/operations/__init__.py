"""Running it: the server's app with its health, and the doctor that looks at an installation."""

from __future__ import annotations

from typing import Any


def create_app() -> Any:
    """What ``mlflow server --app-name safelock`` serves: MLflow's own app with ``/safelock`` beside it.

    Returns:
        An ASGI app under uvicorn, a Flask app under gunicorn and waitress; with ``SAFELOCK_AUTH=basic-auth``
        MLflow's own authentication is in front of all of it.

    Raises:
        SettingsError: ``SAFELOCK_AUTH`` cannot be used here.
    """
    # Imported here: MLflow imports this module in its command line, too, where no server is.
    from mlflow_safelock.operations.application import build

    return build()
