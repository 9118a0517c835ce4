"""The gate's view of an SQL registry store, and the transactions that change a version."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import sqlalchemy as sa
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL, STAGE_NONE
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
)
from mlflow.utils.time import get_current_time_millis
from mlflow.utils.validation import _validate_model_name, _validate_model_version

from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.ledger import LedgerEntry
from mlflow_safelock.gate.ports import ModelVersion, Redirection, Withdrawal
from mlflow_safelock.registry import sql_versions
from mlflow_safelock.registry.sql_ledger import SqlLedger, finish

_logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SqlRegistry(SqlLedger):
    """The registry behind an MLflow SQL store.

    Attributes:
        store: MLflow's ``SqlAlchemyStore`` or its workspace-aware sibling.
    """

    store: Any

    def _session(self, *, read_only: bool = True) -> AbstractContextManager[Any]:
        session: AbstractContextManager[Any] = self.store.ManagedSessionMaker(read_only=read_only)
        return session

    @property
    def has_another_gate(self) -> bool:
        """No: what a database is redirected by stands in the ledger beside it."""
        return False

    def as_decided(self, found: ModelVersion, decision: LedgerEntry) -> ModelVersion:
        """The version as it is: a decision is made in the transaction that redirects its row."""
        return found

    def registered_name(self, name: str) -> str:
        """The name of a registered model as the database has it, which may take other spellings for it."""
        if self._tells_spellings_apart:
            return name
        with self._session() as session:
            query = self.store._get_query(session, SqlRegisteredModel)
            found = query.filter(SqlRegisteredModel.name == name).one_or_none()
            return name if found is None else str(found.name)

    @cached_property
    def _tells_spellings_apart(self) -> bool:
        """Whether names are the same only where all of their characters are; asking costs every request."""
        dialect = self.store.engine.dialect.name
        if dialect != "sqlite":
            return bool(dialect == "postgresql")
        with self._session() as session:
            table = sa.text("SELECT sql FROM sqlite_master WHERE name = 'registered_models'")
            return "COLLATE" not in str(session.execute(table).scalar_one()).upper()

    def model_version(self, name: str, version: int) -> ModelVersion:
        """One version; MLflow's own error where there is none."""
        _validate_model_name(name)
        found = self._versions(sql_versions.ONE, name=name, version=_validate_model_version(version))
        if not found:
            raise MlflowException(
                f"Model Version (name={name}, version={version}) not found", RESOURCE_DOES_NOT_EXIST
            )
        return found[0]

    def model_versions(self, name: str) -> Sequence[ModelVersion]:
        """All ready versions of a registered model, oldest first."""
        return self._versions(sql_versions.READY, name=name)

    def newest_version(self, name: str) -> ModelVersion | None:
        """The ready version of a registered model with the highest number."""
        return next(iter(self._versions(sql_versions.NEWEST_READY, name=name)), None)

    def _versions(self, chosen: sa.Select[Any], **named: str | int) -> list[ModelVersion]:
        with self._session() as session:
            return sql_versions.read_versions(
                session, chosen, {"workspace": self.store._get_active_workspace(), **named}
            )

    def newest_withdrawn(self, name: str) -> int:
        """Number of the newest deleted version of a registered model, which MLflow keeps a row of; or 0."""
        with self._session() as session:
            newest = (
                self.store._get_query(session, SqlModelVersion)
                .filter(SqlModelVersion.name == name, SqlModelVersion.current_stage == STAGE_DELETED_INTERNAL)
                .order_by(SqlModelVersion.version.desc())
                .first()
            )
            return 0 if newest is None else int(newest.version)

    def redirect(self, redirection: Redirection) -> bool:
        """Redirect a version, tag it and append to the ledger, in one transaction or not at all."""

        def work(session: Any) -> bool:
            reach("transaction-begun")
            # The condition in the statement itself takes the row's lock and decides a race in one step.
            updated = session.execute(
                sql_versions.REDIRECTING,
                {
                    "of_workspace": self.store._get_active_workspace(),
                    "of_name": redirection.name,
                    "of_version": redirection.version,
                    "expected": redirection.expected_location,
                    "location": redirection.location,
                    "now": get_current_time_millis(),
                },
            )
            if updated.rowcount != 1:
                return False
            reach("redirected")
            self._set_tags(session, redirection)
            finish(session, redirection)
            return True

        return self._end_with(redirection.lease, work)

    def withdraw(self, withdrawal: Withdrawal) -> bool:
        """Take a version out of its stage and aliases and append to the ledger, in one transaction or not."""
        found = withdrawal.found

        def work(session: Any) -> bool:
            reach("transaction-begun")
            now = {"last_updated_time": get_current_time_millis()}
            stage = {"current_stage": STAGE_NONE} if withdrawal.leaves_stage else {}
            updated = session.execute(
                sa.update(SqlModelVersion)
                .where(
                    SqlModelVersion.workspace == self.store._get_active_workspace(),
                    SqlModelVersion.name == found.name,
                    SqlModelVersion.version == found.version,
                    SqlModelVersion.current_stage == found.stage,
                    sql_versions.is_at(found.location),
                )
                .values(**stage, **now)
            )
            if updated.rowcount != 1:
                return False
            reach("withdrawn")
            session.execute(
                sa.delete(SqlRegisteredModelAlias).where(
                    SqlRegisteredModelAlias.workspace == self.store._get_active_workspace(),
                    SqlRegisteredModelAlias.name == found.name,
                    SqlRegisteredModelAlias.version == found.version,
                    SqlRegisteredModelAlias.alias.in_(withdrawal.aliases),
                )
            )
            finish(session, withdrawal)
            return True

        return self._end_with(withdrawal.lease, work)

    def _set_tags(self, session: Any, redirection: Redirection) -> None:
        # In two statements; merging them one by one asks for each of them first.
        of_version = {
            "workspace": self.store._get_active_workspace(),
            "name": redirection.name,
            "version": redirection.version,
        }
        keys = [*redirection.tags, *redirection.removed_tags]
        of = {f"of_{name}": value for name, value in of_version.items()}
        session.execute(sql_versions.UNTAGGING, {**of, "keys": keys})
        if redirection.tags:
            rows = [{**of_version, "key": key, "value": value} for key, value in redirection.tags.items()]
            session.execute(sql_versions.TAGGING, rows)
