"""What a locked model can prove: where its weights come from, which lock, which strength, decided by whom."""

from mlflow_safelock.provenance.artifacts import (
    ArtifactFile,
    ArtifactReader,
    LocalArtifacts,
    Span,
    StoreChecksum,
)
from mlflow_safelock.provenance.contents import Contents, contents_of
from mlflow_safelock.provenance.envelopes import (
    Signatory,
    Signer,
    check_signing,
    configured_signatories,
    configured_signer,
    keyless_signer,
    signatory_of,
)
from mlflow_safelock.provenance.fingerprint import (
    ADDED_BY_CLIENTS,
    FileFingerprint,
    SourceFingerprint,
    check_fingerprint,
    take_fingerprint,
)
from mlflow_safelock.provenance.identities import Identity
from mlflow_safelock.provenance.keyless import KeylessSigner, check_sigstore
from mlflow_safelock.provenance.keys import (
    PublicKey,
    SigningKey,
    configured_signing_key,
    load_public_key,
    load_signing_key,
)
from mlflow_safelock.provenance.measured import (
    EvaluationStatement,
    Measured,
    MeasuredForm,
    MeasuredRate,
    MeasuredSuite,
    MeasuredUtility,
)
from mlflow_safelock.provenance.measuring import check_every_byte, kept_digests, measure, read_whole
from mlflow_safelock.provenance.receipt import (
    Actor,
    LockReference,
    OwnBiasesRule,
    Promotion,
    Receipt,
    ReceiptPredicate,
    SourceReference,
)
from mlflow_safelock.provenance.signatures import (
    EVALUATION_SIGNATURE_FILE,
    LOCK_SIGNATURE_FILE,
    RECEIPT_SIGNATURE_FILE,
    check_lock_signature,
    check_receipt_signature,
    sign_evaluation,
    sign_lock,
    sign_receipt,
    signed_evaluation,
)
from mlflow_safelock.provenance.steady import ListedArtifacts, SteadyArtifacts
from mlflow_safelock.provenance.tools import installed_version, tool_versions
from mlflow_safelock.provenance.weights import WeightsHeader, read_header

__all__ = [
    "ADDED_BY_CLIENTS",
    "EVALUATION_SIGNATURE_FILE",
    "LOCK_SIGNATURE_FILE",
    "RECEIPT_SIGNATURE_FILE",
    "Actor",
    "ArtifactFile",
    "ArtifactReader",
    "Contents",
    "EvaluationStatement",
    "FileFingerprint",
    "Identity",
    "KeylessSigner",
    "ListedArtifacts",
    "LocalArtifacts",
    "LockReference",
    "Measured",
    "MeasuredForm",
    "MeasuredRate",
    "MeasuredSuite",
    "MeasuredUtility",
    "OwnBiasesRule",
    "Promotion",
    "PublicKey",
    "Receipt",
    "ReceiptPredicate",
    "Signatory",
    "Signer",
    "SigningKey",
    "SourceFingerprint",
    "SourceReference",
    "Span",
    "SteadyArtifacts",
    "StoreChecksum",
    "WeightsHeader",
    "check_every_byte",
    "check_fingerprint",
    "check_lock_signature",
    "check_receipt_signature",
    "check_signing",
    "check_sigstore",
    "configured_signatories",
    "configured_signer",
    "configured_signing_key",
    "contents_of",
    "installed_version",
    "kept_digests",
    "keyless_signer",
    "load_public_key",
    "load_signing_key",
    "measure",
    "read_header",
    "read_whole",
    "sign_evaluation",
    "sign_lock",
    "sign_receipt",
    "signatory_of",
    "signed_evaluation",
    "take_fingerprint",
    "tool_versions",
]
