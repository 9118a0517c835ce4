"""What an identity must have signed is promoted, or loaded, if it did; what anybody else signed is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit.receipts import ReceiptReader
from mlflow_safelock.errors import SigstoreError, VerificationError
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate.ledger import UNSIGNED
from mlflow_safelock.gate.policy import DEFAULT_POLICY
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import (
    RECEIPT_SIGNATURE_FILE,
    Identity,
    keyless_signer,
    load_signing_key,
    sign_lock,
)
from mlflow_safelock.registry.explaining import explain_promotion
from mlflow_safelock.registry.stores import open_store
from tests.keys import write_keys
from tests.registries import BASE, base_lock, log_fine_tune, register_lock, state_of
from tests.registry.test_guard import download_uri, loaded_biases, store_of
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage
from tests.registry.test_signatures import register_signed
from tests.sigstore_instance import ISSUER, SigstoreInstance, running_instance

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

SAFETY = Identity(identity="safety@example.org", issuer=ISSUER)
GATE = Identity(identity="https://example.org/workloads/registry", issuer=ISSUER)
ELSEWHERE = "https://accounts.example.com"


def policy_for(*identities: Identity, **signature: Any) -> str:
    rule = {"required": True, "identities": [one.facts for one in identities], **signature}
    return json.dumps({"version": 1, "gates": [{"signature": rule}]})


def signed_by(instance: SigstoreInstance, who: Identity, lock: SafetyLock) -> bytes:
    instance.log_in(who.identity, who.issuer)
    return sign_lock(lock, keyless_signer())


class TestLocks:
    @pytest.fixture
    def strict(
        self,
        client: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> MlflowClient:
        log_fine_tune("bot")
        return open_with_policy(tmp_path, monkeypatch, policy_for(SAFETY))

    def refused(self, client: MlflowClient, folder: Path, reason: str) -> str:
        before = state_of(client, "bot", 1)
        with pytest.raises(MlflowException, match=rf"\[{reason}\]") as caught:
            stage(client, 1)
        assert caught.value.get_http_status_code() == 403
        assert state_of(client, "bot", 1) == before
        assert ledger_rows(folder)[-1]["reason"] == reason
        return str(caught.value.message)

    def test_one_that_the_identity_signed_is_applied(
        self, strict: MlflowClient, sigstore: SigstoreInstance
    ) -> None:
        register_signed(base_lock(), signed_by(sigstore, SAFETY, base_lock()))
        asked = (sigstore.certificates, len(sigstore.entries))
        stage(strict, 1)
        assert loaded_biases()
        assert (sigstore.certificates, len(sigstore.entries)) == asked, "a promotion asks nobody"

    def test_an_unsigned_one_is_not(self, strict: MlflowClient, tmp_path: Path) -> None:
        register_lock(base_lock())
        refusal = self.refused(strict, tmp_path, "unsigned_lock")
        assert "safelock lock sign models:/safelock.org--tiny-base/1 --sigstore" in refusal

    @pytest.mark.parametrize(
        "how", ["another name", "another provider", "another lock", "a key", "another instance", "changed"]
    )
    def test_a_signature_that_does_not_hold_is_a_refusal(
        self,
        strict: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        how: str,
    ) -> None:
        lock = base_lock()
        if how == "another name":
            signature = signed_by(sigstore, GATE, lock)
            cause = f"signed by {GATE}"
        elif how == "another provider":
            signature = signed_by(sigstore, SAFETY.model_copy(update={"issuer": ELSEWHERE}), lock)
            cause = f"signed by {SAFETY.identity} of {ELSEWHERE}"
        elif how == "another lock":
            signature = signed_by(sigstore, SAFETY, base_lock(seed=1))
            cause = "is of another lock"
        elif how == "a key":
            signature = sign_lock(lock, load_signing_key(write_keys(tmp_path).private))
            cause = "no Sigstore bundle"
        elif how == "another instance":
            with running_instance(tmp_path / "another") as another, monkeypatch.context() as elsewhere:
                elsewhere.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(another.trust_config))
                elsewhere.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(another.token_file))
                signature = signed_by(another, SAFETY, lock)
            cause = "does not hold"
        else:
            signature = signed_by(sigstore, SAFETY, lock)
            form = json.loads(signature)
            other = json.loads(signed_by(sigstore, SAFETY, base_lock(seed=1)))
            form["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"]
            signature, cause = json.dumps(form).encode(), "does not hold"
        register_signed(lock, signature)
        assert cause in self.refused(strict, tmp_path, "bad_signature")

    def test_keys_and_identities_are_taken_side_by_side(
        self,
        strict: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        keys = write_keys(tmp_path)
        text = policy_for(SAFETY, public_keys=[keys.public.name])
        (tmp_path / "safelock.yaml").write_text(text)
        register_signed(base_lock(), sign_lock(base_lock(), load_signing_key(keys.private)))
        stage(strict, 1)
        register_signed(base_lock(seed=1), signed_by(sigstore, SAFETY, base_lock(seed=1)))
        strict.transition_model_version_stage("bot", "1", "Production")
        register_signed(base_lock(seed=2), signed_by(sigstore, GATE, base_lock(seed=2)))
        self.refused(strict, tmp_path, "bad_signature")

    @pytest.mark.parametrize("what", ["the package", "the trust root"])
    def test_where_nothing_can_be_verified_nothing_is_promoted(
        self,
        strict: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        what: str,
    ) -> None:
        register_signed(base_lock(), signed_by(sigstore, SAFETY, base_lock()))
        with monkeypatch.context() as without:
            if what == "the package":
                without.setitem(sys.modules, "sigstore", None)
                without.delitem(sys.modules, "sigstore.models")
                told = r"pip install 'mlflow-safelock[sigstore]'"
            else:
                sigstore.trust_config.write_text("{}")
                told = "SAFELOCK_SIGSTORE_TRUST_CONFIG"
            assert told in self.refused(strict, tmp_path, "no_sigstore")
            # A registry that is opened now says so at once.
            with pytest.raises(SigstoreError):
                open_store(f"safelock+sqlite:///{tmp_path}/registry.db", None)

    def on_record(self, client: MlflowClient) -> list[tuple[int, str | None]]:
        """The locks on record, and what their rows say of their signatures."""
        known = store_of(client)._gate.registry.locks_of("default", BASE)
        return [(entry.lock.version, entry.message) for entry in known]

    def test_one_is_not_registered_while_nobody_can_tell_whether_it_is_signed(
        self,
        strict: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from sigstore.models import ClientTrustConfig

        def away(*_: Any) -> ClientTrustConfig:
            raise ConnectionError("it does not answer")

        signatures = [signed_by(sigstore, SAFETY, base_lock(seed=seed)) for seed in (0, 1)]
        register_signed(base_lock(seed=0), signatures[0])
        with monkeypatch.context() as without:
            without.setattr(ClientTrustConfig, "from_json", away)
            # What was read of the same text before is remembered.
            sigstore.trust_config.write_text(sigstore.trust_config.read_text() + "\n")
            with pytest.raises(MlflowException, match=r"register a lock.*\[unreachable\]") as caught:
                register_signed(base_lock(seed=1), signatures[1])
            assert caught.value.get_http_status_code() == 409
        assert self.on_record(strict) == [(1, None)]
        newer = register_signed(base_lock(seed=1), signatures[1])
        assert self.on_record(strict) == [(1, None), (newer, None)]
        strict.delete_model_version(lock_model_name(BASE), str(newer))
        self.refused(strict, tmp_path, "lock_superseded")

    def test_one_that_cannot_be_verified_here_is_on_record_as_unsigned_until_it_can(
        self, strict: MlflowClient, sigstore: SigstoreInstance
    ) -> None:
        signatures = [signed_by(sigstore, SAFETY, base_lock(seed=seed)) for seed in (0, 1)]
        register_signed(base_lock(seed=0), signatures[0])
        trusted = sigstore.trust_config.read_text()
        sigstore.trust_config.write_text("{}")
        register_signed(base_lock(seed=1), signatures[1])
        assert self.on_record(strict) == [(1, None), (2, UNSIGNED)]
        sigstore.trust_config.write_text(trusted)
        stage(strict, 1)
        assert self.on_record(strict) == [(1, None), (2, None)]


class TestReceipts:
    @pytest.fixture
    def signed(
        self, client: MlflowClient, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> MlflowClient:
        """A version that was promoted by a registry with an identity."""
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        sigstore.log_in(GATE.identity)
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        monkeypatch.delenv("SAFELOCK_SIGSTORE_SIGNING")
        return client

    @staticmethod
    def trust(monkeypatch: pytest.MonkeyPatch, *identities: Identity) -> None:
        monkeypatch.setenv("SAFELOCK_IDENTITIES", json.dumps([one.facts for one in identities]))

    def test_one_that_the_identity_signed_is_loaded_and_believed(
        self, signed: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def evidence() -> Any:
            return ReceiptReader(signed, None, mlflow.get_registry_uri()).evidence_at(download_uri(signed, 1))

        assert evidence().kind == "receipt", "nobody asks"
        self.trust(monkeypatch, SAFETY, GATE)
        assert loaded_biases()
        assert evidence().kind == "signed receipt"
        self.trust(monkeypatch, SAFETY)
        for read in (evidence, loaded_biases):
            with pytest.raises(VerificationError, match=f"none of the identities.*signed by {GATE}"):
                read()

    def test_one_that_is_not_signed_is_not_loaded_until_it_is(
        self, client: MlflowClient, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log_fine_tune("bot")
        register_lock(base_lock())
        stage(client, 1)
        self.trust(monkeypatch, GATE)
        with pytest.raises(VerificationError, match=r"is not signed.*SAFELOCK_SIGSTORE_SIGNING"):
            loaded_biases()
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        sigstore.log_in(GATE.identity)
        for _ in range(2):
            stage(client, 1)
        assert loaded_biases()
        assert len(sigstore.entries) == 1, "signed once, and then left alone"

    def test_a_receipt_of_another_model_does_not_take_its_place(
        self, signed: MlflowClient, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        log_fine_tune("other")
        stage(signed, 1, "other")
        signature = Path(download_uri(signed, 1, "other")) / RECEIPT_SIGNATURE_FILE
        (Path(download_uri(signed, 1)) / RECEIPT_SIGNATURE_FILE).write_bytes(signature.read_bytes())
        self.trust(monkeypatch, GATE)
        with pytest.raises(VerificationError, match="of another receipt"):
            mlflow.pyfunc.load_model("models:/bot/Staging")

    def test_a_rehearsal_leaves_nothing_on_the_log(
        self, client: MlflowClient, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        sigstore.log_in(GATE.identity)
        log_fine_tune("bot")
        register_lock(base_lock())
        addresses = (mlflow.get_registry_uri(), mlflow.get_tracking_uri())
        explained = explain_promotion(*addresses, DEFAULT_POLICY, "bot", 1, Target("stage", "Staging"))
        assert explained.outcome == "lock"
        assert (sigstore.certificates, sigstore.entries) == (0, [])

    def test_without_a_token_nothing_is_promoted(
        self,
        client: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        log_fine_tune("bot")
        register_lock(base_lock())
        before = state_of(client, "bot", 1)
        for age, told in ((None, "cannot be read"), (3600, "Nothing could be signed")):
            if age is not None:
                sigstore.log_in(GATE.identity, age=age)
            with pytest.raises(MlflowException, match=rf"\[no_sigstore\].*{told}") as caught:
                stage(client, 1)
            assert caught.value.get_http_status_code() == 403
        assert state_of(client, "bot", 1) == before
        assert ledger_rows(tmp_path)[-1]["reason"] == "no_sigstore"

    def test_what_cannot_be_used_stops_the_registry_and_not_each_promotion(
        self,
        client: MlflowClient,
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sigstore.trust_config.write_text("{}")
        address = f"safelock+sqlite:///{tmp_path}/registry.db"
        open_store(address, None)
        for name, value in (
            ("SAFELOCK_SIGSTORE_SIGNING", "true"),
            ("SAFELOCK_IDENTITIES", json.dumps([GATE.facts])),
        ):
            monkeypatch.setenv(name, value)
            with pytest.raises(SigstoreError, match="trust configuration"):
                open_store(address, None)
            monkeypatch.delenv(name)

    def test_an_instance_that_is_away_may_be_asked_again(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_instance(tmp_path / "sigstore") as instance:
            instance.log_in(GATE.identity)
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(instance.trust_config))
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(instance.token_file))
        log_fine_tune("bot")
        register_lock(base_lock())
        with pytest.raises(MlflowException, match=r"\[unreachable\]") as caught:
            stage(client, 1)
        assert caught.value.get_http_status_code() == 409
