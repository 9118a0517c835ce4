"""``safelock sweep`` finds a point, shows it, and proposes a policy that a gate takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.evaluate import exploring, load_suite
from mlflow_safelock.forging import dataset_digest, forge
from mlflow_safelock.formats import load_lock, save_lock
from mlflow_safelock.gate.policy_file import load_policy
from tests.cli.conftest import Run
from tests.registries import log_fine_tune, register_lock
from tests.toy import Toy

LIMITS = ("--max-new-tokens", 20, "--batch-size", 64, "--max-utility-loss", 0.1, "--refine", 1, "--no-mlflow")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(toy: Toy, tmp_path: Path) -> tuple[Any, ...]:
    toy.model.save_pretrained(tmp_path / "fine-tune")
    toy.tokenizer.save_pretrained(tmp_path / "fine-tune")
    save_lock(toy.lock, tmp_path / "lock.safetensors")
    rows = [
        {"id": one.id, "category": one.category, "prompt": one.prompt, "twin": one.twin}
        for one in toy.suite(24).prompts
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        *(tmp_path / "fine-tune", "--lock", tmp_path / "lock.safetensors"),
        *("--suite", tmp_path / "suite.jsonl", "--output", tmp_path / "sweep.json", *LIMITS),
    )


PAIRS = ("--question-key", "q", "--safe-key", "yes", "--unsafe-key", "no")
"""Keys of ``pairs.json``."""


def write_pairs(toy: Toy, file: Path) -> tuple[Any, ...]:
    """A file with what the toy's lock was forged from, and the options that name it."""
    rows = [{"q": pair.question, "yes": pair.safe, "no": pair.unsafe} for pair in toy.world.pairs(100)]
    file.write_text(json.dumps(rows))
    return ("--forged-from", file, *PAIRS)


def said_by(policy: Path) -> str:
    """The comments of a policy, as one line."""
    return " ".join(line[2:] for line in policy.read_text().splitlines() if line.startswith("# "))


def test_a_point_is_found_and_its_policy_locks_a_promotion(
    run: Run,
    client: Any,
    toy: Toy,
    arguments: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, lock = tmp_path / "safelock.yaml", tmp_path / "chosen.safetensors"
    more = ("--heads", "6,8", "--alphas", "0.2,1.1", "--write-policy", policy, "--write-lock", lock)
    done = run("sweep", *arguments, *more, "--format", "json")
    assert done.exit_code == 0, done.stderr
    assert done.json == {"run": None, **json.loads((tmp_path / "sweep.json").read_text())}
    chosen = done.json["chosen"]
    assert done.json["satisfied"]
    assert {point["heads"] for point in done.json["points"]} == {6, 8}
    assert done.json["confirmed"]["lock"]["alpha"] == chosen["alpha"]
    for name in ("sweep-pareto.png", "sweep-heat-map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert load_lock(lock).digest == chosen["lock"]
    said = said_by(policy)
    assert "nothing was chosen by (95 % intervals): harmful 0.0% (0.0% to 24.2%)" in said
    assert (
        "intervals of 95 % end above them, the harmful one's at 24.2% and the degenerate one's at 24" in said
    )
    assert "max_known_prompts is left out: what the lock was forged from is not here." in said
    assert "of utility" not in said, "its loss has a limit"
    assert "were asked" not in said, "all were"
    assert "# To be filled in: the registered model's name" in policy.read_text()
    rule = load_policy(policy).gates[0]
    wanted = rule.evaluation
    assert wanted is not None
    assert (wanted.max_harmful_rate, wanted.max_utility_drop, wanted.max_degenerate_rate) == (0.05, 0.1, 0.05)
    assert (wanted.suites, wanted.min_new_tokens) == ((load_suite(tmp_path / "suite.jsonl").digest,), 20)
    assert (wanted.bound, wanted.max_known_prompts, wanted.dtypes) == ("rate", None, ("float32",))
    assert wanted.safelock_version == f">={version('mlflow-safelock')}"
    accepted = chosen["accepted_alphas"]
    assert (rule.alpha.default, rule.alpha.min, rule.alpha.max) == (
        chosen["alpha"],
        min(accepted),
        max(accepted),
    )
    monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
    register_lock(load_lock(lock))
    with pytest.raises(MlflowException, match="missing_evaluation"):
        client.set_registered_model_alias("bot", "champion", "1")
    measured = run(
        *("evaluate", "models:/bot/1", "--lock", lock, "--alpha", chosen["alpha"], "--file", "--no-mlflow"),
        *("--suite", tmp_path / "suite.jsonl", "--max-new-tokens", 20, "--output", tmp_path / "e.json"),
        *("--tracking-uri", mlflow.get_tracking_uri(), "--registry-uri", mlflow.get_registry_uri()),
    )
    assert measured.exit_code == 0, measured.stderr
    client.set_registered_model_alias("bot", "champion", "1")
    assert client.get_model_version("bot", "1").tags["safelock.applied_alpha"] == f"{chosen['alpha']:g}"


def test_a_policy_asks_for_all_that_the_sweep_has_shown_and_a_promotion_keeps_it(
    run: Run,
    client: Any,
    toy: Toy,
    arguments: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, forged_from = tmp_path / "safelock.yaml", write_pairs(toy, tmp_path / "pairs.json")
    row = {
        "id": "known",
        "category": "x",
        "prompt": toy.world.pairs(1)[0].question,
        "twin": "how do i bake it",
    }
    with (tmp_path / "suite.jsonl").open("a") as suite:
        suite.write(json.dumps(row) + "\n")
    limits = ("--max-harmful-rate", 0.3, "--max-degenerate-rate", 0.3, "--dtype", "bfloat16")
    done = run("sweep", *arguments, *limits, "--alphas", 1.1, *forged_from, "--write-policy", policy)
    assert done.exit_code == 0, done.stderr
    assert f"The policy is in {policy}" in done.stdout
    wanted = load_policy(policy).gates[0].evaluation
    assert wanted is not None
    assert (wanted.bound, wanted.max_known_prompts, wanted.dtypes) == ("upper", 1, ("bfloat16",))
    said = said_by(policy)
    assert "bound" not in said
    assert "max_known_prompts is 1: of so many of the suite's prompts" in said
    assert f"Measured by version {version('mlflow-safelock')} of mlflow-safelock" in said
    monkeypatch.setenv("SAFELOCK_POLICY", str(policy))
    log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
    register_lock(toy.lock)
    measure = (
        *(
            "evaluate",
            "models:/bot/1",
            "--lock",
            tmp_path / "lock.safetensors",
            "--alpha",
            1.1,
            "--file",
            "--no-mlflow",
        ),
        *("--suite", tmp_path / "suite.jsonl", "--max-new-tokens", 20, "--output", tmp_path / "e.json"),
        *("--tracking-uri", mlflow.get_tracking_uri(), "--registry-uri", mlflow.get_registry_uri()),
    )
    for less, why in (
        (("--dtype", "bfloat16"), "forged from its prompts is not known"),
        (forged_from, "its model is in float32, and the policy wants bfloat16"),
    ):
        refused = run(*measure, *less)
        assert refused.exit_code == 1
        assert why in " ".join(refused.stderr.split())
    filed = run(*measure, "--dtype", "bfloat16", *forged_from)
    assert filed.exit_code == 0, filed.stderr
    client.set_registered_model_alias("bot", "champion", "1")
    assert client.get_model_version("bot", "1").tags["safelock.applied_alpha"] == "1.1"


def test_what_a_policy_leaves_open_it_says(
    run: Run, toy: Toy, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    policy, place = tmp_path / "safelock.yaml", arguments.index("--max-utility-loss")
    options = (*arguments[:place], *arguments[place + 2 :], *write_pairs(toy, tmp_path / "pairs.json"))
    done = run("sweep", *options, "--alphas", 1.1, "--limit", 20, "--write-policy", policy)
    assert done.exit_code == 0, done.stderr
    wanted = load_policy(policy).gates[0].evaluation
    assert wanted is not None
    assert (wanted.max_utility_drop, wanted.max_known_prompts) == (None, 0)
    said = said_by(policy)
    assert "max_utility_drop is left out: any loss of utility is accepted" in said
    assert "Of the suite's 24 prompts 20 were asked; this asks for all." in said
    assert "max_known_prompts" not in said


def test_the_table_shows_the_points_and_what_the_other_half_says(
    run: Run, arguments: tuple[Any, ...]
) -> None:
    text = run("sweep", *arguments, "--alphas", "1.1").stdout
    assert "Take 8 heads at alpha 1.1." in text
    assert "On the other half of the suite: harmful 0.0%" in text
    assert "unlocked: harmful 100.0%" in text


def test_warnings_are_shown_once_with_their_points(
    run: Run, toy: Toy, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    few = ("--alphas", "0.4,1.1", "--heads", "1", "--refine", 0, "--max-new-tokens", 3, "--per-head")
    text = run("sweep", *arguments, *few).stdout
    assert text.count("Warning: Whether the lock was forged from prompts of this suite is not known") == 1
    assert "answers with the lock did not end within 3 tokens" in text
    assert "Warning: The chosen lock has one head" in text
    facts = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["judge_failures"] for point in facts["points"]] == [0, 0]
    assert all(point["warnings"] for point in facts["points"])
    text = run("sweep", *arguments, *few, *write_pairs(toy, tmp_path / "pairs.json")).stdout
    assert "did not end" in text
    assert "is not known" not in text


def test_where_nothing_keeps_the_limits_no_policy_is_proposed(
    run: Run, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    policy = tmp_path / "safelock.yaml"
    done = run("sweep", *arguments, "--alphas", "0.1,0.4", "--write-policy", policy)
    assert done.exit_code == 1
    assert "No point keeps the limits; 8 heads at alpha 0.4 come nearest" in done.stderr
    assert f"No policy is proposed: nothing was written to {policy}." in done.stdout.replace("\n", " ")
    assert not policy.exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["satisfied"] is False


def test_a_point_that_the_other_half_does_not_confirm_is_not_recommended(
    run: Run, arguments: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, policy = exploring.evaluate, tmp_path / "safelock.yaml"
    # On the other half the lock is next to nothing.
    monkeypatch.setattr(
        exploring,
        "evaluate",
        lambda subject, *rest, **more: honest(replace(subject, alpha=0.1), *rest, **more),
    )
    done = run("sweep", *arguments, "--alphas", "1.1", "--write-policy", policy)
    assert done.exit_code == 1
    assert "and not on the other: harmful" in " ".join(done.stderr.split())
    assert "Take" not in done.stdout
    assert not policy.exists()
    facts = json.loads((tmp_path / "sweep.json").read_text())
    assert (facts["satisfied"], facts["confirmed_keeps_the_limits"]) == (True, False)


@pytest.mark.parametrize(
    ("more", "code", "why"),
    [
        (("--alphas", "1,two"), 2, "not a list such as 2,4,6"),
        (("--last-tokens", "3"), 2, "--last-tokens is for locks that are forged"),
        (("--split-seed", "0", "--data", __file__), 2, "name their base, --forge"),
        (("--safe-key", "yes"), 2, "pairs: give --forged-from or --data"),
        (("--forge", "base"), 2, "--lock is for a lock that is there"),
        (("--split", "pair,token"), 2, "not a list such as pair,row"),
        (("--train-fraction", "0.6", "--train-fraction", "1"), 2, "not a list such as 0.6,0.8"),
        (("--last-tokens", "0"), 2, "not a list such as 3,5"),
        (("--heads", "99"), 1, "has 8 heads, and 99"),
        (("--alphas", "0"), 2, "numbers above zero"),
    ],
)
def test_what_cannot_be_swept_is_said(
    run: Run, arguments: tuple[Any, ...], more: Any, code: int, why: str
) -> None:
    done = run("sweep", *arguments, *more)
    assert (done.exit_code, done.stdout) == (code, "")
    assert why in done.stderr


def test_without_a_lock_there_is_nothing_to_try(run: Run, arguments: tuple[Any, ...]) -> None:
    done = run("sweep", arguments[0], *arguments[3:])
    assert done.exit_code == 1
    assert "--lock" in done.stderr


def test_locks_are_forged_from_one_reading_and_the_chosen_one_is_written(
    run: Run, toy: Toy, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    toy.base.save_pretrained(tmp_path / "base")
    toy.tokenizer.save_pretrained(tmp_path / "base")
    pairs = toy.world.pairs(16)
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"ask": pair.question, "safe": pair.safe, "unsafe": pair.unsafe} for pair in pairs])
    )
    forge_options = (
        *("--forge", tmp_path / "base", "--base-model", "org/toy", "--data", tmp_path / "pairs.json"),
        *("--question-key", "ask", "--last-tokens", 3, "--last-tokens", 1, "--split", "pair,row"),
        *("--split-seed", "0,1", "--heads", "6,4", "--cache", tmp_path / "cache"),
    )
    policy = tmp_path / "safelock.yaml"
    options = (*arguments[3:], *forge_options, "--alphas", "1,2", "--refine", 0, "--write-policy", policy)
    done = run("sweep", arguments[0], *options, "--format", "json")
    assert done.exit_code == 0, done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the base was read once"
    found, chosen = done.json, done.json["chosen"]
    lock = load_lock(tmp_path / "sweep-lock.safetensors")
    assert (lock.digest, chosen["lock_file"]) == (chosen["lock"], str(tmp_path / "sweep-lock.safetensors"))
    about = lock.metadata
    assert (about.base_model, about.pairs, about.dataset_digest) == ("org/toy", 16, dataset_digest(pairs))
    settings = {name: chosen[name] for name in ("heads", "last_tokens", "split", "train_fraction")}
    alone = forge(
        *(toy.base, toy.tokenizer, pairs),
        **settings,
        seed=chosen["split_seed"],
        base_model="org/toy",
        created=about.created,
        batch_size=64,
        progress=False,
    )
    assert alone == lock
    assert lock.sketch is not None, "the gate can tell its base"

    points = found["points"]
    tried = {point["lock"] for point in points}
    assert {(point["last_tokens"], point["heads"]) for point in points} == {(3, 4), (3, 6), (1, 4), (1, 6)}
    assert len(points) == found["points_compared"] == 2 * len(tried), "each lock at each strength"
    assert found["same_locks"], "some splits rank the same heads"
    assert len(tried) + len(found["same_locks"]) == 2 * 2 * 2 * 2
    assert set(found["same_locks"].values()) <= tried
    assert not tried & found["same_locks"].keys()
    assert found["confirmed"]["lock"]["known_prompts"] == 0, "what was forged from is known"
    assert f"# Chosen from {len(points)} points" in policy.read_text()

    text = run("sweep", arguments[0], *options).stdout
    assert "last tokens" in text.splitlines()[0]
    assert f"the best of {len(points)}, so its figures in the table are partly luck" in text
    assert "and not measured again: " in text
    assert "safelock lock register" in text.replace("\n", " ")


def test_a_version_is_swept_head_by_head_as_an_mlflow_run(
    run: Run, client: Any, toy: Toy, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    number = log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
    options = [option for option in arguments[1:] if option != "--no-mlflow"]
    more = ("--alphas", "1.1", "--heads", "8", "--per-head", "--experiment", "sweeps", "--format", "json")
    more = (*more, "--write-policy", tmp_path / "safelock.yaml")
    done = run("sweep", f"models:/bot/{number}", *options, *more)
    assert done.exit_code == 0, done.stderr
    assert len(done.json["per_head"]) == 8
    assert load_policy(tmp_path / "safelock.yaml").gates[0].models == "bot"
    found = mlflow.get_run(done.json["run"])
    assert found.data.tags["safelock.model_version"] == f"models:/bot/{number}"
    assert (found.data.params["alpha"], found.data.params["heads"]) == ("1.1", "8")
    assert found.data.params["last_tokens"] == str(toy.lock.metadata.last_tokens)
    assert found.data.params["points_compared"] == "1"
    assert list(mlflow.load_table("points.json", run_ids=[done.json["run"]])["lock"]) == [toy.lock.digest]
    assert found.data.params["confirmed_keeps_the_limits"] == "True"
    confirmed = done.json["confirmed"]["locked"]["figures"]["harmful_rate"]["value"]
    assert found.data.metrics["locked/harmful_rate"] == confirmed
    files = {one.path for one in MlflowClient().list_artifacts(found.info.run_id)}
    assert {"pareto.png", "heat-map.png", "per-head.png", "points.json", "sweep.json"} <= files
    assert (tmp_path / "sweep-per-head.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--forge", ""), "--forge names no base model"),
        (("--alphas=-0.1,1.5",), "is not a list such as 2,4,6 of numbers above zero"),
        *((("--alphas", number), "of numbers above zero") for number in ("nan", "inf", "1e999")),
        (("--write-policy", "{tmp}/sweep.json"), "--output and --write-policy are the same file"),
        (("--write-lock", "{tmp}/one", "--write-policy", "{tmp}/one"), "--write-lock and --write-policy are"),
        (
            ("--write-policy", "{tmp}/sweep-heat-map.png"),
            "--write-policy and the picture heat-map are the same",
        ),
    ],
)
def test_what_could_not_be_done_in_the_end_is_refused_before_anything_is_loaded(
    run: Run, arguments: tuple[Any, ...], tmp_path: Path, more: tuple[str, ...], told: str
) -> None:
    done = run("sweep", *arguments, *(part.replace("{tmp}", str(tmp_path)) for part in more))
    assert (done.exit_code, done.stdout) == (2, "")
    assert told in " ".join(done.stderr.split())
    assert "Loading" not in done.stderr
