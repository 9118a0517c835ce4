"""A policy decides which promotions are gated, and cannot be misread."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_safelock.errors import PolicyError
from mlflow_safelock.gate.policy import DEFAULT_POLICY, Policy
from mlflow_safelock.gate.policy_file import PolicySource, load_policy
from mlflow_safelock.gate.ports import Target

COMPLETE = """
version: 1
gates:
  - models: "support-*"
    stages: [Staging]
    aliases: [champion]
    lock: {min_version: 2}
    alpha: {default: 5, min: 2.0, max: 8.0}
    carrier: overlay
    missing_lock: allow
    not_an_llm: reject
  - models: "*"
bases:
  "support-*": org/base
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_policy(text: str) -> Path:
        path = tmp_path / "safelock.yaml"
        path.write_text(text)
        return path

    return write_policy


def test_the_default_policy_gates_staging_and_production_of_every_model() -> None:
    rule = DEFAULT_POLICY.rule_for("anything")
    assert rule is not None
    assert rule.covers(Target("stage", "Staging"))
    assert rule.covers(Target("stage", "Production"))
    assert rule.covers(Target("alias", "champion"))
    assert not rule.covers(Target("stage", "Archived"))
    assert not rule.covers(Target("stage", "None"))
    assert not rule.covers(Target("alias", "experiment"))
    assert (rule.alpha.default, rule.alpha.min, rule.alpha.max) == (6.0, 1.0, 12.0)
    assert rule.missing_lock == "reject"


def test_an_alias_is_gated_in_any_case_of_its_letters() -> None:
    rule = DEFAULT_POLICY.rule_for("bot")
    assert rule is not None
    assert rule.covers(Target("alias", "Champion"))


def test_a_file_says_all_of_it_and_the_first_match_decides(write) -> None:
    policy = load_policy(write(COMPLETE))
    support, other = policy.rule_for("support-bot"), policy.rule_for("other")
    assert support is policy.gates[0]
    assert other is policy.gates[1]
    assert support.alpha.default == 5.0
    assert not support.covers(Target("stage", "Production"))
    assert policy.base_of("support-bot") == "org/base"
    assert policy.base_of("other") is None
    assert Policy(version=1, gates=policy.gates[:1]).rule_for("other") is None


def test_globs_are_case_sensitive(write) -> None:
    assert load_policy(write(COMPLETE)).rule_for("Support-bot").lock.min_version == 1


def test_the_digest_is_of_what_the_policy_means_not_of_how_it_is_written(write) -> None:
    spelled = load_policy(write("version: 1\ngates: [{models: '*'}]\n"))
    assert spelled.digest == DEFAULT_POLICY.digest
    assert load_policy(write(COMPLETE)).digest != DEFAULT_POLICY.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "version: 1\ngates:\n  - modles: '*'\n",
            "line 3: the key gates.0.modles is not known.*: models, ",
        ),
        ("version: 1\nversion: 1\ngates: [{}]\n", "line 2.*twice"),
        ("version: 2\ngates: [{}]\n", "line 1.*version"),
        ("gates: [{}]\n", "line 1: version is missing"),
        ("version: 1\ngates: []\n", "at least one gate"),
        ("version: 1\ngates: [{stages: [staging]}]\n", "stages"),
        ("version: 1\ngates: [{stages: Staging}]\n", "stages must be a list"),
        ("version: 1\ngates: [{alpha: {default: 0, min: 0}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {default: -6, min: -8, max: -1}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {default: 13}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {max: .inf}}]\n", "number"),
        ("version: 1\ngates: [{alpha: {default: .nan}}]\n", "number"),
        ("version: 1\ngates: [{alpha: {default: '6'}}]\n", "valid number"),
        ("version: 1\ngates: [{alpha: {default: yes}}]\n", "valid number"),
        ("version: 1\ngates: [{lock: {min_version: 0}}]\n", "greater than 0"),
        ("version: 1\ngates: [{missing_lock: ignore}]\n", "missing_lock"),
        ("version: 1\ngates: &g [{}]\nbases: *g\n", "aliases"),
        ("version: 1\ngates: [\n", "line"),
        ("", "not a YAML mapping"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_an_error_that_names_the_place(
    write, text: str, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy(write(text))


def test_the_environment_names_the_policy_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
    assert PolicySource()() == DEFAULT_POLICY
    monkeypatch.setenv("SAFELOCK_POLICY", str(write(COMPLETE)))
    assert PolicySource()().gates[0].models == "support-*"
    monkeypatch.setenv("SAFELOCK_POLICY", "/nowhere/safelock.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        PolicySource()()
