"""Who asks for a promotion, as far as MLflow knows."""

from __future__ import annotations

import getpass
import sys

from mlflow_safelock.provenance import Actor


def current_actor() -> Actor:
    """The user of the current request, verified where MLflow's authentication is on.

    Without it the name in the request is only claimed, since anybody may send any. Outside a server it is the
    operating system's user, which is claimed as well.
    """
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        authorization = flask.request.authorization
        name = authorization.username if authorization is not None else None
        return Actor(
            name=name or "anonymous", verified=bool(name) and _authentication_is_on(flask.current_app)
        )
    return process_actor()


def process_actor() -> Actor:
    """The operating system's user that this process runs as; claimed, since nobody vouches for it."""
    try:
        return Actor(name=getpass.getuser(), verified=False)
    except (OSError, KeyError):
        return Actor(name="unknown", verified=False)


def _authentication_is_on(app: object) -> bool:
    handlers = getattr(app, "before_request_funcs", {}).get(None, [])
    return any(getattr(handler, "__module__", "") == "mlflow.server.auth" for handler in handlers)
