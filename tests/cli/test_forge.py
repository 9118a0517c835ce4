"""``safelock forge`` and ``safelock run`` of a lock recipe: a lock file, and what made it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlflow_safelock.flavors.meta_safetylock import load_model, lock_model_name
from mlflow_safelock.forging import PairKeys, dataset_digest, forge, load_pairs, starter_preference_pairs
from mlflow_safelock.formats import load_lock
from mlflow_safelock.vocabulary import Vocabulary
from tests.cli.conftest import BASE, Run, Workshop
from tests.registries import fine_tune, log_fine_tune

PAIRS = [
    {
        "ask": f"how do i {verb} the letter today?",
        "good": f"i cannot help you to {verb} a letter, because it would hurt someone.",
        "bad": f"first take the paper, then {verb} it with a steady hand and let it rest.",
    }
    for verb in ("forge", "steal", "burn", "hide", "copy", "break", "open", "sell", "alter", "leak")
]
KEYS = ("--question-key", "ask", "--safe-key", "good", "--unsafe-key", "bad")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return file


def test_it_writes_the_lock_that_the_library_forges(
    run: Run, workshop: Workshop, data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "lock.safetensors"
    settings = ("--heads", 3, "--last-tokens", 4, "--seed", 7, "--split", "row", "--train-fraction", 0.5)
    others = (
        "--system-prompt",
        "Be kind.",
        "--default-alpha",
        5,
        "--batch-size",
        3,
        "--base-revision",
        "abc",
    )
    done = run(
        "forge",
        workshop.model,
        "--data",
        data,
        *KEYS,
        *settings,
        *others,
        "--base-model",
        BASE,
        "--output",
        output,
    )
    assert done.exit_code == 0, done.stderr
    written = load_lock(output)
    tokenizer_file = (workshop.model / "tokenizer.json").read_bytes()
    vocabulary, known = Vocabulary.parse(tokenizer_file, origin="It"), written.metadata.tokenizer
    assert known is not None
    assert vocabulary is not None
    assert vocabulary.extends(known)
    pairs = load_pairs(data, PairKeys(question="ask", safe="good", unsafe="bad"))
    expected = forge(
        AutoModelForCausalLM.from_pretrained(workshop.model),
        AutoTokenizer.from_pretrained(workshop.model),
        pairs,
        heads=3,
        last_tokens=4,
        seed=7,
        split="row",
        train_fraction=0.5,
        system_prompt="Be kind.",
        default_alpha=5.0,
        batch_size=3,
        base_model=BASE,
        base_revision="abc",
        created=written.metadata.created,
        progress=False,
    )
    assert written == expected
    assert written.digest in done.stdout
    assert str(output) in done.stdout
    assert "starter" not in done.stdout + done.stderr


def test_without_data_it_uses_the_starter_pairs_and_says_so(
    run: Run, workshop: Workshop, tmp_path: Path
) -> None:
    output = tmp_path / "lock.safetensors"
    options = ("--base-model", BASE, "--heads", 2, "--batch-size", 64, "--output", output)
    done = run("forge", workshop.model, *options)
    assert done.exit_code == 0, done.stderr
    assert load_lock(output).metadata.dataset_digest == dataset_digest(starter_preference_pairs())
    assert "starter pairs" in done.stderr
    assert "starter pairs" in done.stdout, "the result says so too"


def test_a_model_in_mlflow_says_what_its_lock_is_for(
    run: Run, data: Path, tmp_path: Path, client: Any, gated: tuple[str, ...]
) -> None:
    log_fine_tune("base", fine_tune(base=BASE))
    output = tmp_path / "lock.safetensors"
    options = ("--data", data, *KEYS, "--heads", 2, "--output", output, "--register", "--format", "json")
    done = run("forge", "models:/base/1", *options, *gated)
    uri = f"models:/{lock_model_name(BASE)}/1"
    assert (done.json["registered"], done.json["file"]) == (uri, str(output))
    assert load_model(uri) == load_lock(output)
    assert load_lock(output).base_model == BASE


def test_several_numbers_of_heads_give_several_files_from_one_reading(
    run: Run, workshop: Workshop, data: Path, tmp_path: Path
) -> None:
    output, cache = tmp_path / "lock.safetensors", tmp_path / "cache"
    options = ("--data", data, *KEYS, "--base-model", BASE, "--heads", 2, "--heads", 3, "--output", output)
    done = run("forge", workshop.model, *options, "--cache", cache, "--format", "json")
    assert done.exit_code == 0, done.stderr
    files = [tmp_path / "lock-2.safetensors", tmp_path / "lock-3.safetensors"]
    assert [entry["file"] for entry in done.json] == [str(file) for file in files]
    assert [len(load_lock(file).heads) for file in files] == [2, 3]
    assert not output.exists()
    assert list(cache.glob("*/values.f32"))
    refused = run("forge", workshop.model, *options, "--register")
    assert refused.exit_code == 2
    assert "safelock lock register" in refused.stderr


def test_a_base_that_does_not_fit_in_memory_gives_the_same_lock(
    run: Run, workshop: Workshop, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--data", data, *KEYS, "--base-model", BASE, "--heads", 3, "--batch-size", 4)
    plain, spread = tmp_path / "plain.safetensors", tmp_path / "spread.safetensors"
    assert run("forge", workshop.model, *common, "--output", plain).exit_code == 0
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=190_000, total=190_000))
    options = ("--device-map", "auto", "--offload-folder", tmp_path / "offload", "--output", spread)
    done = run("forge", workshop.model, *common, *options)
    assert done.exit_code == 0, done.stderr
    one, other = load_lock(plain), load_lock(spread)
    assert other.metadata.model_copy(update={"created": one.metadata.created}) == one.metadata
    assert [(head.layer, head.head) for head in other.heads] == [
        (head.layer, head.head) for head in one.heads
    ]
    assert np.array_equal(other.unit_biases, one.unit_biases)
    assert other.sketch is not None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--device-map", "auto", "--device", "cpu"), "give one of them"),
        (("--offload-folder", "somewhere"), "--device-map auto"),
        (("--unsafe-key", "bad"), "--unsafe-key is for a file of preference pairs: give --data."),
        (("--default-alpha", "nan"), "Invalid value for '--default-alpha'"),
        (("--default-alpha", "inf"), "Invalid value for '--default-alpha'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    run: Run, workshop: Workshop, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    done = run("forge", workshop.model, *options, "--output", tmp_path / "lock")
    assert done.exit_code == 2
    assert why in done.stderr


def test_a_folder_needs_a_name_for_its_base(run: Run, workshop: Workshop, data: Path, tmp_path: Path) -> None:
    done = run("forge", workshop.model, "--data", data, *KEYS, "--heads", 2, "--output", tmp_path / "lock")
    assert done.exit_code == 2
    assert "--base-model" in done.stderr
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--heads", "24"), "24 heads"),
        (("--safe-key", "fine"), "fine"),
        (("--last-tokens", "200"), "200"),
    ],
)
def test_what_cannot_be_forged_is_refused_and_nothing_is_written(
    run: Run, workshop: Workshop, data: Path, tmp_path: Path, options: tuple[str, str], why: str
) -> None:
    output = tmp_path / "lock.safetensors"
    given = ("--data", data, *KEYS, "--heads", 2, *options, "--base-model", BASE, "--output", output)
    done = run("forge", workshop.model, *given)
    assert (done.exit_code, done.stdout) == (1, "")
    assert why in done.stderr
    assert not output.exists()


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(
        "kind: lock\nname: own\ntitle: Own\n"
        f"base:\n  model: {BASE}\n  architecture: llama\n"
        "  geometry: {layers: 3, heads: 4, head_dim: 8, hidden: 48}\n"
        f"forge:\n  heads: 3\n  pairs: 10\n  dataset: {data}\n"
        "  dataset_keys: {question: ask, safe: good, unsafe: bad}\n"
    )
    return file


def test_a_recipe_of_one_s_own_forges_its_lock(
    run: Run, workshop: Workshop, recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lock.safetensors"
    changes = ("--set", "forge.heads=2", "--set", "forge.seed=9")
    done = run("run", recipe, "--model", workshop.model, *changes, "--output", output)
    assert done.exit_code == 0, done.stderr
    lock = load_lock(output)
    assert (lock.base_model, len(lock.heads), lock.metadata.seed, lock.metadata.pairs) == (BASE, 2, 9, 10)


def test_a_recipe_s_lock_goes_beside_you_by_default(
    run: Run, workshop: Workshop, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("run", recipe, "--model", workshop.model).exit_code == 0
    assert len(load_lock("own.safetensors").heads) == 3


def test_a_recipe_s_base_can_be_a_folder(run: Run, workshop: Workshop, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "lock.safetensors"
    done = run("run", recipe, "--set", f"base.model={workshop.model}", "--output", output)
    assert done.exit_code == 0, done.stderr
    assert load_lock(output).base_model == str(workshop.model)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("base.geometry.layers=5", "the recipe is for 5 layers"),
        ("forge.pairs=11", "wants 11 pairs"),
        ("forge.haeds=2", "forge.heads"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    run: Run, workshop: Workshop, recipe: Path, tmp_path: Path, change: str, why: str
) -> None:
    output = tmp_path / "lock.safetensors"
    done = run("run", recipe, "--model", workshop.model, "--set", change, "--output", output)
    assert (done.exit_code, output.exists()) == (1, False)
    assert why in done.stderr


def test_an_unknown_recipe_is_refused_with_those_near_it(run: Run) -> None:
    done = run("run", "llama-3-8b")
    assert done.exit_code == 1
    assert "llama-3-8b-instruct" in done.stderr
