"""An audit through MLflow's client, where the ledger cannot be reached: the evidence is in the artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlflow_safelock.audit.receipts import ReceiptReader
from mlflow_safelock.audit.rows import (
    AuditRow,
    RegisteredVersion,
    row_of,
    row_without_evidence,
)
from mlflow_safelock.errors import SafelockError, VerificationError
from mlflow_safelock.gate.source import PROMPT_SOURCE

_PROMPTS = "tag.`mlflow.prompt.is_prompt` = 'true'"
"""MLflow's searches leave out prompts, which is whatever somebody tagged as one, unless they ask for them."""

_Key = tuple[str, int]


def server_rows(
    registry_uri: str, tracking_uri: str | None, is_wanted: Callable[[str], bool]
) -> Iterator[AuditRow]:
    """A row for every version that the client may see, by name and version.

    Args:
        registry_uri: The registry, usually an MLflow server's address.
        tracking_uri: Where artifacts are fetched through; MLflow's current one where not given.
        is_wanted: Whether a registered model of this name is wanted.

    Raises:
        mlflow.exceptions.MlflowException: The registry cannot be reached.
    """
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=registry_uri)
    receipts = ReceiptReader(client, tracking_uri, registry_uri)
    models = [model for model in _search(client.search_registered_models) if is_wanted(model.name)]
    aliases: dict[_Key, list[str]] = {}
    for model in models:
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    for found in _versions(client, models):
        yield _row(client, found, tuple(sorted(aliases.get((found.name, int(found.version)), ()))), receipts)


def _versions(client: MlflowClient, models: Sequence[RegisteredModel]) -> Iterator[ModelVersion]:
    """Every version of the models that is not deleted, by name and number.

    A version that is tagged as a prompt hides its siblings from searches, so gaps are asked for one by one.
    """
    found = {(one.name, int(one.version)): one for one in _search(client.search_model_versions)}
    for model in sorted(models, key=lambda model: model.name):
        newest = max((int(one.version) for one in model.latest_versions), default=0)
        for number in range(1, newest + 1):
            version = found.get((model.name, number)) or _version(client, model.name, number)
            if version is not None and version.source != PROMPT_SOURCE:
                yield version


def _version(client: MlflowClient, name: str, number: int) -> ModelVersion | None:
    try:
        # The client itself denies that a version exists which is tagged as a prompt.
        return client._get_registry_client().get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None  # deleted
        raise


def _search(search: Callable[..., Any]) -> Iterator[Any]:
    """All pages of a search, prompts included."""
    for only in (None, _PROMPTS):
        token = None
        while True:
            page = search(filter_string=only, page_token=token)
            yield from page
            token = page.token
            if not token:
                break


def _row(
    client: MlflowClient,
    found: ModelVersion,
    aliases: tuple[str, ...],
    receipts: ReceiptReader,
) -> AuditRow:
    number = int(found.version)
    try:
        location = client.get_model_version_download_uri(found.name, str(number))
        failure = None
    except MlflowException as error:
        location, failure = "", error.message
    version = RegisteredVersion(
        workspace=found.workspace,
        name=found.name,
        version=number,
        stage=found.current_stage,
        aliases=aliases,
        source=found.source or "",
        location=location,
        tags=dict(found.tags),
    )
    if failure is not None:
        return row_without_evidence(version, "unknown", f"Its location is not to be had: {failure}")
    try:
        evidence = receipts.evidence_at(location)
    except VerificationError as error:
        return row_without_evidence(version, "unlocked", error.cause)
    except SafelockError as error:
        return row_without_evidence(version, "unknown", error.cause)
    return row_without_evidence(version) if evidence is None else row_of(version, evidence)
