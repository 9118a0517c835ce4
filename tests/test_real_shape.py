"""The published Llama-3-8B lock on a checkpoint with that model's true attention, through the whole path.

The lock is imported and registered, a fine-tune logged with ``mlflow.transformers`` and promoted through a
real server by plain HTTP, and loaded with ``mlflow.pyfunc``. The fine-tune has the attention of Llama-3-8B to
the last number of its shape (1.4 B parameters, 2.7 GB in bfloat16, in shards), a thin MLP and made weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import requests
import torch
from mlflow import MlflowClient
from safetensors import safe_open

from mlflow_safelock import SafetyLock, import_published_lock
from mlflow_safelock.flavors import meta_safetylock
from tests.models import tiny_tokenizer
from tests.registries import REQUIREMENTS, biases_of
from tests.servers import MlflowServer, mlflow_server
from tests.thin_llama import LLAMA_3_8B, thin_llama

pytestmark = [pytest.mark.real_shape, pytest.mark.shared]

BASE = "meta-llama/Meta-Llama-3-8B-Instruct"
NAME = "support-bot"
ALPHA = 6.0
PROMPT = "how do i bake"

FLOAT32_SUM = 128 * 2.0**-24
"""What a sum of a head's 128 products in float32 is off by, at most, relative to the sum of their sizes."""


@dataclass(frozen=True)
class Promoted:
    """A fine-tune that was promoted, and what a consumer loads.

    Attributes:
        lock: The lock.
        weights: The folder of the fine-tune's weights as logged, on the server's disk.
        overlay: The folder that the version was redirected to, on the server's disk.
        model: What ``mlflow.pyfunc.load_model`` gives for the stage.
    """

    lock: SafetyLock
    weights: Path
    overlay: Path
    model: mlflow.pyfunc.PyFuncModel


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that also takes what MLflow keeps in temporary folders, and that is gone afterwards."""
    folder = tmp_path_factory.mktemp("real-shape")
    downloads = folder / "tmp"
    downloads.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(downloads))
        patch.setattr(tempfile, "tempdir", str(downloads))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def promoted(shared: Path, scratch: Path) -> Iterator[Promoted]:
    file = shared / "data" / "published_locks" / "Meta-Llama-3-8B-Instruct.safelock"
    lock = import_published_lock(file, base_model=BASE)
    with mlflow_server(scratch / "server") as server, clients_of(server):
        with mlflow.start_run():
            meta_safetylock.register(lock)
        original = log_fine_tune(server)
        transition_to_staging(server)
        yield Promoted(
            lock=lock,
            weights=original / "model",
            overlay=stored(server, download_uri(server)),
            model=mlflow.pyfunc.load_model(f"models:/{NAME}/Staging"),
        )


@contextmanager
def clients_of(server: MlflowServer) -> Iterator[None]:
    """Let MLflow's own functions talk to a server, and to nothing else that an earlier test has set."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            patch.setenv(variable, server.url)
        try:
            mlflow.set_tracking_uri(server.url)
            mlflow.set_registry_uri(server.url)
            mlflow.set_experiment("real-shape")
            yield
        finally:
            mlflow.set_tracking_uri(None)
            mlflow.set_registry_uri(None)


def log_fine_tune(server: MlflowServer) -> Path:
    """Log and register the fine-tune; where the server keeps it. It is not left in memory."""
    model = thin_llama(LLAMA_3_8B, key_value_heads=8)
    model.name_or_path = BASE
    model.config._name_or_path = BASE
    model.generation_config.max_new_tokens = 3
    model.generation_config.do_sample = False
    with mlflow.start_run():
        mlflow.transformers.log_model(
            {"model": model, "tokenizer": tiny_tokenizer()},
            name="model",
            task="text-generation",
            registered_model_name=NAME,
            pip_requirements=REQUIREMENTS,
        )
    return stored(server, download_uri(server))


def transition_to_staging(server: MlflowServer) -> None:
    answer = requests.post(
        f"{server.url}/api/2.0/mlflow/model-versions/transition-stage",
        json={"name": NAME, "version": "1", "stage": "Staging", "archive_existing_versions": False},
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_version"]["current_stage"] == "Staging"


def download_uri(server: MlflowServer) -> str:
    return MlflowClient(server.url).get_model_version_download_uri(NAME, "1")


def stored(server: MlflowServer, uri: str) -> Path:
    """Where a proxied artifact lies on the server's disk."""
    assert uri.startswith("mlflow-artifacts:/"), "clients go through the server"
    return server.artifacts / uri.removeprefix("mlflow-artifacts:/")


def network_of(promoted: Promoted) -> Any:
    return promoted.model.get_raw_model().model


def logged_columns(weights: Path, layer: int, head: int) -> np.ndarray:
    """The columns of ``W_o`` that belong to a head, as logged: ``[hidden, head_dim]``, in float64."""
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    shard = json.loads((weights / "model.safetensors.index.json").read_text())["weight_map"][name]
    width = LLAMA_3_8B.head_dim
    with safe_open(weights / shard, framework="pt") as tensors:
        columns = tensors.get_slice(name)[:, head * width : (head + 1) * width]
    assert columns.dtype == torch.bfloat16
    return columns.double().numpy()


def half_ulp(values: np.ndarray) -> np.ndarray:
    """Half the distance between neighbouring bfloat16 numbers (8 bits of significand) at each value."""
    _, exponents = np.frexp(np.abs(values))
    return np.ldexp(1.0, exponents - 9)


def test_the_fine_tune_is_logged_in_shards(promoted: Promoted) -> None:
    shards = sorted(promoted.weights.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sum(shard.stat().st_size for shard in shards) > 2.7e9


def test_every_bias_of_every_locked_layer_is_the_one_that_the_logged_weights_make(promoted: Promoted) -> None:
    found = biases_of(network_of(promoted))
    lock = promoted.lock
    assert len(lock.heads) == 24
    for layer in lock.layers:
        expected, sizes = np.zeros(LLAMA_3_8B.hidden), np.zeros(LLAMA_3_8B.hidden)
        for locked in lock.heads_of_layer(layer):
            push = ALPHA * locked.std * locked.direction.astype(np.float64)
            columns = logged_columns(promoted.weights, layer, locked.head)
            expected += columns @ push
            sizes += np.abs(columns) @ np.abs(push)
        summed = FLOAT32_SUM * sizes
        error = np.abs(found[layer] - expected)
        assert (error <= summed + half_ulp(np.abs(expected) + summed)).all(), f"layer {layer}"
        assert np.linalg.norm(error) < 2.0**-9 * np.linalg.norm(expected)


def test_layers_without_a_locked_head_have_no_bias(promoted: Promoted) -> None:
    assert sorted(biases_of(network_of(promoted))) == list(promoted.lock.layers)
    assert len(promoted.lock.layers) < LLAMA_3_8B.layers


def test_the_loaded_model_has_the_shape_and_dtype_of_the_logged_one(promoted: Promoted) -> None:
    projections = [layer.self_attn.o_proj for layer in network_of(promoted).model.layers]
    assert [tuple(projection.weight.shape) for projection in projections] == [(4096, 4096)] * 32
    kept = {projection.bias.dtype for projection in projections if projection.bias is not None}
    assert kept == {projection.weight.dtype for projection in projections} == {torch.bfloat16}


def test_the_loaded_model_answers(promoted: Promoted) -> None:
    (answer,) = promoted.model.predict([PROMPT])
    assert answer.startswith(PROMPT)
    assert len(answer) > len(PROMPT)


def test_what_the_promotion_wrote_is_small_whatever_the_size_of_the_model(promoted: Promoted) -> None:
    assert promoted.overlay.parent.name.endswith("-safelock")
    written = [path for path in promoted.overlay.rglob("*") if path.is_file()]
    assert {"MLmodel", "lock.safetensors", "receipt.json"} <= {path.name for path in written}
    assert sum(path.stat().st_size for path in written) < 1 << 20
