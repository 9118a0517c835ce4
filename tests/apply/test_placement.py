from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from peft import LoraConfig, get_peft_model

from mlflow_safelock.apply import apply_lock, generate
from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.errors import ApplyError
from tests.apply.conftest import lock_for
from tests.models import tiny_model, tiny_tokenizer

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

PROMPTS = ["how do i bake the bread", "hi"]


def offloaded(way: str, folder: str) -> torch.nn.Module:
    model = tiny_model("llama")
    if way == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if way == "disk":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    parts = {"model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    parts |= {f"model.layers.{layer}": "cpu" for layer in range(model.config.num_hidden_layers)}
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched"])
def test_a_model_whose_embeddings_are_offloaded_answers_as_one_in_memory_does(way, tmp_path):
    plain, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model = offloaded(way, str(tmp_path))
    assert model.get_input_embeddings().weight.device.type == "meta"
    assert execution_device(model) == torch.device("cpu")
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == generate(
        plain, tokenizer, PROMPTS, max_new_tokens=8
    )
    lock = lock_for(plain)
    apply_lock(plain, lock, 3.0)
    apply_lock(model, lock, 3.0)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == generate(
        plain, tokenizer, PROMPTS, max_new_tokens=8
    )


def test_weights_in_memory_say_where_a_model_computes():
    model = tiny_model("llama")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert execution_device(model) == execution_device(adapted) == torch.device("cpu")


def test_one_of_several_hooks_of_a_module_says_where_it_computes():
    embeddings = torch.nn.Embedding(2, 2, device="meta")
    embeddings._hf_hook = SequentialHook(ModelHook(), AlignDevicesHook(execution_device="cpu"))
    model = SimpleNamespace(get_input_embeddings=lambda: embeddings, modules=embeddings.modules)
    assert execution_device(model) == torch.device("cpu")


def test_a_model_without_weights_is_refused():
    with pytest.raises(ApplyError, match="meta device"):
        execution_device(tiny_model("llama").to("meta"))
