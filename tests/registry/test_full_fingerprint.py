"""``fingerprint: full``: measured before the promotion, bound by it, and every byte compared when loaded."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit import audit_rows
from mlflow_safelock.cli.main import main
from mlflow_safelock.errors import VerificationError
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.flavors.standalone import read_standalone
from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.provenance import LocalArtifacts, SourceFingerprint, check_fingerprint
from tests.provenance.test_measuring import byte_that_no_block_has, flip_byte
from tests.registries import base_lock, biases_of, fine_tune, log_fine_tune, register_lock, state_of
from tests.registry.s3_server import S3Server
from tests.registry.test_guard import download_uri
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage
from tests.registry.test_standalone import download, folder_of, mlflow_geometry, prepare, s3, undo

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

assert s3, "a fixture"

FULL = "version: 1\ngates: [{fingerprint: full}]\n"
WEIGHTS = "model/model.safetensors"


@pytest.fixture(autouse=True)
def _notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logged_bot() -> int:
    """A fine-tune whose weights are too large to be compared whole, and its base's lock."""
    version = log_fine_tune("bot", fine_tune(intermediate_size=2_000))
    register_lock(base_lock())
    return version


@pytest.fixture
def full(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A registry whose policy asks for full fingerprints, with a fine-tune and its base's lock."""
    client = open_with_policy(tmp_path, monkeypatch, FULL)
    logged_bot()
    return client


def fingerprint_at(location: str) -> SourceFingerprint:
    return read_overlay(LocalArtifacts(folder_of(location))).receipt.predicate.source.fingerprint


def edit_unseen(location: str, fingerprint: SourceFingerprint, path: str = WEIGHTS) -> None:
    """Change one byte that no block of the fingerprint has."""
    flip_byte(folder_of(location) / path, byte_that_no_block_has(fingerprint, path))


def test_without_a_measuring_the_promotion_is_refused_and_names_the_command(
    full: MlflowClient, tmp_path: Path
) -> None:
    before = state_of(full, "bot", 1)
    with pytest.raises(MlflowException, match=r"not_measured.*safelock prepare models:/bot/1") as info:
        stage(full, 1)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(full, "bot", 1) == before
    assert ledger_rows(tmp_path)[-1]["reason"] == "not_measured"


def test_a_measured_version_is_promoted_and_its_receipt_has_the_digest_of_every_file(
    full: MlflowClient, tmp_path: Path
) -> None:
    original = download_uri(full, 1)
    made = prepare(tmp_path, 1)
    assert (made["carrier"], made["location"]) == ("overlay", None)
    assert made["fingerprint_location"].startswith(f"{original}-safelock/manifest-")
    assert made["measured_bytes"] > 1 << 20
    assert download_uri(full, 1) == original, "nothing is promoted yet"
    stage(full, 1)
    fingerprint = fingerprint_at(download_uri(full, 1))
    assert fingerprint.is_full
    assert fingerprint.digest == made["fingerprint"]
    events = [(row["event"], row["fingerprint"]) for row in ledger_rows(tmp_path)]
    assert events == [("prepared", made["fingerprint"]), ("promoted", made["fingerprint"])]
    assert biases_of(mlflow.pyfunc.load_model("models:/bot/Staging")._model_impl.pipeline.model)
    with sa.create_engine(f"sqlite:///{tmp_path}/registry.db").connect() as connection:
        assert verify_chain(connection).rows == 3 + len(events), "and rows for two policies and a lock"
    uri = f"safelock+sqlite:///{tmp_path}/registry.db"
    (row,) = audit_rows(uri)
    assert (row.state, row.drift) == ("locked", ())


def test_the_loader_refuses_one_byte_that_a_sampled_fingerprint_misses(
    full: MlflowClient, tmp_path: Path
) -> None:
    original = download_uri(full, 1)
    prepare(tmp_path, 1)
    stage(full, 1)
    fingerprint = fingerprint_at(download_uri(full, 1))
    copy = tmp_path / "copy"
    shutil.copytree(folder_of(original), copy)
    edit_unseen(original, fingerprint)
    check_fingerprint(fingerprint, LocalArtifacts(folder_of(original)))
    with pytest.raises(VerificationError, match=r"model\.safetensors.*other bytes"):
        mlflow.pyfunc.load_model("models:/bot/Staging")
    # A local copy of it that is whole serves as well as ever.
    mlflow.pyfunc.load_model("models:/bot/Staging", model_config={"safelock_source": str(copy)})


def test_preparing_again_reads_nothing_and_a_change_is_measured_anew(
    full: MlflowClient, tmp_path: Path
) -> None:
    first = prepare(tmp_path, 1)
    again = prepare(tmp_path, 1)
    assert again["measured_bytes"] is None
    assert again["fingerprint"] == first["fingerprint"]
    assert len(ledger_rows(tmp_path)) == 1
    config = folder_of(download_uri(full, 1)) / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("8", "9"))
    with pytest.raises(MlflowException, match=r"source_changed.*generation_config\.json"):
        stage(full, 1)
    assert prepare(tmp_path, 1)["fingerprint"] != first["fingerprint"]
    stage(full, 1)


def test_an_edit_that_hits_no_block_is_measured_anew(full: MlflowClient, tmp_path: Path) -> None:
    original = download_uri(full, 1)
    first = prepare(tmp_path, 1)
    fingerprint = SourceFingerprint.model_validate_json(
        (folder_of(first["fingerprint_location"]) / "fingerprint.json").read_bytes()
    )
    weights = folder_of(original) / WEIGHTS
    written = weights.stat().st_mtime_ns
    edit_unseen(original, fingerprint)
    second = prepare(tmp_path, 1)
    assert second["measured_bytes"] == first["measured_bytes"]
    stage(full, 1)
    assert biases_of(mlflow.pyfunc.load_model("models:/bot/Staging")._model_impl.pipeline.model)

    # Somebody who sets the time back is not seen by it, and --again does not look.
    edit_unseen(original, fingerprint_at(download_uri(full, 1)))
    os.utime(weights, ns=(written, written))
    assert prepare(tmp_path, 1)["measured_bytes"] is None
    assert prepare(tmp_path, 1, "--again")["measured_bytes"] == first["measured_bytes"]


@pytest.mark.parametrize("how", ["gone", "edited"])
def test_a_fingerprint_that_somebody_else_wrote_counts_for_nothing(
    full: MlflowClient, tmp_path: Path, how: str
) -> None:
    original = download_uri(full, 1)
    file = folder_of(prepare(tmp_path, 1)["fingerprint_location"]) / "fingerprint.json"
    measured = SourceFingerprint.model_validate_json(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        # The digest of other weights, which are put there afterwards where no block sees it.
        edit_unseen(original, measured)
        values = measured.model_dump(mode="json")
        for entry in values["files"]:
            if entry["path"] == WEIGHTS:
                entry["whole"] = digest_of(folder_of(original) / WEIGHTS)
        file.write_bytes(SourceFingerprint.model_validate_json(json.dumps(values)).to_bytes())
    with pytest.raises(MlflowException, match="not_measured"):
        stage(full, 1)
    prepare(tmp_path, 1)
    stage(full, 1)


def digest_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_a_dry_run_says_that_it_was_not_measured(full: MlflowClient, tmp_path: Path) -> None:
    command = [
        *("promote", "models:/bot/1", "--stage", "Staging", "--dry-run", "--format", "json"),
        *("--registry-uri", f"safelock+sqlite:///{tmp_path}/registry.db"),
        *("--tracking-uri", f"sqlite:///{tmp_path}/tracking.db"),
    ]
    refused = CliRunner().invoke(main, command)
    assert json.loads(refused.stdout)["refusal"]["reason"] == "not_measured"
    prepare(tmp_path, 1)
    assert json.loads(CliRunner().invoke(main, command).stdout)["outcome"] == "lock"


def test_what_was_promoted_by_blocks_is_promoted_again_in_full(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged_bot()
    stage(client, 1)
    sampled = download_uri(client, 1)
    assert not fingerprint_at(sampled).is_full
    client = open_with_policy(tmp_path, monkeypatch, FULL)
    with pytest.raises(MlflowException, match="not_measured"):
        stage(client, 1)
    prepare(tmp_path, 1)
    stage(client, 1)
    assert download_uri(client, 1) != sampled
    assert fingerprint_at(download_uri(client, 1)).is_full


def test_a_tag_that_comes_afterwards_asks_for_every_byte(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = "version: 1\ngates: [{tags: {risk: high}, fingerprint: full}, {}]\n"
    client = open_with_policy(tmp_path, monkeypatch, policy)
    logged_bot()
    stage(client, 1)
    client.set_model_version_tag("bot", "1", "risk", "high")
    with pytest.raises(MlflowException, match="not_locked"):
        download_uri(client, 1)
    prepare(tmp_path, 1)
    stage(client, 1)
    assert fingerprint_at(download_uri(client, 1)).is_full


class TestStandalone:
    @pytest.fixture
    def prepared(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, Any]:
        policy = "version: 1\ngates: [{fingerprint: full, carrier: standalone}]\n"
        self.client = open_with_policy(tmp_path, monkeypatch, policy)
        logged_bot()
        return prepare(tmp_path, 1)

    def test_it_is_promoted_and_its_receipt_has_the_digest_of_every_file(
        self, prepared: dict[str, Any], tmp_path: Path
    ) -> None:
        stage(self.client, 1)
        assert download_uri(self.client, 1) == prepared["location"]
        receipt = read_standalone(LocalArtifacts(folder_of(prepared["location"])))
        assert receipt.predicate.source.fingerprint.is_full
        assert ledger_rows(tmp_path)[-1]["fingerprint"] == prepared["fingerprint"]

    def test_one_byte_of_its_weights_is_refused_by_export_and_undo(
        self, prepared: dict[str, Any], tmp_path: Path
    ) -> None:
        location = prepared["location"]
        receipt = read_standalone(LocalArtifacts(folder_of(location)))
        (shared,) = receipt.predicate.shared
        fingerprint = receipt.predicate.source.fingerprint.of_copies(receipt.predicate.shared)
        edit_unseen(location, fingerprint, shared)
        read_standalone(LocalArtifacts(folder_of(location)))
        done = undo(tmp_path, str(folder_of(location)), tmp_path / "unlocked")
        assert (done.exit_code, "other bytes" in done.output) == (1, True)

    def test_one_made_of_sampled_blocks_does_not_do(
        self, prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{carrier: standalone}]\n")
        assert prepare(tmp_path, 1)["location"] != prepared["location"]

    def test_a_fingerprint_that_was_lost_is_made_again_and_the_model_stays(
        self, prepared: dict[str, Any], tmp_path: Path
    ) -> None:
        shutil.rmtree(folder_of(prepared["fingerprint_location"]))
        again = prepare(tmp_path, 1)
        assert again["fingerprint_location"] != prepared["fingerprint_location"]
        assert again["check"] is None, "the model was there already"
        stage(self.client, 1)


def test_on_s3_a_promotion_reads_little_and_biases_within_a_file_are_in_its_digest(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    policy = "version: 1\ngates: [{models: bot, fingerprint: full, carrier: CARRIER}]\n"
    client = open_with_policy(tmp_path, monkeypatch, policy.replace("CARRIER", "overlay"))
    mlflow.set_experiment("on s3")
    components = fine_tune("gpt2", n_inner=20_000)
    log_fine_tune("bot", components)
    register_lock(base_lock(**mlflow_geometry(components["model"])))
    size = prepare(tmp_path, 1)["measured_bytes"]
    assert s3.read > size > 20e6
    s3.forget()
    stage(client, 1)
    assert s3.read < 0.1 * size
    client = open_with_policy(tmp_path, monkeypatch, policy.replace("CARRIER", "standalone"))
    made = prepare(tmp_path, 1)
    assert made["measured_bytes"] is None, "it was measured before"
    stage(client, 1)
    folder = download(made["location"], tmp_path / "locked")
    (patched,) = read_standalone(LocalArtifacts(folder)).predicate.patched
    assert patched.whole == digest_of(folder / patched.path)
