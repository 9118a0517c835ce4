"""Whether a request is a delivery of MLflow's webhooks: signed with the secret, of now, and new."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlflow.webhooks.constants import (
    WEBHOOK_DELIVERY_ID_HEADER,
    WEBHOOK_SIGNATURE_HEADER,
    WEBHOOK_SIGNATURE_VERSION,
    WEBHOOK_TIMESTAMP_HEADER,
)

OLDEST_SECONDS = 300
"""How far a delivery's time may be from now, either way."""

_TIMESTAMP = re.compile(r"[0-9]{1,12}")

Verdict = Literal["new", "repeated", "refused"]


@dataclass
class Deliveries:
    """The deliveries that one secret vouches for.

    Attributes:
        secret: The webhook's secret.
    """

    secret: bytes
    _seen: dict[str, int] = field(default_factory=dict, init=False)

    def judge(self, headers: Mapping[str, str], body: bytes) -> Verdict:
        """Tell what a request is.

        Args:
            headers: Its headers, by names in any case of their letters.
            body: Its body, byte for byte.

        Returns:
            ``new``, ``repeated`` where this delivery came before, or ``refused``: it is not signed with the
            secret, or was sent more than five minutes before or after now.
        """
        named = {name.lower(): value for name, value in headers.items()}
        delivery = named.get(WEBHOOK_DELIVERY_ID_HEADER.lower(), "")
        sent = named.get(WEBHOOK_TIMESTAMP_HEADER.lower(), "")
        signature = named.get(WEBHOOK_SIGNATURE_HEADER.lower(), "")
        # Both whatever is wrong: how long it takes tells nobody which.
        is_signed = hmac.compare_digest(self._signature(delivery, sent, body), signature.encode())
        is_of_now = _TIMESTAMP.fullmatch(sent) is not None and abs(time.time() - int(sent)) <= OLDEST_SECONDS
        if not (delivery and is_signed and is_of_now):
            return "refused"
        self._forget_old_ones()
        if delivery in self._seen:
            return "repeated"
        self._seen[delivery] = int(sent)
        return "new"

    def _signature(self, delivery: str, sent: str, body: bytes) -> bytes:
        signed = f"{delivery}.{sent}.".encode() + body
        digest = hmac.new(self.secret, signed, hashlib.sha256).digest()
        return f"{WEBHOOK_SIGNATURE_VERSION},".encode() + base64.b64encode(digest)

    def _forget_old_ones(self) -> None:
        """Forget what would be refused by its time, so that the memory of a long run stays small."""
        oldest = time.time() - OLDEST_SECONDS
        self._seen = {delivery: sent for delivery, sent in self._seen.items() if sent >= oldest}
