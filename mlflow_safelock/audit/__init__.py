"""Which model versions are locked, and what proves it."""

from mlflow_safelock.audit.report import audit, audit_rows
from mlflow_safelock.audit.rows import AuditRow, Evidence

__all__ = ["AuditRow", "Evidence", "audit", "audit_rows"]
