"""Locks from the command line: import, inspect, register, verify."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_safelock.flavors.meta_safetylock import load_model, lock_model_name
from mlflow_safelock.formats import load_lock, save_lock
from mlflow_safelock.recipes import LockRecipe, load_recipe
from tests.cli.conftest import BASE, Run, Workshop
from tests.formats.published_files import content_for, entry, layer_key, write_published
from tests.keys import write_keys
from tests.registries import base_lock
from tests.sigstore_instance import ISSUER, SigstoreInstance

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file of the shape that the recipe of Llama 3 8B expects."""
    recipe = load_recipe("llama-3-8b-instruct")
    assert isinstance(recipe, LockRecipe)
    return write_published(tmp_path / "published.safelock", content_for(recipe))


@pytest.mark.parametrize("name", [("--base-model", LLAMA), ("--recipe", "llama-3-8b-instruct")])
def test_import_writes_the_lock_of_a_known_base(
    run: Run, published: Path, tmp_path: Path, name: tuple[str, str]
) -> None:
    done = run("lock", "import", published, *name, "--output", tmp_path / "lock.safetensors")
    lock = load_lock(tmp_path / "lock.safetensors")
    assert (done.exit_code, lock.base_model, len(lock.heads)) == (0, LLAMA, 24)
    assert lock.digest in done.stdout
    assert str(tmp_path / "lock.safetensors") in done.stdout


def test_import_of_an_unknown_base_takes_its_shape(run: Run, tmp_path: Path) -> None:
    file = write_published(tmp_path / "own", {layer_key(2): [entry(1, head_dim=8)]})
    shape = ("--layers", 3, "--heads", 4, "--head-dim", 8, "--hidden", 48)
    output = tmp_path / "own.safetensors"
    done = run("lock", "import", file, "--base-model", BASE, *shape, "--output", output, "--format", "json")
    assert done.exit_code == 0
    assert done.json["file"] == str(output)
    assert done.json["metadata"]["geometry"] == {"layers": 3, "heads": 4, "head_dim": 8, "hidden": 48}
    assert [(head["layer"], head["head"]) for head in done.json["heads"]] == [(2, 1)]


def test_import_refuses_a_file_of_another_base(run: Run, published: Path, tmp_path: Path) -> None:
    output = tmp_path / "lock.safetensors"
    done = run("lock", "import", published, "--recipe", "mistral-nemo-12b", "--output", output)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "Next: " in done.stderr
    assert not output.exists()


def test_import_holds_a_recipe_of_one_s_own_to_its_head_count(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "kind: lock\nname: own\ntitle: Own\nbase:\n  model: org/own\n  architecture: llama\n"
        "  geometry: {layers: 3, heads: 4, head_dim: 8, hidden: 48}\n"
        "published: {file: own, heads: 2, layers: [1, 2]}\nforge: {heads: 2}\n"
    )
    one = write_published(tmp_path / "one", {layer_key(2): [entry(1, head_dim=8)]})
    two = write_published(tmp_path / "two", {layer_key(2): [entry(1, head_dim=8), entry(3, 1, head_dim=8)]})
    output = tmp_path / "lock.safetensors"
    done = run("lock", "import", one, "--recipe", recipe, "--output", output)
    assert (done.exit_code, output.exists()) == (1, False)
    assert "holds 1 heads" in done.stderr
    assert run("lock", "import", two, "--recipe", recipe, "--output", output).exit_code == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "Name the base model"),
        (("--base-model", BASE, "--layers", 3), "missing: --heads, --head-dim, --hidden"),
        (("--base-model", BASE, "--recipe", "llama-3-8b-instruct"), "leave the other options out"),
    ],
)
def test_import_asks_for_one_clear_base(
    run: Run, published: Path, tmp_path: Path, options: tuple[object, ...], why: str
) -> None:
    done = run("lock", "import", published, *options, "--output", tmp_path / "lock.safetensors")
    assert done.exit_code == 2
    assert why in done.stderr


def test_import_for_a_base_that_no_recipe_knows_names_the_options_for_its_shape(
    run: Run, published: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lock.safetensors"
    done = run("lock", "import", published, "--base-model", BASE, "--output", output)
    assert done.exit_code == 1
    assert "Next: Say its shape: --layers, --heads, --head-dim and --hidden" in done.stderr
    assert "geometry=" not in done.stderr


def test_an_output_in_a_folder_that_is_not_there_is_refused_first(
    run: Run, published: Path, tmp_path: Path
) -> None:
    done = run("lock", "import", published, "--base-model", LLAMA, "--output", tmp_path / "no" / "lock")
    assert done.exit_code == 2
    assert "there is no folder" in done.stderr


def test_an_output_that_is_no_file_is_refused_first_and_left_alone(
    run: Run, published: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "astray").symlink_to(tmp_path / "no" / "lock")
    for name, why in (("pipe", "it is a pipe"), ("link", "it is a pipe"), ("astray", "there is no folder")):
        done = run("lock", "import", published, "--base-model", LLAMA, "--output", tmp_path / name)
        assert done.exit_code == 2
        assert why in done.stderr
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_inspect_gives_everything_but_the_directions(run: Run, workshop: Workshop) -> None:
    lock = load_lock(workshop.lock)
    found = run("lock", "inspect", workshop.lock, "--format", "json").json
    assert set(found) == {"digest", "metadata", "heads", "std", "score"}
    assert found["digest"] == lock.digest
    assert found["metadata"] == lock.metadata.model_dump(mode="json")
    assert [(head["layer"], head["head"], head["std"]) for head in found["heads"]] == [
        (head.layer, head.head, head.std) for head in lock.heads
    ]
    scores = [float(lock.scores[head.layer, head.head]) for head in lock.heads]  # type: ignore[index]
    assert [head["score"] for head in found["heads"]] == pytest.approx(scores, abs=1e-6)
    assert found["score"] == {
        "min": pytest.approx(min(scores), abs=1e-6),
        "max": pytest.approx(max(scores), abs=1e-6),
    }
    assert found["std"] == {"min": min(h.std for h in lock.heads), "max": max(h.std for h in lock.heads)}


def test_inspect_shows_the_heads_of_each_layer(run: Run, workshop: Workshop) -> None:
    lock = load_lock(workshop.lock)
    text = run("lock", "inspect", workshop.lock).stdout
    assert lock.digest in text
    for layer in lock.layers:
        heads = ", ".join(str(head.head) for head in lock.heads_of_layer(layer))
        assert any(line.split("  ")[0].strip() == str(layer) and heads in line for line in text.splitlines())


def test_a_lock_without_scores_is_shown_too(run: Run, workshop: Workshop, tmp_path: Path) -> None:
    from dataclasses import replace

    save_lock(replace(load_lock(workshop.lock), scores=None), tmp_path / "plain.safetensors")
    assert "not known" in run("lock", "inspect", tmp_path / "plain.safetensors").stdout
    found = run("lock", "inspect", tmp_path / "plain.safetensors", "--format", "json").json
    assert found["score"] is None
    assert {head["score"] for head in found["heads"]} == {None}


def test_inspect_of_a_published_file_says_to_import_it(run: Run, published: Path) -> None:
    done = run("lock", "inspect", published)
    assert done.exit_code == 1
    assert f"safelock lock import {published}" in done.stderr


def test_register_puts_a_lock_where_the_gate_looks(
    run: Run, workshop: Workshop, client: Any, gated: tuple[str, ...]
) -> None:
    lock = load_lock(workshop.lock)
    done = run("lock", "register", workshop.lock, *gated)
    uri = f"models:/{lock_model_name(BASE)}/1"
    assert done.stdout.splitlines() == [f"Registered {uri}", f"digest     {lock.digest}"]
    assert load_model(uri) == lock
    assert run("lock", "inspect", uri, *gated, "--format", "json").json["digest"] == lock.digest
    assert run("lock", "register", workshop.lock, "--name", "attic", *gated).stdout.startswith(
        "Registered models:/attic/1"
    )


def test_register_at_a_server_that_accepts_and_never_answers_gives_up(
    run: Run, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_safelock.cli.options.SERVER_ANSWERS_WITHIN", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run("lock", "register", workshop.lock, "--tracking-uri", uri)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"Error: The MLflow server {uri} does not answer" in done.stderr
    assert "Next: " in done.stderr


def test_import_registers_when_asked(
    run: Run, published: Path, tmp_path: Path, client: Any, gated: tuple[str, ...]
) -> None:
    output = tmp_path / "lock.safetensors"
    done = run("lock", "import", published, "--base-model", LLAMA, "--output", output, "--register", *gated)
    assert f"models:/{lock_model_name(LLAMA)}/1" in done.stdout
    assert load_model(f"models:/{lock_model_name(LLAMA)}/1") == load_lock(output)


def test_verify_holds_a_lock_to_a_digest_and_a_model(run: Run, workshop: Workshop) -> None:
    digest = load_lock(workshop.lock).digest
    options = ("--digest", digest, "--against", workshop.model)
    found = run("lock", "verify", workshop.lock, *options, "--format", "json")
    assert found.exit_code == 0
    assert (found.json["ok"], found.json["digest"], set(found.json["checks"])) == (
        True,
        digest,
        {"sound", "digest", "fits"},
    )
    assert digest in run("lock", "verify", workshop.lock, *options).stdout


@pytest.mark.parametrize(
    ("which", "options", "why"),
    [
        ("lock", ("--digest", "sha256:" + "0" * 64), "has the digest"),
        ("other_lock", ("--against", "{model}"), "5 layers"),
        ("lock", ("--against", "./nowhere"), "no model folder at ./nowhere"),
    ],
)
def test_verify_fails_on_anything_that_does_not_hold(
    run: Run, workshop: Workshop, which: str, options: tuple[str, ...], why: str
) -> None:
    filled = [option.format(model=workshop.model) for option in options]
    done = run("lock", "verify", getattr(workshop, which), *filled)
    assert (done.exit_code, done.stdout) == (1, "")
    assert why in done.stderr
    assert "Next: " in done.stderr


def test_verify_fails_on_a_damaged_file(run: Run, workshop: Workshop, tmp_path: Path) -> None:
    data = bytearray(workshop.lock.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    done = run("lock", "verify", tmp_path / "damaged.safetensors")
    assert done.exit_code == 1
    assert "changed or damaged" in done.stderr


def test_enroll_adds_what_a_published_lock_lacks(run: Run, tmp_path: Path) -> None:
    from mlflow_safelock.apply import attention_of
    from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer
    from tests.models import random_lock, tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    save_lock(random_lock(attention_of(model).geometry, base_model=BASE), tmp_path / "bare.safetensors")
    output = tmp_path / "full.safetensors"
    done = run(
        "lock", "enroll", tmp_path / "bare.safetensors", "--base", tmp_path / "base", "--output", output
    )
    assert done.exit_code == 0, done.stderr
    assert "sketch, unit biases, tokenizer" in done.stdout
    lock = load_lock(output)
    assert lock.sketch is not None
    assert lock.unit_biases is not None
    bare = load_lock(tmp_path / "bare.safetensors")
    assert lock.metadata.tokenizer == digest_of_tokenizer(tiny_tokenizer())
    metadata = lock.metadata.model_copy(update={"tokenizer": None})
    assert replace(lock, sketch=None, unit_biases=None, metadata=metadata) == bare != lock


def test_enroll_refuses_a_base_of_another_shape(run: Run, tmp_path: Path) -> None:
    from mlflow_safelock.apply import attention_of
    from tests.models import random_lock, tiny_model

    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    save_lock(random_lock(attention_of(tiny_model("llama")).geometry), tmp_path / "bare.safetensors")
    output = tmp_path / "full.safetensors"
    done = run(
        "lock", "enroll", tmp_path / "bare.safetensors", "--base", tmp_path / "base", "--output", output
    )
    assert done.exit_code == 1
    assert "2 layers" in done.stderr
    assert not output.exists()


class TestSignatures:
    def test_a_lock_file_is_signed_beside_it_and_verified(self, run: Run, tmp_path: Path) -> None:
        lock = tmp_path / "base.safetensors"
        save_lock(base_lock(), lock)
        key, other = write_keys(tmp_path), write_keys(tmp_path, "p256", "other")
        done = run("lock", "sign", lock, "--key", key.private, "--format", "json").json
        assert done["signature"] == str(tmp_path / "base.dsse.json")
        verified = run("lock", "verify", lock, "--public-key", key.public, "--format", "json")
        assert verified.json["checks"]["signed by"] == done["key"]
        both = ("--public-key", other.public, "--public-key", key.public)
        assert run("lock", "verify", lock, *both).exit_code == 0
        refused = run("lock", "verify", lock, "--public-key", other.public)
        assert refused.exit_code == 1
        assert "signed by none" in refused.stderr
        save_lock(base_lock(seed=1), lock)
        assert "of another lock" in run("lock", "verify", lock, "--public-key", key.public).stderr
        (tmp_path / "base.dsse.json").unlink()
        assert "safelock lock sign" in run("lock", "verify", lock, "--public-key", key.public).stderr

    def test_an_identity_signs_without_a_key(
        self, run: Run, sigstore: SigstoreInstance, tmp_path: Path
    ) -> None:
        lock = tmp_path / "base.safetensors"
        save_lock(base_lock(), lock)
        name = "safety@example.org"
        sigstore.log_in(name)
        done = run("lock", "sign", lock, "--sigstore", "--format", "json").json
        assert (done["identity"], done["issuer"], "key" in done) == (name, ISSUER, False)
        verified = run("lock", "verify", lock, "--identity", name, ISSUER, "--format", "json")
        assert verified.json["checks"]["signed by"] == f"{name} of {ISSUER}"
        both = ("--public-key", write_keys(tmp_path).public, "--identity", name, ISSUER)
        assert run("lock", "verify", lock, *both).exit_code == 0
        for identity in (("other@example.org", ISSUER), (name, "https://accounts.example.com")):
            refused = run("lock", "verify", lock, "--identity", *identity)
            assert (refused.exit_code, refused.stdout) == (1, "")
            assert f"signed by {name} of {ISSUER}" in " ".join(refused.stderr.split())
        assert "only keys count" in run("lock", "verify", lock, *both[:2]).stderr

    def test_something_must_sign_and_one_thing_only(self, run: Run, tmp_path: Path) -> None:
        lock, key = tmp_path / "base.safetensors", write_keys(tmp_path).private
        save_lock(base_lock(), lock)
        for words in (("sign", lock), ("sign", lock, "--key", key, "--sigstore")):
            assert run("lock", *words).exit_code == 2
        assert run("lock", "verify", lock, "--identity", "safety@example.org", "nobody").exit_code == 2
        assert list(tmp_path.glob("*.dsse.json")) == []

    def test_a_registered_lock_is_signed_by_an_identity(
        self, run: Run, client: Any, sigstore: SigstoreInstance, tmp_path: Path, gated: tuple[str, ...]
    ) -> None:
        lock = tmp_path / "base.safetensors"
        save_lock(base_lock(), lock)
        name, who = lock_model_name(base_lock().base_model), ("--identity", "safety@example.org", ISSUER)
        no_token = run("lock", "register", lock, "--sigstore", *gated)
        assert (no_token.exit_code, client.search_registered_models()) == (1, [])
        assert "token" in no_token.stderr
        sigstore.log_in("safety@example.org")
        run("lock", "sign", lock, "--sigstore")
        run("lock", "register", lock, *gated)
        run("lock", "register", lock, "--sigstore", *gated)
        run("lock", "sign", f"models:/{name}/1", "--sigstore", *gated)
        for version in (1, 2, 3):
            verified = run("lock", "verify", f"models:/{name}/{version}", *who, *gated)
            assert verified.exit_code == 0, verified.stderr
        assert len(sigstore.entries) == 3

    @pytest.mark.parametrize("how", ["sign and register", "register with a key", "sign what is registered"])
    def test_a_registered_lock_carries_its_signature(
        self, run: Run, client: Any, tmp_path: Path, gated: tuple[str, ...], how: str
    ) -> None:
        lock, key = tmp_path / "base.safetensors", write_keys(tmp_path)
        save_lock(base_lock(), lock)
        name, version = lock_model_name(base_lock().base_model), 1
        if how == "sign and register":
            run("lock", "sign", lock, "--key", key.private)
            assert "signed     yes" in run("lock", "register", lock, *gated).stdout
        elif how == "register with a key":
            run("lock", "register", lock, "--key", key.private, *gated)
        else:
            assert "signed" not in run("lock", "register", lock, *gated).stdout
            unsigned = run("lock", "verify", f"models:/{name}/1", "--public-key", key.public, *gated)
            assert "is not signed" in unsigned.stderr
            done = run("lock", "sign", f"models:/{name}/1", "--key", key.private, *gated, "--format", "json")
            assert done.json["signature"] == f"models:/{name}/2"
            version = 2
        verified = run("lock", "verify", f"models:/{name}/{version}", "--public-key", key.public, *gated)
        assert verified.exit_code == 0, verified.stderr

    def test_a_signature_of_another_lock_is_not_registered(
        self, run: Run, client: Any, tmp_path: Path, gated: tuple[str, ...]
    ) -> None:
        lock, key = tmp_path / "base.safetensors", write_keys(tmp_path)
        save_lock(base_lock(), lock)
        run("lock", "sign", lock, "--key", key.private)
        save_lock(base_lock(seed=1), lock)
        done = run("lock", "register", lock, *gated)
        assert done.exit_code == 1
        assert "of another lock" in done.stderr
        assert client.search_registered_models() == []
