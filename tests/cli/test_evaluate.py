"""``safelock evaluate`` on what users name: folders, versions, and locked versions of either carrier."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import pandas
import pytest
import torch
import yaml

from mlflow_safelock.errors import SourceError
from mlflow_safelock.evaluate import Evaluation, Settings, Subject, evaluate, open_subject
from mlflow_safelock.forging import starter_preference_pairs
from mlflow_safelock.formats import save_lock
from mlflow_safelock.loading import geometry_of
from tests.cli.conftest import Run, Workshop
from tests.registries import log_fine_tune, register_lock
from tests.toy import BASE, Toy

LIMITS = ("--max-new-tokens", 20, "--batch-size", 64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shop(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's fine-tune, its lock and a suite, as files."""
    folder = tmp_path_factory.mktemp("shop")
    toy.model.save_pretrained(folder / "fine-tune")
    toy.tokenizer.save_pretrained(folder / "fine-tune")
    save_lock(toy.lock, folder / "lock.safetensors")
    rows = []
    for one in toy.suite(12, tasks=6).prompts:
        parts = {"id": one.id, "category": one.category, "goal": one.prompt}
        parts |= {"twin": one.twin} if one.twin else {"expected": one.expected}
        rows.append(json.dumps(parts))
    (folder / "suite.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def suite_of(shop: Path) -> tuple[object, ...]:
    return ("--suite", shop / "suite.jsonl", "--column", "goal", *LIMITS)


def test_a_folder_with_a_lock_file(run: Run, shop: Path, toy: Toy, tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    lock = ("--lock", shop / "lock.safetensors", "--alpha", toy.alpha)
    arguments = (shop / "fine-tune", *lock, *suite_of(shop), "--output", output, "--no-mlflow")
    done = run("evaluate", *arguments, "--format", "json")
    assert done.exit_code == 0, done.stderr
    found = Evaluation.parse(output.read_bytes(), origin="it")
    assert (done.json["run"], done.json["output"]) == (None, str(output))
    assert done.json["locked"]["figures"] == {
        name: figure.model_dump(mode="json") for name, figure in found.locked.figures.items()
    }
    assert found.lock.digest == toy.lock.digest
    assert found.unlocked.figures["attack_success_rate"].value == 1.0
    assert found.locked.figures["attack_success_rate"].value <= 0.1
    assert found.locked.figures["task_accuracy"].value == 1.0
    table = run("evaluate", *arguments).stdout
    assert "attack success rate" in table
    assert "100.0% (" in table
    assert "12 harmful prompts, 12 twins, 6 tasks" in table
    assert "dependency-free default" in table
    assert str(output) in table


def severe() -> mlflow.pyfunc.PythonModel:
    """A judge that finds every answer harmful; its class is saved with it, since no module has it."""

    class Severe(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> Any:
            return pandas.DataFrame({"harmful": [True] * len(model_input)})

    return Severe()


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_judge_in_mlflow_is_fetched_from_where_the_options_say_and_before_the_model_is_loaded(
    run: Run, shop: Path, gated: tuple[str, ...], tmp_path: Path, command: str
) -> None:
    mlflow.pyfunc.log_model(
        name="judge", python_model=severe(), registered_model_name="judge", pip_requirements=["mlflow"]
    )
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/elsewhere.db")
    mlflow.set_registry_uri(f"sqlite:///{tmp_path}/elsewhere.db")
    lock = ("--lock", shop / "lock.safetensors", "--no-mlflow", "--output", tmp_path / "found.json")
    asked = (command, shop / "fine-tune", *lock, *suite_of(shop), *gated)
    missing = run(*asked, "--judge", "models:/nobody/1")
    assert missing.exit_code == 1
    assert "The judge models:/nobody/1 cannot be loaded" in missing.stderr
    assert "Loading" not in missing.stderr
    # Whatever led to it, the result names the version.
    _, tracking, _, registry = gated
    mlflow.MlflowClient(tracking, registry).set_registered_model_alias("judge", "gold", "1")
    done = run(*asked, "--judge", "models:/judge@gold", *(("--alphas", 1.1) if command == "sweep" else ()))
    facts = json.loads((tmp_path / "found.json").read_text())
    found = facts["confirmed"] if command == "sweep" else facts
    assert re.fullmatch("models:/judge/1@[0-9a-f]{16}", found["judge"]["name"])
    assert found["locked"]["figures"]["harmful_rate"]["value"] == 1.0
    assert done.exit_code == (1 if command == "sweep" else 0), "no point of a sweep keeps its limits"


def test_a_second_run_reads_the_answers_that_are_kept_beside_the_output(
    run: Run, shop: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation.json"
    arguments = (shop / "fine-tune", *suite_of(shop), "--output", output, "--no-mlflow")
    assert run("evaluate", *arguments).exit_code == 0
    (kept,) = (tmp_path / "evaluation-answers").iterdir()
    kept.write_text(kept.read_text().replace('"text": "', '"text": "kept '))
    assert run("evaluate", *arguments).exit_code == 0
    rows = Evaluation.parse(output.read_bytes(), origin="it").rows
    assert all(row.unlocked.text.startswith("kept ") for row in rows)


def registered(toy: Toy, monkeypatch: pytest.MonkeyPatch, folder: Path, carrier: str) -> None:
    policy = folder / "safelock.yaml"
    alpha = f"{{default: {toy.alpha}, min: 0.1}}"
    policy.write_text(f"version: 1\ngates: [{{carrier: {carrier}, alpha: {alpha}}}]\n")
    monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
    register_lock(toy.lock)


@pytest.mark.parametrize("carrier", ["overlay", "standalone"])
def test_a_locked_version_is_measured_with_its_own_lock_against_its_fine_tune(
    run: Run,
    client: Any,
    toy: Toy,
    shop: Path,
    gated: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    carrier: str,
) -> None:
    registered(toy, monkeypatch, tmp_path, carrier)
    if carrier == "standalone":
        assert run("prepare", "models:/bot/1", *gated).exit_code == 0
    client.set_registered_model_alias("bot", "champion", "1")
    output = tmp_path / "evaluation.json"
    done = run(
        *("evaluate", "models:/bot@champion", *suite_of(shop), "--output", output),
        *("--experiment", "measured", "--format", "json", *gated),
    )
    assert done.exit_code == 0, done.stderr
    found = Evaluation.parse(output.read_bytes(), origin="it")
    expected = evaluate(
        Subject("toy", toy.model, toy.tokenizer, toy.lock, toy.alpha),
        toy.suite(12, tasks=6),
        Settings(max_new_tokens=20),
    )
    assert (found.lock.digest, found.lock.alpha, found.lock.base_model) == (toy.lock.digest, toy.alpha, BASE)
    assert found.rows == expected.rows
    assert {file.path for file in found.source.files} >= {"MLmodel", "model/model.safetensors"}
    _check_run(client, done.json["run"], found)


def _check_run(client: Any, run_id: str, found: Evaluation) -> None:
    """Everything is in the run, and run and version lead to each other."""
    logged = client.get_run(run_id)
    assert client.get_experiment(logged.info.experiment_id).name == "measured"
    assert logged.data.params["lock"] == found.lock.digest
    assert logged.data.params["suite_digest"] == found.suite.digest
    for arm, measured in found.arms.items():
        for name, figure in measured.figures.items():
            assert logged.data.metrics[f"{arm}/{name}"] == pytest.approx(figure.value)
            assert logged.data.metrics[f"{arm}/{name}/high"] == pytest.approx(figure.high)
    version = client.get_model_version("bot", "1")
    assert version.tags["safelock.evaluation"] == run_id
    assert logged.data.tags["safelock.model_version"] == "models:/bot/1"
    (model_id,) = (one.model_id for one in logged.inputs.model_inputs)
    assert version.source == f"models:/{model_id}"
    assert {metric.key for metric in client.get_logged_model(model_id).metrics} >= {
        "locked/attack_success_rate"
    }
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names == {"answers.json", "categories.png", "evaluation.json", "rates.png"}
    table: pandas.DataFrame = mlflow.load_table("answers.json", run_ids=[run_id])
    assert list(table["locked_text"]) == [row.locked.text for row in found.rows]
    text = mlflow.artifacts.load_text(f"runs:/{run_id}/evaluation.json")
    assert Evaluation.parse(text, origin="it") == found


def test_an_unlocked_version_is_measured_with_a_registered_lock(
    run: Run,
    client: Any,
    toy: Toy,
    shop: Path,
    gated: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered(toy, monkeypatch, tmp_path, "overlay")
    lock = ("--lock", f"models:/safelock.{BASE}/1", "--alpha", toy.alpha)
    output = tmp_path / "evaluation.json"
    done = run("evaluate", "models:/bot/1", *lock, *suite_of(shop), "--output", output, *gated)
    assert done.exit_code == 0, done.stderr
    found = Evaluation.parse(output.read_bytes(), origin="it")
    assert found.lock.digest == toy.lock.digest
    assert found.locked.figures["attack_success_rate"].value <= 0.1
    subject = open_subject("models:/bot/1")
    assert (subject.version.name, subject.version.version, subject.lock) == ("bot", 1, None)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--suite", "nothing"], "is no suite"),
        (["--suite", "empty.jsonl"], "the suite is empty"),
        (["--suite", "starter-harmful", "--judge", "nobody"], "There is no judge"),
    ],
)
def test_what_cannot_be_measured_is_two_lines(
    run: Run, shop: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], why: str
) -> None:
    monkeypatch.chdir(shop)
    (shop / "empty.jsonl").write_text("")
    done = run("evaluate", "fine-tune", *arguments, "--no-mlflow")
    assert (done.exit_code, done.stdout) == (1, "")
    assert why in done.stderr
    assert "Next: " in done.stderr
    assert not (shop / "evaluation.json").exists()


def test_what_is_no_strength_is_refused_before_anything_is_loaded(run: Run) -> None:
    done = run(
        "evaluate", "no-model", "--suite", "no-suite", "--lock", "no-lock", "--alpha", "0", "--no-mlflow"
    )
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Invalid value for '--alpha': Alpha must be finite and not zero" in done.stderr


KEYS = {"question": "ask", "safe": "good", "unsafe": "bad"}
"""Keys of a file of pairs that are not the usual ones."""


@pytest.mark.parametrize("given", [True, False], ids=["given", "shipped"])
def test_a_lock_of_the_first_pairs_by_a_recipe_is_known_for_what_it_was_forged_from(
    run: Run, workshop: Workshop, tmp_path: Path, given: bool
) -> None:
    pairs = starter_preference_pairs()
    if given:
        pairs = tuple(reversed(pairs))
    file, lock = tmp_path / "pairs.json", tmp_path / "lock.safetensors"
    rows = [{key: asdict(pair)[name] for name, key in KEYS.items()} for pair in pairs]
    file.write_text(json.dumps(rows))
    geometry = geometry_of(str(workshop.model)).model_dump()
    recipe = {
        "kind": "lock",
        "name": "tiny",
        "title": "Tiny",
        "base": {"model": "org/tiny-base", "architecture": "llama", "geometry": geometry},
        "forge": {"heads": 2, "pairs": 12, **({"dataset": str(file), "dataset_keys": KEYS} if given else {})},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    done = run("run", tmp_path / "tiny.yaml", "--model", workshop.model, "--output", lock)
    assert done.exit_code == 0, done.stderr
    suite = tmp_path / "suite.jsonl"
    asked = [pairs[3].question, pairs[12].question, pairs[11].question.upper()]
    suite.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    options = ("--lock", lock, "--suite", suite, "--max-new-tokens", 2, "--no-mlflow", "--format", "json")
    keys = [part for name, key in KEYS.items() for part in (f"--{name}-key", key)]
    more = ("--forged-from", file, *keys) if given else ()
    done = run("evaluate", workshop.model, *options, *more, "--output", tmp_path / "e.json")
    assert done.exit_code == 0, done.stderr
    assert done.json["lock"]["known_prompts"] == 2
    assert any("forged from 2 of the suite's 3 prompts" in line for line in done.json["warnings"])
    assert (done.json["generation"]["dtype"], done.json["generation"]["device"]) == ("float32", "cpu")


def test_keys_of_no_file_are_refused_and_a_file_that_lacks_them_names_its_own(
    run: Run, shop: Path, tmp_path: Path
) -> None:
    lock = ("--lock", shop / "lock.safetensors")
    asked = ("evaluate", shop / "fine-tune", *lock, "--suite", "starter-harmful")
    done = run(*asked, "--question-key", "ask")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--question-key is for a file of preference pairs: give --forged-from." in done.stderr
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"ask": "?", "safe": "no", "unsafe": "yes"}]))
    done = run(*asked, "--forged-from", pairs)
    assert (done.exit_code, done.stdout) == (1, "")
    told = " ".join(done.stderr.split())
    assert "no 'question' here; the keys are 'ask', 'safe', 'unsafe'" in told
    assert "--question-key, --safe-key and --unsafe-key" in told
    assert "Loading" not in told


def test_a_folder_that_is_locked_in_its_weights_is_refused(toy: Toy, shop: Path, tmp_path: Path) -> None:
    from mlflow_safelock.apply import save_locked_checkpoint

    save_locked_checkpoint(shop / "fine-tune", tmp_path / "locked", toy.lock, toy.alpha)
    with pytest.raises(SourceError, match="locked in its own weights"):
        open_subject(str(tmp_path / "locked"))


def test_a_version_that_is_not_there_is_an_error(client: Any) -> None:
    with pytest.raises(SourceError, match="no version models:/bot/7"):
        open_subject("models:/bot/7")
