"""What is promoted is what would be loaded: no other weights, no code, no bias that takes the lock back."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mlflow_safelock.apply import apply_lock, attention_of, handle_of
from mlflow_safelock.audit import audit
from mlflow_safelock.audit.rows import Evidence
from mlflow_safelock.errors import PromotionRefused, SourceError, VerificationError
from mlflow_safelock.evaluate import open_subject
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.forging.base_weights import sketch_of, unit_biases_of
from mlflow_safelock.gate import promotion
from mlflow_safelock.gate.locked_models import LockedModels
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import Receipt
from tests.models import random_lock, tiny_model
from tests.registries import (
    BASE,
    REQUIREMENTS,
    base_lock,
    biases_of,
    expected_biases,
    fine_tune,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.registry.test_promotion import (
    COMMIT,
    hub,
    ledger_rows,
    log_adapter_alone,
    open_with_policy,
    stage,
)
from tests.registry.test_standalone import prepare

__all__ = ["hub"]

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

PROJECTION = "model.layers.0.self_attn.o_proj.weight"


def enrolled(lock: SafetyLock, model: Any) -> SafetyLock:
    """A lock that knows its base's weights, which are those of ``model``."""
    attention = attention_of(model)
    return replace(lock, sketch=sketch_of(attention), unit_biases=unit_biases_of(attention, lock.heads))


def lock_of(model_type: str, model: Any) -> SafetyLock:
    """A lock for a model that is no Llama, and knows its weights."""
    plain = random_lock(attention_of(model).geometry, seed=0, base_model=BASE)
    metadata = plain.metadata.model_copy(update={"architecture": model_type})
    return enrolled(SafetyLock(plain.heads, metadata, plain.scores), model)


def source_of(client: MlflowClient, version: int) -> Path:
    location = client.get_model_version_download_uri("bot", str(version))
    return Path(location.removeprefix("file://"))


def in_flavor(**more: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        described = yaml.safe_load((source / "MLmodel").read_text())
        described["flavors"]["transformers"].update(more)
        (source / "MLmodel").write_text(yaml.safe_dump(described))

    return edit


def in_config(**more: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        path = source / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return edit


def in_pyfunc(**more: Any) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        described = yaml.safe_load((source / "MLmodel").read_text())
        described["flavors"]["python_function"].update(more)
        (source / "MLmodel").write_text(yaml.safe_dump(described))

    return edit


def in_signature(source: Path) -> None:
    described = yaml.safe_load((source / "MLmodel").read_text())
    params = json.loads(described["signature"]["params"])
    params.append({"name": "custom_generate", "type": "string", "default": "somebody/code", "shape": None})
    described["signature"]["params"] = json.dumps(params)
    (source / "MLmodel").write_text(yaml.safe_dump(described))


def in_inference_config(source: Path) -> None:
    (source / "components" / "inference_config.txt").write_text('{"a": [{"trust_remote_code": true}]}')


def with_an_adapter(source: Path) -> None:
    (source / "model" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def with_distributed_checkpoint(source: Path) -> None:
    (source / "model" / "shard-00001-model-00001-of-00002.safetensors").touch()


def with_renamed_tokenizer(**config: Any) -> Callable[[Path], None]:
    """As transformers 4 logged it."""

    def edit(source: Path) -> None:
        in_flavor(tokenizer_type="BloomTokenizerFast")(source)
        path = source / "components" / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return edit


LOADED_OTHERWISE = pytest.mark.parametrize(
    ("edit", "why"),
    [
        (in_flavor(pipeline_model_type="OpenForCausalLM"), "pipeline_model_type.*'OpenForCausalLM'"),
        (in_flavor(tokenizer_type="OpenTokenizer"), "tokenizer_type.*'OpenTokenizer'"),
        (in_flavor(components={"tokenizer": 1}), r"components.*\{'tokenizer': 1\}"),
        (in_flavor(components=["tokenizer", "model"], model_type="LlamaForCausalLM"), "components.*'model'"),
        (in_flavor(components=["config", "trust_remote_code"]), "components.*'config'"),
        (in_pyfunc(data="other"), "folder 'other'.*data"),
        (in_pyfunc(config={"custom_generate": "somebody/code"}), r"custom_generate.*\(config\)"),
        (in_signature, "custom_generate.*signature"),
        (in_inference_config, "trust_remote_code.*inference_config"),
        (in_flavor(processor_type="OpenProcessor"), "processor_type.*'OpenProcessor'"),
        (in_flavor(local_base_model_path="elsewhere"), "local_base_model_path"),
        (in_flavor(source_model_revision="main"), "source_model_revision"),
        (in_config(transformers_weights="other.safetensors"), "transformers_weights"),
        (in_config(attribute_map={"transformers_weights": "notes"}, notes="other"), "attribute_map"),
        (in_config(architectures=["MistralForCausalLM"]), "'MistralForCausalLM'.*'llama'"),
        (in_flavor(pipeline_model_type="MistralForCausalLM"), "'MistralForCausalLM'.*'llama'"),
        (in_flavor(components=3), "components.*is 3"),
        (in_config(configuration_files=["config.4.0.0.json"]), "configuration_files"),
        (in_config(text_config={"model_type": "llama"}), "text_config.*'llama'"),
        (with_distributed_checkpoint, "distributed.*shard-00001-model-00001-of-00002.safetensors"),
        (with_renamed_tokenizer(auto_map={"AutoTokenizer": ["x.Y", None]}), "'BloomTokenizerFast'"),
        (with_an_adapter, "adapter_config.json"),
    ],
)


@LOADED_OTHERWISE
def test_what_would_be_loaded_otherwise_than_it_is_stored_is_refused(
    client: MlflowClient, tmp_path: Path, edit: Callable[[Path], None], why: str
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    source, before = source_of(client, version), state_of(client, "bot", version)
    edit(source)
    with pytest.raises(MlflowException, match=rf"\[loaded_otherwise\].*{why}.*(?:Log it|Merge)") as info:
        stage(client, version)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, "bot", version) == before
    assert [row["reason"] for row in ledger_rows(tmp_path)] == ["loaded_otherwise"]
    # Nor does the loader, whose transformers may be another one, load it so.
    with pytest.raises(SourceError, match=why):
        locked_model.save_model(base_lock(), tmp_path / "by hand", str(source))
    assert not (tmp_path / "by hand").exists()


def test_other_names_of_classes_and_options_that_are_not_set_pass(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    source = source_of(client, version)
    in_flavor(tokenizer_type="GPT2TokenizerFast", pipeline_model_type="AutoModelForCausalLM")(source)
    in_pyfunc(config={"trust_remote_code": False})(source)
    stage(client, version)
    assert state_of(client, "bot", version)["stage"] == "Staging"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize(
    "edit", [in_flavor(tokenizer_type="OpenTokenizer"), in_flavor(components=["tokenizer", "model"])]
)
def test_an_adapter_that_is_loaded_with_more_than_its_base_is_refused(
    client: MlflowClient, hub: str, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    register_lock(base_lock())
    version, _ = log_adapter_alone(["q_proj"])
    source = source_of(client, version)
    edit(source)
    with pytest.raises(MlflowException, match=r"\[loaded_otherwise\]"):
        stage(client, version)
    with pytest.raises(SourceError, match=r"OpenTokenizer|components"):
        locked_model.save_model(base_lock(), tmp_path / "by hand", str(source))


def test_a_reference_to_a_hub_is_not_fetched_where_it_is_loaded_with_more(
    client: MlflowClient, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{no_weights: snapshot}]\n")
    register_lock(base_lock())
    version = log_fine_tune("bot", pipeline("text-generation", model=hub), save_pretrained=False)
    in_flavor(components=["tokenizer", "model"])(source_of(client, version))
    with pytest.raises(MlflowException, match=r"\[loaded_otherwise\].*components"):
        stage(client, version)


def test_a_tokenizer_that_has_another_name_by_now_passes(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    with_renamed_tokenizer()(source_of(client, version))
    stage(client, version)
    assert mlflow.pyfunc.load_model("models:/bot/Staging").predict(["how do i bake"])


def test_a_class_that_is_in_no_table_of_transformers_passes_for_its_own_type(client: MlflowClient) -> None:
    version = log_fine_tune("bot", fine_tune("gpt2"))
    model = fine_tune("gpt2")["model"]
    register_lock(lock_of("gpt2", model))
    source = source_of(client, version)
    in_config(architectures=["GPT2DoubleHeadsModel"])(source)
    stage(client, version)
    assert state_of(client, "bot", version)["stage"] == "Staging"


def test_classes_of_a_type_that_transformers_does_not_know_are_not_told_apart(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "architectures.yaml"
    described.write_text("architectures: [{model_type: ours}]\n")
    monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(described))
    version = log_fine_tune("bot")
    lock = base_lock()
    register_lock(replace(lock, metadata=lock.metadata.model_copy(update={"architecture": "ours"})))
    in_config(model_type="ours")(source_of(client, version))
    stage(client, version)
    assert state_of(client, "bot", version)["stage"] == "Staging"


def nested(kind: str) -> Any:
    values: Any = {"leaf": 1}
    if kind == "many times":  # 2 ** 40 of them, in 2 KB
        for _ in range(40):
            values = {"a": values, "b": values}
    elif kind == "in itself":
        values["x"] = values
    else:
        for _ in range(80):
            values = [values]
    return values


@pytest.mark.parametrize("kind", ["many times", "in itself", "deep"])
def test_options_that_hold_themselves_are_looked_at_once(client: MlflowClient, kind: str) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    source = source_of(client, version)
    described = yaml.safe_load((source / "MLmodel").read_text())
    described["flavors"]["python_function"]["config"] = {"a": nested(kind), "custom_generate": "code"}
    (source / "MLmodel").write_text(yaml.dump(described))
    with pytest.raises(MlflowException, match=r"\[loaded_otherwise\].*custom_generate"):
        stage(client, version)


@pytest.mark.parametrize(
    "file", ["MLmodel", "conda.yaml", "components/inference_config.txt", "model/config.json"]
)
def test_files_that_are_nested_too_deeply_are_refused(
    client: MlflowClient, tmp_path: Path, file: str
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    path = source_of(client, version) / file
    deep = "[" * 100_000 + "]" * 100_000
    is_json = file.startswith(("components", "model"))
    path.write_text(f'{{"a": {deep}}}' if is_json else path.read_text() + f"a: {deep}\n")
    with pytest.raises(MlflowException, match=r"nested too deeply|no readable MLmodel|conda.yaml file"):
        stage(client, version)
    assert ledger_rows(tmp_path)[-1]["reason"] in ("unreadable", "loaded_otherwise")


def test_code_that_was_logged_with_a_model_is_left_out_of_an_overlay_and_refused_beside_weights(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    source = source_of(client, version)
    (source / "code").mkdir()
    (source / "code" / "transformers.py").write_text("raise RuntimeError('it was run')\n")
    in_pyfunc(code="code")(source)
    in_flavor(code="code")(source)
    assert open_subject(f"models:/bot/{version}").source is not None
    stage(client, version)
    assert mlflow.pyfunc.load_model("models:/bot/Staging").predict(["how do i bake"])
    assert not [place for place in sys.path if str(source) in place], "its code would be imported from there"
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{carrier: standalone}]\n")
    with pytest.raises(PromotionRefused, match=r"code_paths.*as an overlay"):
        client._get_registry_client().store.prepare("bot", version)


def test_a_projection_under_two_names_is_refused(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    path = source_of(client, version) / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[PROJECTION.removeprefix("model.")] = torch.ones_like(tensors[PROJECTION])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MlflowException, match=r"layer 0 under several names"):
        stage(client, version)


def test_a_tensor_in_two_shards_is_refused(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    folder = source_of(client, version) / "model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(tensors, folder / first, metadata={"format": "pt"})
    save_file({PROJECTION: torch.ones_like(tensors[PROJECTION])}, folder / second, metadata={"format": "pt"})
    places = dict.fromkeys(tensors, first) | {PROJECTION: second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(MlflowException, match=rf"'{PROJECTION}'.*is in '.*{first}' and in '.*{second}'"):
        stage(client, version)


class TestOwnBiases:
    @pytest.fixture
    def lock(self) -> SafetyLock:
        lock = enrolled(base_lock(), fine_tune()["model"])
        register_lock(lock)
        return lock

    @torch.no_grad()
    def biased(self, **config: Any) -> dict[str, Any]:
        """The fine-tune with biases of zero."""
        components = fine_tune(**config)
        components["model"].load_state_dict(fine_tune()["model"].state_dict(), strict=False)
        for name, parameter in components["model"].named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
        return components

    @torch.no_grad()
    def put(self, components: dict[str, Any], lock: SafetyLock, share: float, projection: str) -> None:
        """Give a part of the lock's biases to a projection of each locked layer."""
        for layer, bias in expected_biases(components["model"], lock, 6.0).items():
            module = components["model"].model.layers[layer].get_submodule(projection)
            module.bias.copy_(torch.tensor(share * bias))

    @pytest.mark.parametrize(
        ("flag", "projection", "share", "refused"),
        [
            ("attention_bias", "self_attn.o_proj", -1.0, r"lock_taken_back.*10\d%"),
            ("attention_bias", "self_attn.o_proj", -0.6, "lock_taken_back.*6\\d%"),
            ("mlp_bias", "mlp.down_proj", -1.0, "lock_taken_back"),
            ("attention_bias", "self_attn.o_proj", 1.0, "already_locked.*saved with a lock"),
        ],
    )
    def test_those_that_take_the_lock_back_or_are_one_are_refused(
        self,
        client: MlflowClient,
        lock: SafetyLock,
        flag: str,
        projection: str,
        share: float,
        refused: str,
    ) -> None:
        components = self.biased(**{flag: True})
        self.put(components, lock, share, projection)
        version = log_fine_tune("bot", components)
        before = state_of(client, "bot", version)
        with pytest.raises(MlflowException, match=refused):
            stage(client, version)
        assert state_of(client, "bot", version) == before

    def test_a_policy_can_leave_them_out_for_bases_that_have_such_ones(
        self, client: MlflowClient, lock: SafetyLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        components = self.biased(attention_bias=True)
        self.put(components, lock, -1.0, "self_attn.o_proj")
        version = log_fine_tune("bot", components)
        with pytest.raises(MlflowException, match="'own_biases: ignore'"):
            stage(client, version)
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{own_biases: ignore}]\n")
        stage(client, version)
        assert ledger_rows(tmp_path)[-1]["asked"]["own_biases"] == "ignore"

    def test_they_are_held_against_the_strength_that_is_asked_for(
        self, client: MlflowClient, lock: SafetyLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_with_policy(
            tmp_path, monkeypatch, "version: 1\ngates: [{alpha: {default: 60, min: 1, max: 100}}]\n"
        )
        components = self.biased(attention_bias=True)
        self.put(components, lock, -0.4, "self_attn.o_proj")
        version = log_fine_tune("bot", components)
        stage(client, version)  # 4 % of ten times that
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "3")
        with pytest.raises(MlflowException, match=r"lock_taken_back.*8\d%.*alpha 3"):
            stage(client, version)

    def test_others_pass_and_stay(self, client: MlflowClient, lock: SafetyLock) -> None:
        components = self.biased(attention_bias=True)
        generator = torch.Generator().manual_seed(0)
        own = {}
        with torch.no_grad():
            for index, layer in enumerate(components["model"].model.layers):
                bias = layer.self_attn.o_proj.bias
                bias.copy_(0.01 * torch.randn(bias.shape, generator=generator))
                own[index] = bias.double().numpy().copy()
        stage(client, log_fine_tune("bot", components))
        served = biases_of(mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model)
        for layer, bias in expected_biases(components["model"], lock, 6.0).items():
            np.testing.assert_allclose(served[layer], own[layer] + bias, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def with_value_biases(
        self, kv_heads: int, lock: SafetyLock, **config: Any
    ) -> tuple[dict[str, Any], SafetyLock]:
        """A base with biases of zero, and the lock that knows it."""
        components = fine_tune(attention_bias=True, num_key_value_heads=kv_heads, **config)
        for layer in components["model"].model.layers:
            layer.self_attn.v_proj.bias.zero_()
            layer.self_attn.o_proj.bias.zero_()
        known = enrolled(lock, components["model"])
        register_lock(known)
        return components, known

    @torch.no_grad()
    def take_back_by_values(self, model: Any, lock: SafetyLock, share: float) -> None:
        """Give the values biases that take a share of a lock back in its own heads."""
        width, kv_heads = lock.geometry.head_dim, model.config.num_key_value_heads
        for locked in lock.heads:
            taken = torch.tensor(-6.0 * share * locked.std * locked.direction.astype(np.float64))
            bias = model.model.layers[locked.layer].self_attn.v_proj.bias
            number = locked.head * kv_heads // lock.geometry.heads
            bias[number * width : (number + 1) * width] = taken

    @torch.no_grad()
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_those_of_values_reach_the_output_whole(self, client: MlflowClient, kv_heads: int) -> None:
        one_of_each = {(one.layer, one.head // 2): one for one in base_lock().heads}
        plain = SafetyLock(tuple(one_of_each.values()), base_lock().metadata, base_lock().scores)
        components, lock = self.with_value_biases(kv_heads, plain)
        self.take_back_by_values(components["model"], lock, 1.0)
        with pytest.raises(MlflowException, match=r"lock_taken_back.*1\d\d%"):
            stage(client, log_fine_tune("bot", components))

    @torch.no_grad()
    def test_nor_may_they_go_round_the_locked_directions(self, client: MlflowClient) -> None:
        """Biases orthogonal to what is added, of which the projections make its opposite all the same."""
        components, lock = self.with_value_biases(4, base_lock(head_dim=16), head_dim=16)
        model, tokens = components["model"], torch.arange(5, 25)[None]
        plain, heads = model(input_ids=tokens).logits, (lock.geometry.heads, lock.geometry.head_dim)
        for layer, push in expected_biases(model, lock, 6.0).items():
            attention, added = model.model.layers[layer].self_attn, np.zeros(heads)
            for locked in lock.heads:
                if locked.layer == layer:
                    added[locked.head] = locked.std * locked.direction
            along = added.ravel() / np.linalg.norm(added)
            across = np.eye(len(along)) - np.outer(along, along)
            weight = attention.o_proj.weight.double().numpy()
            bias = across @ np.linalg.lstsq(weight @ across, -push, rcond=None)[0]
            assert abs(bias @ along) < 1e-6
            attention.v_proj.bias.copy_(torch.tensor(bias))
        with apply_lock(model, lock, 6.0):
            # The lock is in force, and the model is what it was without one.
            assert torch.allclose(model(input_ids=tokens).logits, plain, atol=1e-3)
        with pytest.raises(MlflowException, match=r"lock_taken_back.* 100%"):
            stage(client, log_fine_tune("bot", components))

    def test_what_does_not_arrive_is_taken_back_as_well(self, client: MlflowClient, lock: SafetyLock) -> None:
        """Neither is half of the push, and both are more."""
        components = self.biased(attention_bias=True)
        with torch.no_grad():
            for layer in components["model"].model.layers:
                layer.self_attn.o_proj.weight.mul_(0.8)
        stage(client, log_fine_tune("bot", components))
        # Of what arrives: half of it are four tenths.
        self.put(components, lock, -0.5, "self_attn.o_proj")
        with pytest.raises(MlflowException, match=r"lock_taken_back.* take back 4\d% .*of which 80% arrives"):
            stage(client, log_fine_tune("bot", components))

    def test_what_a_stored_bias_takes_back_no_other_makes_up_for(
        self, client: MlflowClient, lock: SafetyLock
    ) -> None:
        """Of two that are stored one may be dropped when the model is loaded."""
        components = self.biased(attention_bias=True, mlp_bias=True)
        self.put(components, lock, -0.95, "self_attn.o_proj")
        self.put(components, lock, 0.95, "mlp.down_proj")
        components["model"].config.mlp_bias = False
        version = log_fine_tune("bot", components)
        assert not json.loads((source_of(client, version) / "model" / "config.json").read_text())["mlp_bias"]
        with pytest.raises(MlflowException, match="lock_taken_back"):
            stage(client, version)

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
    def test_a_base_below_an_adapter_is_looked_at_when_it_is_loaded(
        self, client: MlflowClient, lock: SafetyLock, hub: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        base = self.biased(attention_bias=True)
        self.put(base, lock, -1.0, "self_attn.o_proj")
        base["model"].save_pretrained(tmp_path / f"hub/models--{hub.replace('/', '--')}/snapshots/{COMMIT}")
        version, _ = log_adapter_alone(["q_proj"])
        stage(client, version)
        with pytest.raises(VerificationError, match=r"take back 10\d%.*'own_biases: ignore'"):
            mlflow.pyfunc.load_model("models:/bot/Staging")
        # Where the policy leaves them out, the overlay is another, which says so.
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{own_biases: ignore}]\n")
        stage(client, version)
        assert handle_of(mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model).alpha == 6.0
        receipt = json.loads((source_of(client, version) / "receipt.json").read_text())
        assert receipt["predicate"]["own_biases"] == "ignore"
        (row,) = audit(client._registry_uri, models="bot")
        assert (row.own_biases, row.evidence, row.state) == ("ignore", "ledger", "locked")

    @pytest.mark.parametrize(("before", "after", "is_renamed"), [("a", "b", False), ("b", "a", True)])
    def test_a_name_at_which_less_is_asked_may_be_given(
        self,
        client: MlflowClient,
        lock: SafetyLock,
        tmp_path: Path,
        monkeypatch: Any,
        before: str,
        after: str,
        is_renamed: bool,
    ) -> None:
        policy = "version: 1\ngates: [{models: a, own_biases: ignore}, {}]\n"
        client = open_with_policy(tmp_path, monkeypatch, policy)
        version = log_fine_tune(before)
        client.transition_model_version_stage(before, str(version), "Staging")
        if not is_renamed:
            with pytest.raises(MlflowException, match="asks for more"):
                client.rename_registered_model(before, after)
            return
        client.rename_registered_model(before, after)
        served = mlflow.pyfunc.load_model(f"models:/{after}/Staging").get_raw_model().model
        assert handle_of(served).alpha == 6.0

    def test_a_standalone_model_has_it_on_record_and_its_receipt_says_nothing_of_it(
        self, client: MlflowClient, lock: SafetyLock, tmp_path: Path, monkeypatch: Any
    ) -> None:
        ignoring = "version: 1\ngates: [{carrier: standalone, own_biases: ignore}]\n"
        client = open_with_policy(tmp_path, monkeypatch, ignoring)
        version = log_fine_tune("bot")
        prepare(tmp_path, version)
        stage(client, version)
        (row,) = audit(client._registry_uri, models="bot")
        assert (row.own_biases, row.evidence) == ("ignore", "ledger")
        receipt = (source_of(client, version) / "receipt.json").read_bytes()
        assert Evidence.from_receipt(Receipt.parse(receipt, origin="test")).own_biases is None
        # Promoted again where they are compared, that is on record as well.
        client = open_with_policy(tmp_path, monkeypatch, ignoring.replace(", own_biases: ignore", ""))
        stage(client, version)
        (row,) = audit(client._registry_uri, models="bot")
        assert (row.own_biases, row.state) == ("check", "locked")

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
    @pytest.mark.parametrize(("scale", "is_served"), [(3.0, False), (1.2, True)])
    @pytest.mark.parametrize("path", ["self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj"])
    def test_what_an_adapter_makes_of_a_base_s_biases_is_looked_at_when_it_is_loaded(
        self,
        client: MlflowClient,
        lock: SafetyLock,
        hub: str,
        tmp_path: Path,
        path: str,
        scale: float,
        is_served: bool,
    ) -> None:
        """A base may have a third of what takes a lock back in its biases; multiplied by three it is all."""
        if path == "self_attn.v_proj":
            base, lock = self.with_value_biases(4, lock)
            self.take_back_by_values(base["model"], lock, 1 / 3)
        else:
            base = self.biased(attention_bias=True, mlp_bias=True)
            self.put(base, lock, -1 / 3, path)
        base["model"].save_pretrained(tmp_path / f"hub/models--{hub.replace('/', '--')}/snapshots/{COMMIT}")
        _, _, name = path.rpartition(".")
        config = IA3Config(target_modules=[name], feedforward_modules=[], task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(hub), config).eval()
        with torch.no_grad():
            for layer in adapted.base_model.model.model.layers:
                layer.get_submodule(path).ia3_l["default"].fill_(scale)
        stage(
            client, log_fine_tune("bot", {"model": adapted, "tokenizer": AutoTokenizer.from_pretrained(hub)})
        )
        if is_served:
            served = mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model
            assert handle_of(served).alpha == 6.0
            return
        with pytest.raises(VerificationError, match="take back"):
            mlflow.pyfunc.load_model("models:/bot/Staging")

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
    def test_a_base_that_is_an_adapter_itself_is_refused_when_it_is_loaded(
        self, client: MlflowClient, lock: SafetyLock, hub: str, tmp_path: Path
    ) -> None:
        version, _ = log_adapter_alone(["q_proj"])
        snapshots = tmp_path / "hub"
        folder = snapshots / f"models--{hub.replace('/', '--')}" / "snapshots" / COMMIT
        inner = "org/inner"
        below = snapshots / "models--org--inner" / "snapshots" / COMMIT
        below.parent.mkdir(parents=True)
        (below.parents[1] / "refs").mkdir()
        (below.parents[1] / "refs" / "main").write_text(COMMIT)
        shutil.move(folder, below)
        model = AutoModelForCausalLM.from_pretrained(inner)
        config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(inner).save_pretrained(folder)
        assert AutoModelForCausalLM.from_pretrained(hub).peft_config, "transformers puts it on"
        stage(client, version)
        with pytest.raises(VerificationError, match="has an adapter of its own"):
            mlflow.pyfunc.load_model("models:/bot/Staging")

    @pytest.mark.parametrize(
        ("share", "path", "why"),
        [
            (-1.0, "self_attn.o_proj", "take back 10"),
            (1.0, "self_attn.o_proj", "are 10"),
            (-0.4, "self_attn.o_proj", None),
            (-1.0, "mlp.down_proj", "take back 10"),
        ],
    )
    def test_those_of_a_model_that_is_locked_by_hand_are_looked_at(
        self,
        client: MlflowClient,
        lock: SafetyLock,
        tmp_path: Path,
        share: float,
        path: str,
        why: str | None,
    ) -> None:
        components = self.biased(attention_bias=True, mlp_bias=True)
        self.put(components, lock, share, path)
        mlflow.transformers.save_model(
            components, tmp_path / "source", task="text-generation", pip_requirements=REQUIREMENTS
        )
        if why is None:
            locked_model.save_model(lock, tmp_path / "locked", str(tmp_path / "source"))
            return
        with pytest.raises(VerificationError, match=why):
            locked_model.save_model(lock, tmp_path / "locked", str(tmp_path / "source"))
        locked_model.save_model(lock, tmp_path / "locked", str(tmp_path / "source"), own_biases="ignore")
        locked_model.load_model(str(tmp_path / "locked"))

    @torch.no_grad()
    def test_those_of_values_are_looked_at_by_hand_too(self, client: MlflowClient, tmp_path: Path) -> None:
        """By heads that are not locked, which the projection brings to the same place."""
        components = fine_tune(attention_bias=True, num_key_value_heads=4)
        model = components["model"]
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.zero_()
            layer.self_attn.o_proj.bias.zero_()
        lock = enrolled(base_lock(), model)
        for layer, push in expected_biases(model, lock, 6.0).items():
            attention = model.model.layers[layer].self_attn
            columns = attention.o_proj.weight.double().clone()
            for head in (locked.head for locked in lock.heads if locked.layer == layer):
                columns[:, head * lock.geometry.head_dim : (head + 1) * lock.geometry.head_dim] = 0
            attention.v_proj.bias.copy_(torch.linalg.pinv(columns) @ -torch.tensor(push).double())
            attention.o_proj.bias.copy_(-0.2 * torch.tensor(push))  # so narrow a model needs the rest of it
        mlflow.transformers.save_model(
            components, tmp_path / "source", task="text-generation", pip_requirements=REQUIREMENTS
        )
        with pytest.raises(VerificationError, match=r"take back 6\d%"):
            locked_model.save_model(lock, tmp_path / "locked", str(tmp_path / "source"))

    @torch.no_grad()
    def test_those_of_experts_count(self, client: MlflowClient) -> None:
        components = fine_tune("gpt_oss")
        lock = lock_of("gpt_oss", components["model"])
        register_lock(lock)
        stage(client, log_fine_tune("bot", components))
        for layer, bias in expected_biases(components["model"], lock, 6.0).items():
            components["model"].model.layers[layer].mlp.experts.down_proj_bias[0].sub_(torch.tensor(bias))
        with pytest.raises(MlflowException, match=r"lock_taken_back.*(?:99|10\d)%"):
            stage(client, log_fine_tune("bot", components))

    def test_numbers_that_are_none_are_refused(self, client: MlflowClient, lock: SafetyLock) -> None:
        components = self.biased(mlp_bias=True)
        with torch.no_grad():
            components["model"].model.layers[2].mlp.down_proj.bias[0] = torch.nan
        with pytest.raises(MlflowException, match=r"model\.layers\.2\.mlp\.down_proj\.bias.*not finite"):
            stage(client, log_fine_tune("bot", components))

    @pytest.mark.parametrize(
        ("dtype", "why"), [(None, "under several names"), (torch.float8_e5m2, "F8_E5M2")]
    )
    def test_those_that_cannot_be_told_are_refused(
        self, client: MlflowClient, lock: SafetyLock, dtype: torch.dtype | None, why: str
    ) -> None:
        version = log_fine_tune("bot", self.biased(attention_bias=True))
        path = source_of(client, version) / "model" / "model.safetensors"
        tensors, name = load_file(path), PROJECTION.replace("weight", "bias")
        if dtype is None:
            tensors[name.removeprefix("model.")] = torch.ones_like(tensors[name])
        else:
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(MlflowException, match=why):
            stage(client, version)

    def test_of_a_base_with_biases_only_half_of_the_lock_and_more_is_taken_back(
        self, client: MlflowClient
    ) -> None:
        components = fine_tune("phi")
        model = components["model"]
        lock = lock_of("phi", model)
        register_lock(lock)
        stage(client, log_fine_tune("bot", components))
        before = [layer.self_attn.dense.bias.detach().clone() for layer in model.model.layers]
        apply_lock(model, lock, -6.0)  # what its own biases become is what takes the lock back
        for path in ("self_attn.dense", "mlp.fc2"):  # both are added to the same residual stream
            again = fine_tune("phi")
            with torch.no_grad():
                for index in lock.layers:
                    taken = model.model.layers[index].self_attn.dense.bias - before[index]
                    again["model"].model.layers[index].get_submodule(path).bias.add_(taken)
            with pytest.raises(MlflowException, match="lock_taken_back"):
                stage(client, log_fine_tune("bot", again))


@pytest.mark.parametrize("carrier", ["overlay", "standalone"])
def test_what_is_written_over_while_it_is_promoted_is_not(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carrier: str
) -> None:
    client = open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates: [{{carrier: {carrier}}}]\n")
    version = log_fine_tune("bot")
    register_lock(base_lock())
    path = source_of(client, version) / "model" / "model.safetensors"
    good = path.read_bytes()
    other = tmp_path / "other"
    tiny_model("llama", seed=77).save_pretrained(other)
    if carrier == "standalone":
        client._get_registry_client().store.prepare("bot", version)
    before = state_of(client, "bot", version)

    def write_over(place: str) -> None:
        if place == "approved":
            path.write_bytes((other / "model.safetensors").read_bytes())
            if carrier == "standalone":
                path.write_bytes(good)  # what it was made of is there again once it is looked at

    monkeypatch.setattr(promotion, "reach", write_over)
    with pytest.raises(MlflowException, match=r"\[conflict\].*changed by another request") as info:
        stage(client, version)
    assert info.value.error_code == "RESOURCE_CONFLICT"
    assert state_of(client, "bot", version) == before


def test_a_hard_link_that_is_made_meanwhile_is_no_change(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    path = source_of(client, version) / "model" / "model.safetensors"
    monkeypatch.setattr(
        promotion, "reach", lambda place: os.link(path, tmp_path / "link") if place == "approved" else None
    )
    stage(client, version)
    assert state_of(client, "bot", version)["stage"] == "Staging"


@pytest.mark.parametrize("is_bad_at_the_end", [True, False])
def test_what_is_written_over_with_its_time_set_back_is_examined_again(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_bad_at_the_end: bool
) -> None:
    version = log_fine_tune("bot")
    register_lock(enrolled(base_lock(), fine_tune()["model"]))
    path = source_of(client, version) / "model" / "model.safetensors"
    good, times = path.read_bytes(), path.stat()
    tiny_model("llama", seed=77).save_pretrained(tmp_path / "other")
    bad = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert len(bad) == len(good)
    before = state_of(client, "bot", version)

    def put(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    monkeypatch.setattr(promotion, "reach", lambda place: put(bad) if place == "approved" else None)
    if not is_bad_at_the_end:
        writing = LockedModels.write_overlay

        def written(*args: Any) -> Any:
            found = writing(*args)
            put(good)  # though the receipt is about the other one
            return found

        monkeypatch.setattr(LockedModels, "write_overlay", written)
    with pytest.raises(MlflowException, match=r"\[conflict\]|\[not_a_descendant\]"):
        stage(client, version)
    assert state_of(client, "bot", version) == before
