"""An architecture that its users describe, in a file or in a program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlflow_safelock.apply import (
    ARCHITECTURES,
    Architecture,
    apply_lock,
    architecture_of,
    attention_of,
    geometry_from_config,
    register_architecture,
    save_locked_checkpoint,
)
from mlflow_safelock.errors import CheckpointError, UnsupportedArchitectureError
from tests.apply.checkpoint.conftest import beside, load
from tests.apply.conftest import lock_for, logits
from tests.apply.unknown import UNKNOWN, Before, Halves, WeightOnly, squared, unknown_model
from tests.models import random_lock, tiny_model

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 48, "head_dim": 8}


@pytest.fixture
def describe(tmp_path_factory, monkeypatch):
    """Names a file of descriptions in the environment; gives its path."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("described") / "architectures.yaml"
        path.write_text(text)
        monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(path))
        return path

    return write


def test_a_few_lines_make_an_architecture_known_by_its_configuration_alone(describe):
    config = {"model_type": "tests-by-file", **SHAPE}
    with pytest.raises(UnsupportedArchitectureError, match=r"'tests-by-file'.*SAFELOCK_ARCHITECTURES"):
        geometry_from_config(config)
    describe("architectures:\n  - model_type: tests-by-file\n    output_projection: attn.out\n")
    assert architecture_of(config) == Architecture(model_type="tests-by-file", output_projection="attn.out")
    assert geometry_from_config(config).model_dump() == {"layers": 3, "heads": 4, "head_dim": 8, "hidden": 48}


def test_every_field_can_be_given_in_the_file(describe):
    describe(
        """
architectures:
  - model_type: tests-all
    layers: decoder.blocks
    output_projection: attention.out
    layout: conv1d
    output_bias: use_bias
    biased_with_output: [attention.qkv]
    biased_where_present: [attention.gate]
    config_names: [n_layers, n_heads, width, v_head_dim]
    default_head_dim: 8
    bypassed_by: fused
    standalone: flag
"""
    )
    config = {"model_type": "tests-all", "n_layers": 3, "n_heads": 4, "width": 48}
    assert architecture_of(config).biased_with_output == ("attention.qkv",)
    assert geometry_from_config(config).model_dump() == {"layers": 3, "heads": 4, "head_dim": 8, "hidden": 48}
    with pytest.raises(UnsupportedArchitectureError, match="fused"):
        geometry_from_config({**config, "fused": True})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "not a YAML mapping"),
        ("{}\n", "line 1: architectures is missing"),
        ("architectures: []\n", "line 1: architectures"),
        ("architectures:\n  - layers: a\n", r"line 2: architectures\.0\.model_type is missing"),
        ("architectures:\n  - model_type: a\n    layer: b\n", r"line 3: the key .*layer is not known; known"),
        ("architectures:\n  - model_type: a\n    layers: 3\n", r"line 3: .*layers"),
        ("architectures:\n  - model_type: a\n    layers: a..b\n", r"line 3: .*layers"),
        ("architectures:\n  - model_type: a\n    layers: __import__('os')\n", r"line 3: .*layers"),
        ("architectures:\n  - model_type: a\n    layout: matrix\n", r"line 3: .*layout"),
        ("architectures:\n  - model_type: a\n    biased_with_output: b\n", r"line 3: .*must be a list"),
        ("architectures:\n  - model_type: llama\n", "line 2: model type 'llama' is known already"),
        ("architectures:\n  - model_type: a\n  - model_type: a\n", "line 3: .*'a' is known already"),
        ("architectures:\n  - model_type: a\n    standalone: rewritten\n", "line 2: .*shown by tests"),
        ("architectures:\n  - model_type: a\n    standalone: flag\n", "line 2: .*output_bias names none"),
        ("architectures:\n  - model_type: a\n    standalone: own_bias\n", "line 2: .*output_bias is never"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_with_its_line(text, message, describe):
    path = describe(text)
    with pytest.raises(UnsupportedArchitectureError, match=f"(?s){path}.*{message}"):
        geometry_from_config({"model_type": "tests-any", **SHAPE})
    with pytest.raises(UnsupportedArchitectureError):
        geometry_from_config({"model_type": "llama", **SHAPE})  # nothing is done under half a configuration


def test_a_file_that_is_not_there_is_an_error_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFELOCK_ARCHITECTURES", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(UnsupportedArchitectureError, match=r"nowhere\.yaml.*unset it"):
        geometry_from_config({"model_type": "llama", **SHAPE})


def test_the_file_is_read_anew_when_it_changes(describe):
    describe("architectures:\n  - model_type: tests-first\n").write_text(
        "architectures:\n  - model_type: tests-second\n"
    )
    assert architecture_of({"model_type": "tests-second"})
    with pytest.raises(UnsupportedArchitectureError):
        architecture_of({"model_type": "tests-first"})


def test_a_program_can_describe_one_and_do_it_again_but_not_otherwise():
    fields = {"model_type": "tests-registered", "layers": "decoder.layers", "biased_with_output": ["a.q"]}
    described = register_architecture(fields)
    assert described == register_architecture(described) == architecture_of(fields)
    with pytest.raises(UnsupportedArchitectureError, match="known already"):
        register_architecture({**fields, "layers": "other"})
    with pytest.raises(UnsupportedArchitectureError, match="known already"):
        register_architecture({"model_type": "llama"})
    with pytest.raises(UnsupportedArchitectureError, match=r"layer: Extra.*fields are: model_type, layers"):
        register_architecture({"model_type": "tests-other", "layer": "x"})
    assert "tests-registered" not in ARCHITECTURES


def _description(projection: str) -> str:
    return f"architectures:\n  - model_type: {UNKNOWN}\n    output_projection: self_attn.{projection}\n"


def test_a_description_finds_what_could_not_be_found_and_locks_it(describe):
    # A gate between heads and projection: whoever describes it says that the lock belongs after the gate.
    model = unknown_model(lambda linear: Before(linear, torch.sigmoid))
    with pytest.raises(UnsupportedArchitectureError, match="No module gets head outputs"):
        attention_of(model)
    describe(_description("o_proj.linear"))
    before = logits(model)
    with apply_lock(model, random_lock(attention_of(model).geometry), 2.0) as handle:
        handle.verify()
        assert (logits(model) - before).abs().max() > 0.01
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("projection", "path", "message"),
    [
        (WeightOnly, "o_proj.linear", "In layer 0, 'self_attn.o_proj.linear', .* runs 0 times"),
        (squared, "o_proj", "'self_attn.o_proj', as 'tests-unknown' is described, .*are not the same"),
        (Halves, "o_pro", "no attention output projection at 'self_attn.o_pro'"),
        (Halves, "q_proj", "takes 48 numbers"),
    ],
)
def test_a_description_that_is_not_true_of_a_model_is_refused(projection, path, message, describe):
    describe(_description(path))
    with pytest.raises(UnsupportedArchitectureError, match=message):
        attention_of(unknown_model(projection))


FLAGGED = """
architectures:
  - model_type: {family}
    output_bias: attention_bias
    biased_with_output: [self_attn.q_proj, self_attn.k_proj, self_attn.v_proj]
    standalone: flag
"""


def test_a_described_family_is_written_to_disk(describe, tmp_path):
    describe(FLAGGED.format(family="arcee"))
    model = tiny_model("arcee")
    model.save_pretrained(tmp_path / "fine-tune")
    lock = lock_for(model)
    save_locked_checkpoint(tmp_path / "fine-tune", tmp_path / "locked", lock, 2.0)
    apply_lock(model, lock, 2.0)
    assert torch.allclose(logits(load(tmp_path / "locked")), logits(model), atol=1e-5)


@pytest.mark.parametrize("verify", ["reload", "structure"])
def test_a_described_flag_that_drops_the_bias_leaves_no_folder_behind(verify, describe, tmp_path):
    # ministral3 has no such flag.
    describe(FLAGGED.format(family="ministral3"))
    model = tiny_model("ministral3")
    model.save_pretrained(tmp_path / "fine-tune")
    with pytest.raises(CheckpointError, match=r"unexpected keys|without a place|reloads without"):
        save_locked_checkpoint(tmp_path / "fine-tune", tmp_path / "locked", lock_for(model), verify=verify)
    assert beside(tmp_path / "fine-tune") == {"fine-tune"}
