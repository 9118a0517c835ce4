"""A base that accelerate has offloaded or spread gives the lock that it gives in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM

from mlflow_safelock.errors import ForgeError
from mlflow_safelock.forging import forge, starter_preference_pairs
from mlflow_safelock.lock import SafetyLock
from tests.models import CHATML, tiny_model, tiny_tokenizer

PAIRS = starter_preference_pairs()[:10]
TOKENIZER = tiny_tokenizer(CHATML)
CPU = torch.device("cpu")


def base(family: str = "llama", seed: int = 0) -> nn.Module:
    return tiny_model(family, seed=seed, max_position_embeddings=512)


def forged(model: nn.Module, **settings: object) -> SafetyLock:
    return forge(
        model,
        TOKENIZER,
        PAIRS,
        heads=6,
        last_tokens=3,
        base_model="org/base",
        created="2026-01-31T12:00:00+00:00",
        progress=False,
        **settings,
    )


def in_main_memory(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, folder / "offload", execution_device=CPU)


def split(model: nn.Module, folder: Path) -> nn.Module:
    """Loaded with a device map: the embeddings and every other layer on disk."""
    model.save_pretrained(folder / "model")
    places = dict.fromkeys(("model.norm", "lm_head", "model.rotary_emb"), "cpu") | {
        "model.embed_tokens": "disk"
    }
    places |= {f"model.layers.{n}": "cpu" if n % 2 else "disk" for n in range(3)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload"
    )


def whole_layers(model: nn.Module, folder: Path) -> nn.Module:
    """Every layer is brought in as a whole, by a hook on the layer rather than on its parts."""
    places = dict.fromkeys(("model.norm", "lm_head", "model.rotary_emb", "model.embed_tokens"), "cpu")
    places |= {f"model.layers.{n}": "disk" for n in range(3)}
    return dispatch_model(
        model,
        places,
        main_device="cpu",
        offload_dir=folder / "offload",
        force_hooks=True,
        preload_module_classes=["LlamaDecoderLayer"],
    )


WAYS = [in_main_memory, on_disk, split]


def offloaded_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("way", WAYS)
def test_the_lock_is_the_one_forged_in_memory(
    way: Callable[[nn.Module, Path], nn.Module], family: str, tmp_path: Path
) -> None:
    if way is split and family != "llama":
        pytest.skip("the device map is for the names of a Llama")
    expected, model = forged(base(family)), way(base(family), tmp_path)
    outside = offloaded_names(model)
    assert model.get_input_embeddings().weight.device.type == "meta"
    lock = forged(model)
    assert lock == expected
    assert lock.sketch is not None
    assert lock.unit_biases is not None
    assert np.array_equal(lock.unit_biases, expected.unit_biases)
    assert offloaded_names(model) == outside, "what was offloaded is so again"


def test_a_layer_that_comes_in_as_a_whole_goes_back(tmp_path: Path) -> None:
    model = whole_layers(base(), tmp_path)
    outside = offloaded_names(model)
    assert forged(model).scores is not None
    assert offloaded_names(model) == outside


@pytest.mark.parametrize("way", [*WAYS, whole_layers])
def test_a_cache_tells_offloaded_models_apart_and_knows_one_that_is_in_memory(
    way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", base()
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight.mul_(-1.0)
    for name, model in (("one", base()), ("other", other)):
        (tmp_path / name).mkdir()
        expected = forged(model)
        found = forged(way(model, tmp_path / name), cache=cache)
        assert replace(found, unit_biases=None, sketch=None) == replace(
            expected, unit_biases=None, sketch=None
        )
    assert len(list(cache.iterdir())) == 2
    assert forged(base(), cache=cache) == forged(base())
    if way is not split:  # a configuration that was saved says more
        assert len(list(cache.iterdir())) == 2, "the same model in memory finds what was read"


def test_a_model_that_cannot_be_told_from_another_is_not_cached(tmp_path: Path) -> None:
    model = in_main_memory(base(), tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj._hf_hook.weights_map = {}
    with pytest.raises(ForgeError, match=r"model\.layers\.2\.mlp\.up_proj\.weight, .* cannot be read"):
        forged(model, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
