"""The policy: what is in force, and whether its file is."""

from __future__ import annotations

from mlflow_safelock.gate.policy_file import PolicySource
from mlflow_safelock.operations.findings import Finding


def ask_policy(source: PolicySource) -> Finding:
    """Which policy is in force, and whether the file that it comes from is newer and cannot be used."""
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
    return Finding("policy", "ok", f"The policy {policy.digest} is in force.", "", facts)
