"""``safelock promote``."""

from __future__ import annotations

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.explained import show_explained
from mlflow_safelock.cli.guarded import (
    destination_option,
    explain,
    target_of,
    target_options,
    use_destination,
    version_of,
)
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_table
from mlflow_safelock.errors import SourceError


@click.command(
    cls=Command,
    short_help="Promote a version, or see what that would do.",
    examples=(
        "safelock promote models:/support-bot/3 --stage Staging --tracking-uri http://mlflow:5000",
        "safelock promote models:/support-bot/3 --alias champion --dry-run \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
    ),
)
@click.argument("version", metavar="URI", callback=version_of)
@target_options
@click.option("--archive-existing", is_flag=True, help="Archive what is in the stage now.")
@click.option("--dry-run", is_flag=True, help="Only say what the promotion would do; nothing is written.")
@destination_option
@format_option
@mlflow_options
def promote(
    version: tuple[str, int],
    stage: str | None,
    alias: str | None,
    archive_existing: bool,
    dry_run: bool,
    artifacts_destination: str | None,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Promote the version at URI, by the same plain MLflow call that any client makes.

    With --dry-run nothing is promoted: the policy of SAFELOCK_POLICY, or the default one, is put to the
    registry's own database (--registry-uri safelock+...), and the exit code is 1 where it would refuse.
    """
    target = target_of(stage, alias)
    name, number = version
    use_destination(artifacts_destination)
    if dry_run:
        from mlflow_safelock.gate.policy_file import PolicySource

        announce(f"Looking at {name} version {number}")
        show_explained(explain(mlflow_address, PolicySource()(), version, target), form)
        return
    facts = _promoted(name, number, stage, alias, archive_existing, mlflow_address)
    if form == "json":
        show_json(facts)
    else:
        show_table(facts_table("Promoted", facts.items()))


def _promoted(
    name: str, number: int, stage: str | None, alias: str | None, archive: bool, mlflow_address: MlflowAddress
) -> dict[str, object]:
    announce(f"Promoting {name} version {number}")
    import mlflow

    from mlflow_safelock.audit.database import is_database

    mlflow_address.reach()
    uri = mlflow.get_registry_uri()
    if is_database(uri) and not uri.startswith("safelock+"):
        raise SourceError(
            f"The registry at {uri} is a database without a gate, so nothing would be locked.",
            next_step=f"Name it as safelock+{uri}, or the server that guards it.",
        )
    client = mlflow.MlflowClient()
    if stage is not None:
        client.transition_model_version_stage(name, str(number), stage, archive)
    else:
        client.set_registered_model_alias(name, alias, str(number))
    tags = client.get_model_version(name, str(number)).tags
    return {
        "version": f"models:/{name}/{number}",
        "target": f"stage:{stage}" if stage is not None else f"alias:{alias}",
        "serves": client.get_model_version_download_uri(name, str(number)),
        "lock": tags.get("safelock.lock"),
        "alpha": tags.get("safelock.applied_alpha"),
    }
