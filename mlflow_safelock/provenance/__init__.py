"""What a locked model can prove: where its weights come from, which lock, which strength, decided by whom."""

from mlflow_safelock.provenance.artifacts import (
    ArtifactFile,
    ArtifactReader,
    LocalArtifacts,
    Span,
    StoreChecksum,
)
from mlflow_safelock.provenance.fingerprint import (
    ADDED_BY_CLIENTS,
    FileFingerprint,
    SourceFingerprint,
    check_fingerprint,
    take_fingerprint,
)
from mlflow_safelock.provenance.receipt import (
    Actor,
    LockReference,
    Promotion,
    Receipt,
    ReceiptPredicate,
    SourceReference,
)
from mlflow_safelock.provenance.tools import installed_version, tool_versions
from mlflow_safelock.provenance.weights import WeightsHeader, read_header

__all__ = [
    "ADDED_BY_CLIENTS",
    "Actor",
    "ArtifactFile",
    "ArtifactReader",
    "FileFingerprint",
    "LocalArtifacts",
    "LockReference",
    "Promotion",
    "Receipt",
    "ReceiptPredicate",
    "SourceFingerprint",
    "SourceReference",
    "Span",
    "StoreChecksum",
    "WeightsHeader",
    "check_fingerprint",
    "installed_version",
    "read_header",
    "take_fingerprint",
    "tool_versions",
]
