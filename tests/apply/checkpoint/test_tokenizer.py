from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlflow_safelock.apply import save_locked_checkpoint
from mlflow_safelock.errors import CheckpointError
from tests.models import CHATML, tiny_tokenizer

TEXTS = ["How do I bake bread?", "  two spaces, 3.14159", "<s>hello<|im_end|> there"]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tokens(folder: Path) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]


@pytest.fixture
def with_tokenizer(save_fine_tune):
    """A fine-tune whose tokenizer claims a class, as checkpoints on the hub do, rightly or not."""

    def save(family: str, style: str, claimed_class: str | None):
        source, lock = save_fine_tune(family, vocab_size=1024)
        tiny_tokenizer(CHATML, style=style).save_pretrained(source)
        path = source / "tokenizer_config.json"
        change(path, tokenizer_class=claimed_class)
        if claimed_class is None:
            path.write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
        return source, lock

    return save


@pytest.mark.parametrize(
    "claimed_class", [None, "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize("style", ["byte_level", "metaspace"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "llama"])
def test_the_locked_folder_loads_the_tokenizer_that_the_source_loads(
    family, style, claimed_class, with_tokenizer, tmp_path
):
    source, lock = with_tokenizer(family, style, claimed_class)
    save_locked_checkpoint(source, tmp_path / "locked", lock)
    original = AutoTokenizer.from_pretrained(source)
    carried = AutoTokenizer.from_pretrained(tmp_path / "locked")
    assert type(carried) is type(original)
    assert carried.backend_tokenizer.to_str() == original.backend_tokenizer.to_str()
    assert tokens(tmp_path / "locked") == tokens(source)
    assert carried.chat_template == CHATML


def test_the_configuration_alone_would_have_changed_it(with_tokenizer, tmp_path):
    # Why the class is written down: this is how Mistral's own checkpoints look.
    source, _ = with_tokenizer("mistral", "metaspace", "LlamaTokenizerFast")
    shutil.copytree(source, tmp_path / "naive")
    change(tmp_path / "naive" / "config.json", model_type="llama")
    assert tokens(tmp_path / "naive") != tokens(source)


def test_a_tokenizer_that_cannot_be_kept_is_refused(with_tokenizer, tmp_path):
    source, lock = with_tokenizer("mistral", "byte_level", "TokenizersBackend")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be loaded"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not (tmp_path / "locked").exists()


def test_a_tokenizer_that_transformers_mends_for_a_mistral_only_is_refused(with_tokenizer, tmp_path):
    # transformers looks at large vocabularies only, such as Mistral-Nemo's.
    source, lock = with_tokenizer("mistral", "byte_level", "TokenizersBackend")
    rules = json.loads((source / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary.update({f"unused{number}": number for number in range(len(vocabulary), 100_001)})
    (source / "tokenizer.json").write_text(json.dumps(rules))
    change(source / "config.json", transformers_version="4.57.0")
    change(source / "tokenizer_config.json", fix_mistral_regex=True)
    with pytest.raises(CheckpointError, match="would be another one in a locked checkpoint"):
        save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not (tmp_path / "locked").exists()


def test_a_fine_tune_without_tokenizer_is_locked_without(with_tokenizer, tmp_path):
    source, lock = with_tokenizer("mistral", "byte_level", None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    report = save_locked_checkpoint(source, tmp_path / "locked", lock)
    assert not [name for name in report.files if "token" in name]
