"""A registry that wants its model measured, and evidence to file in it."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException

from mlflow_safelock.evaluate import (
    Evaluation,
    Settings,
    evaluate,
    open_subject,
)
from mlflow_safelock.provenance import (
    EvaluationStatement,
    SigningKey,
)
from mlflow_safelock.provenance.dsse import sign
from mlflow_safelock.registry.asking import (
    FILE_TAG,
)
from mlflow_safelock.registry.stores import open_store
from tests.keys import KeyPair
from tests.registries import log_fine_tune, register_lock, state_of
from tests.toy import Toy

SETTINGS = Settings(max_new_tokens=20, batch_size=64)


class Shop:
    """A guarded registry with the toy in it, and a policy that wants it measured."""

    def __init__(self, client: Any, toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client, self.toy, self.folder = client, toy, folder
        self.suite = toy.suite(20)
        self.policy = folder / "safelock.yaml"
        monkeypatch.setenv("SAFELOCK_POLICY", str(self.policy))
        self.want()
        log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
        register_lock(toy.lock)

    def want(self, **evaluation: Any) -> None:
        rule = {"suites": [self.suite.digest], "min_new_tokens": 20, **evaluation}
        alpha = {"default": self.toy.alpha, "min": 0.1}
        self.policy.write_text(
            yaml.safe_dump({"version": 1, "gates": [{"evaluation": rule, "alpha": alpha}]})
        )

    def want_signed(self, keys: KeyPair, **evaluation: Any) -> None:
        self.want(signature={"required": True, "public_keys": [str(keys.public)]}, **evaluation)

    def measured(self, **changes: Any) -> Evaluation:
        """What an evaluation of the version finds, under the lock that its promotion applies."""
        subject = open_subject("models:/bot/1").with_lock(self.toy.lock, changes.pop("alpha", self.toy.alpha))
        suite = changes.pop("suite", self.suite)
        return evaluate(subject, suite, replace(SETTINGS, **changes))

    def file(self, statement: EvaluationStatement, envelope: bytes | None = None) -> Any:
        return self.store.file_evaluation("bot", 1, statement, envelope)

    def ask(self, statement: EvaluationStatement, key: SigningKey) -> None:
        """What a client does that has nothing but the server's address."""
        envelope = sign(statement.to_bytes(), key).decode()
        self.client.set_model_version_tag("bot", "1", FILE_TAG, envelope)

    @property
    def store(self) -> Any:
        return open_store(mlflow.get_registry_uri(), mlflow.get_tracking_uri())

    def promote(self) -> None:
        self.client.set_registered_model_alias("bot", "champion", "1")

    def refused(self) -> MlflowException:
        """The promotion is refused as a 4xx, and the registry is as it was."""
        before = state_of(self.client, "bot", 1)
        with pytest.raises(MlflowException) as caught:
            self.promote()
        assert 400 <= caught.value.get_http_status_code() < 500
        assert state_of(self.client, "bot", 1) == before
        return caught.value


def older(statement: EvaluationStatement, **ago: float) -> EvaluationStatement:
    """The same, as if it were made so long ago."""
    created = (datetime.now(UTC) - timedelta(**ago)).isoformat()
    return changed(statement, created=created)


def changed(statement: EvaluationStatement, **values: Any) -> EvaluationStatement:
    """The same, with other findings."""
    measured = statement.predicate.model_copy(update=values)
    return EvaluationStatement.about(statement.subject[0].name, measured)


def events(folder: Path) -> list[str]:
    """What the ledger of the registry in a folder says has happened, in order."""
    with sqlite3.connect(folder / "registry.db") as connection:
        return [
            event for (event,) in connection.execute("SELECT event FROM safelock_ledger ORDER BY sequence")
        ]
