"""The gate on the client's side of a registry server that cannot be changed.

Such a server keeps handing out what was registered, so nothing can be redirected there. What a version is
served as stands in a ledger of the clients' own: whoever reads through this store and that ledger gets the
locked model, or a refusal. Whoever goes to the server past it does not, so this is advice and no gate.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import sqlalchemy as sa
from mlflow.entities.model_registry import ModelVersionTag
from mlflow.entities.model_registry.model_version_status import ModelVersionStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.db.utils import (
    _get_managed_session_maker,
    create_sqlalchemy_engine_with_retry,
)
from mlflow.store.model_registry.rest_store import RestStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.workspace_context import get_request_workspace
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
from sqlalchemy.orm import sessionmaker

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate import ledger
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.places import fine_tune_beside
from mlflow_safelock.gate.ports import ModelVersion, Redirection, Withdrawal
from mlflow_safelock.registry.sql_ledger import SqlLedger, finish
from mlflow_safelock.settings import read_settings

_logger = logging.getLogger(__name__)

SCHEMES = ("http://", "https://")

READY = ModelVersionStatus.to_string(ModelVersionStatus.READY)


def ledger_uri(server: str) -> str:
    """Where the ledger for a server is: ``SAFELOCK_LEDGER``, else a sqlite file of this user's.

    Args:
        server: The server's address, without the prefix ``safelock+``.
    """
    configured = read_settings().ledger
    if configured is not None:
        return configured.get_secret_value()
    address = shown_server(server)
    name = "".join(character if character.isalnum() else "-" for character in address).strip("-")
    name += f"-{hashlib.sha256(address.encode()).hexdigest()[:8]}"  # two addresses may be spelt alike
    folder = Path.home() / ".safelock"
    folder.mkdir(mode=0o700, exist_ok=True)
    return f"sqlite:///{folder / name}.db"


def shown_server(server: str) -> str:
    """A server's address without the name and password that may be in it."""
    found = urlsplit(server)
    return urlunsplit(found._replace(netloc=found.netloc.rpartition("@")[2])).rstrip("/")


class LedgerDatabase:
    """A database that holds a ledger and nothing of MLflow's.

    Args:
        uri: Its address, as SQLAlchemy takes it.
    """

    def __init__(self, uri: str) -> None:
        self.engine: sa.Engine = create_sqlalchemy_engine_with_retry(uri)
        self._sessions: Callable[..., AbstractContextManager[Any]] = _get_managed_session_maker(
            sessionmaker(bind=self.engine), self.engine.dialect.name
        )

    def session(self, *, read_only: bool) -> AbstractContextManager[Any]:
        """A session as MLflow makes them for its own database."""
        return self._sessions(read_only=read_only)


@dataclass(frozen=True)
class ClientsLedger(SqlLedger):
    """A ledger that clients of a server keep, looked at without them.

    Attributes:
        database: The database that it is in.
    """

    database: LedgerDatabase

    def _session(self, *, read_only: bool = True) -> AbstractContextManager[Any]:
        return self.database.session(read_only=read_only)


@dataclass(frozen=True)
class RestRegistry(SqlLedger):
    """A registry behind a server, with what is decided about it in another database.

    Attributes:
        store: MLflow's own client of the server.
        database: The ledger's.
        resolve: Gives the storage URI behind a ``models:/`` or ``runs:/`` URI; any other URI as it is.
    """

    store: RestStore
    database: LedgerDatabase
    resolve: Callable[[str], str]

    @property
    def has_another_gate(self) -> bool:
        """Yes: whoever reaches the server's database may reconcile that, by a ledger in it."""
        return True

    def _session(self, *, read_only: bool = True) -> AbstractContextManager[Any]:
        return self.database.session(read_only=read_only)

    def registered_name(self, name: str) -> str:
        """The name of a registered model as the server has it, whose database may take others for it."""
        model = _if_there(lambda: self.store.get_registered_model(name))
        return name if model is None else str(model.name)

    def model_version(self, name: str, version: int) -> ModelVersion:
        """One version, at the place that it was last decided to be served from, else at the server's."""
        return self._last_decided(self._at_the_server(name, version))

    def _last_decided(self, found: ModelVersion) -> ModelVersion:
        decision = self.decision_on(active_workspace(), found.name, found.version)
        return found if decision is None else self.as_decided(found, decision)

    def as_decided(self, found: ModelVersion, decision: LedgerEntry) -> ModelVersion:
        """A version of the server's as it is served to clients of this ledger where a decision holds.

        Raises:
            SourceError: What it was registered from cannot be found out.
        """
        if not decision.locks or found.location == decision.location:
            return found
        is_told = found.location == decision.original_location
        return _as_decided(found, decision, found.location if is_told else self.resolve(found.location))

    def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """All ready versions of a registered model, oldest first; none where there is no such model.

        They are asked for one by one: a search leaves out what somebody tagged as a prompt, and its filter
        takes no name with both kinds of quotes.
        """
        return [*self._newest_first(name)][::-1]

    def newest_version(self, name: str) -> ModelVersion | None:
        """The ready version of a registered model with the highest number."""
        return next(self._newest_first(name), None)

    def _newest_first(self, name: str) -> Iterator[ModelVersion]:
        model = _if_there(lambda: self.store.get_registered_model(name))
        if model is None:
            return
        newest = max((int(version.version) for version in model.latest_versions), default=0)
        for number in range(newest, 0, -1):
            version = _if_there(partial(self.store.get_model_version, name, number))
            if version is not None and version.status == READY:
                yield self._last_decided(self._view(version, model))

    def newest_withdrawn(self, name: str) -> int:
        """0: a server does not tell of deleted versions."""
        return 0

    def redirect(self, redirection: Redirection) -> bool:
        """Put on record what a version is served as; then tag it, which is for people and decides nothing."""
        at_the_server = self._at_the_server(redirection.name, redirection.version)
        handed_out = self.resolve(at_the_server.location)

        def work(session: Any) -> bool:
            reach("transaction-begun")
            decision = ledger.decision_on(
                session, active_workspace(), at_the_server.name, at_the_server.version
            )
            now = at_the_server if decision is None else _as_decided(at_the_server, decision, handed_out)
            if now.location != redirection.expected_location:
                return False
            finish(session, redirection)
            return True

        done = self._end_with(redirection.lease, work)
        if done:
            self._tag(redirection)
        return done

    def withdraw(self, withdrawal: Withdrawal) -> bool:
        """Refused: it is not one step, at a server and in another database."""
        raise PromotionRefused(
            "not_at_a_server",
            f"{withdrawal.found.name!r} version {withdrawal.found.version} cannot be taken out of its places "
            "and put on record at once, through a server.",
            next_step="Run safelock reconcile where the registry's database can be reached.",
        )

    def _at_the_server(self, name: str, version: int) -> ModelVersion:
        return self._view(self.store.get_model_version(name, version), self.store.get_registered_model(name))

    def _view(self, found: Any, model: Any) -> ModelVersion:
        return ModelVersion(
            name=model.name,
            version=int(found.version),
            source=found.source,
            location=str(self.store.get_model_version_download_uri(model.name, found.version)),
            tags=dict(found.tags),
            stage=found.current_stage,
            aliases=tuple(
                alias for alias, holder in dict(model.aliases).items() if int(holder) == int(found.version)
            ),
            model_tags=dict(model.tags),
            created=found.creation_timestamp,
        )

    def _tag(self, redirection: Redirection) -> None:
        try:
            for key, value in redirection.tags.items():
                self.store.set_model_version_tag(
                    redirection.name, redirection.version, ModelVersionTag(key, value)
                )
            for key in redirection.removed_tags:
                self.store.delete_model_version_tag(redirection.name, redirection.version, key)
        except MlflowException as error:
            _logger.warning("The server did not take the tags of a promotion: %s", error)


def _if_there(ask: Callable[[], Any]) -> Any:
    """What the server has, or ``None``."""
    try:
        return ask()
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def _as_decided(found: ModelVersion, decision: LedgerEntry, handed_out: str) -> ModelVersion:
    """A version as clients of this ledger see it.

    What was decided is about the fine-tune that the server hands out, or about the one that a gate beside the
    server has made a locked model of since. Where it is something else by now, it is not about that.

    Args:
        found: The version as the server has it.
        decision: What was decided about it last.
        handed_out: The storage URI of what the server hands out.
    """
    if not decision.locks or decision.location is None:
        return found
    is_about_it = decision.original_location in (handed_out, fine_tune_beside(handed_out))
    return replace(found, location=decision.location) if is_about_it else found


def active_workspace() -> str:
    """The workspace that a client works in."""
    return str(get_request_workspace() or DEFAULT_WORKSPACE_NAME)


def server_store(store_uri: str) -> RestStore:
    """MLflow's own client of the server at an address without our prefix."""
    return RestStore(lambda: get_default_host_creds(store_uri))
