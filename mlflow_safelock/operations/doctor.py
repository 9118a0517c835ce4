"""Looking at an installation, before it is started or while it runs, and saying what to fix.

A database is looked at from here; a server is asked for its own findings, which are those of its health page.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points

import sqlalchemy as sa
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from pydantic import TypeAdapter, ValidationError

from mlflow_safelock.audit.database import is_database, open_database
from mlflow_safelock.errors import PolicyError, SourceError
from mlflow_safelock.gate.policy_file import PolicySource
from mlflow_safelock.operations.clocks import ask_database_clock, ask_server_clock
from mlflow_safelock.operations.database import ask_database, read_ledger_head, read_schema
from mlflow_safelock.operations.destination import probe
from mlflow_safelock.operations.environment import ask_authentication, ask_keys, ask_settings
from mlflow_safelock.operations.findings import Finding, fault_of, found
from mlflow_safelock.operations.policy import ask_policy
from mlflow_safelock.operations.versions import ask_versions
from mlflow_safelock.registry.artifacts import DESTINATION_VARIABLE
from mlflow_safelock.registry.schemes import (
    GROUP,
    Claim,
    claims_of,
    scheme_fault,
    scheme_of,
    shown_uri,
)
from mlflow_safelock.settings import read_settings, variable_of

HEALTH_PAGE = "/safelock/health"

ANSWERS_WITHIN = 60
"""Seconds that a server has for its own findings."""

_findings = TypeAdapter(tuple[Finding, ...])


@dataclass(frozen=True)
class Installation:
    """What is looked at.

    Attributes:
        registry_uri: Where the registry is, as MLflow resolves it.
        is_registry_named: Whether that is named, and not only follows from the tracking URI.
        tracking_uri: Where the tracking server or database is; ``None`` where it is not named.
        destination: What ``mlflow server`` is given as its artifact destination; ``None`` where not told.
    """

    registry_uri: str
    is_registry_named: bool
    tracking_uri: str | None
    destination: str | None = None

    @property
    def is_server(self) -> bool:
        """Whether the registry is one that a server is asked for."""
        return self.registry_uri.startswith(("http://", "https://"))


def examine(installation: Installation) -> tuple[Finding, ...]:
    """Every finding about an installation; a file is written to the artifact destination, and deleted."""
    looks = _through_server if installation.is_server else _from_here
    here = [found(check, look) for check, look in _this_process(installation)]
    return (*here, *looks(installation))


def _this_process(installation: Installation) -> Iterator[tuple[str, Callable[[], Finding]]]:
    yield "versions", ask_versions
    yield "settings", ask_settings
    yield "keys", ask_keys
    yield "schemes", ask_schemes
    yield "registry", lambda: ask_registry(installation)


def _from_here(installation: Installation) -> Iterator[Finding]:
    yield found("policy", ask_policy_file)
    yield found("authentication", ask_authentication)
    yield found("artifacts", lambda: _ask_destination(installation))
    if not is_database(installation.registry_uri):
        return
    opened: list[sa.Engine] = []

    def open_it() -> Finding:
        engine = open_database(installation.registry_uri)
        answers = ask_database(engine)
        opened.append(engine)
        return answers

    yield found("database", open_it)
    for engine in opened:
        yield found("schema", partial(read_schema, engine))
        yield found("ledger", partial(read_ledger_head, engine))
        yield found("clock", partial(ask_database_clock, engine))
        engine.dispose()


def _through_server(installation: Installation) -> Iterator[Finding]:
    """What the server finds itself; and its clock."""
    uri = installation.registry_uri
    before = time.time()
    try:
        answer = http_request(
            get_default_host_creds(uri),
            HEALTH_PAGE,
            "GET",
            max_retries=0,
            timeout=ANSWERS_WITHIN,
            raise_on_status=False,
        )
    except MlflowException as error:
        yield Finding(
            "server",
            "fault",
            f"The server {shown_uri(uri)} does not answer: {error.message.splitlines()[0]}",
            "Look whether it runs, and at the address: --tracking-uri, --registry-uri.",
        )
        return
    after = time.time()
    yield from _told(uri, answer.status_code, answer.content)
    yield ask_server_clock(answer.headers.get("Date"), before, after)


def _told(uri: str, status: int, body: bytes) -> Iterator[Finding]:
    who = f"The server {shown_uri(uri)}"
    if status in (401, 403):
        yield Finding(
            "server",
            "fault",
            f"{who} does not let this client in (HTTP {status}).",
            "Give a user: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        )
        return
    try:
        checks = _findings.validate_python(_checks_in(body))
    except (ValidationError, SourceError):
        yield Finding(
            "server",
            "fault",
            f"{who} does not say whether its registry is gated: it has no {HEALTH_PAGE} (HTTP {status}).",
            "Start it with --app-name safelock, and with mlflow-safelock installed there.",
        )
        return
    yield Finding("server", "ok", f"{who} answers with {len(checks)} findings of its own.")
    for check in checks:
        yield replace(check, check=f"server: {check.check}")


def _checks_in(body: bytes) -> object:
    try:
        values = json.loads(body)
    except ValueError as error:
        raise SourceError("It is no JSON.") from error
    if not isinstance(values, dict) or "checks" not in values:
        raise SourceError("It has no findings.")
    return values["checks"]


def ask_registry(installation: Installation) -> Finding:
    """Whether MLflow puts the gate in front of the registry that is named."""
    uri, tracking = installation.registry_uri, installation.tracking_uri
    if installation.is_server:
        return Finding(
            "registry", "ok", f"The registry is behind a server, {shown_uri(uri)}, which is asked."
        )
    if tracking is not None and scheme_of(tracking).startswith("safelock+"):
        return Finding(
            "registry",
            "fault",
            f"The tracking URI {shown_uri(tracking)} has the gate's scheme, which only registries have.",
            "Write it without safelock+, and the registry's with it: --registry-uri, or MLFLOW_REGISTRY_URI.",
        )
    if not installation.is_registry_named:
        where = "the tracking URI's" if tracking is not None else "MLflow's own default"
        gated = f"safelock+{scheme_of(uri)}" if is_database(uri) else "safelock+sqlite"
        return Finding(
            "registry",
            "fault",
            f"No registry is named, so it is {where}, {shown_uri(uri)}, with no gate in front.",
            f"Name it: --registry-uri {gated}:…, or MLFLOW_REGISTRY_URI; for a server, --registry-store-uri.",
        )
    fault = scheme_fault(uri)
    if fault is not None:
        return Finding("registry", "fault", *fault)
    claim = claims_of(scheme_of(uri))[-1]
    facts = {"scheme": claim.scheme, "package": claim.package, "target": claim.target}
    if tracking is None:
        return Finding(
            "registry",
            "warning",
            f"The registry {shown_uri(uri)} has the gate in front, and no tracking URI is named.",
            "Name it as well: --tracking-uri, or MLFLOW_TRACKING_URI.",
            facts,
        )
    return Finding("registry", "ok", f"The registry {shown_uri(uri)} has the gate in front.", "", facts)


def ask_schemes() -> Finding:
    """Which package MLflow asks for each of our schemes."""
    claims = [claim for claim in _all_claims() if "safelock" in claim.scheme.split("+")]
    schemes = sorted({claim.scheme for claim in claims if claim.is_ours})
    facts = {
        "schemes": [{"scheme": one.scheme, "package": one.package, "target": one.target} for one in claims]
    }
    if not schemes:
        return Finding(
            "schemes",
            "fault",
            "MLflow finds no store of this package: it is not installed, or its entry points are missing.",
            "Install it: pip install . in a checkout, or its wheel.",
            facts,
        )
    rivals = sorted({f"{one.package} ({one.scheme})" for one in claims if not one.is_ours})
    if rivals:
        return Finding(
            "schemes",
            "warning",
            f"Other packages claim schemes of this one: {', '.join(rivals)}. MLflow silently takes the last "
            "that it finds.",
            "Uninstall them, or have them give up those schemes.",
            facts,
        )
    return Finding("schemes", "ok", f"This package alone answers for {', '.join(schemes)}.", "", facts)


def _all_claims() -> Iterator[Claim]:
    for scheme in sorted({point.name for point in entry_points(group=GROUP)}):
        yield from claims_of(scheme)


def ask_policy_file() -> Finding:
    """Which policy would be in force, where it is from, and what it gates."""
    try:
        source = PolicySource()
    except PolicyError as error:
        correct = "Correct the file: safelock policy check names the lines."
        return replace(fault_of("policy", error), next_step=error.next_step or correct)
    finding, policy, path = ask_policy(source), source(), read_settings().policy
    if finding.status == "fault":
        return finding
    gates = [
        {
            "models": gate.models,
            "tags": dict(gate.tags),
            "stages": list(gate.stages),
            "aliases": list(gate.aliases),
        }
        for gate in policy.gates
    ]
    origin = (
        f"the file {path}" if path is not None else f"the default, since {variable_of('policy')} is not set"
    )
    gated = "1 gate" if len(gates) == 1 else f"{len(gates)} gates"
    return replace(
        finding,
        message=f"The policy {policy.digest[:19]}…, of {gated}, is {origin}.",
        facts={**finding.facts, "file": None if path is None else str(path), "gates": gates},
    )


def _ask_destination(installation: Installation) -> Finding:
    destination = installation.destination or os.environ.get(DESTINATION_VARIABLE)
    if not destination:
        return Finding(
            "artifacts",
            "skipped",
            "Where the server's artifacts go is not told, so it was not tried.",
            "Give what mlflow server is given: --artifacts-destination.",
        )
    return probe(destination)
