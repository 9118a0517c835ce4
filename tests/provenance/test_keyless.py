"""What an identity signed is verified against the trust root, by nobody's word, and nobody is asked."""

from __future__ import annotations

import base64
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from sigstore.dsse import Envelope
from sigstore.models import ClientTrustConfig
from sigstore.oidc import IdentityToken
from sigstore.sign import SigningContext

from mlflow_safelock.errors import SettingsError, SigstoreError, UnreachableError, VerificationError
from mlflow_safelock.gate.transient import is_transient
from mlflow_safelock.provenance import (
    Identity,
    check_sigstore,
    configured_signatories,
    configured_signer,
    keyless,
    keyless_signer,
    load_public_key,
    load_signing_key,
)
from mlflow_safelock.provenance.dsse import MAX_BYTES, encode
from mlflow_safelock.provenance.envelopes import is_sealed_by, opened, seal, unverified_payload
from tests.keys import write_keys
from tests.sigstore_instance import ISSUER, SigstoreInstance, running_instance

SAFETY = Identity(identity="safety@example.org", issuer=ISSUER)
OTHER = Identity(identity="someone@example.org", issuer=ISSUER)
STATEMENT = json.dumps(
    {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "it", "digest": {"sha256": "0" * 64}}],
        "predicateType": "urn:test",
        "predicate": {},
    }
).encode()


@pytest.fixture
def bundle(sigstore: SigstoreInstance) -> bytes:
    sigstore.log_in(SAFETY.identity)
    return seal(STATEMENT, keyless_signer())


def changed(bundle: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    form = json.loads(bundle)
    change(form)
    return json.dumps(form).encode()


def entry_of(form: dict[str, Any]) -> dict[str, Any]:
    return form["verificationMaterial"]["tlogEntries"][0]


def test_what_an_identity_signed_is_opened_by_its_name_and_provider(
    sigstore: SigstoreInstance, bundle: bytes
) -> None:
    assert opened(bundle, [OTHER, SAFETY], origin="It") == (STATEMENT, SAFETY)
    assert unverified_payload(bundle, origin="It") == STATEMENT
    assert len(sigstore.entries) == 1


def test_a_workload_has_an_address_for_a_name(sigstore: SigstoreInstance) -> None:
    name = "https://example.org/org/repo/.ci/lock.yml@refs/heads/main"
    sigstore.log_in(name)
    wanted = Identity(identity=name, issuer=ISSUER)
    assert keyless_signer().identity() == wanted
    assert sigstore.entries == [], "who one is can be told without signing"
    assert opened(seal(STATEMENT, keyless_signer()), [wanted], origin="It")[1] == wanted


def test_every_signature_of_a_growing_log_holds(sigstore: SigstoreInstance) -> None:
    sigstore.log_in(SAFETY.identity)
    for _ in range(6):
        assert opened(seal(STATEMENT, keyless_signer()), [SAFETY], origin="It")[0] == STATEMENT
    assert len(sigstore.entries) == 6


def test_verifying_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_instance(tmp_path) as instance:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(instance.trust_config))
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(instance.token_file))
        instance.log_in(SAFETY.identity)
        bundle = seal(STATEMENT, keyless_signer())

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert opened(bundle, [SAFETY], origin="It")[0] == STATEMENT


def test_the_public_instance_is_trusted_where_no_other_is_named_and_is_not_asked(
    bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAFELOCK_SIGSTORE_TRUST_CONFIG")
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    check_sigstore()
    with pytest.raises(VerificationError, match="does not hold"):
        opened(bundle, [SAFETY], origin="It")


@pytest.mark.parametrize(
    "wanted",
    [
        OTHER,
        Identity(identity=SAFETY.identity, issuer="https://accounts.example.com"),
        Identity(identity="safety@example.or", issuer=ISSUER),
        Identity(identity="SAFETY@example.org", issuer=ISSUER),
    ],
    ids=str,
)
def test_another_name_or_another_provider_is_somebody_else(bundle: bytes, wanted: Identity) -> None:
    with pytest.raises(VerificationError, match=f"none of the identities.*signed by {SAFETY}"):
        opened(bundle, [wanted], origin="It")


def test_a_bundle_of_another_instance_does_not_hold(
    bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_instance(tmp_path / "another") as another:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(another.trust_config))
    with pytest.raises(VerificationError, match=r"does not hold.*certificate chain"):
        opened(bundle, [SAFETY], origin="It")


def payload(form: dict[str, Any]) -> None:
    form["dsseEnvelope"]["payload"] = base64.b64encode(STATEMENT.replace(b"it", b"us")).decode()


def payload_type(form: dict[str, Any]) -> None:
    form["dsseEnvelope"]["payloadType"] = "text/plain"


def signature(form: dict[str, Any]) -> None:
    form["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(b"0" * 70).decode()


def time_of_the_log(form: dict[str, Any]) -> None:
    entry_of(form)["integratedTime"] = str(int(entry_of(form)["integratedTime"]) + 1)


def promise(form: dict[str, Any]) -> None:
    del entry_of(form)["inclusionPromise"]


def proof(form: dict[str, Any]) -> None:
    entry_of(form)["inclusionProof"]["rootHash"] = base64.b64encode(b"0" * 32).decode()


def checkpoint(form: dict[str, Any]) -> None:
    note = entry_of(form)["inclusionProof"]["checkpoint"]
    note["envelope"] = note["envelope"].replace("log.example.org\n1\n", "log.example.org\n2\n")


def no_entry(form: dict[str, Any]) -> None:
    form["verificationMaterial"]["tlogEntries"] = []


def no_certificate(form: dict[str, Any]) -> None:
    form["verificationMaterial"]["certificate"]["rawBytes"] = ""


def no_envelope(form: dict[str, Any]) -> None:
    del form["dsseEnvelope"]


def more(form: dict[str, Any]) -> None:
    form["somethingElse"] = 1


@pytest.mark.parametrize(
    "change",
    [
        *(payload, payload_type, signature, time_of_the_log, promise, proof, checkpoint),
        *(no_entry, no_certificate, no_envelope, more),
    ],
)
def test_a_bundle_in_which_something_was_changed_does_not_hold(
    bundle: bytes, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(VerificationError, match="does not hold"):
        opened(changed(bundle, change), [SAFETY], origin="It")


def test_the_entry_of_another_signature_proves_nothing(sigstore: SigstoreInstance, bundle: bytes) -> None:
    other = json.loads(seal(STATEMENT.replace(b"it", b"us"), keyless_signer()))
    swapped = changed(bundle, lambda form: form["verificationMaterial"].update(tlogEntries=[entry_of(other)]))
    with pytest.raises(VerificationError, match="does not hold"):
        opened(swapped, [SAFETY], origin="It")


def test_a_payload_of_another_type_is_not_taken_however_well_it_is_signed(
    sigstore: SigstoreInstance,
) -> None:
    sigstore.log_in(SAFETY.identity)
    config = ClientTrustConfig.from_json(sigstore.trust_config.read_text())
    context = SigningContext.from_trust_config(config)
    with context.signer(IdentityToken(sigstore.token_file.read_text())) as signer:
        certificate, kind = signer._signing_cert(), "text/plain"
        signature = signer._private_key.sign(encode(kind, b"payload"), ec.ECDSA(SHA256()))
        form = {
            "payload": base64.b64encode(b"payload").decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        }
        envelope = Envelope._from_json(json.dumps(form))
        proposed = context._rekor._build_dsse_request(envelope=envelope, certificate=certificate)
        bundle = signer._finalize_sign(certificate, envelope, proposed).to_json().encode()
    with pytest.raises(VerificationError, match=r"holds 'text/plain'"):
        opened(bundle, [SAFETY], origin="It")


def test_a_certificate_that_was_over_when_something_was_signed_does_not_hold(
    sigstore: SigstoreInstance,
) -> None:
    sigstore.log_in(SAFETY.identity)
    sigstore.clock = 3600
    with pytest.raises(VerificationError, match=r"does not hold.*(expired|not valid)"):
        seal(STATEMENT, keyless_signer())


def test_what_is_too_large_is_not_read(bundle: bytes) -> None:
    with pytest.raises(VerificationError, match="at most"):
        opened(bundle + b" " * MAX_BYTES, [SAFETY], origin="It")


def test_a_key_counts_for_no_identity_and_an_identity_for_no_key(bundle: bytes, tmp_path: Path) -> None:
    pair = write_keys(tmp_path)
    envelope, public = seal(STATEMENT, load_signing_key(pair.private)), load_public_key(pair.public)
    for wanted in ([SAFETY, public], [public, SAFETY]):
        assert opened(envelope, wanted, origin="It") == (STATEMENT, public)
        assert opened(bundle, wanted, origin="It") == (STATEMENT, SAFETY)
    with pytest.raises(VerificationError, match="only identities count"):
        opened(envelope, [SAFETY], origin="It")
    with pytest.raises(VerificationError, match="only keys count"):
        opened(bundle, [public], origin="It")
    for nobody in (envelope, bundle):
        with pytest.raises(VerificationError):
            opened(nobody, [], origin="It")


def test_an_envelope_taken_out_of_its_bundle_is_signed_by_no_key(bundle: bytes, tmp_path: Path) -> None:
    envelope = json.dumps(json.loads(bundle)["dsseEnvelope"]).encode()
    with pytest.raises(VerificationError, match="none of the keys"):
        opened(envelope, [load_public_key(write_keys(tmp_path).public), SAFETY], origin="It")


class TestWithoutWhatItTakes:
    def test_no_token_is_told_and_nothing_was_asked_for(self, sigstore: SigstoreInstance) -> None:
        with pytest.raises(SigstoreError, match=r"token.*cannot be read"):
            seal(STATEMENT, keyless_signer())
        sigstore.token_file.write_text("\n")
        with pytest.raises(SigstoreError, match=r"no identity token.*SAFELOCK_SIGSTORE_TOKEN_FILE"):
            seal(STATEMENT, keyless_signer())
        assert (sigstore.certificates, sigstore.entries) == (0, [])

    def test_a_machine_without_a_token_of_its_own_has_none(
        self, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SAFELOCK_SIGSTORE_TOKEN_FILE")
        for variable in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(SigstoreError, match="no identity token"):
            seal(STATEMENT, keyless_signer())

    def test_a_machine_with_a_token_of_its_own_needs_no_file(
        self, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sigstore.log_in(SAFETY.identity)
        monkeypatch.delenv("SAFELOCK_SIGSTORE_TOKEN_FILE")
        monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
        monkeypatch.setenv("GITLAB_CI", "true")
        monkeypatch.setenv("SIGSTORE_ID_TOKEN", sigstore.token_file.read_text())
        assert opened(seal(STATEMENT, keyless_signer()), [SAFETY], origin="It")[1] == SAFETY

    @pytest.mark.parametrize("how", ["rubbish", "expired", "of another provider"])
    def test_a_token_that_is_not_good_is_refused(
        self, sigstore: SigstoreInstance, tmp_path: Path, how: str
    ) -> None:
        if how == "rubbish":
            sigstore.token_file.write_text("rubbish")
        elif how == "expired":
            sigstore.log_in(SAFETY.identity, age=3600)
        else:
            with running_instance(tmp_path / "another") as another:
                another.log_in(SAFETY.identity)
                sigstore.token_file.write_text(another.token_file.read_text())
        with pytest.raises(SigstoreError, match="Nothing could be signed") as caught:
            seal(STATEMENT, keyless_signer())
        assert not is_transient(caught.value)
        assert sigstore.entries == []

    def test_an_instance_that_is_away_may_come_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_instance(tmp_path) as instance:
            monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(instance.trust_config))
            monkeypatch.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(instance.token_file))
            instance.log_in(SAFETY.identity)
        with pytest.raises(SigstoreError) as caught:
            seal(STATEMENT, keyless_signer())
        assert is_transient(caught.value)

    def test_an_instance_that_never_answers_is_not_waited_for(
        self, sigstore: SigstoreInstance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keyless, "SIGN_SECONDS", 0.2)
        sigstore.log_in(SAFETY.identity)
        with sigstore.silent(), pytest.raises(UnreachableError, match="did not answer within"):
            seal(STATEMENT, keyless_signer())

    def test_the_extra_that_is_missing_is_named(self, bundle: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sigstore", None)
        monkeypatch.delitem(sys.modules, "sigstore.models")
        for work in (
            lambda: seal(STATEMENT, keyless_signer()),
            lambda: opened(bundle, [SAFETY], origin="It"),
            check_sigstore,
        ):
            with pytest.raises(SigstoreError, match=r"pip install 'mlflow-safelock\[sigstore\]'"):
                work()
        assert unverified_payload(bundle, origin="It") == STATEMENT, "to show it takes no package"

    @pytest.mark.parametrize("text", [None, "", "{}", '{"mediaType": "x"}', "\xff"])
    def test_a_trust_configuration_that_cannot_be_used_is_told(
        self, bundle: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
    ) -> None:
        path = tmp_path / "broken.json"
        if text is not None:
            path.write_text(text, encoding="latin-1")
        monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(path))
        with pytest.raises(SigstoreError, match="SAFELOCK_SIGSTORE_TRUST_CONFIG"):
            opened(bundle, [SAFETY], origin="It")


class TestSettings:
    def test_a_key_and_an_identity_at_once_are_a_contradiction(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        assert configured_signer() == keyless_signer()
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(write_keys(tmp_path).private))
        with pytest.raises(SettingsError, match="Unset one"):
            configured_signer()

    @pytest.mark.parametrize("text", ["", "[]", "safety@example.org", '[{"identity": "a"}]', "[1]"])
    def test_identities_that_cannot_be_read_are_no_way_out(
        self, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv("SAFELOCK_IDENTITIES", text)
        with pytest.raises(SettingsError, match="SAFELOCK_IDENTITIES"):
            configured_signatories()

    def test_who_signed_is_compared_with_those_who_are_named(
        self, bundle: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert is_sealed_by(bundle, STATEMENT, keyless_signer()), "nobody is named"
        assert not is_sealed_by(bundle, STATEMENT + b" ", keyless_signer())
        for who, counts in ((SAFETY, True), (OTHER, False)):
            monkeypatch.setenv("SAFELOCK_IDENTITIES", json.dumps([who.facts]))
            assert is_sealed_by(bundle, STATEMENT, keyless_signer()) is counts
