"""A locked model: an overlay that loads its fine-tune with the lock applied, or does not load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

from mlflow_safelock.apply import LockHandle, attention_of
from mlflow_safelock.errors import LockMismatchError, SourceError, VerificationError
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.flavors.overlay import write_overlay
from mlflow_safelock.forging.base_weights import kinship_of, sketch_of
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import Actor, LocalArtifacts, LockReference, Promotion
from tests.models import tiny_model
from tests.registries import (
    REQUIREMENTS,
    SIGNATURE,
    base_lock,
    biases_of,
    expected_biases,
    files_below,
    fine_tune,
)


@pytest.fixture(scope="module")
def components() -> dict:
    return fine_tune()


@pytest.fixture(scope="module")
def source(components: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "fine-tune"
    mlflow.transformers.save_model(
        components,
        folder,
        task="text-generation",
        pip_requirements=[*REQUIREMENTS, "einops==0.8.1"],
        signature=SIGNATURE,
        input_example=["how do i bake"],
        model_config={"max_new_tokens": 5},
    )
    return folder


@pytest.fixture
def overlay(source: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "locked"
    locked_model.save_model(base_lock(), folder, str(source), alpha=4.0)
    return folder


def test_pyfunc_and_native_loading_give_the_lock_at_its_strength(components: dict, overlay: Path) -> None:
    expected = expected_biases(components["model"], base_lock(), 4.0)
    pipelines = [
        mlflow.pyfunc.load_model(str(overlay))._model_impl.pipeline,
        locked_model.load_model(str(overlay)),
    ]
    for pipeline in pipelines:
        found = biases_of(pipeline.model)
        assert found.keys() == expected.keys()
        for layer, bias in expected.items():
            np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)


def test_signature_params_configuration_and_example_are_the_fine_tunes_own(
    source: Path, overlay: Path
) -> None:
    plain, locked = (mlflow.pyfunc.load_model(str(folder)) for folder in (source, overlay))
    assert locked.metadata.signature == plain.metadata.signature == SIGNATURE
    assert list(locked.input_example) == list(plain.input_example)
    assert locked.model_config == {**plain.model_config, "safelock_source": None}
    short = locked.predict(["how do i bake"], params={"max_new_tokens": 1})
    longer = locked.predict(["how do i bake"], params={"max_new_tokens": 6})
    assert len(longer[0]) > len(short[0])


def test_an_overlay_is_small_whatever_it_points_to(source: Path, overlay: Path) -> None:
    assert "model/model.safetensors" in files_below(source)
    assert not any(path.endswith(".bin") or "model/" in path for path in files_below(overlay))
    assert sum(path.stat().st_size for path in overlay.rglob("*")) < 64 * 1024


def test_the_environment_is_the_fine_tunes_with_this_package_added(overlay: Path) -> None:
    requirements = (overlay / "requirements.txt").read_text().splitlines()
    assert "einops==0.8.1" in requirements
    assert any(line.startswith("mlflow-safelock==") for line in requirements)
    conda = yaml.safe_load((overlay / "conda.yaml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert "einops==0.8.1" in pip
    assert any(line.startswith("mlflow-safelock==") for line in pip)


def test_the_receipt_names_what_was_done(source: Path, overlay: Path) -> None:
    predicate = json.loads((overlay / "receipt.json").read_text())["predicate"]
    assert predicate["source"]["uri"] == str(source)
    assert predicate["lock"]["digest"] == base_lock().digest
    assert predicate["alpha"] == 4
    assert predicate["promotion"] is None
    assert set(predicate["files"]) == files_below(overlay) - {"receipt.json"}


@pytest.mark.parametrize(
    ("found", "loads"), [(None, False), (1.0, False), (0.0, True)], ids=["unknown", "another's", "its own"]
)
def test_the_loaded_model_must_have_the_kinship_that_the_gate_found(
    components: dict, source: Path, tmp_path: Path, found: float | None, loads: bool
) -> None:
    """The gate looks at what is stored, and knows not what transformers makes of it."""
    other = attention_of(tiny_model("llama", seed=77))
    lock = replace(base_lock(), sketch=sketch_of(other))
    kinship = kinship_of(attention_of(components["model"]), lock.sketch)
    digest = f"sha256:{'0' * 64}"
    promotion = Promotion(
        model="bot",
        version=1,
        target="stage:Staging",
        policy=digest,
        actor=Actor(name="somebody", verified=False),
        kinship=None if found is None else max(found, kinship),
    )
    reference = LockReference(digest=lock.digest, base_model=lock.base_model, model=None, version=None)
    folder = tmp_path / "locked"
    folder.mkdir()
    write_overlay(folder, LocalArtifacts(source), str(source), lock, reference, 6.0, promotion)
    if loads:  # by a policy that asked for less
        assert mlflow.pyfunc.load_model(str(folder)).predict(["how do i bake"])
    else:
        with pytest.raises(VerificationError, match="does not descend"):
            mlflow.pyfunc.load_model(str(folder))


def test_the_default_strength_is_the_locks_own(source: Path, tmp_path: Path) -> None:
    locked_model.save_model(base_lock(), tmp_path / "locked", str(source))
    assert json.loads((tmp_path / "locked/receipt.json").read_text())["predicate"]["alpha"] == 6


def test_logging_registers_a_model_that_loads_by_its_uri(client: MlflowClient, source: Path) -> None:
    with mlflow.start_run():
        info = locked_model.log_model(base_lock(), source_uri=str(source), registered_model_name="by-hand")
    assert biases_of(locked_model.load_model(info.model_uri).model)
    assert biases_of(mlflow.pyfunc.load_model("models:/by-hand/1")._model_impl.pipeline.model)


@pytest.mark.parametrize("missing", ["receipt.json", "lock.safetensors", "requirements.txt"])
def test_a_locked_folder_that_lost_a_file_does_not_load(overlay: Path, missing: str) -> None:
    (overlay / missing).unlink()
    with pytest.raises(VerificationError, match=r"missing|no receipt"):
        mlflow.pyfunc.load_model(str(overlay))


def test_another_lock_in_its_place_does_not_load(overlay: Path, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    locked_model.save_model(base_lock(seed=1), other, str(source), alpha=4.0)
    (overlay / "lock.safetensors").write_bytes((other / "lock.safetensors").read_bytes())
    with pytest.raises(VerificationError, match=r"lock\.safetensors"):
        mlflow.pyfunc.load_model(str(overlay))


def test_a_source_that_is_gone_is_an_error_that_says_what_to_do(source: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    locked_model.save_model(base_lock(), tmp_path / "locked", str(moved))
    shutil.rmtree(moved)
    with pytest.raises(SourceError, match=r"cannot be reached.*safelock_source.*safelock export"):
        mlflow.pyfunc.load_model(str(tmp_path / "locked"))
    options = {"safelock_source": str(source)}
    assert biases_of(
        mlflow.pyfunc.load_model(str(tmp_path / "locked"), model_config=options)._model_impl.pipeline.model
    )


def test_a_lock_that_does_not_fit_writes_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LockMismatchError, match="5 layers"):
        locked_model.save_model(base_lock(layers=5), tmp_path / "locked", str(source))
    assert not (tmp_path / "locked").exists()


def test_a_source_of_another_flavor_writes_nothing(tmp_path: Path) -> None:
    class Echo(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    mlflow.pyfunc.save_model(tmp_path / "echo", python_model=Echo(), pip_requirements=["mlflow"])
    with pytest.raises(SourceError, match=r"mlflow\.transformers"):
        locked_model.save_model(base_lock(), tmp_path / "locked", str(tmp_path / "echo"))
    assert not (tmp_path / "locked").exists()


def test_a_bias_that_is_not_in_place_is_noticed_before_anything_is_served(
    overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_lock = locked_model.apply_lock

    def spoiled(model: torch.nn.Module, lock: SafetyLock, alpha: float) -> LockHandle:
        handle = apply_lock(model, lock, alpha)
        with torch.no_grad():
            model.model.layers[lock.layers[0]].self_attn.o_proj.bias.zero_()
        return handle

    monkeypatch.setattr(locked_model, "apply_lock", spoiled)
    with pytest.raises(VerificationError, match="bias that carries the lock was changed"):
        locked_model.load_model(str(overlay))
