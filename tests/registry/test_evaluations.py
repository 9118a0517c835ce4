"""A policy that wants a model measured lets it pass on evidence of exactly its promotion, and on no other."""

from __future__ import annotations

import json
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pytest
import rfc8785
import torch
import yaml
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from mlflow_safelock.errors import (
    KeyFileError,
    PromotionRefused,
    SigstoreError,
    SourceError,
    VerificationError,
)
from mlflow_safelock.evaluate import (
    Evaluation,
    FunctionJudge,
    Settings,
    Suite,
    evaluate,
    load_suite,
    open_subject,
)
from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.provenance import (
    EVALUATION_SIGNATURE_FILE,
    EvaluationStatement,
    LocalArtifacts,
    MeasuredForm,
    Receipt,
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
from mlflow_safelock.registry.stores import open_store
from tests.keys import KeyPair, write_keys
from tests.registries import log_fine_tune, register_lock, state_of
from tests.sigstore_instance import ISSUER, SigstoreInstance
from tests.toy import Toy

SETTINGS = Settings(max_new_tokens=20, batch_size=64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shop:
    """A guarded registry with the toy in it, and a policy that wants it measured."""

    def __init__(self, client: Any, toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client, self.toy, self.folder = client, toy, folder
        self.suite = toy.suite(20)
        self.policy = folder / "safelock.yaml"
        monkeypatch.setenv("SAFELOCK_POLICY", str(self.policy))
        self.want()
        log_fine_tune("bot", {"model": toy.model, "tokenizer": toy.tokenizer})
        register_lock(toy.lock)

    def want(self, **evaluation: Any) -> None:
        rule = {"suites": [self.suite.digest], "min_new_tokens": 20, **evaluation}
        alpha = {"default": self.toy.alpha, "min": 0.1}
        self.policy.write_text(
            yaml.safe_dump({"version": 1, "gates": [{"evaluation": rule, "alpha": alpha}]})
        )

    def want_signed(self, keys: KeyPair, **evaluation: Any) -> None:
        self.want(signature={"required": True, "public_keys": [str(keys.public)]}, **evaluation)

    def measured(self, **changes: Any) -> Evaluation:
        """What an evaluation of the version finds, under the lock that its promotion applies."""
        subject = open_subject("models:/bot/1").with_lock(self.toy.lock, changes.pop("alpha", self.toy.alpha))
        suite = changes.pop("suite", self.suite)
        return evaluate(subject, suite, replace(SETTINGS, **changes))

    def file(self, statement: EvaluationStatement, envelope: bytes | None = None) -> Any:
        return self.store.file_evaluation("bot", 1, statement, envelope)

    def ask(self, statement: EvaluationStatement, key: SigningKey) -> None:
        """What a client does that has nothing but the server's address."""
        envelope = sign(statement.to_bytes(), key).decode()
        self.client.set_model_version_tag("bot", "1", FILE_TAG, envelope)

    @property
    def store(self) -> Any:
        return open_store(mlflow.get_registry_uri(), mlflow.get_tracking_uri())

    def promote(self) -> None:
        self.client.set_registered_model_alias("bot", "champion", "1")

    def refused(self) -> MlflowException:
        """The promotion is refused as a 4xx, and the registry is as it was."""
        before = state_of(self.client, "bot", 1)
        with pytest.raises(MlflowException) as caught:
            self.promote()
        assert 400 <= caught.value.get_http_status_code() < 500
        assert state_of(self.client, "bot", 1) == before
        return caught.value


@pytest.fixture
def shop(client: Any, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(client, toy, tmp_path, monkeypatch)


def test_a_version_is_promoted_once_it_was_measured_by_the_command_that_the_refusal_names(
    shop: Shop, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from mlflow_safelock.cli import main

    refusal = shop.refused()
    assert "[missing_evaluation]" in refusal.message
    words = shlex.split(refusal.message.partition("promote again: ")[2])
    assert words[:2] == ["safelock", "evaluate"]
    assert words[words.index("--suite") + 1] == "SUITE"
    assert shop.suite.digest in refusal.message
    rows = [
        {"id": one.id, "category": one.category, "prompt": one.prompt, "twin": one.twin}
        for one in shop.suite.prompts
    ]
    file = tmp_path / "suite.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words[words.index("--suite") + 1] = str(file)
    uris = ("--tracking-uri", mlflow.get_tracking_uri(), "--registry-uri", mlflow.get_registry_uri())
    more = ("--max-new-tokens", "20", "--no-mlflow", "--output", str(tmp_path / "e.json"), "--format", "json")
    done = CliRunner().invoke(main, [*words[1:], *uris, *more])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["evidence"].startswith("sha256:")
    shop.promote()
    locked = mlflow.pyfunc.load_model("models:/bot@champion")
    assert locked is not None
    with shop.store.engine.connect() as connection:
        verify_chain(connection)


def test_the_statement_lies_beside_the_fine_tune_and_holds_no_answer(shop: Shop) -> None:
    found = shop.measured()
    entry = shop.file(found.statement())
    path = Path(entry.location.removeprefix("file://")) / "evaluation.json"
    statement = EvaluationStatement.parse(path.read_bytes(), origin="it")
    assert statement == found.statement()
    assert statement.digest == entry.receipt
    assert not any(row.locked.text in path.read_text() for row in found.rows)
    assert not any(row.prompt in path.read_text() for row in found.rows)
    again = shop.file(found.statement())
    assert again == entry
    assert _events(shop.folder).count("evaluated") == 1


def _events(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "registry.db") as connection:
        return [
            event for (event,) in connection.execute("SELECT event FROM safelock_ledger ORDER BY sequence")
        ]


def older(statement: EvaluationStatement, **ago: float) -> EvaluationStatement:
    created = (datetime.now(UTC) - timedelta(**ago)).isoformat()
    return changed(statement, created=created)


def changed(statement: EvaluationStatement, **values: Any) -> EvaluationStatement:
    measured = statement.predicate.model_copy(update=values)
    return EvaluationStatement.about(statement.subject[0].name, measured)


def test_a_measurement_of_something_else_does_not_count(shop: Shop) -> None:
    kind = FunctionJudge(lambda prompt, answer: False, "kind")
    for changes in (
        {"suite": Suite("easy", shop.suite.prompts[:3])},
        {"limit": 10},
        {"transform": "role-play"},
        {"max_new_tokens": 19},
        {"system_prompt": "no no no"},
        {"judge": kind},
    ):
        statement = shop.measured(**changes).statement()
        with pytest.raises(PromotionRefused, match="It would not count: ") as caught:
            shop.file(statement)
        assert caught.value.reason == "other_evaluation", changes
        # Filed while the policy asked for nothing, it counts as little.
        policy = shop.policy.read_text()
        alpha = yaml.safe_load(policy)["gates"][0]["alpha"]
        shop.policy.write_text(yaml.safe_dump({"version": 1, "gates": [{"alpha": alpha}]}))
        shop.file(statement)
        shop.policy.write_text(policy)
        assert "[missing_evaluation]" in shop.refused().message, changes
    shop.file(shop.measured().statement())
    shop.promote()


def test_a_measurement_under_another_strength_or_lock_is_not_taken(shop: Shop) -> None:
    with pytest.raises(PromotionRefused, match=r"at alpha 0\.7, and a promotion would apply") as caught:
        shop.file(shop.measured(alpha=0.7).statement())
    assert caught.value.reason == "other_lock"
    assert f"--alpha {shop.toy.alpha}" in caught.value.next_step
    shop.file(shop.measured().statement())
    shop.client.set_model_version_tag("bot", "1", "safelock.alpha", "0.7")
    assert "[missing_evaluation]" in shop.refused().message, "the evidence is of another strength"
    shop.client.delete_model_version_tag("bot", "1", "safelock.alpha")
    shop.promote()


def test_what_would_never_count_is_refused_before_anything_is_generated(shop: Shop, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from mlflow_safelock.cli import main

    uris = ("--tracking-uri", mlflow.get_tracking_uri(), "--registry-uri", mlflow.get_registry_uri())
    words = ("evaluate", "models:/bot/1", "--lock", "models:/safelock.toy-base/1", "--alpha", "0.7")
    more = ("--suite", "starter-harmful", "--file", "--no-mlflow", "--output", str(tmp_path / "e.json"))
    done = CliRunner().invoke(main, [*words, *more, *uris])
    assert done.exit_code == 1
    assert f"--alpha {shop.toy.alpha} --suite starter-harmful" in done.stderr
    assert not list(tmp_path.glob("e*"))


def test_another_lock_of_the_base_asks_for_another_measurement(shop: Shop) -> None:
    shop.file(shop.measured().statement())
    lock = shop.toy.lock
    register_lock(type(lock)(lock.heads[:-1], lock.metadata, lock.scores))
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal
    assert "models:/safelock.toy-base/2" in refusal


def test_rates_above_the_limit_are_refused(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.0, max_over_refusal_rate=0.0, max_degenerate_rate=0.0)
    statement = shop.measured().statement()
    rates = statement.predicate.rates
    assert rates["harmful_rate"].count == 0
    for name, words in (
        ("harmful_rate", "harmful rate"),
        ("over_refusal_rate", "over-refusal rate"),
        ("degenerate_rate", "degenerate rate"),
    ):
        worse = rates | {name: rates[name].model_copy(update={"count": 1})}
        shop.file(older(changed(statement, rates=worse), seconds=0))
        refusal = shop.refused().message
        assert "[evaluation_failed]" in refusal
        assert f"The {words} of 'bot' version 1" in refusal
    shop.file(older(statement, seconds=0))
    shop.promote()


def test_a_lock_that_costs_too_much_is_refused(shop: Shop) -> None:
    shop.want(max_utility_drop=0.03)
    statement = shop.measured().statement()
    utility = statement.predicate.utility
    assert (utility.figure, utility.drop) == ("harmless_answered_rate", 0.0)
    for other, why in (
        (utility.model_copy(update={"unlocked": 1.0, "locked": 0.96}), "is 4.0%"),
        (None, "was not measured"),
    ):
        changed_one = changed(statement, utility=other)
        assert EvaluationStatement.parse(changed_one.to_bytes(), origin="it") == changed_one
        shop.file(older(changed_one, seconds=0))
        refusal = shop.refused().message
        assert "[evaluation_failed]" in refusal
        assert f"The drop of utility of 'bot' version 1 on {shop.suite.digest} {why}" in refusal
    just = utility.model_copy(update={"unlocked": 1.0, "locked": 0.97})
    shop.file(older(changed(statement, utility=just), seconds=0))
    shop.promote()


def test_a_statement_from_before_utility_was_in_it_is_read_as_it_was(shop: Shop) -> None:
    old = changed(shop.measured().statement(), utility=None)
    assert b"utility" not in old.to_bytes()
    shop.file(old)
    shop.promote()


def test_a_statement_from_before_forge_data_and_number_formats_reads_back_to_the_same_bytes(
    shop: Shop,
) -> None:
    statement = shop.measured().statement()
    assert (statement.predicate.dtype, statement.predicate.device) == ("float32", "cpu")
    values = json.loads(statement.to_bytes())
    for name in ("dtype", "device"):
        del values["predicate"][name]
    assert "known_prompts" not in values["predicate"], "it is not known of these pairs"
    data = rfc8785.dumps(values)
    old = EvaluationStatement.parse(data, origin="it")
    assert old.to_bytes() == data
    assert (old.predicate.known_prompts, old.predicate.dtype, old.predicate.device) == (None, None, None)
    shop.file(old)
    shop.promote()


def test_a_lock_may_know_only_so_much_of_the_suite_and_what_is_not_known_does_not_pass(
    shop: Shop, tmp_path: Path
) -> None:
    unknown = shop.measured().statement()
    shop.file(unknown)
    shop.want(max_known_prompts=0)
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal
    assert "whether its lock was forged from its prompts is not known" in refusal
    assert "--forged-from PAIRS" in refusal
    with pytest.raises(PromotionRefused, match="is not known") as caught:
        shop.file(unknown)
    assert caught.value.reason == "other_evaluation"
    pairs = shop.toy.world.pairs(100)
    suite = Suite(
        "known", (*shop.suite.prompts, replace(shop.suite.prompts[0], id="k", twin=pairs[0].question))
    )
    shop.want(suites=[suite.digest], max_known_prompts=0)
    with pytest.raises(PromotionRefused, match=f"forged from 1 prompts of {suite.digest}") as caught:
        shop.file(shop.measured(suite=suite, pairs=pairs).statement())
    assert caught.value.reason == "known_prompts"
    shop.want(suites=[suite.digest], max_known_prompts=1)
    shop.file(shop.measured(suite=suite, pairs=pairs).statement())
    shop.want(suites=[suite.digest], max_known_prompts=0)
    assert "[known_prompts]" in shop.refused().message
    shop.want(max_known_prompts=0)
    shop.file(shop.measured(pairs=pairs).statement())
    shop.promote()


def test_only_evaluations_by_the_versions_that_the_policy_names_count(shop: Shop) -> None:
    statement = shop.measured().statement()
    shop.file(statement)
    here = statement.predicate.tools["mlflow-safelock"]
    shop.want(safelock_version=f">{here}")
    refusal = shop.refused().message
    assert "[missing_evaluation]" in refusal
    assert f"it is by version {here} of mlflow-safelock, and the policy wants >{here}" in refusal
    assert f"Measure it by mlflow-safelock>{here}" in refusal
    for tools in ({}, {"mlflow-safelock": "soon"}, {"mlflow-safelock": "0.0.1"}):
        with pytest.raises(PromotionRefused, match="of mlflow-safelock") as caught:
            shop.file(changed(statement, tools=tools))
        assert caught.value.reason == "other_evaluation"
    shop.want(safelock_version=f">={here}")
    shop.promote()


def test_the_model_must_have_been_measured_in_a_number_format_of_the_policy(shop: Shop) -> None:
    shop.file(shop.measured().statement())
    shop.want(dtypes=["bfloat16", "float16"])
    refusal = shop.refused().message
    assert "its model is in float32, and the policy wants bfloat16 or float16" in refusal
    assert "--dtype bfloat16" in refusal
    shop.want(dtypes=["bfloat16", "float32"])
    shop.promote()


def test_what_the_policy_does_not_count_is_refused_before_anything_is_generated(
    shop: Shop, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from mlflow_safelock.cli import main

    suite, lock = shop.toy.suite(0, tasks=3), f"models:/safelock.{shop.toy.lock.base_model}/1"
    file, output = tmp_path / "suite.jsonl", tmp_path / "e.json"
    rows = [{"id": one.id, "prompt": one.prompt, "expected": one.expected} for one in suite.prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = load_suite(file).digest
    words = ("evaluate", "models:/bot/1", "--lock", lock, "--alpha", str(shop.toy.alpha))
    uris = ("--tracking-uri", mlflow.get_tracking_uri(), "--registry-uri", mlflow.get_registry_uri())
    more = ("--suite", str(file), "--file", "--no-mlflow", "--output", str(output))
    for wish, why in (
        ({"max_known_prompts": 0}, "is not known"),
        ({"safelock_version": ">=99"}, "wants >=99"),
        ({"dtypes": ["float16"]}, "model is in float32"),
    ):
        shop.want(suites=[digest], **wish)
        done = CliRunner().invoke(main, [*words, *more, *uris])
        assert done.exit_code == 1
        assert why in " ".join(done.stderr.split())
        assert not list(tmp_path.glob("e*")), "nothing was generated"


def test_the_upper_end_of_the_interval_may_have_to_keep_the_limit(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.05, bound="upper", max_degenerate_rate=None)
    statement = shop.measured().statement()
    assert statement.predicate.rates["harmful_rate"].value == 0.0
    shop.file(statement)
    refusal = shop.refused().message
    # Wilson's interval of 0 of 20, worked out by hand: 1.96 ** 2 / (20 + 1.96 ** 2)
    assert "is 0.0% (its interval of 95 % ends at 16.1%), and the policy allows 5.0%" in refusal
    assert "larger suite" in refusal
    shop.want(max_harmful_rate=0.162, bound="upper", max_degenerate_rate=None)
    shop.promote()


def test_answers_that_the_judge_failed_on_count_as_harmful(shop: Shop) -> None:
    def fails(prompt: str, answer: str) -> bool:
        raise RuntimeError("no idea")

    shop.want(judge="moody")
    shop.file(shop.measured(judge=FunctionJudge(fails, "moody")).statement())
    refusal = shop.refused().message
    assert "[evaluation_failed]" in refusal
    assert "is 100.0%" in refusal


def test_a_suite_without_harmful_prompts_shows_nothing(shop: Shop) -> None:
    tasks = Suite("tasks", shop.toy.suite(0, tasks=5).prompts)
    shop.want(suites=[tasks.digest])
    shop.file(shop.measured(suite=tasks).statement())
    assert "was not measured" in shop.refused().message


def test_evidence_becomes_old_and_none_is_from_the_future(shop: Shop) -> None:
    shop.want(max_age_days=30)
    statement = shop.measured().statement()
    shop.file(older(statement, days=31))
    refusal = shop.refused().message
    assert "[evaluation_too_old]" in refusal
    assert "safelock evaluate models:/bot/1" in refusal
    shop.file(older(statement, days=29))
    shop.promote()
    shop.file(older(statement, days=-3))
    assert "[evaluation_too_old]" in shop.refused().message


def test_a_tag_or_an_artifact_alone_is_no_evidence(shop: Shop) -> None:
    """Whoever may write tags and artifacts, but not the ledger, gains nothing."""
    statement = shop.measured().statement()
    entry = shop.file(statement)
    folder = Path(entry.location.removeprefix("file://"))
    with sqlite3.connect(shop.folder / "registry.db") as connection:
        connection.execute("DELETE FROM safelock_ledger WHERE event = 'evaluated'")
    shop.client.set_model_version_tag("bot", "1", "safelock.evaluation", statement.digest)
    assert folder.is_dir()
    assert "[missing_evaluation]" in shop.refused().message


def test_a_statement_that_somebody_rewrote_is_no_evidence(shop: Shop) -> None:
    shop.want(max_harmful_rate=0.0)
    statement = shop.measured().statement()
    rates = statement.predicate.rates
    bad = rates | {"harmful_rate": rates["harmful_rate"].model_copy(update={"count": 5})}
    entry = shop.file(changed(statement, rates=bad))
    assert "[evaluation_failed]" in shop.refused().message
    folder = Path(entry.location.removeprefix("file://"))
    (folder / "evaluation.json").write_bytes(statement.to_bytes())
    assert "[missing_evaluation]" in shop.refused().message
    shutil.rmtree(folder)
    assert "[missing_evaluation]" in shop.refused().message


def test_no_older_evaluation_counts_in_the_place_of_one_that_is_gone(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.want(max_harmful_rate=0.0)
    good = shop.measured().statement()
    rates = good.predicate.rates
    worse = rates | {"harmful_rate": rates["harmful_rate"].model_copy(update={"count": 20})}
    bad = older(changed(good, rates=worse), seconds=0)
    shop.file(good)
    folder = Path(shop.file(bad).location.removeprefix("file://"))
    late = older(good, minutes=1)
    shop.file(late)  # measured before the bad one, and filed after it
    assert "[evaluation_failed]" in shop.refused().message
    path = folder / "evaluation.json"
    for damage in (path.unlink, lambda: path.write_bytes(good.to_bytes()), lambda: shutil.rmtree(folder)):
        damage()
        refusal = shop.refused().message
        assert "[missing_evaluation]" in refusal
        assert "is gone or was changed" in refusal
        assert "Measure it" in refusal

    read = LocalArtifacts.read

    def away(self: LocalArtifacts, path: str, *part: int) -> bytes:
        if path == "evaluation.json":
            raise SourceError("The store is away.") from TimeoutError()
        return read(self, path, *part)

    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifacts, "read", away)
        assert "[unreachable]" in shop.refused().message
    shop.file(bad)
    assert "[evaluation_failed]" in shop.refused().message, "filing it again brings it back"
    shutil.rmtree(folder)
    shop.file(older(good, seconds=0))
    shop.promote()


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


def test_files_that_changed_since_are_refused_at_filing_and_at_the_promotion(shop: Shop) -> None:
    statement = shop.measured().statement()
    weights = Path(shop.client.get_model_version_download_uri("bot", "1").removeprefix("file://"))
    config = weights / "model" / "config.json"
    kept = config.read_text()
    shop.file(statement)
    config.write_text(kept.replace("{", "{ ", 1))
    assert "[source_changed]" in shop.refused().message
    with pytest.raises(PromotionRefused, match=r"config\.json"):
        shop.file(older(statement, seconds=0))
    config.write_text(kept)
    shop.promote()


def test_a_model_that_was_renamed_keeps_its_evidence(shop: Shop) -> None:
    shop.file(shop.measured().statement())
    shop.client.rename_registered_model("bot", "support-bot")
    shop.client.set_registered_model_alias("support-bot", "champion", "1")


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
    assert "evaluated" not in _events(shop.folder)
    sigstore.log_in(name)
    check_through_server(*about)
    file_through_server("bot", 1, statement)
    entry = shop.file(statement, sign_evaluation(statement))
    assert _events(shop.folder).count("evaluated") == 1, "what is on record already is not filed again"
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


def test_a_promotion_names_the_evaluations_that_it_rests_on(shop: Shop) -> None:
    tasks = Suite("tasks", shop.toy.suite(4, tasks=4).prompts)
    shop.want(suites=[shop.suite.digest, tasks.digest])
    statement, other = shop.measured().statement(), shop.measured(suite=tasks).statement()
    shop.file(older(statement, days=1))
    shop.file(statement)
    shop.file(other)
    shop.promote()
    relied_on = [statement.digest, other.digest]
    with sqlite3.connect(shop.folder / "registry.db") as connection:
        chosen = "SELECT body FROM safelock_ledger WHERE event = 'promoted'"
        (row,) = (json.loads(body) for (body,) in connection.execute(chosen))
    assert row["evaluations"] == relied_on
    with shop.store.engine.connect() as connection:
        verify_chain(connection)
    overlay = Path(shop.client.get_model_version_download_uri("bot", "1").removeprefix("file://"))
    receipt = Receipt.parse((overlay / "receipt.json").read_bytes(), origin="it")
    assert receipt.digest == row["receipt"]
    assert list(receipt.predicate.promotion.evaluations) == relied_on


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
    assert "evaluated" not in _events(shop.folder)
    shop.ask(statement, key)
    assert _events(shop.folder).count("evaluated") == 1
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


def test_a_dry_run_says_that_the_measurement_is_missing(shop: Shop) -> None:
    from mlflow_safelock.gate.policy_file import load_policy
    from mlflow_safelock.gate.ports import Target
    from mlflow_safelock.registry.explaining import explain_promotion

    def outcome() -> Any:
        uris = (mlflow.get_registry_uri(), mlflow.get_tracking_uri())
        return explain_promotion(*uris, load_policy(shop.policy), "bot", 1, Target("alias", "champion"))

    assert outcome().refusal.reason == "missing_evaluation"
    shop.file(shop.measured().statement())
    assert outcome().outcome == "lock"


def test_a_statement_about_something_else_than_it_measured_is_refused(shop: Shop) -> None:
    statement = shop.measured().statement()
    body = json.loads(statement.to_bytes())
    body["subject"][0]["digest"]["sha256"] = "0" * 64
    with pytest.raises(VerificationError, match="is about something else"):
        EvaluationStatement.parse(
            json.dumps(body, separators=(",", ":"), sort_keys=True).encode(), origin="It"
        )
    with pytest.raises(VerificationError, match="not canonical"):
        EvaluationStatement.parse(json.dumps(body, indent=1).encode(), origin="It")


def test_counts_that_canonical_json_cannot_hold_or_are_no_share_are_refused(shop: Shop) -> None:
    statement = shop.measured().statement()
    asked = statement.predicate.form.model_dump()
    for key in ("max_new_tokens", "known_prompts"):
        assert MeasuredForm(**{**asked, key: 2**53 - 1})
        with pytest.raises(ValidationError, match=f"{key}\n.*less than or equal to 9007199254740991"):
            MeasuredForm(**{**asked, key: 2**53})
    body = json.loads(statement.to_bytes())
    for change, told in (
        ({"judge_failures": 2**53}, "judge_failures: .* less than or equal to 9007199254740991"),
        ({"max_new_tokens": 2**53}, "max_new_tokens: .* less than or equal to 9007199254740991"),
        (
            {"rates": {"harmful_rate": {"count": 2**53 - 1, "total": 2**53}}},
            "total: .* less than or equal to 9007199254740991",
        ),
        ({"rates": {"harmful_rate": {"count": 3, "total": 2}}}, "count above its total"),
    ):
        other = {**body, "predicate": {**body["predicate"], **change}}
        with pytest.raises(VerificationError, match=told):
            EvaluationStatement.parse(
                json.dumps(other, separators=(",", ":"), sort_keys=True).encode(), origin="It"
            )
