"""Where the policy comes from: the file that ``SAFELOCK_POLICY`` names, or the built-in default."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow_safelock.documents import Document, read_document
from mlflow_safelock.errors import KeyFileError, PolicyError
from mlflow_safelock.gate.policy import DEFAULT_POLICY, Policy
from mlflow_safelock.gate.strictness import faults_of_tags
from mlflow_safelock.provenance import load_public_key
from mlflow_safelock.settings import read_settings

_logger = logging.getLogger(__name__)


class PolicySource:
    """The policy in force: read when it is made, and again whenever its file has changed.

    A file that has become unusable, or is gone, leaves the policy in force that was, and says so in the log
    once for each change. Whoever is told of a policy that came into force, and fails, is told again when the
    policy is asked for next.

    Raises:
        PolicyError: ``SAFELOCK_POLICY`` names a file that cannot be used.
    """

    def __init__(self) -> None:
        self._path = read_settings().policy
        self._state = self._state_of_file()
        self._policy = DEFAULT_POLICY if self._path is None else load_policy(self._path)
        self._fault: PolicyError | None = None
        self._listeners: list[Callable[[Policy], None]] = []
        self._untold: deque[tuple[Callable[[Policy], None], Policy]] = deque()
        self._reading = threading.Lock()
        self._telling = threading.Lock()

    def when_changed(self, listener: Callable[[Policy], None]) -> None:
        """Call ``listener`` with every policy that comes into force from now on."""
        self._listeners.append(listener)

    @property
    def fault(self) -> PolicyError | None:
        """Why the file, as it was read last, is not what is in force; ``None`` where it is."""
        return self._fault

    def __call__(self) -> Policy:
        """The policy in force now."""
        if self._path is not None and self._state_of_file() != self._state:
            with self._reading:
                state = self._state_of_file()
                if state != self._state:
                    self._read_again(self._path)
                    self._state = state  # not before: whatever nobody foresaw is said to everybody who asks
        if self._untold:
            self._tell()
        return self._policy

    def _tell(self) -> None:
        """Tell listeners of the policies that came into force, in that order; nobody waits for that."""
        if not self._telling.acquire(blocking=False):
            return
        try:
            while self._untold:
                listener, policy = self._untold[0]
                listener(policy)
                self._untold.popleft()
        except Exception:
            _logger.exception("A policy that came into force is not on record yet, and is put there later")
        finally:
            self._telling.release()

    def _read_again(self, path: Path) -> None:
        try:
            policy = load_policy(path)
        except PolicyError as error:
            self._fault = error
            _logger.error(
                "The policy was changed and cannot be used; the one before it, %s, stays in force. %s",
                self._policy.digest,
                error,
            )
            return
        if policy.digest != self._policy.digest:
            _logger.warning("The policy was changed: %s, and was %s", policy.digest, self._policy.digest)
            self._policy = policy
            self._untold.extend((listener, policy) for listener in self._listeners)
        self._fault = None

    def _state_of_file(self) -> tuple[int, ...] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


def load_policy(path: str | Path) -> Policy:
    """Read a policy file (docs/gate.md).

    Raises:
        PolicyError: It cannot be read, or is not a valid policy; faults are named with their lines.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PolicyError(
            f"The policy file {path} cannot be read: {error}.",
            next_step="Name a file that can be read; without SAFELOCK_POLICY the default policy holds.",
        ) from error
    document = read_document(data, f"The policy file {path}", PolicyError)
    _read_key_files(document, Path(path).parent)
    policy = document.parsed(Policy)
    faults = [
        f"{document.where(('gates', position, 'tags'))}: gates.{position}.tags: {what}."
        for position, what in faults_of_tags(policy)
    ]
    if faults:
        raise PolicyError("\n".join(faults))
    return policy


def _read_key_files(document: Document, folder: Path) -> None:
    """Put the public keys in place of the paths that lead to them: the policy is what the keys are."""
    for place, signature in _signature_rules(document):
        keys = signature.get("public_keys")
        if not isinstance(keys, tuple):
            continue  # the form says what is wrong with it
        try:
            signature["public_keys"] = tuple(
                load_public_key(folder / key).pem if isinstance(key, str) and "BEGIN" not in key else key
                for key in keys
            )
        except KeyFileError as error:
            where = (*place, "public_keys")
            raise PolicyError(
                f"{document.where(where)}: {'.'.join(str(part) for part in where)}: {error.cause}",
                next_step=error.next_step,
            ) from error


def _signature_rules(document: Document) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Everything in a policy that names keys, with its place: who stands behind locks, and evaluations."""
    gates = document.values.get("gates")
    for number, gate in enumerate(gates if isinstance(gates, tuple) else ()):
        evaluation = gate.get("evaluation") if isinstance(gate, dict) else None
        for place, section in ((("gates", number), gate), (("gates", number, "evaluation"), evaluation)):
            signature = section.get("signature") if isinstance(section, dict) else None
            if isinstance(signature, dict):
                yield (*place, "signature"), signature
