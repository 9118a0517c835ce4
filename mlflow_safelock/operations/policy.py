"""The policy: what is in force, and whether its file is."""

from __future__ import annotations

import logging

from mlflow_safelock.errors import SigstoreError
from mlflow_safelock.gate.policy_file import PolicySource
from mlflow_safelock.operations.findings import Finding
from mlflow_safelock.provenance import check_sigstore
from mlflow_safelock.settings import variable_of

_logger = logging.getLogger(__name__)


def ask_policy(source: PolicySource) -> Finding:
    """Which policy is in force, and whether its file is newer, or what it asks for, cannot be used."""
    policy, fault = source(), source.fault
    facts = {"digest": policy.digest, "is_newest": fault is None}
    if fault is not None:
        # Its lines may be anything, so they stay in the log.
        return Finding(
            "policy",
            "fault",
            f"The policy file cannot be used; the policy before it is in force: {policy.digest}.",
            "Correct the file: safelock policy check names the lines.",
            facts,
        )
    if any(rule.names_identities for rule in policy.gates):
        try:
            check_sigstore()
        except SigstoreError as error:
            # It may name paths of this machine, so it stays in the log.
            _logger.error("Signatures of identities cannot be verified: %s", error)
            return Finding(
                "policy",
                "fault",
                f"The policy {policy.digest} names identities, whose signatures cannot be verified here.",
                "Install what verifies them (pip install 'mlflow-safelock[sigstore]'), and look whether "
                f"{variable_of('sigstore_trust_config')}, where it is set, names a file that can be used.",
                facts,
            )
    return Finding("policy", "ok", f"The policy {policy.digest} is in force.", "", facts)
