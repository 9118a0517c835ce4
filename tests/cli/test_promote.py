"""What a promotion would do is told beforehand, by the gate's own checks, and nothing is written for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from sklearn.linear_model import LinearRegression

from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from tests.cli.conftest import Run
from tests.registries import BASE, base_lock, fine_tune, log_fine_tune, register_lock, state_of
from tests.registry.test_guard import store_of
from tests.registry.test_promotion import ledger_rows, open_with_policy

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

DRY = ("promote", "models:/bot/1", "--stage", "Staging", "--dry-run", "--format", "json")


def everything(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, databases included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_promotion_is_explained_and_then_does_just_that(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    client.set_model_version_tag("bot", str(version), "safelock.alpha", "4.5")
    original = client.get_model_version_download_uri("bot", "1")
    before = everything(tmp_path)
    done = run(*DRY, *gated)
    assert everything(tmp_path) == before, "nothing was written"
    assert done.exit_code == 0
    told = done.json
    assert (told["outcome"], told["gate"], told["refusal"]) == ("lock", 1, None)
    assert told["why"] == ["gate 1: '*' matches 'bot', and decides."]
    assert told["source"] == original
    assert (told["base"], told["said_by"]) == (BASE, "source_model_name in MLmodel")
    assert (told["lock"], told["lock_digest"]) == (f"models:/{lock_model_name(BASE)}/1", base_lock().digest)
    assert (told["alpha"], told["alpha_from"]) == (4.5, "the tag safelock.alpha")
    assert (told["kinship"], told["carrier"]) == (None, "overlay")
    assert f"below {original}-safelock/" in told["writes"][0]

    promoted = run("promote", "models:/bot/1", "--stage", "Staging", *gated, "--format", "json").json
    (row,) = ledger_rows(tmp_path)
    assert (row["lock"]["digest"], row["alpha"], row["policy"]) == (
        told["lock_digest"],
        told["alpha"],
        told["policy"],
    )
    assert promoted["serves"].startswith(f"{original}-safelock/")
    assert promoted["lock"] == told["lock"]
    tags = state_of(client, "bot", 1)["tags"]
    assert all(tag in tags for tag in told["writes"][2].removeprefix("the version's tags ").split(", "))

    again = run(*DRY, *gated).json
    assert (again["outcome"], again["source"]) == ("nothing to do", original)
    table = run(*DRY[:-1], "table", *gated).stdout
    assert "it runs that lock already" in table


def test_a_refusal_is_told_with_its_reason_and_leaves_no_row(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
) -> None:
    log_fine_tune("bot")
    before = everything(tmp_path)
    done = run(*DRY, *gated)
    assert (done.exit_code, done.json["outcome"]) == (1, "refuse")
    assert done.json["refusal"]["reason"] == "missing_lock"
    assert "safelock lock register" in done.json["refusal"]["next_step"]
    assert "Error: No lock is registered" in done.stderr
    assert everything(tmp_path) == before
    with pytest.raises(Exception, match="missing_lock"):
        client.transition_model_version_stage("bot", "1", "Staging")


@pytest.mark.parametrize(
    ("hint", "said_by"),
    [
        ("policy", "bases in the policy"),
        ("config", "_name_or_path in config.json"),
        ("tag", "the tag safelock.base_model"),
    ],
)
def test_it_says_who_named_the_base(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], hint: str, said_by: str
) -> None:
    log_fine_tune("bot", fine_tune(base=None))
    register_lock(base_lock())
    policy = tmp_path / "p.yaml"
    policy.write_text("version: 1\ngates: [{}]\n" + (f"bases: {{bot: {BASE}}}\n" if hint == "policy" else ""))
    if hint == "tag":
        client.set_model_version_tag("bot", "1", "safelock.base_model", BASE)
    if hint == "config":
        config = Path(client.get_model_version_download_uri("bot", "1")) / "model/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": BASE}))
    command = ("policy", "check", policy, "--version", "models:/bot/1", "--stage", "staging")
    told = run(*command, *gated, "--format", "json").json
    assert (told["outcome"], told["said_by"]) == ("lock", said_by)


class TestPoliciesThatAreNotInForce:
    @pytest.mark.parametrize(
        ("policy", "place", "outcome", "reason"),
        [
            ("gates: [{}]", ("--alias", "Champion"), "lock", None),
            ("gates: [{}]", ("--alias", "beta"), "not gated", None),
            ("gates: [{}]", ("--stage", "Archived"), "not gated", None),
            ("gates: [{models: other}]", ("--stage", "Staging"), "not gated", None),
            ("gates: [{lock: {min_version: 2}}]", ("--stage", "Staging"), "refuse", "lock_too_old"),
            ("gates: [{kinship: {unknown: reject}}]", ("--stage", "Staging"), "refuse", "kinship_unknown"),
            ("gates: [{carrier: standalone}]", ("--stage", "Staging"), "refuse", "not_prepared"),
            (
                "gates: [{missing_lock: allow}]\nbases: {bot: org/x}",
                ("--stage", "Staging"),
                "pass unlocked",
                None,
            ),
        ],
    )
    def test_they_are_put_to_the_real_registry(
        self,
        run: Run,
        client: MlflowClient,
        tmp_path: Path,
        gated: tuple[str, ...],
        policy: str,
        place: tuple[str, str],
        outcome: str,
        reason: str | None,
    ) -> None:
        log_fine_tune("bot")
        register_lock(base_lock())
        path = tmp_path / "p.yaml"
        path.write_text(f"version: 1\n{policy}\n")
        before = everything(tmp_path)
        done = run("policy", "check", path, "--version", "models:/bot/1", *place, *gated, "--format", "json")
        told = done.json
        assert (told["outcome"], (told["refusal"] or {}).get("reason")) == (outcome, reason)
        assert done.exit_code == (1 if outcome == "refuse" else 0)
        assert everything(tmp_path) == before

    def test_a_prepared_standalone_model_is_found(
        self,
        run: Run,
        client: MlflowClient,
        tmp_path: Path,
        gated: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        log_fine_tune("bot")
        register_lock(base_lock())
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{carrier: standalone}]\n")
        store_of(client).prepare("bot", 1)
        told = run(*DRY, *gated).json
        assert told["outcome"] == "lock"
        assert "standalone-" in told["writes"][0]

    def test_a_gate_by_tag_is_found_by_the_versions_own_tags(
        self, run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...]
    ) -> None:
        log_fine_tune("bot")
        client.set_model_version_tag("bot", "1", "risk", "high")
        path = tmp_path / "p.yaml"
        path.write_text(
            "version: 1\ngates:\n  - tags: {risk: high}\n    aliases: [champion, staging, b]\n  - {}\n"
        )
        command = ("policy", "check", path, "--version", "models:/bot/1", "--alias", "b")
        told = run(*command, *gated, "--format", "json").json
        assert (told["gate"], told["refusal"]["reason"]) == (1, "missing_lock")


def test_a_model_of_another_kind_would_pass(run: Run, client: MlflowClient, gated: tuple[str, ...]) -> None:
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]),
            name="model",
            registered_model_name="bot",
            pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle",
        )
    told = run(*DRY, *gated).json
    assert (told["outcome"], told["why"][-1]) == ("pass unlocked", "It is no language model.")


def test_a_registry_that_has_no_gate_yet_can_be_asked(run: Run, tmp_path: Path, client: MlflowClient) -> None:
    stock = f"sqlite:///{tmp_path}/stock.db"
    mlflow.set_registry_uri(stock)
    log_fine_tune("bot")
    register_lock(base_lock())
    before = everything(tmp_path)
    told = run(*DRY, "--registry-uri", stock, "--tracking-uri", f"sqlite:///{tmp_path}/tracking.db").json
    assert told["outcome"] == "lock"
    assert everything(tmp_path) == before, "no tables were made"


def test_a_database_without_a_gate_is_not_promoted_in(run: Run, tmp_path: Path, client: MlflowClient) -> None:
    log_fine_tune("bot")
    stock = f"sqlite:///{tmp_path}/registry.db"
    done = run("promote", "models:/bot/1", "--alias", "champion", "--registry-uri", stock)
    assert done.exit_code == 1
    assert f"safelock+{stock}" in done.stderr
    assert client.get_model_version("bot", "1").aliases == []


def test_a_refused_promotion_exits_with_1(run: Run, client: MlflowClient, gated: tuple[str, ...]) -> None:
    log_fine_tune("bot")
    done = run("promote", "models:/bot/1", "--alias", "champion", *gated)
    assert done.exit_code == 1
    assert "missing_lock" in done.stderr


@pytest.mark.parametrize("place", [(), ("--stage", "Staging", "--alias", "x"), ("--stage", "Nowhere")])
def test_one_place_must_be_named(run: Run, place: tuple[str, ...]) -> None:
    assert run("promote", "models:/bot/1", "--dry-run", *place).exit_code == 2


def test_only_a_database_can_be_asked(run: Run) -> None:
    done = run(*DRY, "--registry-uri", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "only its server knows" in done.stderr
