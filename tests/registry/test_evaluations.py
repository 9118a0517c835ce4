"""A policy that wants a model measured lets it pass on evidence of exactly its promotion, and on no other."""

from __future__ import annotations

import json
import shlex
import sqlite3
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from mlflow_safelock.errors import (
    PromotionRefused,
    VerificationError,
)
from mlflow_safelock.evaluate import (
    FunctionJudge,
    Suite,
    evaluate,
    load_suite,
    open_subject,
    subjects,
)
from mlflow_safelock.gate.ledger import verify_chain
from mlflow_safelock.provenance import (
    Receipt,
    fingerprint,
)
from tests.registries import register_lock
from tests.registry.evidence import SETTINGS, Shop, changed, older


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


def test_evidence_of_a_version_of_a_judge_counts_by_what_was_in_it_where_the_policy_says_that(
    shop: Shop,
) -> None:
    version = "models:/judge/1"
    now, then = (FunctionJudge(lambda *_: False, f"{version}@{digit * 16}") for digit in "ab")
    shop.want(judge=version)
    shop.file(shop.measured(judge=then).statement())
    # As of a version that was deleted, and another one registered under its number.
    shop.want(judge=now.name)
    assert f"its judge is '{then.name}'" in shop.refused().message
    shop.file(shop.measured(judge=now).statement())
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


def test_where_every_byte_counts_blocks_of_files_are_no_evidence(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which blocks were compared stands in the statement; here all else of the weights is replaced."""
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_BYTES", 1 << 12)
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 64)
    subject = open_subject("models:/bot/1", every_byte=True).with_lock(shop.toy.lock, shop.toy.alpha)
    by_blocks = shop.measured().statement()
    statement = evaluate(subject, shop.suite, SETTINGS).statement()
    shop.file(by_blocks)
    policy = yaml.safe_load(shop.policy.read_text())
    policy["gates"][0]["fingerprint"] = "full"
    shop.policy.write_text(yaml.safe_dump(policy))
    with pytest.raises(PromotionRefused, match=r"of blocks.*--file") as refused:
        shop.file(older(by_blocks, seconds=0))
    assert refused.value.reason == "other_evaluation"
    assert "[not_measured]" in shop.refused().message
    shop.store.prepare("bot", 1)
    refusal = shop.refused().message
    assert "[source_changed]" in refusal
    assert "by blocks alone" in refusal
    shop.file(statement)
    weights = Path(shop.client.get_model_version_download_uri("bot", "1").removeprefix("file://"))
    path = weights / "model" / "model.safetensors"
    kept = path.read_bytes()
    (file,) = (file for file in statement.predicate.source.files if file.path == "model/model.safetensors")
    replaced = bytearray(byte ^ 1 for byte in kept)
    for start, length in file.spans:
        replaced[start : start + length] = kept[start : start + length]
    header = 8 + int.from_bytes(kept[:8], "little")
    path.write_bytes(kept[:header] + bytes(replaced[header:]))
    shop.store.prepare("bot", 1)
    refusal = shop.refused().message
    assert "[source_changed]" in refusal
    assert "had other bytes" in refusal
    path.write_bytes(kept)
    shop.store.prepare("bot", 1)
    shop.promote()


@pytest.mark.parametrize("carrier", ["overlay", "standalone"])
def test_of_a_locked_version_every_byte_is_read_where_its_receipt_is_of_blocks(
    shop: Shop, carrier: str
) -> None:
    """Or the command that a refusal names would never help."""
    alpha = {"default": shop.toy.alpha, "min": 0.1}
    gates = [{"alpha": alpha, "carrier": carrier}]
    shop.policy.write_text(yaml.safe_dump({"version": 1, "gates": gates}))
    shop.store.prepare("bot", 1)
    shop.promote()
    found = evaluate(open_subject("models:/bot/1", every_byte=True), shop.suite, SETTINGS)
    assert open_subject("models:/bot/1").source != found.source
    rule = {"suites": [shop.suite.digest], "min_new_tokens": 20}
    gates = [{"alpha": alpha, "carrier": carrier, "evaluation": rule, "fingerprint": "full"}]
    shop.policy.write_text(yaml.safe_dump({"version": 1, "gates": gates}))
    shop.store.prepare("bot", 1)
    assert "[missing_evaluation]" in shop.refused().message
    shop.file(found.statement())
    shop.promote()


def test_what_is_written_over_while_it_is_loaded_is_not_measured(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = subjects.load_language_model

    def loaded_and_replaced(folder: str, *more: Any) -> Any:
        found = loading(folder, *more)
        path = Path(folder) / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return found

    monkeypatch.setattr(subjects, "load_language_model", loaded_and_replaced)
    with pytest.raises(VerificationError, match="models:/bot/1 were written over while it was loaded"):
        open_subject("models:/bot/1")


def test_a_model_that_was_renamed_keeps_its_evidence(shop: Shop) -> None:
    shop.file(shop.measured().statement())
    shop.client.rename_registered_model("bot", "support-bot")
    shop.client.set_registered_model_alias("support-bot", "champion", "1")


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
