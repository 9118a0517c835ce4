"""Whether a request is a delivery, told by what MLflow itself signs."""

from __future__ import annotations

import json
import time
from uuid import uuid4

import pytest
from mlflow.webhooks.constants import (
    WEBHOOK_DELIVERY_ID_HEADER,
    WEBHOOK_SIGNATURE_HEADER,
    WEBHOOK_TIMESTAMP_HEADER,
)
from mlflow.webhooks.delivery import _generate_hmac_signature

from mlflow_safelock.operations.deliveries import Deliveries

BODY = json.dumps({"entity": "model_version_alias", "action": "created", "data": {}}).encode()


def signed(secret: str, age: int = 0) -> dict[str, str]:
    """Headers of a delivery of ``BODY``, signed by MLflow's own function."""
    return signed_as(secret, uuid4().hex, str(int(time.time()) - age))


def signed_as(secret: str, delivery: str, sent: str) -> dict[str, str]:
    return {
        WEBHOOK_DELIVERY_ID_HEADER: delivery,
        WEBHOOK_TIMESTAMP_HEADER: sent,
        WEBHOOK_SIGNATURE_HEADER: _generate_hmac_signature(secret, delivery, sent, BODY.decode()),
    }


def test_a_delivery_is_new_once_whatever_the_case_of_its_headers() -> None:
    deliveries, headers = Deliveries(b"secret"), signed("secret")
    assert deliveries.judge(headers, BODY) == "new"
    assert deliveries.judge({name.upper(): value for name, value in headers.items()}, BODY) == "repeated"
    assert deliveries.judge(signed("secret"), BODY) == "new"


@pytest.mark.parametrize(
    ("age", "verdict"), [(295, "new"), (305, "refused"), (-295, "new"), (-305, "refused")]
)
def test_it_is_of_the_last_five_minutes(age: int, verdict: str) -> None:
    assert Deliveries(b"secret").judge(signed("secret", age), BODY) == verdict


@pytest.mark.parametrize(
    "name", [WEBHOOK_DELIVERY_ID_HEADER, WEBHOOK_TIMESTAMP_HEADER, WEBHOOK_SIGNATURE_HEADER]
)
@pytest.mark.parametrize("value", [None, "", "x", "1e3", "v1,", "-1", "\u0661\u0662"])
def test_nothing_of_it_may_be_missing_or_another(name: str, value: str | None) -> None:
    headers = {**signed("secret"), name: value}
    if value is None:
        del headers[name]
    assert Deliveries(b"secret").judge(headers, BODY) == "refused"  # type: ignore[arg-type]


@pytest.mark.parametrize("sent", ["", "x", "1e9", "nan", "-1", "+1", "\u0661\u0662", 40 * "9"])
def test_a_time_that_is_none_is_refused_though_it_is_signed(sent: str) -> None:
    assert Deliveries(b"secret").judge(signed_as("secret", "a", sent), BODY) == "refused"


def test_a_delivery_without_a_name_is_refused_though_it_is_signed() -> None:
    assert Deliveries(b"secret").judge(signed_as("secret", "", str(int(time.time()))), BODY) == "refused"


def test_another_body_or_secret_is_refused_and_is_not_remembered() -> None:
    deliveries, headers = Deliveries(b"secret"), signed("secret")
    assert deliveries.judge(headers, BODY + b" ") == "refused"
    assert Deliveries(b"other").judge(headers, BODY) == "refused"
    assert deliveries.judge(headers, BODY) == "new"


def test_what_is_too_old_to_be_repeated_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    deliveries = Deliveries(b"secret")
    for _ in range(3):
        assert deliveries.judge(signed("secret", age=290), BODY) == "new"
    later = time.time() + 20
    monkeypatch.setattr(time, "time", lambda: later)
    assert deliveries.judge(signed("secret"), BODY) == "new"
    assert len(deliveries._seen) == 1
