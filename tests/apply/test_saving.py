from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    pipeline,
)

from mlflow_safelock.apply import ARCHITECTURES, apply_lock, attention_of, handle_of
from mlflow_safelock.errors import (
    AlreadyLockedError,
    CheckpointError,
    UnsupportedArchitectureError,
    VerificationError,
)
from tests.apply.conftest import lock_for, logits
from tests.apply.test_carriers import EightBitLinear, trained_projection, with_adapter
from tests.models import CHATML, tiny_model, tiny_tokenizer

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

BY_FLAG = sorted(name for name, row in ARCHITECTURES.items() if row.standalone == "flag")
BY_OWN_BIAS = sorted(name for name, row in ARCHITECTURES.items() if row.standalone == "own_bias")
WITHOUT_PLACE = sorted({*ARCHITECTURES} - {*BY_FLAG, *BY_OWN_BIAS})
CONFIG = {"gpt_oss": {"attention_bias": True}, "gpt_neox": {"attention_bias": True}}


def state_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }, model.config.to_json_string()


def is_same(one: tuple[dict[str, torch.Tensor], str], other: tuple[dict[str, torch.Tensor], str]) -> bool:
    return (
        one[1] == other[1]
        and list(one[0]) == list(other[0])
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    )


def stock(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", BY_FLAG + BY_OWN_BIAS)
def test_what_a_locked_model_saves_is_reloaded_locked_by_stock_transformers(family, tmp_path):
    model = tiny_model(family, **CONFIG.get(family, {}))
    lock, unlocked = lock_for(model), logits(model)
    handle = apply_lock(model, lock, 3.0)
    before, locked = state_of(model), logits(model)
    model.save_pretrained(tmp_path / "locked")
    assert is_same(state_of(model), before)
    assert torch.equal(logits(model), locked)
    found = stock(tmp_path / "locked")
    assert torch.allclose(logits(found), locked, atol=1e-5)
    assert not torch.allclose(locked, unlocked, atol=1e-2)
    with pytest.raises(AlreadyLockedError):
        apply_lock(found, lock, 3.0)
    handle.remove()
    model.save_pretrained(tmp_path / "unlocked")
    assert torch.allclose(logits(stock(tmp_path / "unlocked")), unlocked, atol=1e-6)


def trained_a_little(model: Any) -> Any:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.tensor([[5, 17, 200, 31]])
    for _ in range(3):
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    return model


def adapted_and_merged(model: Any) -> Any:
    settings = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    return get_peft_model(model, settings).merge_and_unload()


@pytest.mark.parametrize("change", [trained_a_little, adapted_and_merged])
def test_what_was_trained_or_merged_under_a_lock_is_not_saved_with_biases_of_other_weights(change, tmp_path):
    model = tiny_model("llama")
    handle = apply_lock(model, lock_for(model))
    model = change(model)
    with pytest.raises(VerificationError, match="Take the lock off and apply it anew"):
        model.save_pretrained(tmp_path / "stale")
    assert not (tmp_path / "stale").exists()
    handle.remove()
    apply_lock(model, handle.lock)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("family", [*WITHOUT_PLACE, "gpt_oss"])
def test_a_family_whose_checkpoints_drop_the_lock_is_refused_and_nothing_written(family, tmp_path):
    off = {"attention_bias": False} if family == "gpt_oss" else {}
    model = tiny_model(family, **off)
    handle = apply_lock(model, lock_for(model))
    before = state_of(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"Nothing was saved.*overlay") as raised:
        model.save_pretrained(tmp_path / "locked")
    assert ("save_locked_checkpoint" in str(raised.value)) == (family in ("mistral", "ministral", "qwen2"))
    assert not (tmp_path / "locked").exists()
    assert is_same(state_of(model), before)
    handle.remove()
    model.save_pretrained(tmp_path / "unlocked")
    stock(tmp_path / "unlocked")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_and_has_tied_embeddings_is_saved_in_its_dtype(dtype, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    apply_lock(model, lock_for(model))
    model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = stock(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    assert found.lm_head.weight is found.model.embed_tokens.weight
    # Tensors, and not logits: casting a model in memory rounds the frequencies of its positions, too.
    tensors = found.state_dict()
    assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in model.state_dict().items())
    assert not any(zeros.any() for zeros in tensors.values())


def test_copies_and_parts_of_a_locked_model_are_saved_locked_too(tmp_path):
    model = tiny_model("llama")
    handle = apply_lock(model, lock_for(model))
    locked = logits(model)
    twins = {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    hidden = model.model(torch.tensor([[5, 17, 200]])).last_hidden_state
    model.model.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part").eval()
    assert torch.allclose(part(torch.tensor([[5, 17, 200]])).last_hidden_state, hidden, atol=1e-5)
    handle.remove()
    assert "save_pretrained" not in vars(model)
    assert "save_pretrained" not in vars(model.model)
    for name, twin in twins.items():
        twin.save_pretrained(tmp_path / name)
        assert torch.allclose(logits(stock(tmp_path / name)), locked, atol=1e-5)
        handle_of(twin).remove()
        assert "save_pretrained" not in vars(twin)


def test_a_state_that_a_trainer_gathered_is_saved_with_the_lock(tmp_path):
    model = tiny_model("qwen3")
    apply_lock(model, lock_for(model))
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "locked", state_dict=gathered)
    assert torch.allclose(logits(stock(tmp_path / "locked")), logits(model), atol=1e-5)
    gathered.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        model.save_pretrained(tmp_path / "part", state_dict=gathered)
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("make", [lambda: with_adapter(["q_proj", "o_proj"]), trained_projection])
def test_an_adapter_is_refused_and_the_merged_model_saved_locked(make, tmp_path):
    model = make()
    apply_lock(model, lock_for(model.get_base_model()), 3.0)
    for each in (model, model.get_base_model()):
        with pytest.raises(CheckpointError, match="merge_and_unload"):
            each.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(stock(tmp_path / "merged")), logits(merged), atol=1e-5)
    handle_of(merged).remove()
    merged.save_pretrained(tmp_path / "unlocked")
    assert not torch.allclose(
        logits(stock(tmp_path / "unlocked")), logits(stock(tmp_path / "merged")), atol=1e-2
    )


def test_adapters_elsewhere_and_those_of_transformers_itself_are_refused(tmp_path):
    elsewhere = with_adapter(["q_proj"])
    own = tiny_model("llama")
    own.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (elsewhere, elsewhere.get_base_model(), own):
        if handle_of(model) is None:
            apply_lock(model, lock_for(tiny_model("llama")))
        with pytest.raises(CheckpointError, match="merge_and_unload"):
            model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_projections_that_no_stock_checkpoint_has_are_refused(tmp_path):
    packed = tiny_model("llama")
    for layer in packed.model.layers:
        layer.self_attn.o_proj = EightBitLinear(layer.self_attn.o_proj)
    apply_lock(packed, lock_for(packed))
    packed_elsewhere = tiny_model("llama")
    packed_elsewhere.lm_head = EightBitLinear(packed_elsewhere.lm_head)
    apply_lock(packed_elsewhere, lock_for(packed_elsewhere))
    for model in (packed, packed_elsewhere):
        with pytest.raises(CheckpointError, match=r"reloads locked.*save_locked_checkpoint.*overlay"):
            model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_lock_that_somebody_changed_or_took_a_layer_of_is_not_saved(tmp_path):
    model = tiny_model("llama")
    lock = lock_for(model)
    apply_lock(model, lock)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        attention_of(model).projections[lock.layers[0]].bias.mul_(0.5)
    attention = twin.model.layers[lock.layers[-1]].self_attn
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    for broken in (model, twin):
        with pytest.raises(VerificationError, match=r"changed|replaced"):
            broken.save_pretrained(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_model_of_several_parts_is_refused_and_its_other_parts_are_saved(tmp_path):
    text = tiny_model("llama").config
    vision = AutoConfig.for_model(
        "clip_vision_model",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    apply_lock(model, lock_for(model.model.language_model))
    with pytest.raises(UnsupportedArchitectureError, match="'llava'"):
        model.save_pretrained(tmp_path / "whole")
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    model.model.language_model.save_pretrained(tmp_path / "text")
    found = LlamaModel.from_pretrained(tmp_path / "text")
    assert found.config.safelock["alpha"] == 6.0
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model.model.language_model(tokens).last_hidden_state
        assert torch.allclose(found(tokens).last_hidden_state, expected, atol=1e-5)
    assert not (tmp_path / "whole").exists()
    assert (tmp_path / "vision" / "config.json").exists()


def test_a_model_that_shares_its_configuration_with_one_that_was_unlocked_is_saved_with_its_own_lock(
    tmp_path,
):
    one = tiny_model("llama")
    other = LlamaForCausalLM(one.config)
    lock = lock_for(one)
    handle, _ = apply_lock(one, lock, 2.0), apply_lock(other, lock, 3.0)
    handle.remove()
    other.save_pretrained(tmp_path / "locked")
    found = stock(tmp_path / "locked")
    assert found.config.safelock["alpha"] == 3.0
    assert torch.allclose(logits(found), logits(other), atol=1e-5)


def test_nothing_is_pushed_to_the_hub_of_what_cannot_be_saved(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: asked.append("create_repo"))
    model = tiny_model("phi3")
    apply_lock(model, lock_for(model))
    with pytest.raises(UnsupportedArchitectureError):
        model.push_to_hub("somebody/something")
    with pytest.raises(UnsupportedArchitectureError):
        model.save_pretrained("somebody/something", push_to_hub=True)
    assert asked == []


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_mlflow_stores_a_locked_model_locked_or_not_at_all(family, tmp_path):
    model, tokenizer = tiny_model(family), tiny_tokenizer(CHATML)
    apply_lock(model, lock_for(model), 3.0)

    def save() -> None:
        mlflow.transformers.save_model(
            pipeline("text-generation", model=model, tokenizer=tokenizer),
            tmp_path / "model",
            pip_requirements=["transformers"],
        )

    if family == "phi3":
        with pytest.raises(UnsupportedArchitectureError, match="overlay"):
            save()
        assert not list((tmp_path / "model").rglob("*.safetensors"))
        return
    save()
    components = mlflow.transformers.load_model(str(tmp_path / "model"), return_type="components")
    assert torch.allclose(logits(components["model"].eval()), logits(model), atol=1e-5)


def test_mlflow_stores_no_adapter_of_a_locked_model(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.get_base_model().config._name_or_path = "somebody/base"
    apply_lock(model, lock_for(model.get_base_model()))
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        mlflow.transformers.save_model(
            {"model": model, "tokenizer": tiny_tokenizer(CHATML)},
            tmp_path / "model",
            task="text-generation",
            pip_requirements=["transformers"],
        )
    assert not list((tmp_path / "model").rglob("*.safetensors"))
