"""The gate sees a configuration and no model: an architecture has to be in the table, or described."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.apply import handle_of
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock, state_of

DESCRIPTION = "architectures:\n  - model_type: arcee\n"


@pytest.fixture
def version(client: MlflowClient) -> int:
    register_lock(base_lock())
    return log_fine_tune("bot", fine_tune("arcee"))


def test_an_architecture_that_nobody_described_is_refused_with_how_to_do_it(
    client: MlflowClient, version: int
) -> None:
    before = state_of(client, "bot", version)
    how = r"unsupported_architecture.*'arcee'.*SAFELOCK_ARCHITECTURES.*model_type: arcee"
    with pytest.raises(MlflowException, match=how):
        client.transition_model_version_stage("bot", str(version), "Staging")
    assert state_of(client, "bot", version) == before


def test_a_described_one_is_promoted_and_a_consumer_needs_no_description(
    client: MlflowClient, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "architectures.yaml").write_text(DESCRIPTION)
    monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(tmp_path / "architectures.yaml"))
    client.transition_model_version_stage("bot", str(version), "Staging")
    monkeypatch.delenv("SAFELOCK_ARCHITECTURES")
    served = mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model
    assert handle_of(served).alpha == 6.0


def test_a_description_with_a_fault_refuses_every_promotion_and_names_the_line(
    client: MlflowClient, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "architectures.yaml").write_text(DESCRIPTION + "    layer: model.layers\n")
    monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(tmp_path / "architectures.yaml"))
    with pytest.raises(MlflowException, match=r"unsupported_architecture.*line 3: the key .*layer"):
        client.transition_model_version_stage("bot", str(version), "Staging")
