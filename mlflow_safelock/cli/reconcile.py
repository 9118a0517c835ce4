"""``safelock reconcile``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.audit import VIOLATIONS
from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.guarded import database_of, destination_option, open_guarded, use_destination
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.orphans import sweep_artifacts
from mlflow_safelock.cli.output import counted, new_table, show_json, show_lines, show_table, shown, working
from mlflow_safelock.cli.repairs import facts_of
from mlflow_safelock.cli.watch import INTERVAL, address_of, watch_registry

if TYPE_CHECKING:
    from mlflow_safelock.gate.reconciling import Repair, Way
    from mlflow_safelock.operations.reconciliation import Reconciliation

_LEFT = "left as it is"


@click.command(
    cls=Command,
    short_help="Put right what came past the gate.",
    examples=(
        "safelock reconcile --registry-uri safelock+postgresql://mlflow@db/mlflow",
        "safelock reconcile --lock --demote --registry-uri safelock+postgresql://mlflow@db/mlflow \\",
        "    --artifacts-destination s3://bucket/mlflow",
        "safelock reconcile --watch --interval 10 --lock --demote --registry-uri safelock+sqlite:///registry.db",
        "safelock reconcile --sweep --registry-uri safelock+sqlite:///registry.db",
    ),
)
@click.option("--lock", is_flag=True, help="Lock what slipped through, or put it back as it was locked.")
@click.option("--demote", is_flag=True, help="Take what is not locked out of its gated stage and aliases.")
@click.option("--sweep", is_flag=True, help="List locked models in the artifact store that nobody needs.")
@click.option("--yes", is_flag=True, help="With --sweep: delete them, without asking.")
@click.option(
    "--ledger",
    "ledgers",
    metavar="URI",
    multiple=True,
    help="With --sweep: the database where safelock+http clients have their ledger; may be repeated.",
)
@click.option(
    "--only-this-ledger", is_flag=True, help="With --sweep: there are no such clients, whatever tags say."
)
@click.option("--watch", is_flag=True, help="Do it again and again, until SIGTERM or Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --watch: time between two passes.  [default: 30]",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    callback=lambda _context, _parameter, address: address and address_of(address),
    help="With --watch: take MLflow's webhooks there, each of which begins a pass.",
)
@click.option(
    "--model",
    "models",
    metavar="GLOB",
    help="Only registered models of such names.  [default: all but locks]",
)
@destination_option
@format_option
@mlflow_options
def reconcile(
    lock: bool,
    demote: bool,
    sweep: bool,
    yes: bool,
    ledgers: tuple[str, ...],
    only_this_ledger: bool,
    watch: bool,
    interval: float | None,
    listen: tuple[str, int] | None,
    models: str | None,
    artifacts_destination: str | None,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Find versions in gated stages and aliases that did not pass the gate, and put them right.

    Rows are held to the ledger, and the files behind them compared as at a read; a version of which neither
    what it serves nor its fine-tune can be read here is told, and left.

    Without --lock or --demote it only says what they would do, and nothing is written. With --lock a row that
    somebody edited goes back to what the ledger says, and what was never promoted is promoted as any client
    would do it. With --demote a version leaves its gated stage for None, and loses its gated aliases; with
    both, only one that the gate refuses to lock. Every repair has a row in the ledger. The exit code is 3
    where something differs, and is left.

    With --sweep it lists the locked models beside fine-tunes that no version and no row of the ledger needs,
    with the bytes that they take, and deletes them with --yes, or once you say so on a terminal. Where a
    version has the tags of a promotion that the ledger does not know, clients may guard the registry with a
    ledger of their own: it then sweeps nothing, unless it is told of that ledger, or that there is none.

    With --watch it is the companion of a server that has no gate: it looks again and again, and tells what it
    did, and once what it leaves. SIGTERM ends it after the pass that is under way. With --listen a delivery
    of an MLflow webhook, signed with the secret in SAFELOCK_WEBHOOK_SECRET, begins a pass at once.

    This works on the registry's own database and artifacts, not through a server, with the policy that
    SAFELOCK_POLICY names. Repairs and sweeping need --registry-uri safelock+...
    """
    if sweep and (lock or demote or watch or models):
        raise click.UsageError("--sweep goes by itself: what is needed is asked of all versions.")
    if (yes or ledgers or only_this_ledger) and not sweep:
        raise click.UsageError("--yes, --ledger and --only-this-ledger are for --sweep.")
    if (interval is not None or listen is not None) and not watch:
        raise click.UsageError("--interval and --listen are for --watch.")
    if sweep:
        use_destination(artifacts_destination)
        sweep_artifacts(mlflow_address, form, delete=yes, ledgers=ledgers, only_this_ledger=only_this_ledger)
        return
    ways: tuple[Way, ...] = (*(("lock",) if lock else ()), *(("demote",) if demote else ()))
    use_destination(artifacts_destination)
    with working("Opening the registry"):
        reconciliation = _reconciliation(mlflow_address, models, writes=bool(ways))
    if watch:
        watch_registry(reconciliation, ways, interval or INTERVAL, listen, form)
        return
    repairs = counted(reconciliation.repairs(ways), "Versions that did not pass the gate")
    if form == "json":
        show_json([facts_of(repair) for repair in repairs])
    else:
        _show(repairs, ways)
    left = sum(repair.done is None for repair in repairs)
    if left:
        click.echo(f"Error: {left} model version(s) are not as the ledger has them.", err=True)
        click.echo(
            "Next: Do what the refusals say, or take them out with --demote."
            if ways
            else "Next: Put them right: --lock, --demote, or both.",
            err=True,
        )
        click.get_current_context().exit(VIOLATIONS)


def _reconciliation(mlflow_address: MlflowAddress, models: str | None, *, writes: bool) -> Reconciliation:
    import mlflow

    from mlflow_safelock.gate.policy_file import PolicySource
    from mlflow_safelock.operations.reconciliation import reading_only, repairing

    uri = database_of(mlflow_address, "only there can it be put right")
    if writes:
        return repairing(open_guarded(mlflow_address), uri, models)
    return reading_only(uri, mlflow.get_tracking_uri(), PolicySource()(), models)


def _show(repairs: Sequence[Repair], ways: Sequence[Way]) -> None:
    if not repairs:
        show_lines("Every version in a gated place is as the ledger has it.")
        return
    columns = ("model", "version", "places", "done") if ways else ("model", "version", "places")
    table = new_table(None, *columns)
    for repair in repairs:
        request, places = repair.difference.request, repair.difference.places
        done = (repair.done or _LEFT,) if ways else ()
        table.add_row(
            shown(request.name), str(request.version), shown(", ".join(map(str, places))), *map(shown, done)
        )
    show_table(table)
    show_lines("")
    for repair in repairs:
        facts, request = facts_of(repair), repair.difference.request
        lines = [facts["found"]]
        if not ways:
            lines += [f"--lock: {facts['lock']}", f"--demote: {facts['demote']}"]
        elif repair.refusal is not None:
            lines.append(
                f"Refused [{repair.refusal.reason}]: {repair.refusal.cause} {repair.refusal.next_step}"
            )
        show_lines(*(shown(f"{request.name} version {request.version}: {line}") for line in lines))
