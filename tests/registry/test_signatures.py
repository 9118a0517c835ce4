"""Signed locks and receipts: what is not signed by a key that counts is not promoted, or not loaded."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import rfc8785
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit import audit_rows
from mlflow_safelock.errors import KeyFileError, VerificationError
from mlflow_safelock.flavors import meta_safetylock
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.formats import save_lock
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    LOCK_SIGNATURE_FILE,
    RECEIPT_SIGNATURE_FILE,
    load_signing_key,
    sign_lock,
)
from mlflow_safelock.provenance.dsse import sign
from mlflow_safelock.registry.stores import open_store
from tests.keys import KeyPair, write_keys
from tests.registries import BASE, base_lock, log_fine_tune, register_lock, state_of
from tests.registry.test_guard import download_uri, loaded_biases, store_of
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_keys(tmp_path)


@pytest.fixture
def others(tmp_path: Path) -> KeyPair:
    return write_keys(tmp_path, "p256", "other")


def register_signed(lock: SafetyLock, signature: bytes) -> int:
    with mlflow.start_run():
        return int(meta_safetylock.register(lock, signature).registered_model_version)


def lock_rows(folder: Path) -> list[int]:
    """The versions of locks that rows say were registered, in the order of the rows."""
    with sqlite3.connect(folder / "registry.db") as connection:
        query = "SELECT version FROM safelock_ledger WHERE event = 'registered' ORDER BY sequence"
        return [version for (version,) in connection.execute(query)]


class TestLocks:
    @pytest.fixture
    def under(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., MlflowClient]:
        """Opens the registry with a gate that wants locks signed by one of some keys; by nobody with none."""

        def opened(*pairs: KeyPair) -> MlflowClient:
            names = ", ".join(pair.public.name for pair in pairs)
            signature = f"signature: {{required: true, public_keys: [{names}]}}, " if pairs else ""
            gate = f"{{{signature}missing_lock: allow}}"
            return open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates: [{gate}]\n")

        return opened

    @pytest.fixture
    def strict(
        self, client: MlflowClient, tmp_path: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> MlflowClient:
        log_fine_tune("bot")
        gate = f"signature: {{required: true, public_keys: [{keys.public.name}]}}"
        return open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates: [{{{gate}}}]\n")

    def test_a_signed_one_is_applied(self, strict: MlflowClient, keys: KeyPair) -> None:
        register_signed(base_lock(), sign_lock(base_lock(), load_signing_key(keys.private)))
        stage(strict, 1)
        assert loaded_biases()

    def test_an_unsigned_one_is_not(self, strict: MlflowClient, tmp_path: Path) -> None:
        register_lock(base_lock())
        before = state_of(strict, "bot", 1)
        with pytest.raises(
            MlflowException, match=r"unsigned_lock.*safelock lock sign models:/safelock"
        ) as info:
            stage(strict, 1)
        assert info.value.error_code == "PERMISSION_DENIED"
        assert state_of(strict, "bot", 1) == before
        assert ledger_rows(tmp_path)[-1]["reason"] == "unsigned_lock"

    @pytest.mark.parametrize("how", ["another key", "another lock", "no lock", "rubbish", "an edited lock"])
    def test_a_signature_that_does_not_hold_is_a_refusal(
        self, strict: MlflowClient, tmp_path: Path, keys: KeyPair, others: KeyPair, how: str
    ) -> None:
        key, lock = load_signing_key(keys.private), base_lock()
        signature = {
            "another key": sign_lock(lock, load_signing_key(others.private)),
            "another lock": sign_lock(base_lock(seed=1), key),
            "no lock": sign(b'{"_type":"https://in-toto.io/Statement/v1"}', key),
            "rubbish": b"{}",
            "an edited lock": sign_lock(lock, key),
        }[how]
        register_signed(lock, signature)
        if how == "an edited lock":
            folder = Path(strict.get_model_version_download_uri(lock_model_name(BASE), "1"))
            save_lock(base_lock(seed=1), folder / "lock.safetensors")
        with pytest.raises(MlflowException, match="bad_signature"):
            stage(strict, 1)
        assert ledger_rows(tmp_path)[-1]["reason"] == "bad_signature"

    def test_a_signed_but_older_one_does_not_come_back(self, strict: MlflowClient, keys: KeyPair) -> None:
        key = load_signing_key(keys.private)
        for seed in (0, 1):
            newest = register_signed(base_lock(seed=seed), sign_lock(base_lock(seed=seed), key))
        strict.delete_model_version(lock_model_name(BASE), str(newest))
        with pytest.raises(MlflowException, match="lock_superseded"):
            stage(strict, 1)

    def test_one_that_nobody_signed_supersedes_none_that_is_signed(
        self, strict: MlflowClient, tmp_path: Path, keys: KeyPair, others: KeyPair
    ) -> None:
        name, key = lock_model_name(BASE), load_signing_key(keys.private)
        register_signed(base_lock(seed=0), sign_lock(base_lock(seed=0), key))
        junk = [
            register_lock(base_lock(seed=1)),
            register_signed(
                base_lock(seed=2), sign_lock(base_lock(seed=2), load_signing_key(others.private))
            ),
        ]
        with pytest.raises(MlflowException, match="bad_signature"):
            stage(strict, 1)
        for version in junk:
            strict.delete_model_version(name, str(version))
        stage(strict, 1)
        assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == base_lock(seed=0).digest
        signed_later = register_signed(base_lock(seed=1), sign_lock(base_lock(seed=1), key))
        strict.delete_model_version(name, str(signed_later))
        with pytest.raises(MlflowException, match=r"lock_superseded.*version 2"):
            stage(strict, log_fine_tune("bot"))

    def test_one_that_nobody_signed_is_none_that_is_gone(self, strict: MlflowClient) -> None:
        register_lock(base_lock())
        strict.delete_model_version(lock_model_name(BASE), "1")
        with pytest.raises(MlflowException, match=r"\[missing_lock\]"):
            stage(strict, 1)

    def test_one_that_was_applied_counts_as_signed_though_its_key_came_later(
        self, under: Callable[..., MlflowClient], tmp_path: Path, keys: KeyPair, others: KeyPair
    ) -> None:
        name, first = lock_model_name(BASE), log_fine_tune("bot")
        client = under(keys)
        register_signed(base_lock(seed=0), sign_lock(base_lock(seed=0), load_signing_key(keys.private)))
        newer = register_signed(
            base_lock(seed=1), sign_lock(base_lock(seed=1), load_signing_key(others.private))
        )
        with pytest.raises(MlflowException, match="bad_signature"):
            stage(client, first)
        client = under(keys, others)
        stage(client, first)
        assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == base_lock(seed=1).digest
        client.delete_model_version(name, str(newer))
        for version in (first, log_fine_tune("bot")):
            with pytest.raises(MlflowException, match="lock_superseded"):
                stage(client, version)
        client.delete_registered_model(name)
        with pytest.raises(MlflowException, match="lock_gone"):
            stage(client, log_fine_tune("bot"))

    def test_one_that_nobody_signed_is_done_away_with_where_one_gate_wants_signatures_and_another_does_not(
        self, client: MlflowClient, tmp_path: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        strict = f"{{models: 'strict-*', signature: {{required: true, public_keys: [{keys.public.name}]}}}}"
        client = open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates: [{strict}, {{}}]\n")
        name, older, newer = lock_model_name(BASE), base_lock(seed=0), base_lock(seed=1)
        signature = sign_lock(older, load_signing_key(keys.private))
        register_signed(older, signature)
        register_lock(newer)
        for bot in ("strict-bot", "lax-bot"):
            log_fine_tune(bot)
        revoke = f"safelock lock revoke models:/{name}/2 --digest {newer.digest} --reason"
        with pytest.raises(MlflowException, match=rf"unsigned_lock.*{revoke} .*then delete that version"):
            stage(client, 1, "strict-bot")
        with pytest.raises(MlflowException, match=rf"register a lock.*lock_superseded.*{revoke}"):
            register_signed(older, signature)
        client.delete_model_version(name, "2")
        stage(client, 1, "strict-bot")
        with pytest.raises(MlflowException, match=rf"lock_superseded.*{revoke}"):
            stage(client, 1, "lax-bot")
        with pytest.raises(MlflowException, match="lock_superseded"):
            register_signed(older, signature)
        store_of(client).revoke_lock(name, 2, "nobody's", newer.digest)
        stage(client, 1, "lax-bot")
        assert register_signed(older, signature) == 3
        for bot in ("strict-bot", "lax-bot"):
            stage(client, log_fine_tune(bot), bot)
        assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == older.digest

    def test_one_that_another_registration_finds_signed_is_on_record_as_such(
        self, under: Callable[..., MlflowClient], keys: KeyPair, others: KeyPair
    ) -> None:
        locks = base_lock(seed=0), base_lock(seed=1)
        signatures = [
            sign_lock(lock, load_signing_key(pair.private))
            for lock, pair in zip(locks, (keys, others), strict=True)
        ]
        under(keys)
        for lock, signature in zip(locks, signatures, strict=True):
            register_signed(lock, signature)
        under(keys, others)
        with pytest.raises(MlflowException, match=r"lock_superseded.*version 2"):
            register_signed(locks[0], signatures[0])

    def test_one_that_a_promotion_finds_applied_already_counts_as_signed_too(
        self, under: Callable[..., MlflowClient], tmp_path: Path, keys: KeyPair, others: KeyPair
    ) -> None:
        client, version = under(keys), log_fine_tune("bot")
        register_signed(base_lock(seed=0), sign_lock(base_lock(seed=0), load_signing_key(keys.private)))
        newer = register_signed(
            base_lock(seed=1), sign_lock(base_lock(seed=1), load_signing_key(others.private))
        )
        client = under()
        stage(client, version)
        client = under(keys, others)
        for _ in range(2):
            stage(client, version)
        assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted"], "there was nothing to do"
        assert lock_rows(tmp_path) == [1, 2, 2], "its row as a signed one is written once"
        client.delete_model_version(lock_model_name(BASE), str(newer))
        client.transition_model_version_stage("bot", str(version), "None")
        for which in (version, log_fine_tune("bot")):
            with pytest.raises(MlflowException, match="lock_superseded"):
                stage(client, which)

    def test_a_signature_is_not_asked_for_where_the_policy_does_not(self, client: MlflowClient) -> None:
        log_fine_tune("bot")
        register_signed(base_lock(), b"rubbish")
        stage(client, 1)
        folder = Path(client.get_model_version_download_uri(lock_model_name(BASE), "1"))
        assert (folder / LOCK_SIGNATURE_FILE).read_bytes() == b"rubbish"


class TestReceipts:
    @pytest.fixture
    def signed(self, client: MlflowClient, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
        """A version that was promoted by a registry with a key."""
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        monkeypatch.delenv("SAFELOCK_SIGNING_KEY")
        return client

    @staticmethod
    def trust(monkeypatch: pytest.MonkeyPatch, *pairs: KeyPair) -> None:
        monkeypatch.setenv("SAFELOCK_PUBLIC_KEYS", ":".join(str(pair.public) for pair in pairs))

    def test_a_signed_one_is_loaded_and_without_keys_nobody_asks(
        self, signed: MlflowClient, keys: KeyPair, others: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert loaded_biases()
        self.trust(monkeypatch, others, keys)
        assert loaded_biases()

    def test_one_that_is_not_signed_is_not_loaded(
        self, client: MlflowClient, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        self.trust(monkeypatch, keys)
        with pytest.raises(VerificationError, match=r"is not signed.*SAFELOCK_SIGNING_KEY"):
            mlflow.pyfunc.load_model("models:/bot/Staging")
        # The next step that the error names is one that works.
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
        stage(client, 1)
        assert loaded_biases()

    def test_one_that_somebody_else_signed_is_not_loaded(
        self, signed: MlflowClient, others: KeyPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.trust(monkeypatch, others)
        with pytest.raises(VerificationError, match="signed by none of the keys"):
            mlflow.pyfunc.load_model("models:/bot/Staging")

    def test_a_rewritten_receipt_does_not_fit_its_signature(
        self, signed: MlflowClient, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = Path(download_uri(signed, 1))
        shutil.copytree(folder, elsewhere := tmp_path / "copy")
        receipt = json.loads((folder / "receipt.json").read_text())
        receipt["predicate"]["alpha"] = 1.0
        (elsewhere / "receipt.json").write_bytes(rfc8785.dumps(receipt))
        assert loaded_biases(str(elsewhere)), "nobody asks"
        self.trust(monkeypatch, keys)
        with pytest.raises(VerificationError, match="of another receipt"):
            mlflow.pyfunc.load_model(str(elsewhere))

    def test_a_locked_model_that_somebody_saved_by_hand_is_not_loaded(
        self, signed: MlflowClient, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow_safelock.flavors import locked_model

        with sqlite3.connect(tmp_path / "registry.db") as connection:
            (source,) = connection.execute("SELECT source FROM model_versions WHERE name='bot'").fetchone()
        locked_model.save_model(base_lock(), tmp_path / "by-hand", source, alpha=0.001)
        self.trust(monkeypatch, keys)
        with pytest.raises(VerificationError, match="is not signed"):
            mlflow.pyfunc.load_model(str(tmp_path / "by-hand"))

    def test_a_key_that_comes_later_signs_with_the_next_promotion(
        self, client: MlflowClient, keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
        for _ in range(2):
            stage(client, 1)
        assert (Path(download_uri(client, 1)) / RECEIPT_SIGNATURE_FILE).is_file()
        assert len(ledger_rows(tmp_path)) == 2, "signed once, and then left alone"

    def test_a_standalone_model_carries_its_signature(
        self,
        client: MlflowClient,
        keys: KeyPair,
        others: KeyPair,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{carrier: standalone}]\n")
        log_fine_tune("bot")
        register_lock(base_lock())
        store_of(client).prepare("bot", 1)
        self.trust(monkeypatch, keys)
        stage(client, 1)
        assert (Path(download_uri(client, 1)) / RECEIPT_SIGNATURE_FILE).is_file()
        self.trust(monkeypatch, others)
        with pytest.raises(MlflowException, match="signed by none"):
            client.transition_model_version_stage("bot", "1", "Production")

    def test_the_audit_believes_a_signed_one(
        self,
        signed: MlflowClient,
        keys: KeyPair,
        others: KeyPair,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from mlflow_safelock.audit.receipts import ReceiptReader

        def evidence() -> Any:
            return ReceiptReader(signed, None, mlflow.get_registry_uri()).evidence_at(download_uri(signed, 1))

        assert evidence().kind == "receipt"
        self.trust(monkeypatch, keys)
        assert evidence().kind == "signed receipt"
        self.trust(monkeypatch, others)
        with pytest.raises(VerificationError, match="signed by none"):
            evidence()

    def test_a_key_that_cannot_be_used_stops_the_registry_and_not_each_promotion(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(tmp_path / "nowhere.pem"))
        with pytest.raises(KeyFileError, match=r"nowhere\.pem"):
            open_store(f"safelock+sqlite:///{tmp_path}/registry.db", None)

    def test_an_empty_list_of_keys_is_no_way_out(
        self, signed: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_PUBLIC_KEYS", "")
        with pytest.raises(KeyFileError, match="names no key"):
            mlflow.pyfunc.load_model("models:/bot/Staging")


def test_the_database_audit_needs_no_signature(client: MlflowClient, tmp_path: Path) -> None:
    log_fine_tune("bot")
    register_lock(base_lock())
    stage(client, 1)
    (row,) = audit_rows(f"sqlite:///{tmp_path}/registry.db", None)
    assert row.evidence == "ledger"
