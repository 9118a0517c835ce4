"""Gates by tag: tags lead to stricter gates only, and taking one away serves nothing unlocked."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit import audit_rows
from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.provenance import load_signing_key, sign_lock
from tests.keys import write_keys
from tests.registries import base_lock, log_fine_tune, register_lock
from tests.registry.test_guard import download_uri, edit_row, loaded_biases, store_of
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage
from tests.registry.test_signatures import register_signed

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

POLICY = """
version: 1
gates:
  - tags: {risk: "high*"}
    aliases: [staging, champion, beta]
    lock: {min_version: 2}
    alpha: {default: 8, min: 4}
  - {}
"""


@pytest.fixture
def tagged(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A registry with gates by tag, a version of ``bot``, and two versions of its base's lock."""
    client = open_with_policy(tmp_path, monkeypatch, POLICY)
    log_fine_tune("bot")
    register_lock(base_lock(seed=0))
    return client


@pytest.mark.parametrize("where", ["version", "registered model"])
def test_a_tag_leads_to_its_gate(tagged: MlflowClient, tmp_path: Path, where: str) -> None:
    if where == "version":
        tagged.set_model_version_tag("bot", "1", "risk", "high-2")
    else:
        tagged.set_registered_model_tag("bot", "risk", "high-2")
    with pytest.raises(MlflowException, match=r"lock_too_old.*version 2"):
        stage(tagged, 1)
    register_lock(base_lock(seed=1))
    tagged.set_registered_model_alias("bot", "beta", "1")
    assert loaded_biases("models:/bot@beta")
    assert ledger_rows(tmp_path)[-1]["alpha"] == 8.0


def test_without_the_tag_the_gate_without_tags_decides(tagged: MlflowClient, tmp_path: Path) -> None:
    stage(tagged, 1)
    tagged.set_registered_model_alias("bot", "beta", "1")
    (row,) = ledger_rows(tmp_path)
    assert (row["alpha"], row["target"]) == (6.0, "stage:Staging")


class TestATagThatIsTakenAway:
    @pytest.fixture
    def promoted(self, tagged: MlflowClient) -> MlflowClient:
        register_lock(base_lock(seed=1))
        tagged.set_model_version_tag("bot", "1", "risk", "high")
        tagged.set_registered_model_alias("bot", "beta", "1")
        tagged.delete_model_version_tag("bot", "1", "risk")
        return tagged

    def test_what_was_locked_stays_locked(self, promoted: MlflowClient) -> None:
        assert loaded_biases("models:/bot@beta")
        stage(promoted, 1)
        assert loaded_biases("models:/bot/Staging")

    def test_a_version_under_an_alias_that_any_gate_is_for_is_not_unlocked(
        self, promoted: MlflowClient
    ) -> None:
        with pytest.raises(PromotionRefused, match="alias:beta") as info:
            store_of(promoted).unlock("bot", 1, "the tag is gone, so why not")
        assert info.value.reason == "still_gated"

    def test_no_version_leaves_every_gate(self, promoted: MlflowClient, tmp_path: Path) -> None:
        stage(promoted, 1)
        original = ledger_rows(tmp_path)[0]["original_location"]
        edit_row(tmp_path, "UPDATE model_versions SET storage_location=? WHERE name='bot'", original)
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(promoted, 1)


class TestATagThatComesBack:
    @pytest.mark.parametrize("locks", [1, 2])
    def test_what_passed_a_looser_gate_meanwhile_is_not_served_in_the_stricter_one(
        self, tagged: MlflowClient, locks: int
    ) -> None:
        if locks == 2:
            register_lock(base_lock(seed=1))
        tagged.set_model_version_tag("bot", "1", "safelock.alpha", "2")
        stage(tagged, 1)
        assert loaded_biases()
        tagged.set_model_version_tag("bot", "1", "risk", "high")
        with pytest.raises(MlflowException, match=r"not_locked.*risk: high\*.*Promote it again"):
            download_uri(tagged, 1)

    def test_what_the_stricter_gate_would_have_passed_is_served(self, tagged: MlflowClient) -> None:
        register_lock(base_lock(seed=1))
        stage(tagged, 1)
        tagged.set_model_version_tag("bot", "1", "risk", "high")
        assert loaded_biases()

    def test_an_unlocked_version_under_an_alias_of_the_stricter_gate_is_not_served(
        self, tagged: MlflowClient
    ) -> None:
        tagged.set_registered_model_alias("bot", "beta", "1")
        assert download_uri(tagged, 1)
        tagged.set_model_version_tag("bot", "1", "risk", "high")
        with pytest.raises(MlflowException, match=r"not_locked.*alias:beta"):
            download_uri(tagged, 1)

    @pytest.mark.parametrize(
        ("asks", "refusal"),
        [
            ("evaluation: {max_harmful_rate: 0.05}", "missing_evaluation"),
            ("signature: {required: true, public_keys: [key.pub.pem]}", "unsigned_lock"),
            ("carrier: standalone", "not_prepared"),
            ("lock: {max_age_days: 30}", "lock_expired"),
        ],
    )
    def test_whatever_the_stricter_gate_refuses_is_not_served_there(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str, refusal: str
    ) -> None:
        write_keys(tmp_path)
        policy = f"version: 1\ngates:\n  - tags: {{risk: high}}\n    {asks}\n  - {{}}\n"
        client = open_with_policy(tmp_path, monkeypatch, policy)
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        assert download_uri(client, 1)
        client.set_model_version_tag("bot", "1", "risk", "high")
        with pytest.raises(MlflowException, match=r"not_locked.*risk: high"):
            download_uri(client, 1)
        with pytest.raises(MlflowException, match=refusal):
            stage(client, 1)
        client.delete_model_version_tag("bot", "1", "risk")
        assert download_uri(client, 1), "without the tag it is as good as it was"

    def test_what_was_promoted_again_there_is_served_and_goes_on_without_the_tag_and_with_it(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = write_keys(tmp_path)
        asks = "signature: {required: true, public_keys: [key.pub.pem]}"
        policy = f"version: 1\ngates:\n  - tags: {{risk: high}}\n    {asks}\n  - {{}}\n"
        client = open_with_policy(tmp_path, monkeypatch, policy)
        log_fine_tune("bot")
        register_signed(base_lock(), sign_lock(base_lock(), load_signing_key(keys.private)))
        stage(client, 1)
        client.set_model_version_tag("bot", "1", "risk", "high")
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, 1)
        for _ in range(2):
            stage(client, 1)
            assert download_uri(client, 1)
        client.delete_model_version_tag("bot", "1", "risk")
        stage(client, 1)
        client.set_model_version_tag("bot", "1", "risk", "high")
        assert download_uri(client, 1)
        assert [row["event"] for row in ledger_rows(tmp_path)].count("promoted") == 2


def test_the_audit_holds_a_version_to_the_gate_of_its_tags(
    tagged: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged.set_registered_model_alias("bot", "beta", "1")
    uri = f"sqlite:///{tmp_path}/registry.db"
    (row,) = audit_rows(uri, None)
    assert row.violation is None
    tagged.set_registered_model_tag("bot", "risk", "high")
    (row,) = audit_rows(uri, None)
    assert "alias:beta" in (row.violation or "")


def test_a_rename_looks_at_the_tags(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = POLICY.replace("- tags", "- models: support-*\n    tags").replace("- {}", "- models: support-*")
    client = open_with_policy(tmp_path, monkeypatch, policy)
    log_fine_tune("free")
    client.set_registered_model_alias("free", "beta", "1")
    client.set_registered_model_tag("free", "risk", "high")
    with pytest.raises(MlflowException, match=r"not_locked.*alias:beta"):
        client.rename_registered_model("free", "support-x")
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        connection.execute("DELETE FROM registered_model_tags")
    client.rename_registered_model("free", "support-x")
