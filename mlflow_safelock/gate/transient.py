"""Whether a failure may be over in a while: an overloaded or restarting store, a network that is slow.

Each kind of store and of database has errors of its own; what they have in common is an HTTP status, or that
they come from a time-out or a broken connection.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from http import HTTPStatus

from mlflow_safelock.errors import (
    LockWithoutEffectError,
    PromotionRefused,
    SafelockError,
    SigstoreError,
    UnreachableError,
)

_STATUSES = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)

_ERRNOS = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ESTALE, errno.EIO}
)
"""What a mounted file system says while its server is away."""

_NAMES = ("Timeout", "ConnectionError", "RetryError", "ServiceUnavailable")
"""Classes of errors, by name, that clients of stores have for it without a common base."""

WITHOUT_EFFECT = "lock_without_effect"
"""Reason of a refusal: too little of the lock's push arrives in the fine-tune."""

AGAIN = "It may be over in a while: do it again."


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one that may be over in a while."""
    return any(_is_transient_itself(one) for one in _with_causes(error))


def unreadable(error: SafelockError) -> PromotionRefused:
    """The refusal of a promotion whose artifacts cannot be read or written, or not verified or signed."""
    if not is_transient(error):
        reasons = {SigstoreError: "no_sigstore", LockWithoutEffectError: WITHOUT_EFFECT}
        reason = next((reasons[kind] for kind in reasons if isinstance(error, kind)), "unreadable")
        return PromotionRefused(reason, error.cause, next_step=error.next_step)
    again = "" if isinstance(error, UnreachableError) else f"{AGAIN} "
    return PromotionRefused("unreachable", error.cause, next_step=f"{again}{error.next_step}".strip())


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        yield now
        seen.add(id(now))
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


def _is_transient_itself(error: BaseException) -> bool:
    if isinstance(error, UnreachableError | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    if any(kind.__name__ in _NAMES for kind in type(error).__mro__):
        return True
    return bool({str(int(status)) for status in _STATUSES} & set(_statuses(error)))


def _statuses(error: BaseException) -> Iterator[str]:
    """The HTTP statuses that an error states, in the ways of MLflow, requests and the clouds' clients."""
    response = getattr(error, "response", None)
    yield from (str(getattr(error, name, "")) for name in ("status_code", "code"))
    yield str(getattr(response, "status_code", ""))
    ask = getattr(error, "get_http_status_code", None)
    if ask is not None:
        yield str(ask())
