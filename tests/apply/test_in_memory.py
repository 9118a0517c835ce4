from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_model
from transformers import AutoModelForCausalLM

from mlflow_safelock.apply import (
    ARCHITECTURES,
    apply_lock,
    attention_of,
    geometry_from_config,
    handle_of,
)
from mlflow_safelock.errors import (
    AlphaError,
    AlreadyLockedError,
    LockMismatchError,
    UnsupportedArchitectureError,
    VerificationError,
)
from mlflow_safelock.lock import AttentionGeometry
from tests.apply.conftest import lock_for, logits
from tests.apply.test_displacement import plain_biases
from tests.models import random_lock, tiny_model

FAMILIES = sorted(ARCHITECTURES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bytes_of(model) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def with_an_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))


def state_of(model) -> tuple[dict[str, bytes], dict[str, int], str]:
    """Everything that locking touches: tensors, identities of parameters, configuration."""
    return (
        bytes_of(model),
        {name: id(p) for name, p in model.named_parameters()},
        model.config.to_json_string(),
    )


def projection_weights(model) -> np.ndarray:
    attention = attention_of(model)
    linear = attention.architecture.layout == "linear"
    weights = (projection.weight.detach().double() for projection in attention.projections)
    return np.stack([(weight if linear else weight.T).numpy() for weight in weights])


@pytest.mark.parametrize("family", FAMILIES)
def test_locked_layers_get_the_bias_of_the_model_s_own_weights_and_others_none(family):
    model = tiny_model(family)
    lock = lock_for(model, heads=3)
    before = [projection.bias for projection in attention_of(model).projections]
    expected = plain_biases(lock, 2.5, projection_weights(model))
    apply_lock(model, lock, 2.5)
    for layer, projection in enumerate(attention_of(model).projections):
        if layer not in lock.layers:
            assert projection.bias is before[layer]
            continue
        own = 0.0 if before[layer] is None else before[layer].detach().double().numpy()
        found = projection.bias.detach().double().numpy()
        assert np.allclose(found, expected[layer] + own, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_locking_is_adding_the_displacement_to_the_heads_and_removing_leaves_no_trace(family):
    model = tiny_model(family)
    lock = lock_for(model)
    before, unlocked = state_of(model), logits(model)

    displaced = copy.deepcopy(model)
    geometry = geometry_from_config(model.config)
    for layer in lock.layers:
        full = torch.zeros(geometry.heads, geometry.head_dim)
        for locked in lock.heads_of_layer(layer):
            full[locked.head] = 2.0 * locked.std * torch.tensor(locked.direction)
        attention_of(displaced).projections[layer].register_forward_pre_hook(
            lambda _, inputs, full=full: (inputs[0] + full.flatten(),)
        )

    handle = apply_lock(model, lock, 2.0)
    locked = logits(model)
    assert (locked - unlocked).abs().max() > 0.05
    assert torch.allclose(locked, logits(displaced), atol=2e-5)
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(logits(model), unlocked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_dtype_gets_the_nearest_bias_it_has_but_for_a_float32_sum(family, dtype):
    model = tiny_model(family, dtype=dtype)
    lock = lock_for(model)
    own = [projection.bias for projection in attention_of(model).projections]
    expected = plain_biases(lock, 6.0, projection_weights(model))
    with apply_lock(model, lock) as handle:
        for layer in lock.layers:
            bias = attention_of(model).projections[layer].bias
            assert bias.dtype == dtype
            assert not bias.requires_grad
            before = 0.0 if own[layer] is None else own[layer].detach().double()
            exact = torch.tensor(expected[layer]) + before
            half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
            of_the_sum = (0.0 if dtype == torch.float64 else 1e-6) * exact.abs().max()
            error = (bias.detach().double() - exact).abs()
            assert (error <= half_a_step * (1 + 1e-6) + of_the_sum).all()
        handle.verify()
        assert torch.isfinite(logits(model)).all()


def test_default_alpha_is_the_method_s(llama, lock):
    assert apply_lock(llama, lock).alpha == 6.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_negative_alpha_pushes_the_other_way_exactly(family):
    model = tiny_model(family)
    lock = lock_for(model)
    projection = attention_of(model).projections[lock.layers[0]]
    own = 0.0 if projection.bias is None else projection.bias.detach().clone()
    with apply_lock(model, lock, 4.0):
        plus = projection.bias.detach() - own
    with apply_lock(model, lock, -4.0):
        minus = projection.bias.detach() - own
    assert torch.allclose(plus, -minus, atol=1e-6)
    assert plus.abs().max() > 0.1


def test_context_manager_unlocks_at_the_end_and_on_error(llama, lock):
    before = state_of(llama)
    with apply_lock(llama, lock) as handle:
        handle.verify()
    assert state_of(llama) == before
    with pytest.raises(RuntimeError, match="in the middle"), apply_lock(llama, lock):
        raise RuntimeError("in the middle")
    assert state_of(llama) == before


def test_removing_twice_does_nothing_and_the_model_can_be_locked_again(llama, lock):
    before = state_of(llama)
    first = apply_lock(llama, lock)
    first.remove()
    first.remove()
    assert state_of(llama) == before
    second = apply_lock(llama, lock, -1.0)
    first.remove()
    second.verify()
    second.remove()
    assert state_of(llama) == before


def test_locked_model_generates_and_what_it_says_changes(llama, lock):
    tokens = torch.tensor([[5, 17, 200, 31]])
    arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    before = llama.generate(tokens, **arguments)
    with apply_lock(llama, lock):
        after = llama.generate(tokens, **arguments)
    assert not torch.equal(before, after)
    assert torch.equal(llama.generate(tokens, **arguments), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_deep_copy_stays_locked_on_its_own_and_can_be_unlocked(family):
    model = tiny_model(family)
    lock, before, unlocked = lock_for(model), bytes_of(model), logits(model)
    handle = apply_lock(model, lock)
    locked, twin = logits(model), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(logits(twin), locked)
    copied = handle_of(twin)
    assert copied is not None
    assert (copied.lock, copied.alpha, copied.layers) == (lock, 6.0, lock.layers)
    copied.verify()
    with pytest.raises(AlreadyLockedError):
        apply_lock(twin, lock)
    copied.remove()
    assert handle_of(twin) is None
    assert bytes_of(twin) == before
    assert torch.equal(logits(twin), unlocked)


def test_removing_from_the_copy_leaves_the_original_locked(llama, lock):
    handle = apply_lock(llama, lock)
    locked = logits(llama)
    handle_of(copy.deepcopy(llama)).remove()
    handle.verify()
    assert torch.equal(logits(llama), locked)


def test_a_pickled_model_stays_locked(llama, lock):
    apply_lock(llama, lock)
    twin = pickle.loads(pickle.dumps(llama))
    handle_of(twin).verify()
    assert torch.equal(logits(twin), logits(llama))


def test_each_bias_has_memory_of_its_own_as_other_programs_that_save_a_model_ask_for(llama, lock, tmp_path):
    apply_lock(llama, lock, 6.0)
    save_model(llama, str(tmp_path / "model.safetensors"))
    saved = load_file(tmp_path / "model.safetensors")
    biases = {name: bias for name, bias in llama.named_parameters() if name.endswith("o_proj.bias")}
    assert len(biases) == len(lock.layers) > 1
    for name, bias in biases.items():
        assert torch.equal(saved[name], bias)
        assert bias.untyped_storage().nbytes() == bias.nbytes


def test_an_unlocked_model_has_no_handle(llama):
    assert handle_of(llama) is None


def test_a_second_lock_is_refused_on_the_model_and_on_its_parts(llama, lock):
    handle = apply_lock(llama, lock)
    before = state_of(llama)
    for part in (llama, llama.model):
        with pytest.raises(AlreadyLockedError, match=lock.digest):
            apply_lock(part, lock_for(llama, seed=3))
    assert state_of(llama) == before
    handle.verify()


def test_models_that_share_a_configuration_object_are_locked_one_by_one(llama, lock):
    sibling = AutoModelForCausalLM.from_config(llama.config).eval()
    assert sibling.config is llama.config
    first = apply_lock(llama, lock)
    second = apply_lock(sibling, lock)
    second.remove()
    first.verify()
    first.remove()


def test_a_locked_model_that_was_saved_and_loaded_is_recognised(llama, lock, tmp_path):
    apply_lock(llama, lock)
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(AlreadyLockedError, match=r"saved with a lock.*at alpha 6\.0"):
        apply_lock(loaded, lock)


@pytest.mark.parametrize(
    "change",
    [{"layers": 4}, {"heads": 5}, {"head_dim": 16}, {"hidden": 64}],
    ids=lambda change: next(iter(change)),
)
def test_a_lock_for_another_shape_is_refused_naming_both(llama, change):
    shape = geometry_from_config(llama.config)
    other = random_lock(AttentionGeometry(**{**shape.model_dump(), **change}), base_model="org/base")
    before = state_of(llama)
    with pytest.raises(LockMismatchError) as raised:
        apply_lock(llama, other)
    message = str(raised.value)
    assert str(other.geometry) in message
    assert str(shape) in message
    assert "org/base" in message
    assert state_of(llama) == before


def test_names_in_the_place_of_a_model_or_a_lock_are_refused(llama, lock):
    with pytest.raises(LockMismatchError, match=r"of type 'str'.*load_lock"):
        apply_lock(llama, "lock.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=r"of type 'str'.*from_pretrained"):
        apply_lock("org/fine-tune", lock)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), True, "6", None])
def test_what_is_no_strength_is_refused_and_changes_nothing(llama, lock, alpha):
    before = state_of(llama)
    with pytest.raises(AlphaError):
        apply_lock(llama, lock, alpha)
    assert state_of(llama) == before


def test_a_bias_beyond_the_dtype_is_refused_and_changes_nothing():
    model = tiny_model("llama", dtype=torch.float16)
    before = state_of(model)
    with pytest.raises(AlphaError, match=r"torch\.float16"):
        apply_lock(model, lock_for(model), 1e7)
    assert state_of(model) == before
    assert handle_of(model) is None


def test_failing_midway_leaves_the_model_as_it_was(llama, lock):
    class Stubborn(torch.nn.Linear):
        """A projection that takes no hook, as the last one to be locked."""

        def register_forward_pre_hook(self, *args, **kwargs):
            raise MemoryError("no room for a hook")

    layer = llama.model.layers[lock.layers[-1]]
    weight = layer.self_attn.o_proj.weight
    layer.self_attn.o_proj = Stubborn(*weight.shape[::-1], bias=False)
    layer.self_attn.o_proj.weight = weight
    assert len(lock.layers) > 1
    before = state_of(llama)
    with pytest.raises(MemoryError, match="no room"):
        apply_lock(llama, lock)
    assert state_of(llama) == before
    assert handle_of(llama) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_verify_names_the_layer_whose_bias_is_not_what_it_should_be(family):
    model = tiny_model(family)
    lock = lock_for(model)
    handle = apply_lock(model, lock)
    layer = lock.layers[-1]
    bias = attention_of(model).projections[layer].bias
    true_values = bias.data.clone()

    bias.data[3] += 1e-3
    with pytest.raises(VerificationError, match=f"Layer {layer}:"):
        handle.verify()
    bias.data.copy_(-true_values)
    with pytest.raises(VerificationError, match=f"Layer {layer}:"):
        handle.verify()
    bias.data.fill_(float("nan"))
    with pytest.raises(VerificationError, match=f"Layer {layer}:"):
        handle.verify()
    bias.data.copy_(true_values)
    handle.verify()


def test_verify_notices_a_bias_that_is_gone_and_a_lock_that_was_removed(llama, lock):
    handle = apply_lock(llama, lock)
    projection = attention_of(llama).projections[lock.layers[0]]
    placed, projection.bias = projection.bias, None
    with pytest.raises(VerificationError, match="is gone"):
        handle.verify()
    projection.bias = placed
    handle.verify()
    handle.remove()
    with pytest.raises(VerificationError, match="was removed"):
        handle.verify()


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_notices_weights_that_no_longer_fit_the_bias(dtype):
    model = tiny_model("llama", dtype=dtype)
    lock = lock_for(model)
    handle = apply_lock(model, lock)
    weight = attention_of(model).projections[lock.layers[0]].weight
    weight.data.mul_(1.5)
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[0]}: the bias in place"):
        handle.verify()
    handle.remove()  # the bias itself is untouched, so it can be taken away


def test_a_model_that_was_cast_after_locking_verifies_and_unlocks_in_its_new_dtype():
    model = tiny_model("gpt2")
    fresh = copy.deepcopy(model).to(torch.bfloat16)
    handle = apply_lock(model, lock_for(model))
    model.to(torch.bfloat16)
    handle.verify()
    handle.remove()
    assert bytes_of(model) == bytes_of(fresh)


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "casts",
    [
        *((half, torch.float32) for half in HALVES),
        *((torch.float32, half, torch.float32) for half in HALVES),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
    ids=lambda casts: "-".join(str(dtype).removeprefix("torch.") for dtype in casts),
)
def test_a_model_that_was_cast_there_and_back_verifies_is_saved_and_unlocked(family, casts, tmp_path):
    first, *later = casts
    model = tiny_model(family).to(first)
    fresh, untouched = copy.deepcopy(model), copy.deepcopy(model)
    handle = apply_lock(model, lock_for(model))
    for dtype in later:
        model.to(dtype)
        fresh.to(dtype)
    handle.verify()
    model.save_pretrained(tmp_path / "saved")
    handle.remove()
    # A bias of the model's own was not in it meanwhile, and is as exact as it was.
    own = [name for name in bytes_of(model) if ".c_proj.bias" in name and "attn" in name]
    exact = bytes_of(untouched.to(casts[-1]))
    layers = [f".{layer}." for layer in handle.layers]
    kept = {name: exact[name] for name in own if any(layer in name for layer in layers)}
    assert bytes_of(model) == {**bytes_of(fresh), **kept}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_verify_notices_weights_that_changed_by_a_few_roundings(dtype):
    model = tiny_model("llama").to(dtype)
    handle = apply_lock(model, lock_for(model))
    handle.verify()
    with torch.no_grad():
        attention_of(model).projections[handle.layers[0]].weight.mul_(1.02)
    with pytest.raises(VerificationError, match="away from the one"):
        handle.verify()


@pytest.mark.parametrize("larger", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("half", HALVES)
def test_a_cast_verifies_also_where_one_row_is_far_larger_than_the_others(half, larger):
    # Of a bias with one large number next to nothing may be lost by chance, and of its weights more.
    for seed in range(12):
        model = tiny_model("llama", seed=seed)
        with torch.no_grad():
            for projection in attention_of(model).projections:
                projection.weight[5] *= larger
        handle = apply_lock(model, random_lock(geometry_from_config(model.config), 12, seed))
        model.to(half)
        handle.verify()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("what", ["bias", "weight"])
def test_verify_notices_what_was_weakened_after_a_cast(half, what):
    for seed in range(5):
        model = tiny_model("llama", seed=seed)
        handle = apply_lock(model, random_lock(geometry_from_config(model.config), 12, seed))
        model.to(half)
        handle.verify()
        projection = attention_of(model).projections[handle.layers[0]]
        with torch.no_grad():
            (projection.bias.mul_ if what == "bias" else projection.weight.div_)(0.97)
        with pytest.raises(VerificationError, match=f"Layer {handle.layers[0]}: the bias in place"):
            handle.verify()


def test_a_bias_of_its_own_keeps_its_dtype_where_the_weights_have_another():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    for projection in attention_of(model).projections:
        projection.bias = torch.nn.Parameter(torch.rand(48))
    before = bytes_of(model)
    apply_lock(model, lock_for(model)).remove()
    assert bytes_of(model) == before


def test_a_handle_that_was_looked_up_notices_layers_that_carry_no_lock_or_another_one(llama, lock):
    severe = copy.deepcopy(llama)
    apply_lock(llama, lock, 6.0)
    apply_lock(severe, lock, 3.0)
    first, second = lock.layers[0], lock.layers[-1]
    kept = llama.model.layers[second].self_attn.o_proj
    llama.model.layers[second].self_attn.o_proj = severe.model.layers[second].self_attn.o_proj
    with pytest.raises(VerificationError, match=rf"Layer {second}: .*at alpha 3\.0, and other layers .*6\.0"):
        handle_of(llama).verify()
    llama.model.layers[second].self_attn.o_proj = kept
    handle_of(llama).verify()
    plain = torch.nn.Linear(32, 48, bias=False)
    llama.model.layers[first].self_attn.o_proj = plain
    for recompute in (True, False):
        with pytest.raises(VerificationError, match=f"Layer {first}: it does not carry the lock"):
            handle_of(llama).verify(recompute=recompute)


def test_layers_that_were_taken_out_or_changed_places_are_noticed(llama, lock):
    handle = apply_lock(llama, lock, 6.0)
    layers = llama.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for found in (handle, handle_of(llama)):
        with pytest.raises(VerificationError, match="wrapped or replaced"):
            found.verify()
    layers[0], layers[1] = layers[1], layers[0]
    del layers[2]
    llama.config.num_hidden_layers = 2
    with pytest.raises(VerificationError, match="Layer 2: its output projection was wrapped or replaced"):
        handle.verify()


def leave_the_bias_out(projection):
    projection.forward = lambda inputs: torch.nn.functional.linear(inputs, projection.weight)


class WithoutBias(torch.nn.Linear):
    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.weight)


@pytest.mark.parametrize("change", [leave_the_bias_out, lambda one: setattr(one, "__class__", WithoutBias)])
def test_a_forward_that_may_leave_out_the_bias_is_noticed_and_the_lock_can_be_taken_off(llama, lock, change):
    before, handle = logits(llama), apply_lock(llama, lock)
    for projection in attention_of(llama).projections:
        change(projection)
    assert torch.equal(logits(llama), before)
    for recompute in (True, False):
        with pytest.raises(VerificationError, match="another forward after it was locked"):
            handle.verify(recompute=recompute)
    handle.remove()
    apply_lock(llama, lock).verify()
    assert not torch.allclose(logits(llama), before, atol=1e-3)


def test_a_bias_that_is_made_of_others_after_locking_is_an_error_of_ours(llama, lock):
    handle = apply_lock(llama, lock)
    projection = attention_of(llama).projections[lock.layers[0]]
    torch.nn.utils.parametrize.register_parametrization(projection, "bias", torch.nn.Identity())
    for attempt in (handle.verify, handle.remove):
        with pytest.raises(VerificationError, match=r"made anew of other tensors.*remove_parametrizations"):
            attempt()
    torch.nn.utils.parametrize.remove_parametrizations(projection, "bias")
    handle.remove()


def test_locking_makes_nothing_where_new_tensors_go_by_default(llama, lock):
    with torch.device("meta"):
        handle = apply_lock(llama, lock)
        handle.verify()
        handle.remove()


def test_a_block_that_casts_its_model_ends_unlocked_and_with_its_own_error(llama, lock):
    def cast_and_fail() -> None:
        with apply_lock(llama, lock):
            llama.half()
            llama.float()
            raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        cast_and_fail()
    assert handle_of(llama) is None


@pytest.mark.parametrize("wrap", [lambda model: model, with_an_adapter])
def test_layers_that_share_a_projection_are_refused_and_left_as_they_were(llama, wrap):
    lock = lock_for(llama)
    llama.model.layers[2] = llama.model.layers[1]
    model = wrap(llama)
    before = logits(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"Layers 1 and 2 .* share one .*deepcopy"):
        apply_lock(model, lock)
    assert torch.equal(logits(model), before)


def test_weights_of_which_no_bias_can_be_made_are_named_as_the_fault(llama, lock):
    weight = attention_of(llama).projections[lock.layers[0]].weight
    fresh = weight.detach().clone()
    for broken, message in ((float("nan"), "is no number: the weights"), (0.0, "At any alpha .* is zero")):
        weight.data.fill_(broken)
        with pytest.raises(AlphaError, match=rf"{message}.*fine-tune again"):
            apply_lock(llama, lock)
        assert handle_of(llama) is None
    weight.data.copy_(fresh)
    apply_lock(llama, lock).verify()


def test_removing_refuses_to_destroy_a_bias_that_somebody_changed(llama, lock):
    handle = apply_lock(llama, lock)
    bias = attention_of(llama).projections[lock.layers[-1]].bias
    true_values = bias.data.clone()
    bias.data[0] += 1.0
    changed = state_of(llama)
    with pytest.raises(VerificationError, match=f"Layer {lock.layers[-1]}: .*was changed"):
        handle.remove()
    assert state_of(llama) == changed  # the other layers' biases are still in place, too
    bias.data.copy_(true_values)
    handle.remove()
    assert handle_of(llama) is None


def test_weights_can_be_trained_while_locked_and_the_bias_takes_no_part(llama, lock):
    handle = apply_lock(llama, lock)
    names = [name for name, parameter in llama.named_parameters() if not parameter.requires_grad]
    assert names == [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in lock.layers]
    llama(torch.tensor([[5, 17, 200]]), labels=torch.tensor([[5, 17, 200]])).loss.backward()
    assert all(llama.get_parameter(name).grad is None for name in names)
    handle.remove()


def test_the_handle_says_what_it_is(llama, lock):
    handle = apply_lock(llama, lock, 2.0)
    assert repr(handle) == f"LockHandle({lock!r}, alpha=2.0, on)"
    handle.remove()
    assert repr(handle).endswith("removed)")


@pytest.mark.parametrize(
    ("family", "dtype", "alpha"),
    [
        ("llama", torch.float32, 1e-320),
        ("llama", torch.float16, 1e-8),
        ("llama", torch.bfloat16, 1e-39),
        ("gpt2", torch.float32, 1e-320),
    ],
)
def test_an_alpha_of_which_nothing_is_left_locks_nothing_and_is_refused(family, dtype, alpha):
    model = tiny_model(family, dtype=dtype)
    before = state_of(model)
    with pytest.raises(AlphaError) as info:
        apply_lock(model, lock_for(model), alpha)
    assert info.value.next_step
    assert state_of(model) == before
    assert handle_of(model) is None


@pytest.mark.parametrize("exponent", range(-12, 5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_can_be_applied_can_be_verified(dtype, exponent):
    model = tiny_model("llama", dtype=dtype)
    try:
        handle = apply_lock(model, lock_for(model), 10.0**exponent)
    except AlphaError:
        assert (dtype, exponent < -2) == (torch.float16, True)
    else:
        handle.verify()
