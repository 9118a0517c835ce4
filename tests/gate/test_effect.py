"""How much of a push arrives, by a few rows: what was taken out is found, and no fine-tune is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mlflow_safelock.apply import apply_lock, attention_of
from mlflow_safelock.apply.displacement import displacements, input_displacement
from mlflow_safelock.apply.effect import shares_of
from mlflow_safelock.apply.in_force import pushes_in_force
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.forging.base_weights import unit_biases_of
from mlflow_safelock.gate import effect
from mlflow_safelock.gate.effect import checked_effect, shares_through
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
    shares = checked_effect(source, lock, 6.0)
    assert shares == pytest.approx(dict.fromkeys(lock.layers, 1.0), abs=1e-4)
    assert reads == [lock.geometry.head_dim * 4] * effect.ROWS * len(lock.heads)


@pytest.mark.parametrize("distance", [0.03, 0.1, 0.3])
def test_what_is_not_far_from_the_base_passes_whatever_is_drawn(tmp_path: Path, distance: float) -> None:
    lock = known(tiny_model("llama", **WIDE), heads=4)
    source, reads = stored(disturbed(tiny_model("llama", **WIDE), distance), tmp_path)
    for _ in range(100):
        assert min(checked_effect(source, lock, 6.0).values()) > 0.5
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
    assert checked_effect(source, lock, 6.0) == pytest.approx(dict.fromkeys(lock.layers, 1.0), abs=1e-4)


def test_without_unit_biases_nothing_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source, reads = stored(model, tmp_path)
    assert checked_effect(source, random_lock(attention_of(model).geometry), 6.0) == {}
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
        return shares_through(source.weights, source.architecture, lock, 6.0, outputs)

    assert through(like_a_lock) == pytest.approx(exactly, rel=1e-4)
    assert through(against) == pytest.approx({layer: -share for layer, share in exactly.items()}, rel=1e-4)
    size = {layer: np.linalg.norm(push) / np.linalg.norm(drawn[layer]) for layer, push in added.items()}
    usual = {layer: 0.1 * size[layer] * values for layer, values in drawn.items()}
    reads.clear()
    assert through(usual) == {}
    assert len(reads) == effect.ROWS * shape[0] * len(added)
    assert through({layer: np.zeros(shape) for layer in added}) == {}
