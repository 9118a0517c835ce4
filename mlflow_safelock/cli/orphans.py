"""``safelock reconcile --sweep``: what nobody needs in the artifact store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from mlflow_safelock.cli.guarded import database_of, open_guarded
from mlflow_safelock.cli.options import MlflowAddress
from mlflow_safelock.cli.output import new_table, show_json, show_lines, show_table, shown, working

if TYPE_CHECKING:
    from mlflow_safelock.operations.sweeping import Orphan, Swept


def sweep_artifacts(
    mlflow_address: MlflowAddress,
    form: str,
    *,
    delete: bool,
    ledgers: Sequence[str] = (),
    only_this_ledger: bool = False,
) -> None:
    """List orphans, and delete them where that is wanted: by ``delete``, or by an answer on a terminal.

    Args:
        mlflow_address: The registry.
        form: Form of the output.
        delete: Whether they are deleted without asking.
        ledgers: Databases with the ledgers of clients that guard the registry by themselves.
        only_this_ledger: Whether there are no other ledgers, whatever tags say.
    """
    from mlflow_safelock.operations.reconciliation import sweeping

    with working("Looking beside the fine-tunes"):
        uri = database_of(mlflow_address, "only there is it known what is needed")
        sweep = sweeping(open_guarded(mlflow_address), uri, ledgers, only_known=only_this_ledger)
        orphans = sweep.orphans()
    if not delete and form == "table":
        _show(orphans)
    asked = bool(orphans) and form == "table" and sys.stdin.isatty()
    if not delete and not (asked and click.confirm("Delete them?", err=True)):
        if form == "json":
            show_json([_facts(orphan) for orphan in orphans])
        return
    with working("Deleting"):
        swept = list(sweep.delete(orphans))
    if form == "json":
        show_json([_facts(one.orphan, one) for one in swept])
    else:
        show_lines(*(shown(_told(one)) for one in swept))
        deleted = [one.orphan for one in swept if one.kept is None]
        show_lines(f"{len(deleted)} deleted, {_bytes(deleted)} bytes")
    if any(one.kept is not None for one in swept):
        click.get_current_context().exit(1)


def _show(orphans: Sequence[Orphan]) -> None:
    if not orphans:
        show_lines("Every locked model in the artifact store is needed.")
        return
    table = new_table(None, "bytes", "files", "location", "why")
    for orphan in orphans:
        folder = orphan.folder
        table.add_row(str(folder.size), str(folder.files), shown(folder.location), orphan.why)
    show_table(table)
    show_lines("", f"{len(orphans)} that nobody needs, {_bytes(orphans)} bytes")


def _bytes(orphans: Sequence[Orphan]) -> int:
    return sum(orphan.folder.size for orphan in orphans)


def _told(swept: Swept) -> str:
    location = swept.orphan.folder.location
    return f"deleted {location}" if swept.kept is None else f"kept {location}: {swept.kept}"


def _facts(orphan: Orphan, swept: Swept | None = None) -> dict[str, Any]:
    return {
        "location": orphan.folder.location,
        "bytes": orphan.folder.size,
        "files": orphan.folder.files,
        "why": orphan.why,
        "deleted": swept is not None and swept.kept is None,
        "kept": None if swept is None else swept.kept,
    }
