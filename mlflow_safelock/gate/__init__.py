"""The gate: policy, source, lock, ledger and the decision. It knows no MLflow store class."""
