"""The app that ``mlflow server --app-name safelock`` serves."""

from __future__ import annotations

import logging
import os
from typing import Any

import mlflow.server
from flask import Blueprint, Response, jsonify
from mlflow.environment_variables import _MLFLOW_SGI_NAME

from mlflow_safelock.errors import SettingsError
from mlflow_safelock.operations.findings import any_fault
from mlflow_safelock.operations.health import examine_server, registry_uri
from mlflow_safelock.registry.schemes import scheme_fault
from mlflow_safelock.settings import read_settings

_logger = logging.getLogger(__name__)

pages = Blueprint("safelock", __name__)


@pages.get("/health")
def health() -> tuple[Response, int]:
    """``GET /safelock/health``: 200 where everything is as it should be, else 503 with the reasons."""
    findings = examine_server()
    faulty = any_fault(findings)
    body = {
        "status": "fault" if faulty else "ok",
        "checks": [finding.as_json() for finding in findings],
    }
    answer = jsonify(body)
    answer.headers["Cache-Control"] = "no-store"
    return answer, 503 if faulty else 200


def build() -> Any:
    """MLflow's app for the server in use, with our pages, and MLflow's authentication where it is asked for.

    Raises:
        SettingsError: Authentication is asked for and cannot be imported, or the setting is not valid.
    """
    settings = read_settings()
    app = mlflow.server.app
    prefix = os.environ.get(mlflow.server.STATIC_PREFIX_ENV_VAR, "").rstrip("/")
    if pages.name not in app.blueprints:
        app.register_blueprint(pages, url_prefix=f"{prefix}/safelock")
    _warn_where_not_gated()
    if settings.auth == "basic-auth":
        return _behind_authentication(app)
    if _MLFLOW_SGI_NAME.get() == "uvicorn":
        from mlflow.server.fastapi_app import app as asgi_app

        return asgi_app
    return app


def _behind_authentication(app: Any) -> Any:
    try:
        from mlflow.server.auth import create_app
    except ImportError as error:
        raise SettingsError(
            f"SAFELOCK_AUTH is basic-auth, and MLflow's authentication cannot be imported: {error}.",
            next_step="Install it: pip install 'mlflow[auth]'",
        ) from error
    return create_app(app)


def _warn_where_not_gated() -> None:
    fault = scheme_fault(registry_uri())
    if fault is not None:
        _logger.error("safelock: %s %s", *fault)
