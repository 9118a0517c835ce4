"""What another gate locked, which keeps another ledger: its receipt leads back to the fine-tune.

Nothing that lies there is believed to be a good lock. One thing is taken of it, which fine-tune it was made
of, and that is then promoted like any other, with this gate's lock and strength.
"""

from __future__ import annotations

from mlflow_safelock.errors import VerificationError
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.flavors.standalone import read_standalone
from mlflow_safelock.gate.places import fine_tune_beside, is_standalone
from mlflow_safelock.gate.ports import Artifacts
from mlflow_safelock.provenance import check_fingerprint


def original_by_receipt(location: str, artifacts: Artifacts) -> str | None:
    """Where the fine-tune is that another gate locked; ``None`` where nothing of a gate's lies there.

    Args:
        location: Where the version is handed out from.
        artifacts: The artifacts behind the registry.

    Raises:
        VerificationError: It is not what its receipt says, the receipt is of another fine-tune or not signed
            where that is asked for, or the fine-tune was changed since.
        SourceError: It cannot be read.
    """
    original = fine_tune_beside(location)
    if original is None:
        return None
    reader = artifacts.reader(location)
    receipt = read_standalone(reader) if is_standalone(location) else read_overlay(reader).receipt
    source = receipt.predicate.source
    if artifacts.place(source.uri) != artifacts.place(original):
        raise VerificationError(
            f"The receipt of the locked model at {location} is about the fine-tune at {source.uri}, and it "
            f"lies beside the one at {original}.",
            next_step="Register the fine-tune that is to be served, and promote that one.",
        )
    check_fingerprint(source.fingerprint, artifacts.reader(original))
    return original
