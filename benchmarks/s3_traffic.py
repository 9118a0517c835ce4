"""What passes through this process's S3 client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlflow_safelock.registry.s3 import s3_client


@dataclass
class Traffic:
    """What passes through the S3 client while it is counted.

    Attributes:
        requests: Requests that were answered.
        received: Bytes of the answers' bodies.
        sent: Bytes of the requests' bodies, as often as they were sent.
        copies: Requests by which the store copied something itself.
    """

    requests: int = 0
    received: int = 0
    sent: int = 0
    copies: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is done in the block."""
        events = s3_client().meta.events
        events.register("after-call.s3", self._answered)
        events.register("before-send.s3", self._sent)
        try:
            yield
        finally:
            events.unregister("after-call.s3", self._answered)
            events.unregister("before-send.s3", self._sent)

    def _answered(self, http_response: Any, model: Any, **_: Any) -> None:
        with self._lock:
            self.requests += 1
            self.copies += model.name in ("CopyObject", "UploadPartCopy")
            if model.http["method"] != "HEAD":
                self.received += int(http_response.headers.get("content-length", 0))

    def _sent(self, request: Any, **_: Any) -> None:
        # A body that ends in a checksum says its length in another place.
        length = request.headers.get("X-Amz-Decoded-Content-Length") or request.headers.get("Content-Length")
        with self._lock:
            self.sent += int(length or 0)
