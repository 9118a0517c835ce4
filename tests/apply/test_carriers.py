from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM

from mlflow_safelock.apply import apply_lock, attention_of, handle_of
from mlflow_safelock.apply.displacement import displacements, input_displacement
from mlflow_safelock.apply.in_force import pushes_in_force
from mlflow_safelock.errors import AlphaError, AlreadyLockedError, VerificationError
from mlflow_safelock.lock import SafetyLock
from tests.apply.conftest import TOKENS, lock_for, logits
from tests.models import tiny_model

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")


class EightBitLinear(nn.Module):
    """A projection whose weight is no plain matrix: whole numbers with a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def dense_weight(self) -> torch.Tensor:
        return self.packed.float() * self.scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.dense_weight().T


def quantised_llama() -> nn.Module:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = EightBitLinear(layer.self_attn.o_proj)
    return model


def dequantised(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        weight = layer.self_attn.o_proj.dense_weight()
        layer.self_attn.o_proj = nn.Linear(*weight.shape[::-1], bias=False)
        layer.self_attn.o_proj.weight = nn.Parameter(weight)
    return plain


def with_adapter(target_modules: list[str], **settings: Any) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False, **settings)
        return get_peft_model(tiny_model("llama"), config).eval()


def pushed_by_hand(model: nn.Module, lock: SafetyLock, alpha: float) -> torch.Tensor:
    """Logits of a copy that is not locked, with the displacement added to what goes into its projections."""
    plain = copy.deepcopy(model)
    projections = attention_of(plain).projections
    for push in displacements(lock, alpha):
        constant = input_displacement(push, lock.geometry).float()
        projections[push.layer].register_forward_pre_hook(
            lambda _, inputs, constant=constant: (inputs[0] + constant, *inputs[1:])
        )
    return logits(plain)


def test_a_quantised_projection_is_locked_through_its_input_and_unlocked_without_a_trace():
    model = quantised_llama()
    lock, unlocked, keys = lock_for(model), logits(model), list(model.state_dict())
    plain = dequantised(model)
    apply_lock(plain, lock, 3.0)
    handle = apply_lock(model, lock, 3.0)
    handle.verify()
    assert torch.allclose(logits(model), logits(plain), atol=2e-5)
    assert (logits(model) - unlocked).abs().max() > 0.05
    assert list(model.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model), unlocked)
    assert not any(projection._forward_pre_hooks for projection in attention_of(model).projections)


def test_a_copy_of_a_model_locked_through_its_inputs_stays_locked_on_its_own():
    model = quantised_llama()
    unlocked, lock = logits(model), lock_for(model)
    handle = apply_lock(model, lock)
    locked, twin = logits(model), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(logits(twin), locked)
    with pytest.raises(AlreadyLockedError):
        apply_lock(twin, lock)
    handle_of(twin).verify()
    handle_of(twin).remove()
    assert torch.equal(logits(twin), unlocked)


def test_a_hook_follows_the_model_into_another_dtype():
    model = tiny_model("llama")
    lock = lock_for(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj)
    before, handle = logits(model), apply_lock(model, lock)
    in_float32 = logits(model)
    assert (in_float32 - before).abs().max() > 0.05
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert (logits(model).float() - in_float32).abs().max() < 0.3
    model.to(torch.float32)
    handle.verify()
    handle.remove()


def test_a_hook_that_would_push_by_nothing_is_refused_when_it_is_put_on_and_when_it_runs():
    model = quantised_llama()
    lock = lock_for(model)
    unlocked, handle = logits(model), apply_lock(model, lock, 1e-8)
    handle.verify()
    model.half()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with pytest.raises(
            AlphaError, match=r"the push on layer \d is lost in the rounding to torch.float16"
        ):
            logits(each)
    model.float()
    handle.remove()
    assert torch.equal(logits(quantised_llama()), unlocked)
    model.half()
    with pytest.raises(AlphaError, match=r"the push on layer \d is lost in the rounding to torch.float16"):
        apply_lock(model, lock, 1e-8)
    assert handle_of(model) is None


def test_a_push_that_vanishes_beside_the_models_own_bias_is_refused_and_noticed():
    model = tiny_model("gpt2")
    for projection in attention_of(model).projections:
        projection.bias.data.mul_(1e4)
    lock = lock_for(model)
    handle = apply_lock(model, lock, 0.1)
    handle.verify()
    model.to(torch.bfloat16)
    with pytest.raises(VerificationError, match="the bias in place is"):
        handle.verify()
    handle.remove()
    with pytest.raises(AlphaError, match=r"the bias of layer \d is lost in the rounding to torch.bfloat16"):
        apply_lock(model, lock, 0.1)
    assert handle_of(model) is None


def test_verify_and_remove_notice_a_hook_that_is_gone():
    model = quantised_llama()
    lock = lock_for(model)
    handle = apply_lock(model, lock)
    attention_of(model).projections[lock.layers[0]]._forward_pre_hooks.clear()
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: the hook"):
        handle.verify()
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: the hook"):
        handle.remove()


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["q_proj", "o_proj"]])
def test_an_adapter_that_is_not_merged_is_locked_as_the_merged_model_is(target_modules):
    model = with_adapter(target_modules)
    merged = copy.deepcopy(model).merge_and_unload()
    unlocked, lock = logits(model), lock_for(merged)
    apply_lock(merged, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    handle.verify()
    assert torch.allclose(logits(model), logits(merged), atol=1e-5)
    handle.remove()
    assert torch.equal(logits(model), unlocked)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_every_kind_of_adapter_on_the_projection_gets_the_push_through_its_input(kind):
    model = with_adapter(["o_proj"], use_dora=kind == "dora", use_rslora=kind == "rslora")
    lock = lock_for(model.get_base_model())
    expected = pushed_by_hand(model, lock, 2.0)
    with apply_lock(model, lock, 2.0) as handle:
        handle.verify()
        assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lock_outlives_the_merging_of_the_adapter_that_it_was_put_on(kind):
    model = with_adapter(["q_proj", "o_proj"], use_dora=kind == "dora")
    merged = copy.deepcopy(model).merge_and_unload()
    lock, unlocked = lock_for(merged), logits(merged)
    expected = pushed_by_hand(merged, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    plain = model.merge_and_unload()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert not torch.allclose(logits(plain), unlocked, atol=1e-2)
    handle_of(plain).verify()
    handle.remove()
    assert torch.allclose(logits(plain), unlocked, atol=1e-6)


def trained_projection() -> PeftModel:
    """A model whose output projections were trained whole, beside adapters on others."""
    model = with_adapter(["q_proj"], modules_to_save=["o_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.25)
    return model


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_a_lock_outlives_the_unwrapping_of_a_projection_that_was_trained_whole(leave):
    model = trained_projection()
    lock = lock_for(model.get_base_model())
    left = getattr(copy.deepcopy(model), leave)()
    expected_before, expected_after = pushed_by_hand(model, lock, 2.0), pushed_by_hand(left, lock, 2.0)
    handle, twin = apply_lock(model, lock, 2.0), copy.deepcopy(model)
    assert torch.allclose(logits(model), expected_before, atol=1e-5)
    plain = getattr(model, leave)()
    assert torch.allclose(logits(plain), expected_after, atol=1e-5)
    handle_of(plain).verify()
    handle.remove()
    assert handle_of(plain) is None
    assert torch.allclose(logits(plain), logits(left), atol=1e-6)
    assert torch.allclose(logits(getattr(twin, leave)()), expected_after, atol=1e-5)


def test_another_adapter_that_trains_the_locked_projection_whole_is_locked_like_the_first():
    model = trained_projection()
    lock = lock_for(model.get_base_model())
    handle = apply_lock(model, lock, 2.0)
    more = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"])
    model.add_adapter("other", more)
    model.set_adapter("other")
    other = copy.deepcopy(model)
    handle_of(other).remove()
    unlocked, expected = logits(other), pushed_by_hand(other, lock, 2.0)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    handle.verify()
    plain = model.merge_and_unload()
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    handle.remove()
    assert torch.allclose(logits(plain), unlocked, atol=1e-5)


@pytest.mark.parametrize("wrap", [False, True])
def test_what_an_adapter_leaves_is_locked_wherever_it_stands(wrap):
    """Whether a wrapper still stands decides, and not how: also when it is wrapped by something unknown."""
    model = with_adapter(["o_proj"])
    lock = lock_for(model.get_base_model())
    expected = pushed_by_hand(model, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    plain = model if wrap else model.merge_and_unload()
    for layer in (model.get_base_model() if wrap else plain).model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj)
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    with pytest.raises(VerificationError, match="wrapped or replaced"):
        handle.verify()


def test_adapters_can_be_merged_in_place_switched_added_and_turned_off_under_a_lock():
    model = with_adapter(["o_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    lock = lock_for(model.get_base_model())
    states = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        states[name] = pushed_by_hand(model, lock, 2.0)
    with model.disable_adapter():
        off = pushed_by_hand(model, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert torch.allclose(logits(model), states[name], atol=1e-5)
        handle.verify()
    model.merge_adapter(["other"])
    assert torch.allclose(logits(model), states["other"], atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.allclose(logits(model), off, atol=1e-5)
    model.add_adapter("third", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    model.set_adapter("third")
    with_third = logits(model)
    handle.remove()
    assert torch.allclose(with_third, pushed_by_hand(model, lock, 2.0), atol=1e-5)


def test_an_adapter_that_is_put_on_a_locked_projection_is_noticed_and_no_second_lock_accepted():
    model = tiny_model("llama")
    lock = lock_for(model)
    handle = apply_lock(model, lock, 2.0)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    with pytest.raises(VerificationError, match="wrapped or replaced"):
        handle.verify()
    with pytest.raises(AlreadyLockedError):
        apply_lock(wrapped, lock, 2.0)
    handle.remove()
    apply_lock(wrapped, lock, 2.0).verify()


def test_a_projection_that_was_replaced_is_noticed():
    model = tiny_model("llama")
    lock = lock_for(model)
    handle = apply_lock(model, lock, 2.0)
    attention = model.model.layers[lock.layers[0]].self_attn
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: .* wrapped or replaced"):
        handle.verify()


def test_a_locked_adapter_model_can_be_used_from_several_threads():
    model = with_adapter(["o_proj"])
    lock = lock_for(model.get_base_model())
    expected = pushed_by_hand(model, lock, 2.0)
    apply_lock(model, lock, 2.0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: logits(model), range(24)):
            assert torch.allclose(found, expected, atol=1e-5)


def test_a_failed_forward_pass_of_an_adapter_leaves_the_push_as_it_was():
    model = with_adapter(["o_proj"])
    lock = lock_for(model.get_base_model())
    apply_lock(model, lock, 2.0)
    projection = attention_of(model).projections[lock.layers[0]]
    with pytest.raises(RuntimeError):
        projection(torch.zeros(1, 3))
    plain = model.merge_and_unload()
    unlocked = copy.deepcopy(plain)
    handle_of(unlocked).remove()
    assert torch.allclose(logits(plain), pushed_by_hand(unlocked, lock, 2.0), atol=1e-5)


def test_a_projection_class_that_is_not_known_to_be_plain_is_not_given_a_bias():
    class Packed(nn.Linear):
        """Its forward pass ignores the bias, as some quantised classes do."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.weight.T

    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Packed
    apply_lock(reference, lock)
    apply_lock(model, lock)
    assert torch.allclose(logits(model), logits(reference), atol=2e-5)


@pytest.mark.parametrize("kind", ["bias", "quantised", "adapter"])
def test_a_compiled_model_is_locked_and_unlocked_whenever_it_was_compiled(kind):
    model = {
        "bias": lambda: tiny_model("llama"),
        "quantised": quantised_llama,
        "adapter": lambda: with_adapter(["o_proj"]),
    }[kind]()
    lock = lock_for(model.get_base_model() if kind == "adapter" else model)
    unlocked, expected = logits(model), pushed_by_hand(model, lock, 2.0)
    compiled = torch.compile(model, backend="eager")

    def found() -> torch.Tensor:
        with torch.no_grad():
            return compiled(input_ids=TOKENS).logits

    handle = apply_lock(model, lock, 2.0)
    assert torch.allclose(found(), expected, atol=1e-5)
    handle.remove()
    assert torch.allclose(found(), unlocked, atol=1e-5)
    handle = apply_lock(model, lock, 2.0)
    assert torch.allclose(found(), expected, atol=1e-5)
    handle.verify()
    torch.compiler.reset()


def test_a_lock_on_an_adapter_model_breaks_no_graph():
    model = with_adapter(["o_proj"])
    lock = lock_for(model.get_base_model())
    expected = pushed_by_hand(model, lock, 2.0)
    apply_lock(model, lock, 2.0)
    for each in (lambda: model, lambda: model.merge_and_unload()):
        compiled = torch.compile(each(), backend="eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(input_ids=TOKENS).logits, expected, atol=1e-5)
    torch.compiler.reset()


def test_a_projection_with_a_forward_of_its_own_is_pushed_through_its_input():
    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj  # its forward ignores a bias, as that of fused kernels may
        projection.forward = partial(nn.functional.linear, weight=projection.weight)
    apply_lock(reference, lock)
    with apply_lock(model, lock) as handle:
        handle.verify()
        assert torch.allclose(logits(model), logits(reference), atol=2e-5)
    assert not torch.allclose(logits(model), logits(reference), atol=1e-3)


def test_what_accelerate_leaves_behind_is_no_forward_of_its_own():
    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    with apply_lock(reference, lock):
        expected = logits(reference)
    cpu_offload(model, execution_device="cpu")
    remove_hook_from_module(model, recurse=True)
    with apply_lock(model, lock):
        assert all(attention_of(model).projections[layer].bias is not None for layer in lock.layers)
        assert torch.allclose(logits(model), expected, atol=1e-6)


def test_a_forward_of_its_own_is_seen_below_accelerate_too():
    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        projection.forward = partial(nn.functional.linear, weight=projection.weight)
        add_hook_to_module(projection, ModelHook())
    apply_lock(reference, lock)
    apply_lock(model, lock).verify()
    assert torch.allclose(logits(model), logits(reference), atol=2e-5)


def test_a_forward_of_its_own_is_seen_above_accelerate_before_locking_and_after():
    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        add_hook_to_module(projection, ModelHook())
    later = copy.deepcopy(model)
    handle = apply_lock(later, lock)
    for each in (model, later):
        for projection in attention_of(each).projections:
            projection.forward = partial(nn.functional.linear, weight=projection.weight)
    apply_lock(reference, lock)
    apply_lock(model, lock).verify()
    assert torch.allclose(logits(model), logits(reference), atol=2e-5)
    with pytest.raises(VerificationError, match="another forward after it was locked"):
        handle.verify()


def test_a_linear_layer_that_somebody_changed_for_all_is_pushed_through_its_input(monkeypatch):
    model = tiny_model("llama")
    lock, reference = lock_for(model), copy.deepcopy(model)
    apply_lock(reference, lock)
    expected = logits(reference)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda module, inputs: own(module, inputs))
    handle = apply_lock(model, lock)
    assert torch.allclose(logits(model), expected, atol=2e-5)
    handle.verify()


def test_a_model_that_is_sharded_after_it_was_locked_says_that_it_goes_first(tmp_path):
    model = tiny_model("llama")
    handle = apply_lock(model, lock_for(model))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        for attempt in (handle.verify, handle.remove):
            with pytest.raises(
                VerificationError, match=r"sharded after it was locked.*Shard the model first"
            ):
                attempt()
    finally:
        distributed.destroy_process_group()


def test_a_hook_that_somebody_carries_to_another_module_still_pushes():
    model = quantised_llama()
    lock = lock_for(model)
    apply_lock(model, lock)
    locked = logits(model)
    for layer in model.model.layers:
        old, new = layer.self_attn.o_proj, copy.copy(layer.self_attn.o_proj)
        new.__dict__ = {**old.__dict__, "_forward_pre_hooks": OrderedDict()}
        new._forward_pre_hooks_with_kwargs = OrderedDict()
        for hook in old._forward_pre_hooks.values():
            new.register_forward_pre_hook(hook)
        layer.self_attn.o_proj = new
    assert torch.equal(logits(model), locked)


def test_a_hooked_projection_may_be_called_by_keyword():
    class ByKeyword(EightBitLinear):
        def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().__call__(inputs=inputs)

    model = quantised_llama()
    lock, reference, before = lock_for(model), copy.deepcopy(model), logits(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = ByKeyword
    apply_lock(reference, lock)
    handle = apply_lock(model, lock)
    assert torch.equal(logits(model), logits(reference))
    handle.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_offloaded_after_it_was_locked_says_how_to_get_at_it(family):
    model = tiny_model(family)
    before = logits(model)
    handle = apply_lock(model, lock_for(model))
    locked = logits(model)
    cpu_offload(model, execution_device="cpu")
    assert torch.allclose(logits(model), locked, atol=1e-5)
    for attempt in (handle.verify, handle.remove, lambda: pushes_in_force(model)):
        with pytest.raises(
            VerificationError, match=r"offloaded after it was locked.*remove_hook_from_module"
        ):
            attempt()
    remove_hook_from_module(model, recurse=True)
    handle.verify()
    handle.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_that_accelerate_has_spread_over_devices_is_locked_where_its_weights_are(offloaded, tmp_path):
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    layers = range(plain.config.num_hidden_layers)
    device_map |= {f"model.layers.{n}": "disk" if offloaded and n % 2 else "cpu" for n in layers}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    lock = lock_for(plain)
    expected = pushed_by_hand(plain, lock, 2.0)
    handle = apply_lock(model, lock, 2.0)
    handle.verify()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    handle.remove()
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


def test_gradients_under_checkpointing_are_those_without(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        model = with_adapter(["o_proj"])
        apply_lock(model, lock_for(model.get_base_model()), 2.0)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found = [value.grad for name, value in model.named_parameters() if "lora_" in name]
        assert all(gradient is not None for gradient in found)
        gradients.append(found)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize(
    "make",
    [
        lambda one: prune.l1_unstructured(one, "bias", amount=0.2),
        lambda one: nn.utils.weight_norm(one, "bias", dim=0),
        lambda one: one.__dict__.update(bias=one._parameters.pop("bias").detach()),
    ],
    ids=["pruned", "normed", "plain tensor"],
)
def test_a_projection_whose_own_bias_is_no_parameter_is_pushed_through_its_input(family, make):
    model = tiny_model(family)
    for projection in attention_of(model).projections:
        make(projection)
    lock, before = lock_for(model), logits(model)
    expected = copy.deepcopy(model)
    for push in displacements(lock, 6.0):
        constant = input_displacement(push, lock.geometry).float()
        attention_of(expected).projections[push.layer].register_forward_pre_hook(
            lambda _, inputs, constant=constant: (inputs[0] + constant, *inputs[1:])
        )
    handle = apply_lock(model, lock, 6.0)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    handle.verify()
    handle.remove()
    assert torch.equal(logits(model), before)


def test_hooks_of_a_model_that_was_loaded_from_a_file_are_not_replaced_by_later_ones(monkeypatch):
    model = quantised_llama()
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    apply_lock(model, lock_for(model))
    locked, saved = logits(model), pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in another process, where torch counts anew
    loaded = pickle.loads(saved)
    for projection in attention_of(loaded).projections:
        projection.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(logits(loaded), locked)
    handle_of(loaded).verify()


def test_a_model_that_was_traced_under_a_hook_runs_as_before():
    model = quantised_llama()
    apply_lock(model, lock_for(model))
    projection = attention_of(model).projections[lock_for(model).layers[0]]
    inputs = torch.rand(1, 3, 32)
    expected = projection(inputs)
    for hook in projection._forward_pre_hooks.values():
        hook._cast = hook.displacement
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        projection(mode.from_tensor(inputs))
    again = projection(inputs)
    assert type(again) is torch.Tensor
    assert torch.equal(again, expected)
