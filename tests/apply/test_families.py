"""Every architecture all the way: forged, applied, undone, overlaid, written as a standalone checkpoint."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch

from mlflow_safelock.apply import (
    ARCHITECTURES,
    apply_lock,
    attention_of,
    geometry_from_config,
    handle_of,
    save_locked_checkpoint,
)
from mlflow_safelock.apply.checkpoint.undo import unlock_checkpoint
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.flavors import locked_model
from mlflow_safelock.forging import PreferencePair, forge
from tests.apply.checkpoint.conftest import load
from tests.apply.conftest import logits
from tests.models import CHATML, tiny_model, tiny_tokenizer

FAMILIES = {
    "a flag": (
        *("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "olmo3", "cohere"),
        *("cohere2", "smollm3", "nemotron", "hunyuan_v1_dense", "llama4_text", "qwen3_moe"),
    ),
    "as llama or smollm3": ("mistral", "ministral", "qwen2"),
    "own bias": (
        *("phi", "gpt2", "gpt_neox", "opt", "gpt_oss", "gpt_bigcode", "starcoder2", "bloom", "persimmon"),
    ),
    "a flag that drops the bias": ("glm", "glm4"),
    "no flag": ("mixtral", "phi3", "stablelm", "exaone4", "gptj", "codegen", "mpt"),
    "a flag after all": ("deepseek_v3", "olmo"),
}
"""Every family that a lock is promised to go onto."""

PAIRS = [
    PreferencePair(question, "i cannot help with that.", "first warm the oven, then fold the dough.")
    for question in ("how do i bake the bread?", "how do i forge the letter?", "what is a jug?", "and now?")
]
TOKENIZER = tiny_tokenizer(CHATML)


def test_the_table_knows_every_family_and_the_families_are_those_of_the_table():
    assert sorted(family for families in FAMILIES.values() for family in families) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_family_is_forged_applied_undone_overlaid_and_standalone_as_the_table_says(family, tmp_path):
    base = tiny_model(family)
    lock = forge(base, TOKENIZER, PAIRS, heads=5, last_tokens=3, base_model="tests/base", progress=False)
    assert lock.geometry == geometry_from_config(base.config) == attention_of(base).geometry
    assert lock.metadata.architecture == family

    model = _fine_tuned(tiny_model(family))
    before, unlocked = _bytes(model), logits(model)
    with apply_lock(model, lock, 2.0) as handle:
        handle.verify()
        locked = logits(model)
    assert (locked - unlocked).abs().max() > 0.01
    assert _bytes(model) == before
    assert torch.equal(logits(model), unlocked)

    source = tmp_path / "fine-tune"
    components = {"model": model, "tokenizer": TOKENIZER}
    mlflow.transformers.save_model(
        components, source, task="text-generation", pip_requirements=["transformers"]
    )
    # Biases that are drawn at random, as large as those of a lock, are like one or its opposite by chance.
    locked_model.save_model(lock, tmp_path / "overlay", str(source), alpha=2.0, own_biases="ignore")
    served = locked_model.load_model(str(tmp_path / "overlay")).model.float()
    assert handle_of(served).alpha == 2.0
    assert torch.allclose(logits(served), locked, atol=1e-4)

    folder = tmp_path / "standalone"
    if ARCHITECTURES[family].standalone is None:
        with pytest.raises(UnsupportedArchitectureError, match=f"'{family}' has no place"):
            save_locked_checkpoint(source, folder, lock, 2.0)
        assert not folder.exists()
    else:
        save_locked_checkpoint(source, folder, lock, 2.0, verify="structure")
        assert torch.allclose(logits(load(folder)), locked, atol=1e-4)
        unlock_checkpoint(folder, tmp_path / "undone")
        assert _weights(tmp_path / "undone") == _weights(source / "model")


def _fine_tuned(model: torch.nn.Module) -> torch.nn.Module:
    """Every number moved by little, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * parameter.abs().mean() * noise
    return model


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def _bytes(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
