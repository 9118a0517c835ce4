"""Where an artifact URI really lies."""

from __future__ import annotations

import pytest

from mlflow_safelock.errors import SourceError
from mlflow_safelock.registry.artifacts import DESTINATION_VARIABLE, physical_uri


def test_a_proxied_uri_lies_below_the_servers_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DESTINATION_VARIABLE, raising=False)
    assert (
        physical_uri("mlflow-artifacts:/1/models/m-2/artifacts") == "mlflow-artifacts:/1/models/m-2/artifacts"
    )
    monkeypatch.setenv(DESTINATION_VARIABLE, "s3://models/mlflow")
    assert (
        physical_uri("mlflow-artifacts:/1/models/m-2/artifacts")
        == "s3://models/mlflow/1/models/m-2/artifacts"
    )
    assert physical_uri("mlflow-artifacts://host:5000/1/a%20b") == "s3://models/mlflow/1/a b"
    assert physical_uri("s3://elsewhere/x") == "s3://elsewhere/x"


@pytest.mark.parametrize(
    "uri",
    [
        "mlflow-artifacts:/../secrets",
        "mlflow-artifacts:/1/../../secrets",
        "mlflow-artifacts:/1/%2e%2e/%2e%2e/secrets",
        "mlflow-artifacts:/1/..%2f..%2fsecrets",
        "mlflow-artifacts:/1/a\\..\\secrets",
        "mlflow-artifacts:/%252e%252e/secrets",
        "mlflow-artifacts:/1/%25252e%25252e/..%252fsecrets",
        "mlflow-artifacts:/1/a%255c..%255csecrets",
    ],
)
def test_no_uri_climbs_out_of_the_destination(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DESTINATION_VARIABLE, "/srv/artifacts")
    with pytest.raises(SourceError, match="climbs out"):
        physical_uri(uri)


def test_names_that_hold_a_percent_or_dots_are_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DESTINATION_VARIABLE, "s3://models/mlflow")
    assert physical_uri("mlflow-artifacts:/1/100%25/a..b/...") == "s3://models/mlflow/1/100%/a..b/..."
