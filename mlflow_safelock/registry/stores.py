"""MLflow's registry stores with the gate in front of promotions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import sqlalchemy as sa
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag, RegisteredModel
from mlflow.entities.model_registry.model_version_stages import get_canonical_stage
from mlflow.environment_variables import MLFLOW_ENABLE_WORKSPACES
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_CONFLICT,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.store.model_registry.rest_store import RestStore
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from mlflow.store.model_registry.sqlalchemy_workspace_store import WorkspaceAwareSqlAlchemyStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.validation import (
    _validate_model_alias_name,
    _validate_model_name,
    _validate_model_renaming,
    missing_value,
)
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.orm.exc import StaleDataError

from mlflow_safelock.apply.checkpoint.progress import Progress, silent
from mlflow_safelock.errors import LedgerError, PromotionRefused, VerificationError
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.failpoints import reach
from mlflow_safelock.gate.guard import Guard, policy_entry
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ledger import LedgerEntry, LockInForce
from mlflow_safelock.gate.lock_records import FoundLock, LockRecords, is_for_locks
from mlflow_safelock.gate.policy import Policy
from mlflow_safelock.gate.policy_file import PolicySource
from mlflow_safelock.gate.ports import Registry, Target
from mlflow_safelock.gate.promotion import Gate, Preparation
from mlflow_safelock.gate.reconciling import Reconciling
from mlflow_safelock.gate.renaming import Renaming
from mlflow_safelock.gate.schema import bring_up_to_date
from mlflow_safelock.gate.transient import AGAIN, is_transient
from mlflow_safelock.provenance import EvaluationStatement, MeasuredForm, check_signing, check_sigstore
from mlflow_safelock.registry.actor import current_actor, process_actor
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.asking import ASKING, CHECK_TAG, Question
from mlflow_safelock.registry.rest import SCHEMES as SERVER_SCHEMES
from mlflow_safelock.registry.rest import (
    LedgerDatabase,
    RestRegistry,
    active_workspace,
    ledger_uri,
    server_store,
    shown_server,
)
from mlflow_safelock.registry.schemes import warn_of_rivals
from mlflow_safelock.registry.sql import SqlRegistry
from mlflow_safelock.registry.sql_ledger import patiently

_logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEME_PREFIX = "safelock+"

LARGEST_VERSION = 2**31 - 1
"""What the column for a version's number holds in every database."""

ERROR_CODES = {
    "conflict": RESOURCE_CONFLICT,
    "failed": RESOURCE_CONFLICT,
    "geometry_mismatch": RESOURCE_CONFLICT,
    "not_a_descendant": RESOURCE_CONFLICT,
    "other_tokenizer": RESOURCE_CONFLICT,
    "already_locked": RESOURCE_CONFLICT,
    "source_changed": RESOURCE_CONFLICT,
    "unreachable": RESOURCE_CONFLICT,
    "damaged_lock": INVALID_PARAMETER_VALUE,
    "unreadable": INVALID_PARAMETER_VALUE,
    "bad_alpha": INVALID_PARAMETER_VALUE,
    "alpha_out_of_range": INVALID_PARAMETER_VALUE,
}
"""MLflow error codes by reason; all others are PERMISSION_DENIED. All are 4xx: MLflow's client repeats a 5xx
for minutes and loses its message."""


class GateMixin:
    """Puts the gate in front of whatever promotes a version or hands it out; the store class comes after."""

    policy_source: PolicySource
    """Where the policy in force comes from."""

    _gate: Gate
    _guard: Guard

    def transition_model_version_stage(
        self, name: str, version: Any, stage: str, archive_existing_versions: bool
    ) -> ModelVersion:
        """MLflow's own transition, once the gate has locked the version or found nothing to do."""
        target, stock = Target("stage", _canonical(stage)), super().transition_model_version_stage  # type: ignore[misc]
        # As a number: MLflow compares it with one, and a newer driver of PostgreSQL takes no text there.
        number = _number(version) or version
        with self._gated(name, version, target):
            done: ModelVersion = self._patiently(
                lambda: stock(name, number, stage, archive_existing_versions)
            )
        return done

    def set_registered_model_alias(self, name: str, alias: str, version: Any) -> None:
        """MLflow's own alias, once the gate has locked the version or found nothing to do."""
        _validate_model_alias_name(alias)
        stock = super().set_registered_model_alias  # type: ignore[misc]
        with self._gated(name, version, Target("alias", alias)):
            # MLflow looks for the alias before it writes it: of two that make one, the slower finds it next
            # time.
            self._patiently(lambda: stock(name, alias, version), IntegrityError)

    def create_model_version(self, *arguments: Any, **options: Any) -> ModelVersion:
        """MLflow's own registration, of a lock where no later one superseded it.

        A source that may not be read is a refusal, and no 5xx, here too.
        """
        with self._registering(*arguments, **options) as lock:
            created = self._create(*arguments, **options)
            if lock is not None:
                self._put_on_record(lock, created)
        return created

    def _put_on_record(self, lock: FoundLock, created: ModelVersion) -> None:
        """Put a lock on record that is registered by now; failing that, it is when it is first applied."""
        try:
            number = int(created.version)
            self._locks.put_on_record(lock, created.name, number, self._workspace, current_actor())
        except Exception:
            _logger.exception("The lock %s version %s is not on record yet", created.name, created.version)

    @contextmanager
    def _registering(
        self, name: str | None = None, source: str | None = None, *_: Any, **__: Any
    ) -> Iterator[FoundLock | None]:
        """Gives the lock that is about to be registered, if it is one, to one client after another.

        What goes on record at once would not be in the order of its numbers.
        """
        if name is None or source is None or not is_for_locks(name):
            yield None
            return
        what, known_as = f"register a lock as a version of {name!r}", self._name(name)
        with self._alone_with_locks(what, known_as):
            yield self._refusing(
                what, lambda: self._locks.check_new(known_as, source, self._workspace, current_actor())
            )

    @contextmanager
    def _alone_with_locks(self, what: str, name: str) -> Iterator[None]:
        """Hold back who else registers locks under a registered model's name, if it is one for locks."""
        with ExitStack() as until_done:
            if is_for_locks(name):
                work = Work(self._workspace, name, 0, "register")
                self._refusing(what, lambda: until_done.enter_context(self._gate.registry.lease(work)))
            yield

    def _create(self, *arguments: Any, **options: Any) -> ModelVersion:
        try:
            created: ModelVersion = super().create_model_version(*arguments, **options)  # type: ignore[misc]
            return created
        except MlflowException as error:
            refusal = error.__cause__
            if not isinstance(refusal, MlflowException) or _is_the_servers_fault(refusal):
                raise
            raise MlflowException(refusal.message, ErrorCode.Value(refusal.error_code)) from error

    def get_model_version_download_uri(self, name: str, version: Any) -> str:
        """Where the version is that the guard saw to have passed the gate; MLflow's own answer for others.

        It is not asked for again after the guard looked: by then it may be another.
        """
        number = _number(version)
        checked = None
        if number is not None:
            checked = self._refusing(
                f"hand out {name!r} version {number}",
                lambda: self._guard.check_read(self._name(name), number, self._workspace, current_actor()),
            )
        return self._download_uri(name, version) if checked is None else checked

    def rename_registered_model(self, name: str, new_name: str) -> RegisteredModel:
        """MLflow's own renaming, where nothing comes past the gate into a gated place or among locks."""
        _validate_model_renaming(new_name)
        renaming, workspace, name = Renaming(self._gate), self._workspace, self._name(name)
        if not self._patiently(lambda: renaming.is_half_done(name, new_name, workspace)):
            self._rename_checked(renaming, name, new_name)
            reach("renamed")
        self._refusing(
            f"put on record that {name!r} is now {new_name!r}",
            lambda: renaming.put_on_record(name, new_name, workspace, current_actor()),
        )
        return self.get_registered_model(new_name)  # type: ignore[attr-defined]

    def _rename_checked(self, renaming: Renaming, name: str, new_name: str) -> None:
        what, workspace, actor = f"rename {name!r} to {new_name!r}", self._workspace, current_actor()
        stock = super().rename_registered_model  # type: ignore[misc]
        with self._alone_with_locks(what, new_name):
            self._refusing(what, lambda: renaming.check(name, new_name, workspace, actor))
            self._patiently(lambda: stock(name, new_name))
            try:
                self._refusing(what, lambda: renaming.check_what_came(name, new_name, workspace, actor))
            except MlflowException as refusal:
                try:
                    self._patiently(lambda: stock(new_name, name))
                except MlflowException as taken:
                    raise MlflowException(
                        f"{refusal.message} It is called {new_name!r} by now, and could not get its former "
                        "name back. Rename it, or delete the version that is no lock; until then no version "
                        "of that base is promoted.",
                        RESOURCE_CONFLICT,
                    ) from taken
                raise

    def prepare(
        self, name: str, version: int, progress: Progress = silent, *, measure_anew: bool = False
    ) -> Preparation:
        """Write ahead what the version's promotion needs; see ``Gate.prepare``.

        Args:
            name: Registered model.
            version: Its version.
            progress: Is told how many bytes were moved, and of how many.
            measure_anew: Whether a full fingerprint is made also where the one on record seems to hold.

        Raises:
            PromotionRefused: The version could not be promoted as it is.
            MlflowException: There is no such version.
        """
        request = self._request(name, version, Target("prepare", "standalone"))
        return self._gate.prepare(request, progress, measure_anew=measure_anew)

    def set_model_version_tag(self, name: str, version: Any, tag: ModelVersionTag) -> None:
        """MLflow's own tag; by some tags clients ask for something, which is done, and they are not kept."""
        number = _number(version)
        if tag.key not in ASKING or number is None:
            super().set_model_version_tag(name, version, tag)  # type: ignore[misc]
            return
        work = self._answer_question if tag.key == CHECK_TAG else self._file_signed
        self._refusing(
            f"take an evaluation of {name!r} version {number}", lambda: work(name, number, tag.value)
        )

    def _answer_question(self, name: str, version: int, value: str) -> None:
        question = _as_question(value)
        if question.keyid not in (one.keyid for one in self._gate.signatories(name, version)):
            raise PromotionRefused(
                "bad_signature",
                f"The policy takes evaluations of others: {question.signatory} is none of those in it.",
                next_step="Sign as one of them (evaluation.signature in the policy), or name this one there.",
            )
        self.check_measured(name, version, question.form, question.lock, question.alpha)

    def _file_signed(self, name: str, version: int, value: str) -> None:
        envelope = value.encode()
        statement = self._gate.signed_evaluation(name, version, envelope)
        self.file_evaluation(name, version, statement, envelope)

    def file_evaluation(
        self, name: str, version: int, statement: EvaluationStatement, envelope: bytes | None = None
    ) -> LedgerEntry:
        """Put on record how a version was measured; see ``Gate.file_evaluation``.

        Args:
            name: Registered model.
            version: Its version.
            statement: What was measured.
            envelope: Its signature file; ``None``: it is not signed.

        Raises:
            PromotionRefused: It would never count, or the version could not be promoted as it is.
            MlflowException: There is no such version.
        """
        request = self._measuring(name, version, statement.predicate.suite.name)
        return self._gate.file_evaluation(request, statement, envelope)

    def check_measured(self, name: str, version: int, form: MeasuredForm, lock: str, alpha: float) -> None:
        """Refuse before anything is measured that would never count; see ``Gate.check_measured``.

        Raises:
            PromotionRefused: A promotion would apply something else, or could not be made.
            MlflowException: There is no such version.
        """
        self._gate.check_measured(self._measuring(name, version, form.suite.name), lock, alpha, form)

    def _measuring(self, name: str, version: int, suite: str) -> Request:
        return self._request(name, version, Target("evaluate", suite))

    def unlock(self, name: str, version: int, reason: str) -> str:
        """Take the lock off a version that is in no gated place; see ``Guard.unlock``.

        Raises:
            PromotionRefused: It may not be unlocked.
            MlflowException: There is no such version.
        """
        return self._guard.unlock(self._name(name), version, self._workspace, current_actor(), reason)

    def revoke_lock(self, name: str, version: int, reason: str, digest: str | None = None) -> LockInForce:
        """Put on record that a registered lock may not be applied any more; see ``LockRecords.revoke``.

        Raises:
            PromotionRefused: It is no lock.
            MlflowException: There is no such version.
        """
        return self._locks.revoke(self._name(name), version, self._workspace, current_actor(), reason, digest)

    @property
    def _locks(self) -> LockRecords:
        return LockRecords(self._gate)

    @property
    def reconciling(self) -> Reconciling:
        """What puts right in this registry what came past the gate."""
        return Reconciling(self._guard)

    @property
    def _workspace(self) -> str:
        return str(self._get_active_workspace())  # type: ignore[attr-defined]

    def _request(self, name: str, version: int, target: Target) -> Request:
        return Request(self._name(name), version, target, current_actor(), self._workspace)

    def _name(self, name: str) -> str:
        """The name that the registry has for a client's spelling; every name comes through here."""
        _validate_model_name(name)
        return self._gate.registry.registered_name(name)

    def _download_uri(self, name: str, version: Any) -> str:
        return str(super().get_model_version_download_uri(name, version))  # type: ignore[misc]

    @contextmanager
    def _gated(self, name: str, version: Any, target: Target) -> Iterator[None]:
        """Pass the gate before MLflow's own promotion, and see to it that the version is locked after it."""
        number = _number(version)
        if number is None:
            yield  # MLflow refuses it, in its own words
            return
        who, gate = f"{name!r} version {number}", self._gate
        what = f"promote {who} to {target}"
        request = self._refusing(what, lambda: self._request(name, number, target))
        is_gated = self._refusing(what, lambda: gate.promote(request))
        reach("gate-passed")
        yield
        reach("transition-done")
        if is_gated:
            what = f"lock {who} again, whose lock was taken off while it came to {target}, where it is now,"
            self._refusing(what, lambda: gate.keep_locked(request))

    def _patiently(self, work: Callable[[], T], *lost_races: type[SQLAlchemyError]) -> T:
        """Do something of MLflow's that changes the database, as patiently as the gate does its own.

        Args:
            work: What to do, in a transaction of its own.
            lost_races: The errors by which it is told that another was faster, besides a busy database's and
                that a row is gone which it had read.
        """
        try:
            return patiently(work, OperationalError, StaleDataError, *lost_races)
        except LedgerError as busy:
            raise MlflowException(f"{busy} [conflict]", RESOURCE_CONFLICT) from busy

    def _refusing(self, what: str, work: Callable[[], T]) -> T:
        """Do something of the gate's; whatever it refuses or fails at becomes an MLflow error of 4xx."""
        try:
            return work()
        except PromotionRefused as refusal:
            raise MlflowException(
                f"safelock refused to {what} [{refusal.reason}]. {refusal}",
                ERROR_CODES.get(refusal.reason, PERMISSION_DENIED),
            ) from refusal
        except MlflowException as error:
            if not _is_the_servers_fault(error):
                raise
            raise _failed(what, error) from error
        except Exception as error:
            raise _failed(what, error) from error


def _is_the_servers_fault(error: MlflowException) -> bool:
    return int(error.get_http_status_code()) >= HTTPStatus.INTERNAL_SERVER_ERROR


def _canonical(stage: Any) -> str:
    """A stage as MLflow spells it, which has no error of its own for what is no text."""
    if not isinstance(stage, str):
        raise MlflowException(missing_value("stage"), INVALID_PARAMETER_VALUE)
    return str(get_canonical_stage(stage))


def _number(version: Any) -> int | None:
    """The number of a version; ``None`` for what is none, which MLflow refuses in its own words.

    Raises:
        MlflowException: MLflow's column holds no such number, for which a driver has a 5xx.
    """
    try:
        number = int(version)
    except (TypeError, ValueError):
        return None
    if abs(number) > LARGEST_VERSION:
        raise MlflowException(f"Model Version (version={version}) not found", RESOURCE_DOES_NOT_EXIST)
    return number


def _as_question(value: str) -> Question:
    try:
        return Question.parse(value)
    except VerificationError as error:
        raise PromotionRefused("unreadable", error.cause, next_step="Ask with safelock evaluate.") from error


def _failed(what: str, error: Exception) -> MlflowException:
    _logger.error("safelock could not %s", what, exc_info=error)
    reason, again = ("unreachable", f" {AGAIN}") if is_transient(error) else ("failed", "")
    return MlflowException(
        f"safelock could not {what} [{reason}]. {error} Nothing was changed.{again} The server's log has the "
        "details.",
        RESOURCE_CONFLICT,
    )


class SafelockStore(GateMixin, SqlAlchemyStore):  # type: ignore[misc]
    """MLflow's SQL registry store, gated."""


class SafelockWorkspaceStore(GateMixin, WorkspaceAwareSqlAlchemyStore):  # type: ignore[misc]
    """MLflow's SQL registry store for servers with workspaces, gated."""


class SafelockRestStore(GateMixin, RestStore):  # type: ignore[misc]
    """MLflow's client of a registry server, with the gate on the client's side of it.

    Attributes:
        engine: The ledger's database.
        registry: The registry with what this ledger says of it.
    """

    engine: sa.Engine
    registry: RestRegistry

    def _get_active_workspace(self) -> str:
        return active_workspace()

    def _download_uri(self, name: str, version: Any) -> str:
        number = _number(version)
        if number is None:
            return super()._download_uri(name, version)  # which the server refuses, in its own words
        return self.registry.model_version(name, number).location


GuardedStore = SafelockStore | SafelockWorkspaceStore | SafelockRestStore


def is_server(store_uri: str) -> bool:
    """Whether a registry's address, with our prefix or without, is one of a server."""
    return store_uri.removeprefix(SCHEME_PREFIX).startswith(SERVER_SCHEMES)


def connect(store_uri: str) -> SafelockStore | SafelockWorkspaceStore:
    """The store for a database, without a gate yet, and without anything being written for one."""
    store_class = SafelockWorkspaceStore if MLFLOW_ENABLE_WORKSPACES.get() else SafelockStore
    return store_class(store_uri.removeprefix(SCHEME_PREFIX))


def ledger_engine(store_uri: str) -> sa.Engine:
    """The database that holds a registry's ledger: its own, or the clients' of a server."""
    if is_server(store_uri):
        return LedgerDatabase(ledger_uri(store_uri.removeprefix(SCHEME_PREFIX))).engine
    engine: sa.Engine = connect(store_uri).engine
    return engine


def _registry_at(store_uri: str, tracking_uri: str | None) -> tuple[GuardedStore, Registry]:
    """The store at an address and what the gate sees of it, with the tables that a gate needs."""
    if not is_server(store_uri):
        store = connect(store_uri)
        bring_up_to_date(store.engine)
        return store, SqlRegistry(store)
    server = store_uri.removeprefix(SCHEME_PREFIX)
    database = LedgerDatabase(ledger_uri(server))
    bring_up_to_date(database.engine)
    rest_store = SafelockRestStore(lambda: get_default_host_creds(server))
    rest_store.engine = database.engine
    rest_store.registry = RestRegistry(
        server_store(server), database, RegistryArtifacts(tracking_uri).resolve
    )
    _logger.info(
        "safelock is on this client's side of %s only: others are not held back", shown_server(server)
    )
    return rest_store, rest_store.registry


def open_store(store_uri: str, tracking_uri: str | None) -> GuardedStore:
    """Open the gated store for a ``safelock+…`` URI.

    Raises:
        PolicyError: The policy file cannot be used.
        KeyFileError: The key for receipts cannot be used.
        SettingsError: Settings about signatures contradict each other, or are none.
        SigstoreError: Identities sign, or may have signed, and Sigstore cannot be used here.
    """
    warn_of_rivals(store_uri)
    source = PolicySource()
    policy = source()
    check_signing()  # what cannot be used is an error now, and not in every promotion
    if any(rule.names_identities for rule in policy.gates):
        check_sigstore()
    store, registry = _registry_at(store_uri, tracking_uri)
    store.policy_source = source
    store._gate = Gate(source, registry, RegistryArtifacts(tracking_uri))
    store._guard = Guard(store._gate)

    def put_on_record(policy: Policy) -> None:
        # It is of no workspace and of nobody's request: the process is what reads it.
        registry.record_policy(policy_entry(policy, process_actor(), DEFAULT_WORKSPACE_NAME))

    source.when_changed(put_on_record)
    put_on_record(policy)
    _logger.info("safelock guards this registry: %s, policy %s", type(store).__name__, policy.digest)
    return store
