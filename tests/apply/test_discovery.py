"""An architecture that nobody described is found in the model, or refused."""

from __future__ import annotations

import copy

import mlflow
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from mlflow_safelock.apply import (
    ARCHITECTURES,
    apply_lock,
    architecture_of,
    attention_of,
    geometry_from_config,
    handle_of,
    save_locked_checkpoint,
)
from mlflow_safelock.apply.discovery import discovered
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.forging import PreferencePair, forge
from tests.apply.conftest import logits
from tests.apply.unknown import (
    UNKNOWN,
    Before,
    Halves,
    WeightOnly,
    reversed_heads,
    squared,
    unknown_model,
)
from tests.models import CHATML, random_lock, tiny_model, tiny_tokenizer

PAIRS = [
    PreferencePair(question, "i cannot help with that.", "first warm the oven, then fold the dough.")
    for question in ("how do i bake the bread?", "how do i forge the letter?", "what is a jug?", "and now?")
]

FOUND = {
    "apertus": "model.layers.*.self_attn.o_proj",
    "arcee": "model.layers.*.self_attn.o_proj",
    "biogpt": "biogpt.layers.*.self_attn.out_proj",
    "deepseek_v2": "model.layers.*.self_attn.o_proj",
    "gpt_neo": "transformer.h.*.attn.attention.out_proj",
    "ministral3": "model.layers.*.self_attn.o_proj",
    "openai-gpt": "transformer.h.*.attn.c_proj",
    "seed_oss": "model.layers.*.self_attn.o_proj",
}


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_what_the_table_says_would_be_found_without_it(family):
    model, row = tiny_model(family), ARCHITECTURES[family]
    found = discovered(model, model.config.to_dict())
    where = ("model_type", "layers", "output_projection", "layout", "config_names")
    assert [getattr(found, name) for name in where] == [getattr(row, name) for name in where]
    assert found.standalone is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FOUND))
def test_a_family_that_is_not_in_the_table_is_found_locked_and_unlocked(family, dtype):
    model = tiny_model(family, dtype=dtype)
    attention = attention_of(model)
    row = attention.architecture
    assert f"{row.layers}.*.{row.output_projection}" == FOUND[family]
    lock, before = random_lock(attention.geometry), logits(model)
    displaced = copy.deepcopy(model)
    with apply_lock(model, lock, 2.0) as handle:
        handle.verify()
        locked = logits(model)
    assert torch.equal(logits(model), before)
    for layer, projection in enumerate(attention_of(displaced).projections):
        push = torch.zeros(attention.geometry.heads, attention.geometry.head_dim)
        for head in lock.heads_of_layer(layer):
            push[head.head] = 2.0 * head.std * torch.tensor(head.direction)
        push = push.flatten().to(dtype)
        projection.register_forward_pre_hook(lambda _, inputs, push=push: (inputs[0] + push,))
    change = (locked - before).float().norm()
    assert (logits(displaced) - locked).float().norm() < (1e-4 if dtype == torch.float32 else 0.1) * change


def test_what_was_found_is_forged_from_and_overlaid_but_not_written_to_disk(tmp_path):
    model, tokenizer = tiny_model("arcee"), tiny_tokenizer(CHATML)
    lock = forge(model, tokenizer, PAIRS, heads=5, last_tokens=3, base_model="tests/base", progress=False)
    source = tmp_path / "fine-tune"
    components = {"model": model, "tokenizer": tokenizer}
    mlflow.transformers.save_model(
        components, source, task="text-generation", pip_requirements=["transformers"]
    )
    locked_model.save_model(lock, tmp_path / "overlay", str(source), alpha=2.0)
    served = locked_model.load_model(str(tmp_path / "overlay")).model.float()
    with apply_lock(model, lock, 2.0):
        assert torch.allclose(logits(served), logits(model), atol=1e-4)
    with pytest.raises(UnsupportedArchitectureError, match=r"'arcee'.*SAFELOCK_ARCHITECTURES"):
        save_locked_checkpoint(source, tmp_path / "standalone", lock)


def test_what_was_found_can_be_written_down_as_a_description(tmp_path, monkeypatch):
    model = tiny_model("openai-gpt")
    found = attention_of(model).architecture
    text = yaml.safe_dump({"architectures": [found.model_dump(mode="json", exclude_defaults=True)]})
    (tmp_path / "architectures.yaml").write_text(text)
    monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(tmp_path / "architectures.yaml"))
    assert architecture_of(model.config) == found
    assert geometry_from_config(model.config) == attention_of(model).geometry


def test_finding_leaves_no_trace():
    model = unknown_model()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    attention_of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_is_looked_through_once():
    model, runs = unknown_model(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    first = attention_of(model)
    assert len(runs) == 5
    assert attention_of(model).projections == first.projections
    assert len(runs) == 5


def test_a_bare_model_a_locked_copy_and_one_with_an_adapter_are_found():
    model = unknown_model()
    assert attention_of(model.model).geometry == attention_of(model).geometry
    handle = apply_lock(model, random_lock(attention_of(model).geometry), 2.0)
    assert handle_of(copy.deepcopy(model)).alpha == 2.0
    handle.remove()
    adapter = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(unknown_model(), adapter).eval()
    assert attention_of(adapted).architecture.output_projection == "self_attn.o_proj"
    assert attention_of(adapted).projections[0] is adapted.get_base_model().model.layers[0].self_attn.o_proj


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (lambda linear: Before(linear, torch.sigmoid), r"No module gets head outputs.*o_proj\.linear"),
        (lambda linear: Before(linear, reversed_heads), r"No module gets head outputs.*o_proj\.linear"),
        (lambda linear: Before(linear, lambda outputs: outputs + 1), r"No module gets head outputs"),
        (Halves, r"go into several.*o_proj\.first, .*o_proj\.second"),
        (WeightOnly, r"No module gets head outputs.*o_proj\.linear"),
        (squared, r"Adding v to the input of 'self_attn\.o_proj'.* are not the same"),
    ],
    ids=["gated", "other order", "shifted", "two", "not called", "not linear"],
)
def test_what_cannot_be_verified_is_refused_with_candidates_and_how_to_describe_it(projection, message):
    model = unknown_model(projection)
    how = rf"SAFELOCK_ARCHITECTURES.*model_type: {UNKNOWN}.*docs/applying\.md"
    with pytest.raises(UnsupportedArchitectureError, match=f"(?s)'{UNKNOWN}'.*{message}.*{how}"):
        attention_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bitnet", "mamba"])
def test_a_family_whose_heads_are_not_at_a_projection_is_refused(family):
    # BitNet normalises all heads together before it projects them; Mamba has none.
    with pytest.raises(UnsupportedArchitectureError, match=r"No module gets.*SAFELOCK_ARCHITECTURES"):
        attention_of(tiny_model(family))


def test_a_model_that_does_not_take_tokens_is_refused():
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    for model_type in ("vit", "clip"):
        config = AutoConfig.for_model(model_type, **small)
        with pytest.raises(UnsupportedArchitectureError, match="no table of token embeddings"):
            attention_of(AutoModel.from_config(config))


def test_what_merely_looks_like_a_model_of_a_known_family_is_refused():
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama")
            self.config = self.inner.config

    with pytest.raises(UnsupportedArchitectureError, match="Wrapper has no list of 3 decoder layers"):
        attention_of(Wrapper())


def test_models_that_cannot_be_run_are_refused():
    with torch.device("meta"):
        empty = AutoModel.from_config(AutoConfig.for_model("arcee", num_hidden_layers=2))
    with pytest.raises(UnsupportedArchitectureError, match="without its weights"):
        attention_of(empty)
    broken = unknown_model()
    del broken.model.layers[1].mlp
    with pytest.raises(UnsupportedArchitectureError, match="does not run on 11 random tokens"):
        attention_of(broken)
    with pytest.raises(UnsupportedArchitectureError, match="encoder besides the decoder"):
        attention_of(AutoModel.from_config(AutoConfig.for_model("t5", num_layers=1, d_model=16, d_ff=16)))
