"""Evaluations count from whom the policy names, be it through the ledger or through a server."""

from __future__ import annotations

import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from mlflow_safelock.errors import (
    KeyFileError,
    PromotionRefused,
    SigstoreError,
    SourceError,
)
from mlflow_safelock.provenance import (
    EVALUATION_SIGNATURE_FILE,
    EvaluationStatement,
    SigningKey,
    load_signing_key,
    sign_evaluation,
)
from mlflow_safelock.provenance.dsse import sign
from mlflow_safelock.registry.asking import (
    ASKING,
    CHECK_TAG,
    FILE_TAG,
    check_through_server,
    file_through_server,
)
from tests.keys import write_keys
from tests.registry.evidence import Shop, changed, events, older
from tests.sigstore_instance import ISSUER, SigstoreInstance


def test_evidence_is_signed_where_the_policy_says_by_whom(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, others = write_keys(tmp_path), write_keys(tmp_path, "p256", "other")
    statement = shop.measured().statement()
    shop.file(statement)
    shop.want_signed(keys)
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal, "what was filed before is not signed"
    assert load_signing_key(keys.private).public.keyid[:16] in refusal
    with pytest.raises(PromotionRefused) as unsigned:
        shop.file(statement)
    assert unsigned.value.reason == "unsigned_evaluation"
    key = load_signing_key(keys.private)
    for envelope in (
        sign(statement.to_bytes(), load_signing_key(others.private)),
        sign(older(statement, days=1).to_bytes(), key),
        b"{}",
    ):
        with pytest.raises(PromotionRefused) as bad:
            shop.file(statement, envelope)
        assert bad.value.reason == "bad_signature"
    monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
    entry = shop.file(statement, sign_evaluation(statement))
    assert shop.file(statement, sign_evaluation(statement)) == entry, "Ed25519 signs alike every time"
    shop.promote()
    path = Path(entry.location.removeprefix("file://")) / EVALUATION_SIGNATURE_FILE
    kept = path.read_bytes()
    for broken in (sign(statement.to_bytes(), load_signing_key(others.private)), b"rubbish"):
        path.write_bytes(broken)
        assert "[missing_evaluation]" in shop.refused().message
    path.write_bytes(kept)
    shop.promote()
    shop.want_signed(others)
    assert "[missing_evaluation]" in shop.refused().message, "a key that was taken out of the policy"


def test_evidence_is_signed_by_an_identity_where_the_policy_names_one(
    shop: Shop, sigstore: SigstoreInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "evaluators@example.org"
    wanted = {"required": True, "identities": [{"identity": name, "issuer": ISSUER}]}
    shop.want(signature=wanted)
    statement = shop.measured().statement()
    about = ("bot", 1, statement.predicate.form, shop.toy.lock.digest, shop.toy.alpha)
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal
    assert f"as {name} of {ISSUER} (SAFELOCK_SIGSTORE_SIGNING), and promote again" in refusal
    with pytest.raises(KeyFileError, match="SAFELOCK_SIGSTORE_SIGNING"):
        check_through_server(*about)
    monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
    with pytest.raises(SigstoreError, match="token"):
        check_through_server(*about)
    sigstore.log_in("somebody@example.org")
    with pytest.raises(MlflowException, match=r"\[bad_signature\].*somebody@example.org of .* is none"):
        check_through_server(*about)
    with pytest.raises(MlflowException, match=r"\[bad_signature\].*signed by somebody@example.org"):
        file_through_server("bot", 1, statement)
    with pytest.raises(PromotionRefused, match="signed by somebody") as bad:
        shop.file(statement, sign_evaluation(statement))
    assert bad.value.reason == "bad_signature"
    assert "evaluated" not in events(shop.folder)
    sigstore.log_in(name)
    check_through_server(*about)
    file_through_server("bot", 1, statement)
    entry = shop.file(statement, sign_evaluation(statement))
    assert events(shop.folder).count("evaluated") == 1, "what is on record already is not filed again"
    shop.promote()
    path = Path(entry.location.removeprefix("file://")) / EVALUATION_SIGNATURE_FILE
    kept = path.read_bytes()
    path.write_bytes(sign_evaluation(older(statement, days=1)))
    assert "[missing_evaluation]" in shop.refused().message
    path.write_bytes(kept)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sigstore", None)
        without.delitem(sys.modules, "sigstore.models")
        assert "[no_sigstore]" in shop.refused().message
        with pytest.raises(MlflowException, match=r"\[no_sigstore\].*mlflow-safelock\[sigstore\]"):
            shop.client.set_model_version_tag("bot", "1", FILE_TAG, kept.decode())
    shop.promote()
    wanted["identities"] = [{"identity": "others@example.org", "issuer": ISSUER}]
    shop.want(signature=wanted)
    assert "[missing_evaluation]" in shop.refused().message, "an identity that was taken out of the policy"


def test_a_signature_that_is_gone_hides_no_newer_evaluation(shop: Shop, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, "p256")
    key = load_signing_key(keys.private)
    shop.want_signed(keys, max_harmful_rate=0.0)
    good = shop.measured().statement()
    rates = good.predicate.rates
    worse = rates | {"harmful_rate": rates["harmful_rate"].model_copy(update={"count": 20})}
    bad = older(changed(good, rates=worse), seconds=0)
    entry = shop.file(good, sign(good.to_bytes(), key))
    assert shop.file(good, sign(good.to_bytes(), key)) == entry, "ECDSA signs differently every time"
    folder = Path(shop.file(bad, sign(bad.to_bytes(), key)).location.removeprefix("file://"))
    (folder / EVALUATION_SIGNATURE_FILE).unlink()
    assert "is gone or was changed" in shop.refused().message


def test_a_client_without_the_ledger_files_only_what_a_key_of_the_policy_signed(
    shop: Shop, tmp_path: Path
) -> None:
    keys, others = write_keys(tmp_path), write_keys(tmp_path, "p256", "other")
    key, other = load_signing_key(keys.private), load_signing_key(others.private)
    statement = shop.measured().statement()

    def refused(statement: EvaluationStatement, by: SigningKey) -> str:
        with pytest.raises(MlflowException) as caught:
            shop.ask(statement, by)
        assert 400 <= caught.value.get_http_status_code() < 500
        return str(caught.value.message)

    assert "[signatures_not_asked_for]" in refused(statement, key)
    shop.want_signed(keys)
    assert "[bad_signature]" in refused(statement, other)
    assert "[other_lock]" in refused(shop.measured(alpha=0.7).statement(), key)
    files = statement.predicate.source.files
    elsewhere = statement.predicate.source.model_copy(update={"files": files[:-1]})
    assert "[unreadable]" in refused(changed(statement, source=elsewhere), key)
    assert "evaluated" not in events(shop.folder)
    shop.ask(statement, key)
    assert events(shop.folder).count("evaluated") == 1
    assert not set(ASKING) & set(shop.client.get_model_version("bot", "1").tags)
    shop.promote()


def test_a_question_is_answered_before_anything_is_measured(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, others = write_keys(tmp_path), write_keys(tmp_path, "p256", "other")
    shop.want_signed(keys)
    form = shop.measured().statement().predicate.form
    about = ("bot", 1, form, shop.toy.lock.digest)
    with pytest.raises(KeyFileError, match="no key is named"):
        check_through_server(*about, shop.toy.alpha)
    monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(others.private))
    with pytest.raises(MlflowException, match=r"\[bad_signature\].*is none of those"):
        check_through_server(*about, shop.toy.alpha)
    monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
    check_through_server(*about, shop.toy.alpha)
    with pytest.raises(MlflowException, match=r"\[other_lock\]"):
        check_through_server(*about, 0.7)
    shorter = form.model_copy(update={"max_new_tokens": 1})
    with pytest.raises(MlflowException, match=r"\[other_evaluation\].*its answers may have 1 tokens"):
        check_through_server("bot", 1, shorter, shop.toy.lock.digest, shop.toy.alpha)
    with pytest.raises(MlflowException, match=r"\[unreadable\]"):
        shop.client.set_model_version_tag("bot", "1", CHECK_TAG, "{}")
    mlflow.set_registry_uri(mlflow.get_registry_uri().removeprefix("safelock+"))
    with pytest.raises(SourceError, match="has no gate that takes evaluations"):
        check_through_server(*about, shop.toy.alpha)
    assert not set(ASKING) & set(shop.client.get_model_version("bot", "1").tags)
