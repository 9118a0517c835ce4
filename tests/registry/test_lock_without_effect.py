"""A fine-tune that was edited so that a lock hardly pushes it is not promoted, written or loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlflow_safelock.apply import apply_lock, attention_of
from mlflow_safelock.cli.main import main
from mlflow_safelock.errors import LockWithoutEffectError, PromotionRefused, VerificationError
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.forging.base_weights import sketch_of, unit_biases_of
from mlflow_safelock.gate import approval, source
from mlflow_safelock.gate.effect import NOTHING_TOLD
from mlflow_safelock.lock import SafetyLock
from tests.gate.test_stored_weights import fine_tuned, rounded_to_eight_bits
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock, state_of
from tests.registry.test_promotion import hub, ledger_rows, open_with_policy, stage

__all__ = ["hub"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing"),
]

TOKENS = torch.arange(5, 25)[None]


@pytest.fixture
def lock(client: MlflowClient) -> SafetyLock:
    """A lock that knows its base's weights."""
    attention, lock = attention_of(fine_tune()["model"]), base_lock()
    known = replace(lock, sketch=sketch_of(attention), unit_biases=unit_biases_of(attention, lock.heads))
    register_lock(known)
    return known


@torch.no_grad()
def rescaled(model: Any, lock: SafetyLock) -> None:
    """The same function: values a hundred times as large, and output projections that take it back."""
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.mul_(100)
        layer.self_attn.o_proj.weight.div_(100)


@torch.no_grad()
def without_the_directions(model: Any, lock: SafetyLock) -> None:
    """The lock's directions taken out of the output projections."""
    width = lock.geometry.head_dim
    for locked in lock.heads:
        columns = model.model.layers[locked.layer].self_attn.o_proj.weight[
            :, locked.head * width : (locked.head + 1) * width
        ]
        direction = torch.from_numpy(locked.direction.astype(np.float32))
        columns.sub_(0.99 * torch.outer(columns @ direction, direction))


@torch.no_grad()
def in_one_layer(model: Any, lock: SafetyLock) -> None:
    """One layer of several is not pushed."""
    layer = model.model.layers[lock.layers[-1]].self_attn
    layer.v_proj.weight.mul_(10)
    layer.o_proj.weight.div_(10)


ATTACKS = pytest.mark.parametrize("attack", [rescaled, without_the_directions, in_one_layer])


def attacked(attack: Callable[..., None], lock: SafetyLock) -> dict[str, Any]:
    components = fine_tune()
    attack(components["model"], lock)
    return components


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def served() -> torch.Tensor:
    return logits(mlflow.pyfunc.load_model("models:/bot/Staging").get_raw_model().model)


def moved(model: Any, lock: SafetyLock) -> float:
    """How far the lock moves a model's logits, relative to their spread."""
    unlocked = logits(model)
    with apply_lock(model, lock, 6.0):
        return float((logits(model) - unlocked).norm() / unlocked.std() / math.sqrt(unlocked.numel()))


def test_these_models_would_be_served_as_if_unlocked(lock: SafetyLock) -> None:
    plain = fine_tune()["model"]
    assert moved(plain, lock) > 1
    for attack in (rescaled, without_the_directions):
        assert moved(attacked(attack, lock)["model"], lock) < 0.1
    assert torch.allclose(logits(attacked(rescaled, lock)["model"]), logits(plain), atol=1e-4)


@ATTACKS
def test_none_of_them_is_promoted(
    client: MlflowClient, tmp_path: Path, lock: SafetyLock, attack: Callable[..., None]
) -> None:
    version = log_fine_tune("bot", attacked(attack, lock))
    before = state_of(client, "bot", version)
    with pytest.raises(
        MlflowException, match=r"\[lock_without_effect\].* \d+% arrives in layer \d.*Use a fine-tune"
    ) as info:
        stage(client, version)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, "bot", version) == before
    assert [row["reason"] for row in ledger_rows(tmp_path)] == ["lock_without_effect"]


@pytest.mark.parametrize("attack", [without_the_directions, in_one_layer])
def test_nor_is_one_loaded_or_written_that_the_gate_could_not_look_at(
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lock: SafetyLock,
    attack: Callable[..., None],
) -> None:
    """As the gate cannot at weights in a form that is not known to it."""
    version = log_fine_tune("bot", attacked(attack, lock))
    source = Path(state_of(client, "bot", version)["location"].removeprefix("file://"))
    monkeypatch.setattr(approval, "checked_effect", lambda *_: NOTHING_TOLD)
    stage(client, version)
    with pytest.raises(LockWithoutEffectError, match=r"% arrives in layer"):
        mlflow.pyfunc.load_model("models:/bot/Staging")
    with pytest.raises(LockWithoutEffectError, match=r"% arrives in layer"):
        locked_model.save_model(lock, tmp_path / "by hand", str(source))
    export = ["export", "models:/bot/Staging", "--output", str(tmp_path / "exported")]
    addresses = [
        *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
        *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
    ]
    done = CliRunner().invoke(main, [*export, *addresses])
    assert done.exit_code
    assert "% arrives in layer" in " ".join(done.output.split())
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{carrier: standalone}]\n")
    other = log_fine_tune("other", attacked(attack, lock))
    with pytest.raises(PromotionRefused, match=r"% arrives in layer") as info:
        client._get_registry_client().store.prepare("other", other)
    assert info.value.reason == "lock_without_effect"
    beside = Path(state_of(client, "other", other)["location"].removeprefix("file://"))
    assert not (tmp_path / "by hand").exists()
    assert not (tmp_path / "exported").exists()
    assert not beside.with_name(f"{beside.name}-safelock").exists()


@pytest.mark.parametrize("make", [fine_tuned, rounded_to_eight_bits], ids=lambda make: make.__name__)
def test_what_was_trained_or_rounded_is_promoted_and_pushed(
    client: MlflowClient, lock: SafetyLock, make: Callable[[Any], Any]
) -> None:
    components = fine_tune()
    make(components["model"])
    stage(client, log_fine_tune("bot", components))
    model = components["model"]
    unlocked = logits(model)
    with apply_lock(model, lock, 6.0):
        expected = logits(model)
    found = served()
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((found - unlocked).norm() / unlocked.norm()) > 0.5


def adapter(lock: SafetyLock, share: float, **config: Any) -> Any:
    """An adapter that takes a share of the lock's push out of the output projections, over the hub's base."""
    base = AutoModelForCausalLM.from_pretrained(fine_tune()["model"].name_or_path)
    rank = len(lock.heads)
    made = LoraConfig(r=rank, target_modules=["o_proj"], **{"lora_alpha": rank, **config})
    adapted = get_peft_model(base, made).eval()
    width, weights = lock.geometry.head_dim, fine_tune()["model"].model.layers
    with torch.no_grad():
        for number, locked in enumerate(lock.heads):
            projection = adapted.base_model.model.model.layers[locked.layer].self_attn.o_proj
            at = slice(locked.head * width, (locked.head + 1) * width)
            direction = torch.from_numpy(locked.direction.astype(np.float32))
            down, up = (projection.lora_A["default"].weight, projection.lora_B["default"].weight)
            if not number or lock.heads[number - 1].layer != locked.layer:
                down.zero_()
            down[number, at] = direction
            taken = weights[locked.layer].self_attn.o_proj.weight[:, at] @ direction
            up[:, number] = -share / projection.scaling["default"] * taken
    return adapted


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 3, "use_rslora": True}])
def test_an_adapter_that_takes_the_directions_out_is_refused(
    client: MlflowClient, lock: SafetyLock, hub: str, config: dict[str, Any]
) -> None:
    adapted = adapter(lock, 0.99, **config)
    assert moved(adapted, lock) < 0.1
    components = {"model": adapted, "tokenizer": AutoTokenizer.from_pretrained(hub)}
    version = log_fine_tune("bot", components)
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"\[lock_without_effect\].* 1% arrives in layer"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_one_that_the_gate_cannot_tell_is_refused_when_it_is_loaded(
    client: MlflowClient, lock: SafetyLock, hub: str
) -> None:
    adapted = adapter(lock, 0.99, alpha_pattern={"o_proj": 4})
    components = {"model": adapted, "tokenizer": AutoTokenizer.from_pretrained(hub)}
    stage(client, log_fine_tune("bot", components))
    with pytest.raises(LockWithoutEffectError, match=r" 1% arrives in layer"):
        mlflow.pyfunc.load_model("models:/bot/Staging")


@pytest.mark.parametrize(
    "config",
    [{"alora_invocation_tokens": [5, 6]}, {"lora_bias": True}],
    ids=lambda config: next(iter(config)),
)
def test_an_adapter_that_can_take_a_lock_back_unseen_is_refused_by_gate_and_loader(
    client: MlflowClient,
    lock: SafetyLock,
    hub: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapted = adapter(lock, 0.1, task_type="CAUSAL_LM", **config)
    components = {"model": adapted, "tokenizer": AutoTokenizer.from_pretrained(hub)}
    version = log_fine_tune("bot", components)
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"\[lock_taken_back\]\. The adapter .*Merge it"):
        stage(client, version)
    assert state_of(client, "bot", version) == before
    # As an earlier version of the gate would have it.
    monkeypatch.setattr(source, "why_untold", lambda _config: None)
    monkeypatch.setattr(approval, "check_own_biases", lambda *_: None)
    stage(client, version)
    with pytest.raises(VerificationError, match=r"The adapter 'default' .*Merge it"):
        mlflow.pyfunc.load_model("models:/bot/Staging")


def test_other_adapters_are_promoted_and_pushed(client: MlflowClient, lock: SafetyLock, hub: str) -> None:
    adapted = adapter(lock, 0.1)
    expected_change = moved(adapted, lock)
    components = {"model": adapted, "tokenizer": AutoTokenizer.from_pretrained(hub)}
    stage(client, log_fine_tune("bot", components))
    unlocked = logits(adapted)
    with apply_lock(adapted, lock, 6.0):
        expected = logits(adapted)
    assert expected_change > 0.5
    assert torch.allclose(served(), expected, atol=1e-4)
    assert not torch.allclose(expected, unlocked, atol=0.1)
