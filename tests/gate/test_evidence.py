"""How a refusal names what would be measured."""

from __future__ import annotations

import pytest

from mlflow_safelock.gate.evidence import typed_judge


@pytest.mark.parametrize(
    ("named", "typed"),
    [
        ("refusal-match", "refusal-match"),
        ("models:/judge/3", "models:/judge/3"),
        ("runs:/0a1b/judge@9f2c1d0ab4e67788", "runs:/0a1b/judge"),
        ("s3://bucket/judge@9f2c1d0ab4e67788", "s3://bucket/judge"),
        ("guard:llama-guard@9f2c1d0ab4e67788", "guard:PATH"),
        ("classifier:toxic-bert@9f2c1d0ab4e67788#toxic", "classifier:PATH#toxic"),
        ("classifier:org/toxic-bert#toxic", "classifier:org/toxic-bert#toxic"),
        ("models:/judge/3@9f2c1d0ab4e67788", "models:/judge/3"),
        (f"classifier:org/toxic-bert@{'9f' * 20}#toxic", f"classifier:org/toxic-bert@{'9f' * 20}#toxic"),
    ],
)
def test_a_judge_is_named_as_the_command_takes_it(named: str, typed: str) -> None:
    assert typed_judge(named) == typed
