"""``safelock prepare``."""

from __future__ import annotations

import click

from mlflow_safelock.cli.command import Command
from mlflow_safelock.cli.guarded import destination_option, open_guarded, use_destination, version_of
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options
from mlflow_safelock.cli.output import (
    announce,
    facts_table,
    in_words,
    moving,
    show_json,
    show_lines,
    show_table,
)


@click.command(
    cls=Command,
    short_help="Write ahead what a promotion has no time for.",
    examples=(
        "safelock prepare models:/support-bot/3 --registry-uri safelock+postgresql://mlflow@db/mlflow",
        "safelock prepare models:/support-bot/3 --registry-uri safelock+sqlite:///registry.db \\",
        "    --artifacts-destination s3://bucket/mlflow",
        "safelock prepare models:/support-bot/3 --again --registry-uri safelock+sqlite:///registry.db",
    ),
)
@click.argument("version", metavar="URI", callback=version_of)
@click.option("--again", is_flag=True, help="Measure every byte anew, whatever is on record.")
@destination_option
@format_option
@mlflow_options
def prepare(
    version: tuple[str, int],
    again: bool,
    artifacts_destination: str | None,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Write what the promotion of the version at URI needs: a standalone model, a full fingerprint.

    Where the policy says "no_weights: snapshot", a model that was logged as a reference to a hub gets its
    weights first, at the commit that it names; they are written into the model's folder.

    A standalone model, where the policy asks for that carrier, lies beside the fine-tune and shares its
    weights: by links on one file system, by copies that S3 makes itself. For a full fingerprint every byte of
    the fine-tune is read. The promotion then finds them and compares them. Doing this again changes nothing,
    unless a file was written since, by the file system's word, or --again is given: then it measures anew.
    After a failure it goes on where it was, with the copies that S3 made and with the files that were read;
    files that had to be copied on disks, or through a server, are copied anew. A standalone model that was
    damaged since is written anew, beside the old one. Nothing is promoted here, and the checks are those of a
    promotion, refusals included.

    This works on the registry's own database (--registry-uri safelock+...) and artifacts, with the policy
    that SAFELOCK_POLICY names; of a server, only on the client's side of it (safelock+http://...).
    """
    name, number = version
    announce(f"Preparing {name} version {number}")
    use_destination(artifacts_destination)
    store = open_guarded(mlflow_address)
    with moving() as progress:
        made = store.prepare(name, number, progress, measure_anew=again)
    written, measured = made.written, made.measured
    if form == "json":
        show_json(
            {
                "model": name,
                "version": number,
                "carrier": made.carrier,
                "location": made.location,
                "lock": made.lock,
                "alpha": made.alpha,
                "fingerprint": measured and measured.fingerprint.digest,
                "fingerprint_location": measured and measured.location,
                "fetched": made.fetched,
                "measured_bytes": measured.fingerprint.size if measured and measured.is_new else None,
                "check": written and written.check,
                "bias_error": written and written.bias_error,
                "weights": written and {file.path: file.sharing for file in written.weights},
            }
        )
        return
    show_table(
        facts_table(
            "Prepared",
            [
                ("carrier", made.carrier),
                ("location", made.location or "the promotion writes it"),
                ("lock", made.lock),
                ("alpha", made.alpha),
                ("fetched from the hub", made.fetched),
                ("full fingerprint", measured and measured.location),
                ("weights", written and in_words(file.sharing for file in written.weights)),
                ("bias error", written and f"{written.bias_error:.1e}, relative"),
                ("check", written.check if written else ("there already" if made.location else None)),
            ],
        )
    )
    show_lines("", f"Promote it: transition {name} version {number}, or set its alias, with plain MLflow.")
