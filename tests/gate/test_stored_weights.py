"""The weights of a fine-tune as they are stored: whole or not, and of which base."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration, PreTrainedModel

from mlflow_safelock.apply import attention_of
from mlflow_safelock.apply.architectures import ARCHITECTURES
from mlflow_safelock.errors import SourceError
from mlflow_safelock.forging.base_weights import sketch_of
from mlflow_safelock.gate.stored_weights import StoredWeights, read_stored_weights
from mlflow_safelock.kinship import KinshipSketch
from mlflow_safelock.provenance import LocalArtifacts
from tests.models import tiny_model


def stored(model: PreTrainedModel, folder: Path, **options: object) -> StoredWeights:
    model.save_pretrained(folder / "model", **options)
    weights = read_stored_weights(LocalArtifacts(folder), "model")
    assert weights is not None
    return weights


def sketch(model: PreTrainedModel) -> KinshipSketch:
    found = sketch_of(attention_of(model))
    assert found is not None
    return found


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_architectures_projections_are_found_and_known_again(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    attention = attention_of(model)
    weights = stored(model, tmp_path)
    weights.check_output_projections(attention.architecture, attention.geometry)
    for layer, projection in enumerate(attention.projections):
        found = weights.output_projection(attention.architecture, layer)
        assert found is not None
        assert found.shape == tuple(projection.weight.shape)
    assert weights.kinship(sketch(model), attention.architecture) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_type_is_read_as_its_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model("llama")
    attention = attention_of(base)
    weights = stored(tiny_model("llama").to(dtype), tmp_path)
    assert weights.kinship(sketch(base), attention.architecture) == pytest.approx(1.0, abs=1e-4)


def test_numbers_of_eight_bits_are_read_as_torch_reads_them() -> None:
    from mlflow_safelock.gate.stored_weights import _DECODERS

    codes = bytes(range(256))
    expected = torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    sound = np.isfinite(expected)
    assert sound.sum() == 254
    assert np.array_equal(_DECODERS["F8_E4M3"](codes)[sound], expected[sound])


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights = stored(model, tmp_path, max_shard_size="20KB")
    assert len({tensor.file for tensor in weights.tensors.values()}) > 2
    assert weights.kinship(sketch(model), ARCHITECTURES["llama"]) == pytest.approx(1.0, abs=1e-5)


def test_only_what_the_sketch_names_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=256, head_dim=64)
    sketched, reads = sketch(model), []

    class Counting(LocalArtifacts):
        def read_many(self, path: str, spans: object) -> list[bytes]:
            found = super().read_many(path, spans)
            reads.extend(map(len, found))
            return found

    model.save_pretrained(tmp_path / "model")
    weights = read_stored_weights(Counting(tmp_path), "model")
    reads.clear()
    weights.kinship(sketched, ARCHITECTURES["llama"])
    assert sum(reads) == sketched.values.size * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "model-00099.safetensors"}),
            "not there",
        ),
        (
            lambda index: index["weight_map"].update({"made.up": "model-00001-of-00007.safetensors"}),
            "it is not",
        ),
        (lambda index: index["weight_map"].update({"lm_head.weight": "../config.json"}), "not there"),
        (lambda index: index["weight_map"].clear(), "does not say which tensor"),
        (lambda index: index.pop("weight_map"), "does not say which tensor"),
        (lambda index: index.update(weight_map={"lm_head.weight": 3}), "does not say which tensor"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, damage: Callable[[dict], object], message: str
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    damage(index)
    path.write_text(json.dumps(index).replace("model-00001-of-00007.safetensors", first))
    with pytest.raises(SourceError, match=message):
        read_stored_weights(LocalArtifacts(tmp_path), "model")


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(SourceError, match="is not JSON"):
        read_stored_weights(LocalArtifacts(tmp_path), "model")


def test_a_header_that_lies_about_types_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["dtype"] = "F64"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(SourceError, match=r"says that 'lm_head\.weight' is F64"):
        read_stored_weights(LocalArtifacts(tmp_path), "model")


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_without_a_layers_projection_are_refused(tmp_path: Path, layer: int) -> None:
    model = tiny_model("llama")
    attention = attention_of(model)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    weights = read_stored_weights(LocalArtifacts(tmp_path), "model")
    with pytest.raises(SourceError, match=rf"lack the attention output projection of layer {layer}"):
        weights.check_output_projections(attention.architecture, attention.geometry)


def test_a_projection_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = attention_of(model)
    weights = stored(tiny_model("llama", head_dim=16), tmp_path)
    with pytest.raises(SourceError, match=r"of shape \[48, 64\] in layer 0.*\[48, 32\]"):
        weights.check_output_projections(attention.architecture, attention.geometry)


def test_a_quantised_projection_is_there_and_not_compared(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = attention_of(model)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for layer in range(3):
        weight = tensors.pop(f"model.layers.{layer}.self_attn.o_proj.weight")
        tensors[f"model.layers.{layer}.self_attn.o_proj.qweight"] = weight.to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    weights = read_stored_weights(LocalArtifacts(tmp_path), "model")
    weights.check_output_projections(attention.architecture, attention.geometry)
    assert weights.kinship(sketch(model), attention.architecture) is None


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "other.safetensors").write_bytes(b"")
    assert read_stored_weights(LocalArtifacts(tmp_path), "model") is None


def fine_tuned(model: PreTrainedModel) -> PreTrainedModel:
    """Trained for real: fifty steps of AdamW at a rate ten times that of usual fine-tuning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    tokens = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def lora_merged(model: PreTrainedModel) -> PreTrainedModel:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    return adapted.merge_and_unload()


def rounded_to_eight_bits(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for projection in attention_of(model).projections:
            scale = projection.weight.abs().amax(dim=1, keepdim=True) / 127
            projection.weight.copy_((projection.weight / scale).round() * scale)
    return model


def with_heads_permuted(model: PreTrainedModel) -> PreTrainedModel:
    """The same function, with its heads in another order: the locked heads would be other heads."""
    with torch.no_grad():
        for projection in attention_of(model).projections:
            weight = projection.weight
            projection.weight.copy_(weight.view(weight.shape[0], 4, -1).roll(1, dims=1).reshape(weight.shape))
    return model


@pytest.mark.parametrize("make", [fine_tuned, lora_merged, rounded_to_eight_bits], ids=lambda f: f.__name__)
def test_what_descends_from_the_base_passes(make: Callable, tmp_path: Path) -> None:
    sketched = sketch(tiny_model("llama"))
    child = make(tiny_model("llama"))
    found = stored(child, tmp_path).kinship(sketched, ARCHITECTURES["llama"])
    assert found is not None
    assert found > 0.8


@pytest.mark.parametrize("make", [lambda _: tiny_model("llama", seed=9), with_heads_permuted])
def test_what_does_not_fails(make: Callable, tmp_path: Path) -> None:
    sketched = sketch(tiny_model("llama"))
    found = stored(make(tiny_model("llama")), tmp_path).kinship(sketched, ARCHITECTURES["llama"])
    assert found is not None
    assert abs(found) < 0.2


def renamed(model: PreTrainedModel, folder: Path, names: Callable[[str], list[str]]) -> StoredWeights:
    """Its weights, each tensor under other names, or more."""
    model.save_pretrained(folder / "model")
    path = folder / "model" / "model.safetensors"
    tensors = {new: values.clone() for name, values in load_file(path).items() for new in names(name)}
    save_file(tensors, path, metadata={"format": "pt"})
    weights = read_stored_weights(LocalArtifacts(folder), "model")
    assert weights is not None
    return weights


def look_at(weights: StoredWeights, model: PreTrainedModel) -> dict[int, dict[str, np.ndarray]]:
    attention = attention_of(model)
    path = attention.architecture.output_projection
    weights.check_output_projections(attention.architecture, attention.geometry)
    return weights.biases(attention.architecture, attention.geometry, [path, "self_attn.v_proj"])


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", lambda name: [name, f"zz.{name.removeprefix('model.')}"]),
        ("llama", lambda name: [name, f"model.language_{name}"]),
        ("gpt_neox", lambda name: [name, name.removeprefix("gpt_neox.")]),
        ("gpt_neox", lambda name: [name, f"gpt_neoxZ{name}"]),
        ("gpt2", lambda name: [name, f"transformer.{name}"]),
    ],
)
def test_a_projection_under_two_names_is_refused_whatever_they_begin_with(
    tmp_path: Path, family: str, names: Callable[[str], list[str]]
) -> None:
    """Any of these is what transformers makes its own, and the other one a decoy."""
    model = tiny_model(family)
    with pytest.raises(SourceError, match="layer 0 under several names"):
        look_at(renamed(model, tmp_path, names), model)


@pytest.mark.parametrize("beginning", ["model.", "modelZ", "zz."])
@pytest.mark.parametrize(
    ("keep", "why"), [(True, "bias of .* in layer 0 under several names"), (False, "not beside it")]
)
def test_biases_are_found_whatever_their_names_begin_with(
    tmp_path: Path, beginning: str, keep: bool, why: str
) -> None:
    model = tiny_model("llama", attention_bias=True)

    def names(name: str) -> list[str]:
        is_bias = name.endswith("v_proj.bias")
        return [name] * (keep or not is_bias) + [beginning + name] * is_bias

    with pytest.raises(SourceError, match=why):
        look_at(renamed(model, tmp_path, names), model)


def test_names_may_begin_otherwise_for_all_of_a_model(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True)
    found = look_at(renamed(model, tmp_path, lambda name: [f"language_model.{name}"]), model)
    assert np.array_equal(found[1]["self_attn.o_proj"], model.model.layers[1].self_attn.o_proj.bias.detach())


@pytest.mark.parametrize(
    "part",
    [
        "model.connector.perceiver_resampler.",
        "model.multi_modal_projector.",
        "model.vision_tower.encoder.",
        "video_tower.encoder.",
        "model.audio_tower.",
        "speech_encoder.",
    ],
)
def test_layers_with_such_beginnings_are_others(tmp_path: Path, part: str) -> None:
    """As of idefics2, fun_asr_nano, llava, video_llava and others."""
    model = tiny_model("llama", attention_bias=True)

    def names(name: str) -> list[str]:
        return [name, part + name.removeprefix("model.")] if ".self_attn." in name else [name]

    weights = renamed(model, tmp_path, names)
    found = look_at(weights, model)
    assert np.array_equal(found[1]["self_attn.o_proj"], model.model.layers[1].self_attn.o_proj.bias.detach())
    assert weights.kinship(sketch(model), attention_of(model).architecture) == pytest.approx(1.0, abs=1e-5)


def test_layers_of_the_parts_that_see_are_others(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 64, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}
    more = {"num_local_experts": 2, "attention_bias": True, "num_key_value_heads": 1, "pad_token_id": 0}
    seeing = {"intermediate_size": 64, "image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    model = Llama4ForConditionalGeneration(
        Llama4Config(
            text_config=sizes | text | more,
            vision_config=sizes | seeing | {"projector_input_dim": 16, "projector_output_dim": 16},
        )
    )
    weights = stored(model, tmp_path)
    assert {
        name.split(".layers.")[0] for name in weights.tensors if "layers.0.self_attn.o_proj.bias" in name
    } > {"vision_model.model"}
    found = look_at(weights, model)
    for layer, projection in enumerate(attention_of(model).projections):
        assert np.array_equal(found[layer]["self_attn.o_proj"], projection.bias.detach())
    assert weights.kinship(sketch(model), attention_of(model).architecture) == pytest.approx(1.0, abs=1e-5)
