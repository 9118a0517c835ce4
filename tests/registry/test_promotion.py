"""A promotion locks, or refuses and leaves the registry as it was."""

from __future__ import annotations

import copy
import json
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LinearRegression
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_safelock.apply import apply_lock, attention_of, handle_of
from mlflow_safelock.errors import (
    LockMismatchError,
    PolicyError,
    PromotionRefused,
    SourceError,
    VerificationError,
)
from mlflow_safelock.evaluate import open_subject
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.forging.base_weights import sketch_of
from mlflow_safelock.gate.ledger import row_digest
from mlflow_safelock.lock import SafetyLock
from tests.models import tiny_model
from tests.registries import (
    BASE,
    base_lock,
    biases_of,
    expected_biases,
    fine_tune,
    just_before,
    log_fine_tune,
    register_lock,
    state_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


def ledger_rows(folder: Path) -> list[dict[str, Any]]:
    """The ledger's rows about fine-tunes, oldest first, each checked against its digest."""
    with sqlite3.connect(folder / "registry.db") as connection:
        rows = connection.execute("SELECT previous, digest, body FROM safelock_ledger ORDER BY sequence")
        found = list(rows)
    for previous, digest, body in found:
        assert digest == row_digest(previous, body.encode())
    bodies = [json.loads(body) for _, _, body in found]
    return [body for body in bodies if body["event"] not in ("policy", "registered")]


def stage(client: MlflowClient, version: int, name: str = "bot") -> None:
    client.transition_model_version_stage(name, str(version), "Staging")


def alias(client: MlflowClient, version: int, name: str = "bot") -> None:
    client.set_registered_model_alias(name, "champion", str(version))


PROMOTIONS = pytest.mark.parametrize("promote", [stage, alias])


def uri_of(promote: Callable[..., None]) -> str:
    return "models:/bot/Staging" if promote is stage else "models:/bot@champion"


def statements_of(work: Callable[[], None]) -> int:
    """How many statements the databases of this process are sent meanwhile, without sqlite's own settings."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("PRAGMA"):
            sent.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        work()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    return len(sent)


def test_what_a_promotion_asks_of_the_database_does_not_grow_with_the_registry(client: MlflowClient) -> None:
    register_lock(base_lock())
    components = fine_tune()
    stage(client, log_fine_tune("bot", components))
    first = log_fine_tune("bot", components)
    few = statements_of(lambda: stage(client, first))
    for seed in range(1, 6):
        register_lock(base_lock(seed=seed))
    for _ in range(4):
        later = log_fine_tune("bot", components)
        client.set_registered_model_alias("bot", f"candidate-{later}", str(later))
    many = statements_of(lambda: stage(client, later))
    assert few <= 38  # of which MLflow's own transition has 13
    assert many <= few


@PROMOTIONS
def test_a_promotion_locks_what_every_consumer_loads(
    client: MlflowClient, tmp_path: Path, promote: Callable[..., None]
) -> None:
    components = fine_tune()
    version = log_fine_tune("bot", components, input_example=["how do i bake"])
    before = state_of(client, "bot", version)
    lock = base_lock()
    register_lock(lock)
    promote(client, version)

    loaded = mlflow.pyfunc.load_model(uri_of(promote))
    expected = expected_biases(components["model"], lock, alpha=6.0)
    found = biases_of(loaded._model_impl.pipeline.model)
    assert found.keys() == expected.keys()
    for layer, bias in expected.items():
        np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)
    assert loaded.metadata.signature == mlflow.models.get_model_info(before["location"]).signature
    assert list(loaded.input_example) == ["how do i bake"]
    assert isinstance(loaded.predict(["how do i bake"])[0], str)

    after = state_of(client, "bot", version)
    assert after["source"] == before["source"]
    assert after["location"] != before["location"]
    assert not biases_of(mlflow.transformers.load_model(before["location"]).model), "the source is as it was"
    (row,) = ledger_rows(tmp_path)
    assert (row["event"], row["model"], row["version"]) == ("promoted", "bot", version)
    assert row["lock"]["digest"] == lock.digest
    assert row["original_location"] == before["location"]
    assert row["location"] == after["location"]
    assert after["tags"]["safelock.state"] == "locked"
    assert after["tags"]["safelock.lock"] == f"models:/{lock_model_name(BASE)}/1"


def test_the_locked_folder_gives_no_unlocked_weights_to_the_transformers_flavor(
    client: MlflowClient,
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    stage(client, version)
    with pytest.raises(MlflowException, match="transformers"):
        mlflow.transformers.load_model("models:/bot/Staging")


@PROMOTIONS
def test_without_a_lock_for_its_base_a_version_is_refused(
    client: MlflowClient, tmp_path: Path, promote: Callable[..., None]
) -> None:
    version = log_fine_tune("bot")
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"missing_lock.*org/tiny-base.*safelock lock register") as info:
        promote(client, version)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, "bot", version) == before
    (row,) = ledger_rows(tmp_path)
    assert (row["event"], row["reason"]) == ("rejected", "missing_lock")


def test_without_a_word_on_its_base_a_version_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    components = fine_tune(base=None)
    version = log_fine_tune("bot", components)
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"unknown_base.*safelock\.base_model"):
        stage(client, version)
    assert state_of(client, "bot", version) == before
    assert ledger_rows(tmp_path)[-1]["reason"] == "unknown_base"
    # The next step that the error names is one that works.
    client.set_model_version_tag("bot", str(version), "safelock.base_model", BASE)
    stage(client, version)
    assert state_of(client, "bot", version)["stage"] == "Staging"


def test_a_lock_of_another_geometry_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock(layers=5))
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"geometry_mismatch.*5 layers.*3 layers") as info:
        stage(client, version)
    assert info.value.error_code == "RESOURCE_CONFLICT"
    assert state_of(client, "bot", version) == before
    assert ledger_rows(tmp_path)[-1]["reason"] == "geometry_mismatch"


def test_a_lock_registered_under_another_base_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    from mlflow_safelock.flavors import meta_safetylock

    version, other = log_fine_tune("bot"), base_lock(base="org/other")
    with mlflow.start_run(), pytest.raises(MlflowException, match=r"no_lock.*a lock of 'org/other'"):
        meta_safetylock.log_model(other, registered_model_name=lock_model_name(BASE))
    guarded = mlflow.get_registry_uri()
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/registry.db")  # past the gate
    with mlflow.start_run():
        meta_safetylock.log_model(other, registered_model_name=lock_model_name(BASE))
    mlflow.set_registry_uri(guarded)
    with pytest.raises(MlflowException, match=r"damaged_lock.*'org/other'"):
        stage(client, version)


def test_a_damaged_lock_is_refused(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    location = Path(client.get_model_version_download_uri(lock_model_name(BASE), "1"))
    data = bytearray((location / "lock.safetensors").read_bytes())
    data[-5] ^= 1
    (location / "lock.safetensors").write_bytes(data)
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match="damaged_lock") as info:
        stage(client, version)
    assert info.value.error_code == "INVALID_PARAMETER_VALUE"
    assert state_of(client, "bot", version) == before


def test_a_second_promotion_of_a_locked_version_changes_nothing(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    stage(client, version)
    location = state_of(client, "bot", version)["location"]
    alias(client, version)
    client.transition_model_version_stage("bot", str(version), "Production")
    stage(client, version)
    assert state_of(client, "bot", version)["location"] == location
    assert len(ledger_rows(tmp_path)) == 1


def test_a_newer_lock_is_applied_to_the_source_and_never_on_top(client: MlflowClient, tmp_path: Path) -> None:
    components = fine_tune()
    version = log_fine_tune("bot", components)
    original = state_of(client, "bot", version)["location"]
    register_lock(base_lock(seed=0))
    stage(client, version)
    newer = base_lock(seed=1)
    register_lock(newer)
    stage(client, version)
    rows = ledger_rows(tmp_path)
    assert [row["lock"]["version"] for row in rows] == [1, 2]
    assert {row["original_location"] for row in rows} == {original}
    found = biases_of(mlflow.pyfunc.load_model("models:/bot/Staging")._model_impl.pipeline.model)
    for layer, bias in expected_biases(components["model"], newer, 6.0).items():
        np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_locked_version_is_locked_anew_from_the_source(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    original = state_of(client, "bot", version)["location"]
    register_lock(base_lock())
    stage(client, version)
    client.copy_model_version(f"models:/bot/{version}", "copy")
    stage(client, 1, name="copy")
    row = ledger_rows(tmp_path)[-1]
    assert (row["event"], row["model"], row["original_location"]) == ("promoted", "copy", original)
    assert state_of(client, "copy", 1)["location"] == row["location"]


def somebody_faster(folder: Path, before: str, what: str) -> AbstractContextManager[None]:
    """Do something in the registry's database the first time that a statement is about to begin so."""

    def do_it() -> None:
        with sqlite3.connect(folder / "registry.db") as other:
            other.execute(what)

    return just_before(before, do_it)


def test_an_alias_that_somebody_else_makes_at_the_same_moment_is_moved(
    client: MlflowClient, tmp_path: Path
) -> None:
    register_lock(base_lock())
    versions = [log_fine_tune("bot"), log_fine_tune("bot")]
    stage(client, versions[1])
    make_it = (
        "INSERT INTO registered_model_aliases (workspace, name, alias, version) "
        f"VALUES ('default', 'bot', 'champion', {versions[0]})"
    )
    with somebody_faster(tmp_path, "INSERT INTO registered_model_aliases", make_it):
        alias(client, versions[1])
    assert client.get_model_version_by_alias("bot", "champion").version == versions[1]


def test_an_alias_that_somebody_else_deletes_at_the_same_moment_is_made(
    client: MlflowClient, tmp_path: Path
) -> None:
    register_lock(base_lock())
    versions = [log_fine_tune("bot"), log_fine_tune("bot")]
    alias(client, versions[0])
    with somebody_faster(tmp_path, "UPDATE registered_model_aliases", "DELETE FROM registered_model_aliases"):
        alias(client, versions[1])
    assert client.get_model_version_by_alias("bot", "champion").version == versions[1]


def test_a_version_that_somebody_else_deletes_at_the_same_moment_is_not_there(
    client: MlflowClient, tmp_path: Path
) -> None:
    register_lock(base_lock())
    version = log_fine_tune("bot")
    stage(client, version)
    with (
        somebody_faster(tmp_path, "UPDATE model_versions", "DELETE FROM model_versions WHERE name = 'bot'"),
        pytest.raises(MlflowException, match="not found") as info,
    ):
        client.transition_model_version_stage("bot", str(version), "Production")
    assert info.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_a_model_that_is_no_language_model_passes_untouched(client: MlflowClient, tmp_path: Path) -> None:
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]),
            name="model",
            registered_model_name="prices",
            pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle",
        )
    before = state_of(client, "prices", 1)
    stage(client, 1, name="prices")
    alias(client, 1, name="prices")
    after = state_of(client, "prices", 1)
    assert (after["stage"], after["aliases"]) == ("Staging", ["champion"])
    assert (after["location"], after["tags"]) == (before["location"], before["tags"])
    (row,) = ledger_rows(tmp_path)
    assert (row["event"], row["reason"]) == ("passed", "not_an_llm")


def test_ungated_stages_and_aliases_are_stock_mlflow(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    client.transition_model_version_stage("bot", str(version), "Archived")
    client.set_registered_model_alias("bot", "experiment", str(version))
    assert state_of(client, "bot", version)["stage"] == "Archived"
    assert ledger_rows(tmp_path) == []


def test_stock_errors_stay_stock_errors(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    with pytest.raises(MlflowException, match="Invalid Model Version stage") as info:
        client.transition_model_version_stage("bot", str(version), "Limbo")
    assert info.value.error_code == "INVALID_PARAMETER_VALUE"
    with pytest.raises(MlflowException, match="not found") as info:
        client.transition_model_version_stage("bot", "99", "Staging")
    assert info.value.error_code == "RESOURCE_DOES_NOT_EXIST"


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (lambda store: store.get_model_version_download_uri("bot", "9" * 30), 404),
        (lambda store: store.get_model_version_download_uri("bot", 2**31), 404),
        (lambda store: store.transition_model_version_stage("bot", "9" * 30, "Staging", False), 404),
        (lambda store: store.set_registered_model_alias("bot", "champion", "9" * 30), 404),
        (lambda store: store.transition_model_version_stage("bot", "1", None, False), 400),
        (lambda store: store.transition_model_version_stage(None, "1", "Staging", False), 400),
        (lambda store: store.set_registered_model_alias("bot", None, "1"), 400),
        (lambda store: store.rename_registered_model("bot", None), 400),
    ],
)
def test_what_names_nothing_is_refused_in_mlflows_words_and_leaves_no_row(
    client: MlflowClient, tmp_path: Path, ask: Callable[[Any], Any], status: int
) -> None:
    client.create_registered_model("bot")
    with pytest.raises(MlflowException) as info:
        ask(client._get_registry_client().store)
    assert info.value.get_http_status_code() == status
    assert "safelock" not in info.value.message
    assert ledger_rows(tmp_path) == []


def test_existing_versions_are_archived_only_when_the_gate_lets_the_new_one_in(client: MlflowClient) -> None:
    register_lock(base_lock())
    first = log_fine_tune("bot")
    stage(client, first)
    unknown = log_fine_tune("bot", fine_tune(base="org/unknown"))
    with pytest.raises(MlflowException, match="missing_lock"):
        client.transition_model_version_stage("bot", str(unknown), "Staging", archive_existing_versions=True)
    assert state_of(client, "bot", first)["stage"] == "Staging"
    second = log_fine_tune("bot")
    client.transition_model_version_stage("bot", str(second), "Staging", archive_existing_versions=True)
    assert state_of(client, "bot", first)["stage"] == "Archived"
    assert state_of(client, "bot", second)["stage"] == "Staging"


def edit_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    (folder / "model/model.safetensors").unlink()


def edit_config(folder: Path) -> None:
    path = folder / "model/config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


@pytest.mark.parametrize("change", [edit_weights, remove_weights, edit_config])
def test_a_source_that_changed_after_promotion_is_not_loaded(
    client: MlflowClient, change: Callable[[Path], None]
) -> None:
    version = log_fine_tune("bot")
    source = Path(state_of(client, "bot", version)["location"])
    register_lock(base_lock())
    stage(client, version)
    change(source)
    with pytest.raises(Exception, match=r"(model\.safetensors|config\.json)"):
        mlflow.pyfunc.load_model("models:/bot/Staging")


@pytest.mark.parametrize("name", ["MLmodel", "lock.safetensors", "requirements.txt", "receipt.json"])
def test_a_locked_folder_that_was_edited_is_not_loaded(client: MlflowClient, name: str) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    stage(client, version)
    path = Path(state_of(client, "bot", version)["location"]) / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(Exception, match=name.replace(".", r"\.")):
        mlflow.pyfunc.load_model("models:/bot/Staging")


def test_a_local_copy_of_the_source_is_used_only_with_the_fingerprint(
    client: MlflowClient, tmp_path: Path
) -> None:
    import shutil

    version = log_fine_tune("bot")
    source = Path(state_of(client, "bot", version)["location"])
    register_lock(base_lock())
    stage(client, version)
    copy = tmp_path / "copy"
    shutil.move(source, copy)
    with pytest.raises(Exception, match=r"cannot be reached.*safelock export"):
        mlflow.pyfunc.load_model("models:/bot/Staging")
    options = {"safelock_source": str(copy)}
    assert biases_of(
        mlflow.pyfunc.load_model("models:/bot/Staging", model_config=options)._model_impl.pipeline.model
    )
    edit_config(copy)
    with pytest.raises(Exception, match=r"config\.json"):
        mlflow.pyfunc.load_model("models:/bot/Staging", model_config=options)


def log_adapter() -> int:
    from peft import LoraConfig, get_peft_model

    components = fine_tune(base="base")
    components["model"].save_pretrained("base")
    adapted = get_peft_model(components["model"], LoraConfig(target_modules=["q_proj"], r=2))
    return log_fine_tune("bot", {"model": adapted, "tokenizer": components["tokenizer"]})


def log_adapter_without_saying_so() -> int:
    version = log_adapter()
    path = Path(MlflowClient().get_model_version_download_uri("bot", str(version))) / "MLmodel"
    lines = [line for line in path.read_text().splitlines() if "peft" not in line]
    path.write_text("\n".join(lines) + "\n")
    return version


def log_without_weights() -> int:
    version = log_fine_tune("bot")
    (
        Path(MlflowClient().get_model_version_download_uri("bot", str(version))) / "model/model.safetensors"
    ).unlink()
    return version


def log_in_another_flavor() -> int:
    class Anything(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    folder = Path("weights")
    fine_tune()["model"].save_pretrained(folder)
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=Anything(),
            artifacts={"weights": str(folder)},
            registered_model_name="bot",
            pip_requirements=["mlflow"],
        )
    return int(info.registered_model_version)


def log_with_a_loader_of_its_own() -> int:
    version = log_fine_tune("bot")
    path = Path(MlflowClient().get_model_version_download_uri("bot", str(version))) / "MLmodel"
    path.write_text(
        path.read_text().replace("loader_module: mlflow.transformers", "loader_module: my_loader")
    )
    return version


def log_an_overlay_of_its_own() -> int:
    from mlflow_safelock.flavors import locked_model

    version = log_fine_tune("source")
    location = MlflowClient().get_model_version_download_uri("source", str(version))
    with mlflow.start_run():
        info = locked_model.log_model(base_lock(), source_uri=location, registered_model_name="bot")
    return int(info.registered_model_version)


def log_an_unknown_architecture() -> int:
    version = log_fine_tune("bot")
    path = Path(MlflowClient().get_model_version_download_uri("bot", str(version))) / "model/config.json"
    path.write_text(path.read_text().replace('"llama"', '"unheard_of"'))
    return version


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base model in the hub's cache, as a download leaves it, and what MLflow asks the hub about it."""
    repository = tmp_path / "hub" / f"models--{BASE.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    components = fine_tune()
    components["model"].save_pretrained(snapshot)
    components["tokenizer"].save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("mlflow.transformers.is_valid_hf_repo_id", lambda _name: True)
    monkeypatch.setattr("mlflow.transformers.flavor_config.get_latest_commit_for_repo", lambda _name: COMMIT)
    return BASE


def log_adapter_alone(target_modules: list[str], **options: Any) -> tuple[int, Any]:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(BASE)
    config = LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return log_fine_tune("bot", {"model": adapted, "tokenizer": tokenizer}, **options), adapted


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "o_proj"]])
def test_an_adapter_that_names_its_base_is_promoted_and_loads_locked(
    client: MlflowClient, hub: str, target_modules: list[str]
) -> None:
    lock = base_lock()
    register_lock(lock)
    version, adapted = log_adapter_alone(target_modules)
    stage(client, version)
    state = state_of(client, "bot", version)
    assert state["tags"]["safelock.base"] == hub
    served = mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model
    merged = copy.deepcopy(adapted).merge_and_unload()
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad(), apply_lock(merged, lock, 6.0):
        expected = merged(input_ids=tokens).logits
        unlocked = adapted(input_ids=tokens).logits
        found = served(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, unlocked, atol=1e-2)
    assert handle_of(served).alpha == 6.0


def test_an_adapter_with_biases_of_its_own_is_refused(client: MlflowClient, hub: str) -> None:
    register_lock(base_lock())
    version, _ = log_adapter_alone(["o_proj"])
    location = client.get_model_version_download_uri("bot", str(version)).removeprefix("file://")
    path = Path(location) / "peft" / "adapter_model.safetensors"
    bias = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.bias"
    save_file({**load_file(path), bias: torch.ones(48)}, path, metadata={"format": "pt"})
    with pytest.raises(MlflowException, match=rf"lock_taken_back.*{bias}.*merge_and_unload"):
        stage(client, version)


def test_a_model_that_names_a_hub_alone_is_promoted_once_its_weights_were_fetched(
    client: MlflowClient, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import pipeline

    lock = base_lock()
    register_lock(lock)
    generating = pipeline("text-generation", model=BASE)
    version = log_fine_tune("bot", generating, save_pretrained=False)
    with pytest.raises(MlflowException, match=r"no_weights.*save_pretrained=True"):
        stage(client, version)
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{no_weights: snapshot}]\n")
    with pytest.raises(
        MlflowException, match=rf"no_weights.*{COMMIT}.*safelock prepare models:/bot/{version}"
    ):
        stage(client, version)
    # What names a folder of somebody's is no reference, and nothing that its MLmodel file names is run.
    mlmodel = Path(client.get_model_version_download_uri("bot", str(version))) / "MLmodel"
    logged = mlmodel.read_text()
    for what, other in (
        (f"source_model_name: {BASE}", f"source_model_name: {tmp_path}/hub"),
        (COMMIT, "main"),
    ):
        mlmodel.write_text(logged.replace(what, other))
        with pytest.raises(PromotionRefused, match="without safetensors weights"):
            client._get_registry_client().store.prepare("bot", version)
    mlmodel.write_text(logged)
    folder = tmp_path / "hub" / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PromotionRefused, match="holds an adapter"):
        client._get_registry_client().store.prepare("bot", version)
    assert not mlmodel.with_name("model").exists()
    (folder / "adapter_config.json").unlink()
    mlmodel.write_text(logged.replace("LlamaForCausalLM", "EvilForCausalLM"))
    with monkeypatch.context() as patched:
        patched.setattr("mlflow.transformers.load_model", lambda *_, **__: pytest.fail("it was loaded"))
        with pytest.raises(PromotionRefused, match="EvilForCausalLM") as info:
            client._get_registry_client().store.prepare("bot", version)
        assert info.value.reason == "loaded_otherwise"
        assert not mlmodel.with_name("model").exists()
        mlmodel.write_text(logged)
        made = client._get_registry_client().store.prepare("bot", version)
    assert made.fetched == f"'{BASE}' at commit {COMMIT}"
    assert client._get_registry_client().store.prepare("bot", version).fetched is None
    stage(client, version)
    served = mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model
    expected = expected_biases(generating.model, lock, 6.0)
    assert all(np.allclose(biases_of(served)[layer], bias, atol=1e-6) for layer, bias in expected.items())
    rows = [(row["event"], row["target"]) for row in ledger_rows(tmp_path) if row["event"] != "rejected"]
    assert rows == [("written", "prepare:snapshot"), ("promoted", "stage:Staging")]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_whose_base_could_change_is_refused(
    client: MlflowClient, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_lock(base_lock())
    folder = tmp_path / "hub" / f"models--{BASE.replace('/', '--')}" / "snapshots" / COMMIT
    version, _ = log_adapter_alone(["q_proj"], base_model_path=str(folder))
    with pytest.raises(MlflowException, match=r"base_not_pinned.*merge_and_unload"):
        stage(client, version)
    # Nor is a folder pinned by whatever commit stands beside it.
    version, _ = log_adapter_alone(["q_proj"])
    mlmodel = Path(client.get_model_version_download_uri("bot", str(version))) / "MLmodel"
    logged = mlmodel.read_text()
    for name in (folder, "./", "org/a/b", "https://hub.example/org/base"):
        mlmodel.write_text(logged.replace(f"source_model_name: {BASE}", f"source_model_name: {name}"))
        assert mlmodel.read_text() != logged
        with pytest.raises(MlflowException, match=r"base_not_pinned.*merge_and_unload"):
            stage(client, version)
    mlmodel.write_text(logged)
    stage(client, version)
    # A folder of its name beside whoever loads it would come first.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / BASE)
    with pytest.raises(SourceError, match="there is a folder of that name here"):
        mlflow.pyfunc.load_model("models:/bot/Staging")
    with pytest.raises(SourceError, match="there is a folder of that name here"):
        open_subject(f"models:/bot/{version}")
    shutil.rmtree(tmp_path / BASE)
    mlflow.pyfunc.load_model("models:/bot/Staging")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize(
    ("target_modules", "shape", "told"),
    [
        (["q_proj"], {"heads": 8}, r"self_attn\.q_proj of layer 0 has 32 outputs there, and 64 in"),
        (["q_proj"], {"hidden": 64}, r"self_attn\.q_proj of layer 0 has 48 inputs there, and 64 in"),
        (["o_proj"], {"head_dim": 4}, r"self_attn\.o_proj of layer 0 has 32 inputs there, and 16 in"),
        (["down_proj"], {"layers": 2}, r"changes layer 2, and the lock is for 2 layers"),
    ],
)
def test_an_adapter_that_was_trained_on_another_shape_than_the_locks_is_refused(
    client: MlflowClient, hub: str, target_modules: list[str], shape: dict[str, int], told: str
) -> None:
    register_lock(base_lock(**shape))
    version, _ = log_adapter_alone(target_modules)
    with pytest.raises(MlflowException, match=rf"geometry_mismatch.*{told}"):
        stage(client, version)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_on_a_base_of_another_shape_than_the_lock_never_loads(
    client: MlflowClient, hub: str
) -> None:
    register_lock(base_lock(layers=7))  # it has layers enough for the adapter, which tells nothing more
    version, _ = log_adapter_alone(["q_proj"])
    stage(client, version)
    with pytest.raises(LockMismatchError):
        mlflow.pyfunc.load_model("models:/bot/Staging")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_on_another_base_than_the_locks_never_loads(client: MlflowClient, hub: str) -> None:
    lock = base_lock()
    stranger = sketch_of(attention_of(tiny_model("llama", seed=77)))
    register_lock(SafetyLock(lock.heads, lock.metadata, lock.scores, None, stranger))
    version, _ = log_adapter_alone(["q_proj"])
    stage(client, version)
    with pytest.raises(VerificationError, match=r"does not descend from 'org/tiny-base'"):
        mlflow.pyfunc.load_model("models:/bot/Staging")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (log_adapter, r"unmerged_adapter.*merge_and_unload"),
        (log_adapter_without_saying_so, r"unmerged_adapter.*merge_and_unload"),
        (log_without_weights, r"no_weights.*save_pretrained"),
        (log_in_another_flavor, r"unsupported_flavor.*mlflow\.transformers"),
        (log_with_a_loader_of_its_own, r"unsupported_flavor.*'my_loader'"),
        (log_an_overlay_of_its_own, "already_locked"),
        (log_an_unknown_architecture, "unsupported_architecture"),
    ],
)
def test_a_language_model_that_cannot_be_locked_is_refused_with_the_way_out(
    client: MlflowClient, tmp_path: Path, log: Callable[[], int], reason: str
) -> None:
    register_lock(base_lock())
    version = log()
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=reason):
        stage(client, version)
    assert state_of(client, "bot", version) == before
    assert ledger_rows(tmp_path)[-1]["event"] == "rejected"


def test_artifacts_that_are_gone_are_a_refusal(client: MlflowClient) -> None:
    import shutil

    version = log_fine_tune("bot")
    before = state_of(client, "bot", version)
    shutil.rmtree(before["location"])
    with pytest.raises(MlflowException, match=r"unreadable.*no folder"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_place_that_cannot_be_written_is_a_refusal(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    # A file where the locked folder would go; permissions would not stop root.
    Path(before["location"] + "-safelock").write_text("in the way")
    with pytest.raises(MlflowException, match=r"cannot be written.*write beside") as info:
        stage(client, version)
    assert info.value.error_code == "INVALID_PARAMETER_VALUE"
    assert state_of(client, "bot", version) == before


def open_with_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> MlflowClient:
    path = tmp_path / "safelock.yaml"
    path.write_text(policy)
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))
    # MLflow keeps a store for each URI it has seen: another spelling of the same file gives a fresh one.
    uri = f"safelock+sqlite:///{tmp_path}/../{tmp_path.name}/registry.db"
    mlflow.set_registry_uri(uri)
    return MlflowClient(mlflow.get_tracking_uri(), uri)


def test_the_policy_file_decides_what_is_gated_and_how_strongly(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = fine_tune(base=None)
    version = log_fine_tune("bot", components)
    log_fine_tune("free")
    lock = base_lock()
    register_lock(lock)
    gated = open_with_policy(
        tmp_path,
        monkeypatch,
        "version: 1\n"
        "gates:\n"
        "  - {models: bot, stages: [Production], aliases: [live], alpha: {default: 2.5}}\n"
        f"bases: {{bot: {BASE}}}\n",
    )
    gated.transition_model_version_stage("bot", str(version), "Staging")
    assert state_of(gated, "bot", version)["tags"] == {}
    gated.transition_model_version_stage("free", "1", "Production")
    gated.transition_model_version_stage("bot", str(version), "Production")
    found = biases_of(mlflow.pyfunc.load_model("models:/bot/Production")._model_impl.pipeline.model)
    for layer, bias in expected_biases(components["model"], lock, 2.5).items():
        np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)
    (row,) = ledger_rows(tmp_path)
    assert (row["model"], row["alpha"]) == ("bot", 2.5)


def test_a_policy_may_let_an_unknown_base_through_and_the_ledger_says_so(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    gated = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{missing_lock: allow}]\n")
    stage(gated, version)
    assert state_of(gated, "bot", version)["stage"] == "Staging"
    (row,) = ledger_rows(tmp_path)
    assert (row["event"], row["reason"]) == ("passed", "missing_lock")


def test_a_policy_floor_refuses_an_older_lock(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    gated = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{lock: {min_version: 2}}]\n")
    with pytest.raises(MlflowException, match="lock_too_old"):
        stage(gated, version)
    register_lock(base_lock(seed=1))
    stage(gated, version)


def test_a_broken_policy_opens_no_registry(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PolicyError, match="line 1"):
        open_with_policy(tmp_path, monkeypatch, "version: 3\ngates: [{}]\n").search_registered_models()


def test_promotions_at_the_same_time_give_one_locked_version_and_an_unbroken_chain(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    with ThreadPoolExecutor(8) as pool:
        # One alias only: MLflow's own insert of an alias fails when it races with itself.
        futures = [pool.submit(stage, client, version) for _ in range(15)]
        futures.append(pool.submit(alias, client, version))
    for future in futures:
        future.result()
    rows = [row for row in ledger_rows(tmp_path) if row["event"] == "promoted"]
    assert len(rows) == 1
    assert rows[0]["location"] == state_of(client, "bot", version)["location"]
    assert biases_of(mlflow.pyfunc.load_model("models:/bot@champion")._model_impl.pipeline.model)


def test_prompts_of_mlflow_get_gated_aliases_and_nothing_is_read_for_them(client: MlflowClient) -> None:
    prompt = mlflow.register_prompt(name="greeting", template="Hello {{name}}")
    mlflow.set_prompt_alias("greeting", "champion", prompt.version)
    assert mlflow.load_prompt("prompts:/greeting@champion").template == "Hello {{name}}"
