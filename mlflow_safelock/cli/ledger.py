"""``safelock ledger``: anchor, show and verify."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.guarded import open_ledger
from mlflow_safelock.cli.options import MlflowAddress, format_option, in_existing_folder, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table
from mlflow_safelock.cli.sign import needed_signer_of, signatories_of, signatory_options, signer_options


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    examples=(
        "safelock ledger verify --registry-uri safelock+sqlite:///registry.db",
        "safelock ledger show --model support-bot --registry-uri safelock+sqlite:///registry.db",
    ),
)
def ledger() -> None:
    """Read and check what the gate decided.

    The ledger is a table beside MLflow's own; each row is chained to the one before by its hash.
    """


@ledger.command(
    cls=Command,
    short_help="Check that no row was edited, removed or reordered.",
    examples=(
        "safelock ledger verify --registry-uri safelock+postgresql://mlflow@db/mlflow",
        "safelock ledger verify --anchor checkpoint.json --public-key key.pub.pem \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
    ),
)
@click.option(
    "--anchor",
    "anchors",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Checkpoint that it must still agree with; may be given several times.",
)
@signatory_options
@format_option
@mlflow_options
def verify(
    anchors: tuple[Path, ...],
    public_keys: tuple[Path, ...],
    identities: tuple[tuple[str, str], ...],
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Walk the chain from the first row to the last, and name the first that does not fit.

    What the chain itself cannot show is an end that was cut off, or written anew with every digest from there
    on. Checkpoints can, which "ledger anchor" wrote and you kept elsewhere: --anchor, with --public-key or
    --identity.
    """
    from mlflow_safelock.errors import BrokenLedgerError
    from mlflow_safelock.gate.anchors import read_checkpoint, verify_against

    signatories = signatories_of(public_keys, identities)
    if bool(anchors) != bool(signatories):
        raise click.UsageError("--anchor and --public-key, or --identity, go together.")
    checkpoints = [read_checkpoint(path.read_bytes(), signatories, origin=str(path)) for path in anchors]
    engine = open_ledger(mlflow_address)
    announce("Walking the ledger")
    try:
        with engine.connect() as connection:
            chain = verify_against(connection, checkpoints)
    except BrokenLedgerError as error:
        if form == "json":
            show_json({"ok": False, "row": error.row, "cause": error.cause})
        raise
    anchored = max((checkpoint.rows for checkpoint in checkpoints), default=None)
    if form == "json":
        show_json({"ok": True, "rows": chain.rows, "head": chain.head, "anchored_rows": anchored})
        return
    facts = [("rows", chain.rows), ("head", chain.head), ("anchored rows", anchored)]
    show_table(facts_table("The ledger holds", facts if checkpoints else facts[:2]))


@ledger.command(
    cls=Command,
    short_help="Write a signed checkpoint, to be kept elsewhere.",
    examples=(
        "safelock ledger anchor --key key.pem --out checkpoint.json \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
    ),
)
@signer_options
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=lambda _context, _parameter, path: in_existing_folder(path),
    metavar="FILE",
    help="File to write.",
)
@format_option
@mlflow_options
def anchor(key: Path | None, sigstore: bool, out: Path, form: str, mlflow_address: MlflowAddress) -> None:
    """Walk the chain, and write how many rows there are and what stands for all of them, signed.

    Keep the file where whoever can write to the database cannot. "ledger verify --anchor" then notices an end
    that was cut off, and rows up to there that were written anew.
    """
    from mlflow_safelock.gate.anchors import sign_checkpoint, take_checkpoint
    from mlflow_safelock.provenance import signatory_of

    signer = needed_signer_of(key, sigstore)
    engine = open_ledger(mlflow_address)
    announce("Walking the ledger")
    with engine.connect() as connection:
        checkpoint = take_checkpoint(connection)
    signed = sign_checkpoint(checkpoint, signer)
    out.write_bytes(signed)
    facts = {"file": str(out), **checkpoint.model_dump(mode="json"), **signatory_of(signer, signed).facts}
    if form == "json":
        show_json(facts)
    else:
        show_table(facts_table("Anchored", facts.items()))


@ledger.command(
    cls=Command,
    short_help="Show the last decisions.",
    examples=("safelock ledger show --limit 5 --registry-uri safelock+sqlite:///registry.db",),
)
@click.option("--model", metavar="NAME", help="Of this registered model only.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows.")
@format_option
@mlflow_options
def show(model: str | None, limit: int, form: str, mlflow_address: MlflowAddress) -> None:
    """Show the last rows of the ledger, newest first."""
    from rich.table import Table
    from sqlalchemy.orm import Session

    from mlflow_safelock.gate.ledger import last_entries

    with Session(open_ledger(mlflow_address)) as session:
        rows = last_entries(session, limit, model)
    if form == "json":
        show_json([{"sequence": number, **entry.model_dump(mode="json")} for number, entry in rows])
        return
    table = Table("row", "when", "event", "model", "target", "by", "why", box=None, pad_edge=False)
    for number, entry in rows:
        version = f"{entry.model} {entry.version}" if entry.version else entry.model
        by = entry.actor.name if entry.actor.verified else f"{entry.actor.name} (claimed)"
        table.add_row(
            str(number), entry.time[:19], entry.event, version, entry.target, by, entry.reason or ""
        )
    show_table(table)
