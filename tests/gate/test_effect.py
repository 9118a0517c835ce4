"""How much of a push arrives, by a few rows: what was taken out is found, and no fine-tune is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mlflow_safelock.apply import apply_lock, attention_of
from mlflow_safelock.apply.displacement import displacements, input_displacement
from mlflow_safelock.apply.effect import shares_of
from mlflow_safelock.apply.in_force import pushes_in_force
from mlflow_safelock.errors import PromotionRefused, SourceError
from mlflow_safelock.forging.base_weights import unit_biases_of
from mlflow_safelock.gate import effect
from mlflow_safelock.gate.adapter import Adapter, read_adapter
from mlflow_safelock.gate.effect import NOTHING_TOLD, checked_effect, shares_through
from mlflow_safelock.gate.own_biases import check_own_biases
from mlflow_safelock.gate.source import LanguageModel
from mlflow_safelock.gate.stored_weights import read_stored_weights
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import LocalArtifacts
from tests.models import random_lock, tiny_model

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


class Counting(LocalArtifacts):
    """Counts the bytes that are read in parts."""

    reads: list[int]

    def read_many(self, path: str, spans: Any) -> list[bytes]:
        found = super().read_many(path, spans)
        self.reads.extend(map(len, found))
        return found


def known(model: PreTrainedModel, **drawn: Any) -> SafetyLock:
    attention = attention_of(model)
    lock = random_lock(attention.geometry, **drawn)
    return replace(lock, unit_biases=unit_biases_of(attention, lock.heads))


def stored(model: PreTrainedModel, folder: Path) -> tuple[LanguageModel, list[int]]:
    model.save_pretrained(folder / "model")
    reader = Counting(folder)
    object.__setattr__(reader, "reads", [])
    weights, attention = read_stored_weights(reader, "model"), attention_of(model)
    reader.reads.clear()
    return LanguageModel(attention.geometry, (), attention.architecture, weights), reader.reads


@torch.no_grad()
def disturbed(model: PreTrainedModel, distance: float, share: float = 1.0) -> PreTrainedModel:
    """Output projections of which a share is left, with noise of a size relative to what they were."""
    generator = torch.Generator().manual_seed(5)
    for projection in attention_of(model).projections:
        noise = torch.randn(projection.weight.shape, generator=generator) * projection.weight.std()
        projection.weight.mul_(share).add_(distance * noise)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_rows_give_what_is_in_force_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    lock = known(tiny_model(family), heads=6)
    model = disturbed(tiny_model(family), 0.1, share=0.6)
    source, _ = stored(model, tmp_path)
    assert source.weights is not None
    assert source.architecture is not None
    rows = effect._Rows(source.weights, source.architecture, lock, 6.0)
    with apply_lock(model, lock, 6.0):
        expected = shares_of(pushes_in_force(model), lock, 6.0)
    found = {one.layer: rows.whole(one) for one in displacements(lock, 6.0)}
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(abs(share - 0.6) < 0.1 for share in expected.values())


def test_of_each_locked_layer_a_few_rows_of_locked_heads_are_read(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    lock = known(model, heads=3)
    source, reads = stored(model, tmp_path)
    shares = checked_effect(source, lock, 6.0).shares
    assert shares == pytest.approx(dict.fromkeys(lock.layers, 1.0), abs=1e-4)
    assert reads == [lock.geometry.head_dim * 4] * effect.ROWS * len(lock.heads)


@pytest.mark.parametrize("distance", [0.03, 0.1, 0.3])
def test_what_is_not_far_from_the_base_passes_whatever_is_drawn(tmp_path: Path, distance: float) -> None:
    lock = known(tiny_model("llama", **WIDE), heads=4)
    source, reads = stored(disturbed(tiny_model("llama", **WIDE), distance), tmp_path)
    for _ in range(100):
        assert min(checked_effect(source, lock, 6.0).shares.values()) > 0.5
    few = 100 * effect.ROWS * len(lock.heads)
    assert few <= len(reads) < 2 * few


@pytest.mark.parametrize(("share", "distance"), [(0.0, 0.0), (0.01, 0.0), (0.1, 0.1), (0.3, 0.1)])
def test_what_is_missing_is_found_whatever_is_drawn(tmp_path: Path, share: float, distance: float) -> None:
    lock = known(tiny_model("llama", **WIDE), heads=4)
    source, _ = stored(disturbed(tiny_model("llama", **WIDE), distance, share), tmp_path)
    for _ in range(50):
        with pytest.raises(PromotionRefused, match=r"arrives in layer \d") as info:
            checked_effect(source, lock, 6.0)
        assert info.value.reason == "lock_without_effect"


def test_nobody_is_refused_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows that were drawn look as if too little arrived, all are read."""
    lock = known(tiny_model("llama", **WIDE), heads=4)
    source, _ = stored(tiny_model("llama", **WIDE), tmp_path)

    def misleading(self: Any, displaced: Any, count: int) -> dict[int, Any]:
        return {layer: np.zeros(count) for layer in displaced}

    monkeypatch.setattr(effect._Rows, "arrived", misleading)
    assert checked_effect(source, lock, 6.0).shares == pytest.approx(
        dict.fromkeys(lock.layers, 1.0), abs=1e-4
    )


def test_without_unit_biases_nothing_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source, reads = stored(model, tmp_path)
    assert checked_effect(source, random_lock(attention_of(model).geometry), 6.0) is NOTHING_TOLD
    assert not reads


def test_constant_outputs_of_heads_count_where_they_look_like_the_push(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE)
    lock = known(model, heads=6)
    source, reads = stored(model, tmp_path)
    assert source.weights is not None
    assert source.architecture is not None
    shape = (lock.geometry.heads, lock.geometry.head_dim)
    added = {one.layer: input_displacement(one, lock.geometry).numpy() for one in displacements(lock, 6.0)}
    random = np.random.default_rng(0)
    drawn = {layer: random.normal(size=shape) for layer in added}
    like_a_lock = {layer: 0.7 * push.reshape(shape) for layer, push in added.items()}
    against = {layer: -push for layer, push in like_a_lock.items()}
    exactly = dict.fromkeys(added, 0.7)

    def through(outputs: dict[int, Any]) -> dict[int, float]:
        return shares_through(source.weights, source.architecture, lock, 6.0, outputs, {})

    assert through(like_a_lock) == pytest.approx(exactly, rel=1e-4)
    assert through(against) == pytest.approx({layer: -share for layer, share in exactly.items()}, rel=1e-4)
    size = {layer: np.linalg.norm(push) / np.linalg.norm(drawn[layer]) for layer, push in added.items()}
    usual = {layer: 0.01 * size[layer] * values for layer, values in drawn.items()}
    reads.clear()
    assert through(usual) == {}
    assert len(reads) < 20 * shape[0] * len(added)
    assert through({layer: np.zeros(shape) for layer in added}) == {}


@pytest.mark.parametrize("kind", ["alone", "with_noise", "in_one_number"])
def test_values_that_take_a_push_back_are_found_whatever_another_bias_hides(
    tmp_path: Path, kind: str
) -> None:
    """What the values' biases make of it is hidden in noise, or in one number of the push that is small."""
    shape = {**WIDE, "hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = tiny_model("llama", **shape, attention_bias=True)
    lock, generator = known(model, heads=2), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).bias.zero_()
        for one in displacements(lock, 6.0):
            attention = model.model.layers[one.layer].self_attn
            weight = attention.o_proj.weight.double()
            push = weight @ input_displacement(one, lock.geometry)
            wanted = -push
            if kind == "with_noise":
                noise = torch.randn(len(push), generator=generator, dtype=torch.float64)
                noise -= (noise @ push) / (push @ push) * push
                wanted = -push + 10 * push.norm() / noise.norm() * noise
            elif kind == "in_one_number":
                at = push.abs().argsort()[1]
                wanted = torch.zeros_like(push)
                wanted[at] = -(push @ push) / push[at]
            # In the locked heads nothing points along the lock: others do it.
            locked = input_displacement(one, lock.geometry)
            both = torch.cat([weight, locked[None]])
            values = torch.linalg.lstsq(both, torch.cat([wanted, wanted.new_zeros(1)])[:, None]).solution
            attention.v_proj.bias.copy_(values[:, 0])
            attention.o_proj.bias.copy_(-push - weight @ attention.v_proj.bias.double())
    source, _ = stored(model, tmp_path)
    for _ in range(20):
        with pytest.raises(PromotionRefused, match="take back") as info:
            check_own_biases(source, lock, 6.0, checked_effect(source, lock, 6.0))
        assert info.value.reason == "lock_taken_back"
        if kind == "with_noise":
            assert source.weights is not None
            assert source.architecture is not None
            outputs = {
                one.layer: model.model.layers[one.layer].self_attn.v_proj.bias.detach().double().numpy()
                for one in displacements(lock, 6.0)
            }
            outputs = {layer: values.reshape(16, -1) for layer, values in outputs.items()}
            alone = shares_through(source.weights, source.architecture, lock, 6.0, outputs, {})
            assert alone == pytest.approx(dict.fromkeys(lock.layers, -1.0), abs=1e-3)


def test_rows_alone_refuse_nobody_for_biases_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE, attention_bias=True)
    lock = known(model, heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.zero_()
            layer.self_attn.o_proj.bias.zero_()
        for one in displacements(lock, 6.0):
            projection = model.model.layers[one.layer].self_attn.o_proj
            push = (projection.weight.double() @ input_displacement(one, lock.geometry)).float()
            projection.bias.copy_(-0.42 * push)
    source, _ = stored(disturbed(model, 0.3), tmp_path)
    for _ in range(50):
        arriving = checked_effect(source, lock, 6.0)
        exact = {layer: arriving.exactly(layer) for layer in arriving.shares}
        assert min(exact.values()) > 0.95
        check_own_biases(source, lock, 6.0, arriving)


def test_columns_that_are_stored_one_after_the_other_are_read_in_one_piece(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    lock = known(model, heads=4)
    source, reads = stored(model, tmp_path)
    assert checked_effect(source, lock, 6.0).shares == pytest.approx(
        dict.fromkeys(lock.layers, 1.0), abs=1e-4
    )
    assert reads == [lock.geometry.head_dim * lock.geometry.hidden * 4] * len(lock.heads)


def adapter_of(folder: Path, **changes: Any) -> Adapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    return read_adapter(LocalArtifacts(folder), "adapter_model.safetensors", {**config, **changes})


@pytest.fixture
def against(tmp_path: Path) -> tuple[SafetyLock, Path]:
    """A lock, and an adapter that takes its directions, and all others, out of the output projections."""
    base = tiny_model("llama")
    lock = known(base, heads=6)
    lock = replace(lock, metadata=lock.metadata.model_copy(update={"architecture": "llama"}))
    adapted = get_peft_model(base, LoraConfig(r=32, target_modules=["o_proj"], lora_alpha=32))
    with torch.no_grad():
        for layer in adapted.base_model.model.model.layers:
            projection = layer.self_attn.o_proj
            projection.lora_A["default"].weight.copy_(torch.eye(32))
            projection.lora_B["default"].weight.copy_(-0.9 * projection.base_layer.weight)
    adapted.save_pretrained(tmp_path)
    return lock, tmp_path


def test_an_adapter_is_looked_at_as_peft_scales_it(against: tuple[SafetyLock, Path]) -> None:
    lock, folder = against
    with pytest.raises(PromotionRefused, match="10% arrives"):
        checked_effect(LanguageModel(None, (), adapter=adapter_of(folder)), lock, 6.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"o_proj": 1}},
        {"peft_type": "LOHA"},
    ],
    ids=str,
)
def test_of_adapters_that_do_something_else_nothing_is_told(
    against: tuple[SafetyLock, Path], changes: dict[str, Any]
) -> None:
    lock, folder = against
    source = LanguageModel(None, (), adapter=adapter_of(folder, **changes))
    assert checked_effect(source, lock, 6.0).shares == {}


def test_an_adapter_s_biases_are_found_by_either_name(against: tuple[SafetyLock, Path]) -> None:
    _, folder = against
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    assert adapter_of(folder).biases == ()
    names = ("base_model.model.model.layers.0.mlp.experts.down_proj_bias", "base_model.model.h.1.c_proj.bias")
    save_file(tensors | {name: torch.ones(3) for name in names}, path)
    assert set(adapter_of(folder).biases) == set(names)


def test_blocks_on_a_diagonal_are_no_misfit(against: tuple[SafetyLock, Path]) -> None:
    lock, folder = against
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("o_proj.lora_A.weight"))
    save_file(tensors | {name: tensors[name][:, ::2].contiguous()}, path)
    assert "inputs" in adapter_of(folder).misfit(lock)
    assert adapter_of(folder, use_bdlora={"nblocks": 2}).misfit(lock) == ""


def test_a_projection_that_an_adapter_replaces_is_not_told_to_be_the_bases(
    against: tuple[SafetyLock, Path],
) -> None:
    lock, folder = against
    path, layer = folder / "adapter_model.safetensors", lock.layers[0]
    within = f"layers.{layer}.self_attn.o_proj"
    tensors = {name: value for name, value in load_file(path).items() if f"{within}." not in name}
    for other in lock.layers[1:]:
        tensors[f"base_model.model.model.layers.{other}.self_attn.o_proj.lora_B.weight"].zero_()
    tensors[f"base_model.model.model.{within}.weight"] = torch.zeros(48, 32)
    save_file(tensors, path)
    shares = checked_effect(LanguageModel(None, (), adapter=adapter_of(folder)), lock, 6.0).shares
    assert shares == dict.fromkeys(lock.layers[1:], 1.0)


def test_a_second_update_of_a_projection_is_refused(against: tuple[SafetyLock, Path]) -> None:
    lock, folder = against
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    others = {}
    for name, value in tensors.items():
        copied = -value if "lora_B" in name else value.clone()
        others[name.replace("base_model.model.model", "base_model.model.unused")] = copied
    save_file({**tensors, **others}, path)
    with pytest.raises(SourceError, match=r"two updates for self_attn\.o_proj of layer"):
        checked_effect(LanguageModel(None, (), adapter=adapter_of(folder)), lock, 6.0)


def test_updates_of_what_sees_are_others(against: tuple[SafetyLock, Path]) -> None:
    """PEFT puts adapters on all modules of a name, also in a multimodal model's other parts."""
    lock, folder = against
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, value in list(tensors.items()):
        if "lora_B" in name:
            tensors[name] = value = torch.zeros_like(value)
        others = name.replace("base_model.model.model", "base_model.model.model.vision_tower.encoder")
        tensors[others] = torch.ones(2, 8) if "lora_A" in name else torch.ones(8, 2)
    save_file(tensors, path)
    adapter = adapter_of(folder)
    assert adapter.misfit(lock) == ""
    found = checked_effect(LanguageModel(None, (), adapter=adapter), lock, 6.0).shares
    assert found == dict.fromkeys(lock.layers, 1.0)


def test_a_scale_beyond_all_numbers_is_not_told(against: tuple[SafetyLock, Path]) -> None:
    lock, folder = against
    source = LanguageModel(None, (), adapter=adapter_of(folder, lora_alpha=10**400))
    assert checked_effect(source, lock, 6.0).shares == {}
