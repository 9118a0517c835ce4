"""A standalone model: prepared by a command, found by the promotion, loaded locked by stock software."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_safelock.cli.main import main
from tests.registries import (
    base_lock,
    biases_of,
    expected_biases,
    fine_tune,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.registry.s3_server import S3Server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

POLICY = """
version: 1
gates:
  - carrier: standalone
    alpha: {default: 2.0}
"""


@pytest.fixture(autouse=True)
def policy(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "safelock.yaml"
    path.write_text(POLICY)
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))


def stage(client: MlflowClient, version: int) -> None:
    client.transition_model_version_stage("bot", str(version), "Staging")


def prepare(tmp_path: Path, version: int) -> dict[str, Any]:
    from click.testing import CliRunner

    done = CliRunner().invoke(
        main,
        [
            *("prepare", f"models:/bot/{version}", "--format", "json"),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
            *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
        ],
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def folder_of(location: str) -> Path:
    return Path(local_file_uri_to_path(location))


def test_a_promotion_without_preparation_is_refused_and_names_the_command(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=rf"not_prepared.*safelock prepare models:/bot/{version}"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_prepared_model_is_promoted_and_loads_locked_in_stock_software(
    client: MlflowClient, tmp_path: Path, family: str
) -> None:
    components = fine_tune(family)
    version = log_fine_tune("bot", components, input_example=["how do i bake"])
    geometry = mlflow_geometry(components["model"])
    lock = base_lock(**geometry)
    register_lock(lock)
    before = state_of(client, "bot", version)
    made = prepare(tmp_path, version)
    assert made["carrier"] == "standalone"
    assert made["alpha"] == 2.0
    assert state_of(client, "bot", version) == before, "nothing is promoted yet"
    stage(client, version)
    after = state_of(client, "bot", version)
    assert after["location"] == made["location"]
    assert after["tags"]["safelock.applied_alpha"] == "2"

    locked = pushed(components["model"], lock)
    pipeline = mlflow.transformers.load_model("models:/bot/Staging")
    assert torch.allclose(logits(pipeline.model), locked, atol=1e-5)
    loaded = mlflow.pyfunc.load_model("models:/bot/Staging")
    assert isinstance(loaded.predict(["how do i bake"])[0], str)
    assert list(loaded.input_example) == ["how do i bake"]
    assert loaded.metadata.signature == mlflow.models.get_model_info(before["location"]).signature
    stock = AutoModelForCausalLM.from_pretrained(folder_of(made["location"]) / "model")
    assert torch.allclose(logits(stock), locked, atol=1e-5)
    AutoTokenizer.from_pretrained(folder_of(made["location"]) / "model")
    assert prepare(tmp_path, version)["check"] is None, "it is there already"


def mlflow_geometry(model: torch.nn.Module) -> dict[str, int]:
    from mlflow_safelock.apply import geometry_from_config

    return dict(geometry_from_config(model.config).model_dump())


def pushed(model: torch.nn.Module, lock: Any) -> torch.Tensor:
    from mlflow_safelock.apply import apply_lock

    with apply_lock(model, lock, 2.0):
        return logits(model)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits


def test_the_weights_are_shared_and_the_source_stays_as_it_was(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    source = folder_of(state_of(client, "bot", version)["location"])
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    register_lock(base_lock())
    folder = folder_of(prepare(tmp_path, version)["location"])
    weights = source / "model" / "model.safetensors"
    shared = [path for path in (folder / "model").glob("*.safetensors") if os.path.samefile(path, weights)]
    assert len(shared) == 1 or weights.stat().st_nlink == 1, "a reflink, or one hard link"
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert not list(folder.parent.glob(".*")), "nothing half written is left"


@pytest.mark.parametrize("file", ["model/config.json", "MLmodel", "model/model-safelock.safetensors"])
def test_a_prepared_model_that_was_changed_is_not_promoted(
    client: MlflowClient, tmp_path: Path, file: str
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    path = folder_of(prepare(tmp_path, version)["location"]) / file
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(MlflowException, match=f"unreadable.*{path.name}"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_source_that_changed_after_the_preparation_is_not_promoted(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    prepare(tmp_path, version)
    config = folder_of(before["location"]) / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("8", "9"))
    with pytest.raises(MlflowException, match=r"generation_config\.json"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_newer_lock_needs_another_preparation(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    first = prepare(tmp_path, version)["location"]
    register_lock(base_lock(seed=1))
    with pytest.raises(MlflowException, match="not_prepared"):
        stage(client, version)
    assert prepare(tmp_path, version)["location"] != first
    stage(client, version)


def test_what_a_promotion_would_refuse_is_not_prepared(client: MlflowClient, tmp_path: Path) -> None:
    from click.testing import CliRunner

    version = log_fine_tune("bot")
    location = folder_of(state_of(client, "bot", version)["location"])
    done = CliRunner().invoke(
        main,
        [
            *("prepare", f"models:/bot/{version}"),
            *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
        ],
    )
    assert done.exit_code == 1
    assert "No lock is registered" in done.output
    assert not location.with_name(f"{location.name}-safelock").exists()
    wrong = CliRunner().invoke(main, ["prepare", f"models:/bot/{version}", "--registry-uri", "http://x"])
    assert wrong.exit_code == 1
    assert "safelock+sqlite" in wrong.output


def test_on_s3_the_store_copies_the_weights_itself(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        components = _log_on_s3(server, monkeypatch)
        version = int(client.search_model_versions("name='bot'")[0].version)
        lock = base_lock(layers=2, heads=4, head_dim=32, hidden=128)
        register_lock(lock)
        size = sum(parameter.nbytes for parameter in components["model"].parameters())
        server.passed.clear()
        made = prepare(tmp_path, version)
        through = sum(one.sent + one.received for one in server.passed)
        assert made["location"].startswith("s3://")
        projections = 2 * 128 * 128 * 4
        assert size > 20_000_000
        # Which parts the fingerprint samples differs from model to model, and with it what they overlap.
        assert through < 2 * projections + 1_500_000 < 0.1 * size
        stage(client, version)
        loaded = mlflow.transformers.load_model("models:/bot/Staging").model
        assert biases_of(loaded).keys() == expected_biases(components["model"], lock, 2.0).keys()
        for layer, bias in expected_biases(components["model"], lock, 2.0).items():
            np.testing.assert_allclose(biases_of(loaded)[layer], bias, rtol=1e-5, atol=1e-6)
        assert torch.allclose(logits(loaded), pushed(components["model"], lock), atol=1e-5)


def _log_on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model whose weights are mostly something else than attention, logged to S3."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": server.url,
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="models")
    mlflow.create_experiment("on s3", artifact_location="s3://models/artifacts")
    mlflow.set_experiment("on s3")
    components = fine_tune(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        hidden_size=128,
        intermediate_size=8192,
    )
    log_fine_tune("bot", components)
    return components
