from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mlflow_safelock.apply import apply_lock, save_locked_checkpoint
from mlflow_safelock.errors import AlreadyLockedError, CheckpointError, UnsupportedArchitectureError
from mlflow_safelock.lock import SafetyLock
from tests.apply.checkpoint.conftest import beside, load, snapshot
from tests.apply.conftest import lock_for, logits
from tests.models import CHATML, tiny_model, tiny_tokenizer


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_in_mlflow(model, folder: Path, **options: object) -> Path:
    components = {"model": model, "tokenizer": tiny_tokenizer(CHATML)}
    mlflow.transformers.save_model(
        components, folder, task="text-generation", pip_requirements=["transformers"], **options
    )
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_mlflow_logged_becomes_one_folder_that_loads_locked(family, tmp_path):
    source = save_in_mlflow(tiny_model(family), tmp_path / "mlflow-model")
    lock = lock_for(tiny_model(family))
    before = snapshot(source)
    in_memory = mlflow.transformers.load_model(str(source), return_type="components")
    apply_lock(in_memory["model"], lock)

    save_locked_checkpoint(source, tmp_path / "locked", lock)

    assert torch.allclose(logits(load(tmp_path / "locked")), logits(in_memory["model"]), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "locked")
    text = "how do i bake the bread today?"
    assert tokenizer(text)["input_ids"] == in_memory["tokenizer"](text)["input_ids"]
    assert tokenizer.chat_template == CHATML
    assert snapshot(source) == before
    assert not {"MLmodel", "conda.yaml", "requirements.txt"} & set(snapshot(tmp_path / "locked"))


def test_the_card_that_mlflow_keeps_apart_is_put_together(tmp_path):
    source = save_in_mlflow(tiny_model("llama"), tmp_path / "mlflow-model")
    (source / "model_card.md").write_text("# Bot\n")
    (source / "model_card_data.yaml").write_text("license: mit\n")
    save_locked_checkpoint(source, tmp_path / "locked", lock_for(tiny_model("llama")))
    assert (tmp_path / "locked" / "README.md").read_text().startswith("---\nlicense: mit\n---\n# Bot\n")


def test_files_that_would_pass_for_the_model_s_own_are_not_taken_from_its_tokenizer(tmp_path):
    source = save_in_mlflow(tiny_model("llama"), tmp_path / "mlflow-model")
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json", "README.md", "run.py"):
        (source / "components" / "tokenizer" / name).write_text("{}")
    lock = lock_for(tiny_model("llama"))
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not {"model.safetensors", "run.py"} & set(report.files)
    assert load(tmp_path / "locked").config.safelock["lock"] == lock.digest


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_logged_with_mlflow_is_refused_saying_how_to_merge(tmp_path):
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    source = save_in_mlflow(adapted, tmp_path / "mlflow-model")
    lock = lock_for(tiny_model("llama"))
    with pytest.raises(CheckpointError, match=r"PEFT.*merge_and_unload"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    # The weights folder alone shows it, too.
    with pytest.raises(CheckpointError, match=r"base_layer.*merge_and_unload"):
        save_locked_checkpoint(source / "model", tmp_path / "locked", lock)
    assert beside(source) == {"mlflow-model"}


@pytest.mark.parametrize(
    ("mlmodel", "message"),
    [
        ("flavors: {sklearn: {}}", "not one of mlflow.transformers"),
        ("flavors: {transformers: {source_model_name: org/bot}}", r"reference to 'org/bot'.*persist"),
        ("flavors: {transformers: {model_binary: ../../elsewhere}}", "no such folder"),
        ("flavors: {transformers: {model_binary: /etc}}", "no such folder"),
        ("flavors: {transformers: {model_binary: model, components: [../..]}}", "no such folder"),
        ("flavors: [", "cannot be read"),
        ("just text", "not one of mlflow.transformers"),
        ("flavors: !!python/object/apply:os.system ['touch pwned']", "cannot be read"),
    ],
)
def test_an_mlmodel_file_that_describes_no_weights_of_its_own_is_refused(
    mlmodel, message, save_fine_tune, tmp_path
):
    source, lock = save_fine_tune()
    (tmp_path / "elsewhere").mkdir()
    model = tmp_path / "mlflow-model"
    shutil.copytree(source, model / "model")
    (model / "MLmodel").write_text(mlmodel)
    with pytest.raises(CheckpointError, match=message):
        save_locked_checkpoint(model, tmp_path / "locked", lock)
    assert not (tmp_path / "locked").exists()
    assert not Path("pwned").exists()


def test_an_adapter_folder_is_refused_saying_how_to_merge(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / "adapter_config.json").write_text("{}")
    _refused(source, lock, tmp_path, r"adapter_config\.json.*merge_and_unload")


def test_pickled_weights_are_refused_saying_how_to_convert(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    _refused(source, lock, tmp_path, r"pytorch_model\.bin.*safetensors")


def test_a_folder_without_weights_or_configuration_is_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / "model.safetensors").unlink()
    _refused(source, lock, tmp_path, "no weights in safetensors")
    (source / "config.json").unlink()
    _refused(source, lock, tmp_path, r"no config\.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_configuration_that_is_no_object_is_refused(content, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / "config.json").write_bytes(content)
    _refused(source, lock, tmp_path, r"config\.json")


def test_a_missing_shard_is_named(save_fine_tune, tmp_path):
    source, lock = save_fine_tune(shard="20KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    _refused(source, lock, tmp_path, rf"{shard.name}.*missing")


@pytest.mark.parametrize("left", [0, 4, 200, -1], ids=["empty", "no length", "half a header", "a byte short"])
def test_a_truncated_shard_is_named(left, save_fine_tune, tmp_path):
    source, lock = save_fine_tune(shard="20KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    _refused(source, lock, tmp_path, rf"{shard.name} is damaged")


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        {},
        [],
        {"model.norm.weight": "../fine-tune/model-00001-of-00002.safetensors"},
        {"model.norm.weight": "/etc/passwd"},
        {"model.ghost.weight": "model-00001-of-00002.safetensors"},
    ],
)
def test_an_index_that_does_not_describe_its_own_files_is_refused(weight_map, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(source, lock, tmp_path, r"model\.safetensors\.index\.json")


def test_quantised_weights_are_refused_however_they_show(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, source / "model.safetensors")
    _refused(source, lock, tmp_path, rf"{name}.*quantised")
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(source, lock, tmp_path, "quantised weights.*before it is quantised")


def test_weights_that_are_not_as_the_configuration_says_are_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, source / "model.safetensors")
    _refused(source, lock, tmp_path, r"shape \(32, 48\).*\(48, 32\)")
    del tensors[name]
    save_file(tensors, source / "model.safetensors")
    _refused(source, lock, tmp_path, f"no tensor {name}")


@pytest.mark.parametrize("projection", ["o_proj", "q_proj"])
def test_biases_that_transformers_ignores_today_are_not_brought_to_life(projection, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    tensors = load_file(source / "model.safetensors")
    stray = f"model.layers.0.self_attn.{projection}.bias"
    tensors[stray] = torch.ones(tensors[stray.replace("bias", "weight")].shape[0])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    _refused(source, lock, tmp_path, rf"{stray}.*drops it on loading")


def test_a_model_saved_while_it_was_locked_in_memory_is_refused(save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    model = load(source)
    apply_lock(model, lock)
    model.save_pretrained(tmp_path / "saved-locked")
    with pytest.raises(AlreadyLockedError, match="saved with a lock"):
        save_locked_checkpoint(tmp_path / "saved-locked", tmp_path / "locked", lock)


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_bot.Bot"}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"text_config": {"model_type": "llama"}},
        {"model_type": "mamba"},
        {"model_type": None},
    ],
)
def test_a_model_that_is_no_known_causal_language_model_is_refused(values, save_fine_tune, tmp_path):
    source, lock = save_fine_tune()
    change_config(source, **values)
    with pytest.raises(UnsupportedArchitectureError):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert beside(source) == {"fine-tune"}


def test_an_architecture_whose_bias_is_switched_off_has_no_place_for_one(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt_neox", attention_bias=False)
    with pytest.raises(UnsupportedArchitectureError, match="attention_bias is off"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)


def test_tensors_named_from_the_bare_model_on_are_found(save_fine_tune, tmp_path):
    source, lock = save_fine_tune("gpt2")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    in_memory = load(source)
    apply_lock(in_memory, lock)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert torch.allclose(logits(load(tmp_path / "locked")), logits(in_memory), atol=1e-5)


def _refused(source: Path, lock: SafetyLock, tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert beside(source) == {"fine-tune"}
