"""Every exception this package raises, as one tree.

::

    SafelockError
    ├── LockError
    │   ├── LockFormatError            the file is not a lock file we read
    │   ├── LockValidationError        it is one, and what it says cannot be a lock
    │   └── LockMismatchError          a sound lock, but not for this model
    ├── ForgeError
    │   ├── PreferenceDataError        preference pairs that cannot be used
    │   └── AnswerTokensError          the answer's last tokens cannot be found
    ├── ApplyError
    │   ├── AlphaError                 not a usable strength
    │   ├── AlreadyLockedError         the push would be added twice
    │   ├── UnsupportedArchitectureError  heads cannot be found, or a checkpoint cannot carry the biases
    │   └── CheckpointError            a checkpoint folder that cannot be read, written or confirmed
    ├── SourceError                    the fine-tune behind a locked model cannot be reached
    │   └── UnreachableError           its store does not answer, and may in a while
    ├── VerificationError              something is not what its receipt says
    │   └── LockWithoutEffectError     a model in which too little of a lock's push arrives
    ├── KeyFileError                   a key file that cannot be used
    ├── SigstoreError                  Sigstore cannot be used to sign or to verify
    ├── PolicyError                    a policy file that cannot be used
    ├── PromotionRefused               the gate said no
    ├── LedgerError                    the ledger cannot be read or written
    │   └── BrokenLedgerError          a row of it is not what was written
    ├── SettingsError                  a setting of the environment that cannot be used
    ├── RecipeError                    a recipe that cannot be used
    └── EvaluationError                something that cannot be measured
"""

from __future__ import annotations

import copyreg
from typing import Any


class SafelockError(Exception):
    """Base of all errors of this package.

    Args:
        cause: What is wrong, as a sentence, with the values that show it.
        next_step: What to do about it, as a sentence; empty where there is nothing to say.
    """

    def __init__(self, cause: str, *, next_step: str = "") -> None:
        super().__init__(cause, next_step)
        self.cause = cause
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.cause} {self.next_step}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as a call with their args, which these do not take by position.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class LockError(SafelockError):
    """Something is wrong with a lock."""


class LockFormatError(LockError):
    """A file that is not a lock file, or not one that this version reads."""


class LockValidationError(LockError):
    """A lock whose contents cannot be right: norms, stds, indices, metadata."""


class LockMismatchError(LockError):
    """A sound lock that does not fit the model, base or recipe it is used with."""


class ForgeError(SafelockError):
    """A lock cannot be forged."""


class PreferenceDataError(ForgeError):
    """Preference pairs that cannot be read or used."""


class AnswerTokensError(ForgeError):
    """The last tokens of an answer cannot be found in its rendered chat."""


class ApplyError(SafelockError):
    """A lock cannot be applied."""


class AlphaError(ApplyError):
    """An alpha that is not a finite number other than zero, or one that numbers of the model cannot carry."""


class AlreadyLockedError(ApplyError):
    """The model or checkpoint carries a lock already."""


class UnsupportedArchitectureError(ApplyError):
    """The model's attention heads cannot be found, or its checkpoint format cannot carry a lock."""


class CheckpointError(ApplyError):
    """A checkpoint folder cannot be read, cannot be written, or did not reload as it should."""


class SourceError(SafelockError):
    """The fine-tune that a locked model points to cannot be reached or read."""


class UnreachableError(SourceError):
    """A store that does not answer now; the same call may well succeed in a while."""


class VerificationError(SafelockError):
    """A file, lock or model is not what the receipt says."""


class LockWithoutEffectError(VerificationError):
    """A lock can be put on a model, and too little of its push arrives there, as the weights are."""


class KeyFileError(SafelockError):
    """A key for signatures that cannot be read, or is of a kind that is not used here."""


class SigstoreError(SafelockError):
    """Sigstore cannot be used: not installed, no identity token, no trust root, or it refuses to sign."""


class PolicyError(SafelockError):
    """A policy file that cannot be read or is not valid."""


class PromotionRefused(SafelockError):  # noqa: N818 - a decision, named as one
    """The gate refused a promotion; the registry is as it was.

    Args:
        reason: Machine-readable reason code, such as ``missing_lock``.
        cause: What is wrong, as a sentence.
        next_step: What to do about it, as a sentence.
        about: The beginning of the cause that is the same each time that this is wrong, where the rest need
            not be; all of it where not given.
    """

    def __init__(self, reason: str, cause: str, *, next_step: str = "", about: str | None = None) -> None:
        super().__init__(cause, next_step=next_step)
        self.reason = reason
        self.about = cause if about is None else about


class LedgerError(SafelockError):
    """The ledger cannot be read, or cannot be appended to."""


class BrokenLedgerError(LedgerError):
    """A row of the ledger is not what was written, or is not there.

    Args:
        row: The first row that is known not to hold, from 1.
        cause: What is wrong, as a sentence.
        next_step: What to do about it, as a sentence.
    """

    def __init__(self, row: int, cause: str, *, next_step: str = "") -> None:
        super().__init__(cause, next_step=next_step)
        self.row = row


class SettingsError(SafelockError):
    """A setting of the environment that cannot be used."""


class RecipeError(SafelockError):
    """A recipe that cannot be found, read or run."""


class EvaluationError(SafelockError):
    """Something that cannot be measured."""
