"""The command group that everything hangs on."""

from __future__ import annotations

import click

from mlflow_safelock.cli.audit import audit
from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Group, verbose_option
from mlflow_safelock.cli.compare import compare
from mlflow_safelock.cli.demo import demo
from mlflow_safelock.cli.doctor import doctor
from mlflow_safelock.cli.evaluate import evaluate
from mlflow_safelock.cli.export import export
from mlflow_safelock.cli.forge import forge
from mlflow_safelock.cli.ledger import ledger
from mlflow_safelock.cli.lock import lock
from mlflow_safelock.cli.policy import policy
from mlflow_safelock.cli.prepare import prepare
from mlflow_safelock.cli.promote import promote
from mlflow_safelock.cli.recipes import recipes
from mlflow_safelock.cli.reconcile import reconcile
from mlflow_safelock.cli.reproduce import reproduce
from mlflow_safelock.cli.run import run
from mlflow_safelock.cli.sweep import sweep
from mlflow_safelock.cli.undo import undo
from mlflow_safelock.cli.unlock import unlock


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    examples=(
        "safelock demo                    see it work, in a few minutes on a laptop",
        "",
        "mlflow server --registry-store-uri safelock+sqlite:///registry.db",
        "safelock lock import Meta-Llama-3-8B-Instruct.safelock --recipe llama-3-8b-instruct \\",
        "    --output llama-3-8b.safetensors --register --tracking-uri http://127.0.0.1:5000",
        "safelock audit --registry-uri sqlite:///registry.db",
    ),
)
@click.version_option(package_name="mlflow-safelock", prog_name="safelock")
@verbose_option
def main() -> None:
    """Safety locks for fine-tuned LLMs, enforced in the MLflow model registry.

    A lock is forged once from a base model (or imported), registered, and put onto every fine-tune of that
    base when it is promoted: by plain MLflow calls, through a registry that this package guards.

    The result goes to standard output, everything else to standard error. Exit codes: 0 done, 1 refused or
    failed, 2 the command line is not right, 3 a version is where it may not be.
    """


for _command in (
    *(demo, forge, lock, compare, evaluate, sweep, prepare, promote, export, undo),
    *(doctor, policy, audit, reconcile, ledger, unlock, recipes, run, reproduce),
):
    main.add_command(_command)
