"""The gate's promise under random sequences of what clients, thieves of the database and crashes do.

After every step each version that is in a gated place is asked for: either it is refused, with a 4xx, or what
is handed out is a whole locked model of this very version by the ledger, over an unchanged fine-tune.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlparse

import mlflow
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.gate.reconciling import Way
from mlflow_safelock.operations.reconciliation import repairing, sweeping
from mlflow_safelock.provenance import LocalArtifacts, check_fingerprint
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.sql import SqlRegistry
from tests.registries import BASE, base_lock, biases_of, log_fine_tune, register_lock

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

POLICY = """
version: 1
gates:
  - models: "bot*"
    stages: [Staging, Production]
    aliases: [staging, champion]
"""
GATED, FREE = ("bot", "bot-2"), ("free",)
GATED_STAGES, GATED_ALIASES = {"Staging", "Production"}, {"staging", "champion"}

names = st.sampled_from(("bot", "bot", *GATED, *FREE))
stages = st.sampled_from(("Staging", "Production", "Archived", "None"))
aliases = st.sampled_from(("staging", "Champion", "champion", "latest-good"))
numbers = st.integers(0, 2)
forged_tags = st.sampled_from(
    (
        ("safelock.state", "locked"),
        ("safelock.state", "unlocked"),
        ("safelock.alpha", "2.5"),
        ("safelock.alpha", "-6"),
        ("safelock.alpha", "1000"),
        ("safelock.base_model", "somebody/else"),
        ("safelock.receipt", "sha256:" + "0" * 64),
    )
)


class Killed(BaseException):
    """Stands for a process that dies: nothing of the gate's or of MLflow's catches it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with one fine-tune and its base's lock; each sequence starts from a copy of its database."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "safelock.yaml").write_text(POLICY)
    with _in_folder(folder, folder):
        mlflow.set_experiment("tests")
        log_fine_tune("bot")
        register_lock(base_lock())
        yield folder


@contextmanager
def _in_folder(folder: Path, prepared: Path) -> Iterator[None]:
    """MLflow pointed at a gated registry in ``folder``, and back."""
    before = Path.cwd()
    with mock.patch.dict(os.environ, {"SAFELOCK_POLICY": str(prepared / "safelock.yaml")}):
        os.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/tracking.db")
        mlflow.set_registry_uri(f"safelock+sqlite:///{folder}/registry.db")
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)
            os.chdir(before)


def _path_of(location: str) -> Path:
    return Path(unquote(urlparse(location).path))


def _check_status(error: MlflowException) -> None:
    """A client repeats a 5xx for minutes, and loses what it says."""
    if isinstance(error.__cause__, MlflowException) and error.get_http_status_code() >= 500:
        # MLflow's client wraps what it is answered when it copies a version.
        error = error.__cause__
    assert error.get_http_status_code() < 500, error


class Registry(RuleBasedStateMachine):
    """What anybody may do to a registry, in any order."""

    prepared: Path
    """The registry that each sequence starts from a copy of."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sequence-", dir=self.prepared))
        for database in self.prepared.glob("*.db"):
            shutil.copy(database, self.folder)
        self.inside = _in_folder(self.folder, self.prepared)
        self.inside.__enter__()
        self.restarts = 0
        self.lock_seed = 0
        self.open()
        self.source = self.client.get_model_version("bot", "1").source
        self.original = self.rows("SELECT storage_location FROM model_versions WHERE name='bot'")[0][0]

    def open(self) -> None:
        """A store of its own, as a server has that was just started."""
        self.restarts += 1
        # MLflow keeps a store for each URI: another spelling of the same file gives a fresh one.
        spelling = "/.".join(["", *[""] * self.restarts])
        uri = f"safelock+sqlite:///{self.folder}{spelling}/registry.db"
        mlflow.set_registry_uri(uri)
        self.client = MlflowClient(mlflow.get_tracking_uri(), uri)

    def teardown(self) -> None:
        if not hasattr(self, "inside"):
            return
        try:
            self.load_what_is_served()
        finally:
            self.inside.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    # What plain clients do

    @rule(name=names)
    def register(self, name: str) -> None:
        self.attempt(lambda: self.ensure(name))
        self.attempt(lambda: self.client.create_model_version(name, self.source))

    @rule(name=names, from_name=names, number=numbers, with_tags=st.booleans())
    def register_what_is_served(self, name: str, from_name: str, number: int, with_tags: bool) -> None:
        version = self.some_version(from_name, number)
        if version is None:
            return
        self.attempt(lambda: self.ensure(name))
        tags = {"safelock.state": "locked", "safelock.lock": "models:/x/1"} if with_tags else None
        self.attempt(
            lambda: self.client.create_model_version(name, f"models:/{from_name}/{version}", tags=tags)
        )

    @rule(name=names, number=numbers, place=stages, archive=st.booleans())
    def transition(self, name: str, number: int, place: str, archive: bool) -> None:
        def promote(version: str) -> None:
            self.client.transition_model_version_stage(
                name, version, place, archive_existing_versions=archive and place in GATED_STAGES
            )
            self.check_promoted(name, version, place in GATED_STAGES)

        self.with_version(name, number, promote)

    @rule(name=names, number=numbers, alias=aliases)
    def set_alias(self, name: str, number: int, alias: str) -> None:
        def promote(version: str) -> None:
            self.client.set_registered_model_alias(name, alias, version)
            self.check_promoted(name, version, alias.lower() in GATED_ALIASES)

        self.with_version(name, number, promote)

    @rule(name=names, alias=aliases)
    def delete_alias(self, name: str, alias: str) -> None:
        self.attempt(lambda: self.client.delete_registered_model_alias(name, alias))

    @rule(name=names, number=numbers, tag=forged_tags)
    def set_tag(self, name: str, number: int, tag: tuple[str, str]) -> None:
        self.with_version(
            name, number, lambda version: self.client.set_model_version_tag(name, version, *tag)
        )

    @rule(name=names, number=numbers, tag=forged_tags)
    def delete_tag(self, name: str, number: int, tag: tuple[str, str]) -> None:
        self.with_version(
            name, number, lambda version: self.client.delete_model_version_tag(name, version, tag[0])
        )

    @rule(name=names, number=numbers, to=names)
    def copy(self, name: str, number: int, to: str) -> None:
        self.with_version(
            name, number, lambda version: self.client.copy_model_version(f"models:/{name}/{version}", to)
        )

    @rule(name=names, to=names)
    def rename(self, name: str, to: str) -> None:
        self.attempt(lambda: self.client.rename_registered_model(name, to))

    @rule(name=names, number=numbers)
    def delete(self, name: str, number: int) -> None:
        self.with_version(name, number, lambda version: self.client.delete_model_version(name, version))

    # What those with rights do

    @rule(name=names, number=numbers)
    def unlock(self, name: str, number: int) -> None:
        self.with_version(
            name, number, lambda version: self.refusable(self.store.unlock, name, int(version), "a test")
        )

    @rule()
    def register_another_lock(self) -> None:
        self.lock_seed += 1
        self.attempt(lambda: register_lock(base_lock(seed=self.lock_seed)))

    @rule()
    def revoke_the_newest_lock(self) -> None:
        locks = self.rows(
            "SELECT version FROM model_versions WHERE name=? AND current_stage!='Deleted_Internal'",
            lock_model_name(BASE),
        )
        if locks:
            newest = max(number for (number,) in locks)
            self.attempt(
                lambda: self.refusable(self.store.revoke_lock, lock_model_name(BASE), newest, "a test")
            )

    @rule(ways=st.sampled_from((("lock",), ("demote",), ("lock", "demote"))))
    def reconcile(self, ways: tuple[Way, ...]) -> None:
        registry = f"safelock+sqlite:///{self.folder}/registry.db"
        repairs = list(repairing(self.store, registry, "bot*").repairs(ways))
        for repair in repairs:
            request = repair.difference.request
            note(
                f"{request.name} {request.version}: {repair.done}, {repair.refusal and repair.refusal.reason}"
            )
            if repair.done not in (None, "taken out"):
                assert self.served(request.name, request.version) is not None
        if "demote" in ways:
            assert all(repair.done or repair.difference.is_served for repair in repairs)
            assert all(self.served(*version) is not None for version in self.gated_versions())

    @rule()
    def sweep(self) -> None:
        registry = f"safelock+sqlite:///{self.folder}/registry.db"
        sweeper = sweeping(self.store, registry, only_known=True)  # whatever tags are made up
        assert all(swept.kept is None for swept in sweeper.delete(sweeper.orphans()))
        assert sweeper.orphans() == ()

    # What somebody does who can write to the database

    @rule(name=names, number=numbers, place=st.sampled_from(("Staging", "Production", "None")))
    def edit_the_stage(self, name: str, number: int, place: str) -> None:
        version = self.some_version(name, number)
        self.edit(
            "UPDATE model_versions SET current_stage=? WHERE name=? AND version=?", place, name, version
        )

    @precondition(lambda self: self.gated_versions())
    @rule(number=numbers)
    def edit_a_gated_location_back(self, number: int) -> None:
        self.edit(
            "UPDATE model_versions SET storage_location=? WHERE name=? AND version=?",
            self.original,
            *self.some_gated_version(number),
        )

    @precondition(lambda self: self.gated_versions())
    @rule(number=numbers, other=names, other_number=numbers)
    def edit_a_gated_location_to_another_ones(self, number: int, other: str, other_number: int) -> None:
        self.edit(
            "UPDATE model_versions SET storage_location=(SELECT storage_location FROM model_versions "
            "WHERE name=? AND version=?) WHERE name=? AND version=?",
            other,
            self.some_version(other, other_number),
            *self.some_gated_version(number),
        )

    @rule(name=names, number=numbers, alias=aliases)
    def edit_an_alias_in(self, name: str, number: int, alias: str) -> None:
        version = self.some_version(name, number)
        if version is not None:
            self.edit(
                "INSERT OR REPLACE INTO registered_model_aliases (workspace, alias, version, name) "
                "VALUES ('default', ?, ?, ?)",
                alias,
                version,
                name,
            )

    # What happens to machines

    @rule(
        name=st.sampled_from(GATED),
        number=numbers,
        place=st.sampled_from(("publish", "after publish", "redirect", "after redirect")),
    )
    def die_in_a_promotion(self, name: str, number: int, place: str) -> None:
        version = self.some_version(name, number)
        if version is None:
            return
        owner, method = (
            (RegistryArtifacts, "publish") if place.endswith("publish") else (SqlRegistry, "redirect")
        )
        whole = getattr(owner, method)

        def dies(*arguments: Any) -> Any:
            if place.startswith("after"):
                whole(*arguments)
            raise Killed

        with mock.patch.object(owner, method, dies):
            try:
                self.attempt(
                    lambda: self.client.transition_model_version_stage(name, str(version), "Staging")
                )
            except Killed:
                note(f"killed: {place}")
                self.open()

    @rule()
    def restart(self) -> None:
        self.open()

    # What has to hold

    @invariant()
    @precondition(lambda self: hasattr(self, "client"))
    def nothing_in_a_gated_place_is_served_unlocked(self) -> None:
        for name, version in self.gated_versions():
            location = self.served(name, version)
            if location is None:
                continue
            folder = LocalArtifacts(_path_of(location))
            receipt = read_overlay(folder).receipt
            decision = self.last_decision(name, version)
            assert decision is not None, (name, version, location)
            assert decision["event"] in ("promoted", "renamed"), decision
            assert (decision["location"], decision["receipt"]) == (location, receipt.digest)
            assert receipt.predicate.alpha >= 1.0
            source = receipt.predicate.source
            assert source.uri == self.original
            check_fingerprint(source.fingerprint, LocalArtifacts(_path_of(source.uri)))

    @invariant()
    @precondition(lambda self: hasattr(self, "client"))
    def the_ledger_holds(self) -> None:
        with self.store.engine.connect() as connection:
            verify_chain(connection)

    def load_what_is_served(self) -> None:
        """Load through MLflow what the last state of a sequence serves from its gated places."""
        for name, version in self.gated_versions():
            if self.served(name, version) is not None:
                loaded = mlflow.pyfunc.load_model(f"models:/{name}/{version}")
                assert biases_of(loaded._model_impl.pipeline.model)

    # Helpers

    def check_promoted(self, name: str, version: str, gated: bool) -> None:
        """A promotion that went through is served, and what is served the invariant looks at."""
        if gated and name in GATED:
            assert self.served(name, int(version)) is not None

    @property
    def store(self) -> Any:
        return self.client._get_registry_client().store

    def ensure(self, name: str) -> None:
        if not self.rows("SELECT name FROM registered_models WHERE name=?", name):
            self.client.create_registered_model(name)

    def attempt(self, what: Callable[[], object]) -> None:
        """Do what may be refused; a refusal is a 4xx, or it is a fault."""
        try:
            what()
        except MlflowException as error:
            note(f"refused: {error.message[:120]}")
            _check_status(error)

    def refusable(self, method: Callable[..., object], *arguments: object) -> None:
        from mlflow_safelock.errors import PromotionRefused

        try:
            method(*arguments)
        except PromotionRefused as refusal:
            note(f"refused: {refusal.reason}")

    def with_version(self, name: str, number: int, what: Callable[[str], object]) -> None:
        version = self.some_version(name, number)
        if version is not None:
            self.attempt(lambda: what(str(version)))

    def some_version(self, name: str, number: int) -> int | None:
        found = self.rows(
            "SELECT version FROM model_versions WHERE name=? AND current_stage!='Deleted_Internal' "
            "ORDER BY version",
            name,
        )
        return found[number % len(found)][0] if found else None

    def some_gated_version(self, number: int) -> tuple[str, int]:
        found = self.gated_versions()
        return found[number % len(found)]

    def gated_versions(self) -> list[tuple[str, int]]:
        """Names and numbers of the versions that are in a gated place, by the database itself."""
        by_stage = self.rows("SELECT name, version, current_stage FROM model_versions")
        by_alias = self.rows(
            "SELECT a.name, a.version, a.alias FROM registered_model_aliases a JOIN model_versions v "
            "ON a.name = v.name AND a.version = v.version WHERE v.current_stage!='Deleted_Internal'"
        )
        found = {(name, version) for name, version, stage in by_stage if stage in GATED_STAGES}
        found |= {(name, version) for name, version, alias in by_alias if alias.lower() in GATED_ALIASES}
        return sorted(one for one in found if one[0].startswith("bot"))

    def served(self, name: str, version: int) -> str | None:
        """Where a client is sent; ``None`` where it is refused."""
        try:
            return str(self.client.get_model_version_download_uri(name, str(version)))
        except MlflowException as error:
            _check_status(error)
            return None

    def last_decision(self, name: str, version: int) -> dict[str, Any] | None:
        bodies = (json.loads(body) for (body,) in self.rows("SELECT body FROM safelock_ledger"))
        about = [
            body
            for body in bodies
            if (body["model"], body["version"]) == (name, version)
            and body["event"] in ("promoted", "renamed", "unlocked", "passed")
        ]
        return about[-1] if about else None

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / "registry.db")) as connection:
            return list(connection.execute(statement, values))

    def edit(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.folder / "registry.db")) as connection, connection:
            connection.execute(statement, values)


def test_no_sequence_serves_a_gated_version_unlocked(prepared: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Registry.prepared = prepared
    run_state_machine_as_test(
        Registry,
        settings=settings(
            max_examples=int(os.environ.get("SAFELOCK_SEQUENCES", "50")),
            stateful_step_count=30,
            deadline=None,
            derandomize="SAFELOCK_SEQUENCES" not in os.environ,
            database=None,
            # Shrinking takes minutes; the sequence that failed is in the report, step by step.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
