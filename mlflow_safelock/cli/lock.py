"""``safelock lock``: import, inspect, enroll, register, revoke, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlflow_safelock.cli.command import CONTEXT_SETTINGS, Command, Group
from mlflow_safelock.cli.delivery import deliver, register_lock
from mlflow_safelock.cli.guarded import open_guarded, version_of
from mlflow_safelock.cli.lock_report import lock_facts, show_lock
from mlflow_safelock.cli.options import MlflowAddress, format_option, mlflow_options, output_file_option
from mlflow_safelock.cli.output import announce, facts_table, show_json, show_lines, show_table
from mlflow_safelock.cli.sign import (
    check_signature,
    sign,
    signatories_of,
    signatory_options,
    signature_for,
    signer_of,
    signer_options,
)
from mlflow_safelock.cli.unlock import reason_option
from mlflow_safelock.errors import LockMismatchError, RecipeError
from mlflow_safelock.loading import geometry_of, is_mlflow_model, load_lock_reference

if TYPE_CHECKING:
    from mlflow_safelock.lock import AttentionGeometry, SafetyLock


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    examples=(
        "safelock lock import Mistral_Nemo_12B.safelock --recipe mistral-nemo-12b --output nemo.safetensors",
        "safelock lock inspect nemo.safetensors",
        "safelock lock register nemo.safetensors --tracking-uri http://mlflow:5000",
    ),
)
def lock() -> None:
    """Import, inspect, sign, register and verify locks.

    A lock is a small safetensors file made for one base model: attention heads, a direction and a scale for
    each. "safelock forge" makes a new one.
    """


@lock.command(
    "import",
    cls=Command,
    short_help="Convert a published lock.",
    examples=(
        "safelock lock import Meta-Llama-3-8B-Instruct.safelock \\",
        "    --base-model meta-llama/Meta-Llama-3-8B-Instruct --output llama-3-8b.safetensors",
        "safelock lock import Mistral_Nemo_12B.safelock --recipe mistral-nemo-12b \\",
        "    --output nemo.safetensors --register",
    ),
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--base-model", metavar="ID", help="Base model that the lock is for, by its hub id.")
@click.option("--recipe", metavar="NAME", help="Take base model, shape and head count from a recipe instead.")
@click.option("--layers", type=click.IntRange(min=1), help="Decoder layers, for a base that no recipe knows.")
@click.option("--heads", type=click.IntRange(min=1), help="Query heads in a layer.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Width of a head.")
@click.option("--hidden", type=click.IntRange(min=1), help="Width of the residual stream.")
@output_file_option("Lock file to write.")
@click.option("--register", is_flag=True, help="Register it in MLflow too, where the gate looks.")
@format_option
@mlflow_options
def import_(
    file: Path,
    base_model: str | None,
    recipe: str | None,
    layers: int | None,
    heads: int | None,
    head_dim: int | None,
    hidden: int | None,
    output: Path,
    register: bool,
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Convert a lock FILE that the method's authors published.

    Their files are pickles. They are read through a short list of allowed contents and nothing in them is
    run; a file whose shapes or numbers belong to another base model is refused.
    """
    from mlflow_safelock.formats import import_published_lock

    geometry = _geometry(layers, heads, head_dim, hidden)
    expected = None
    if recipe is not None:
        if base_model is not None or geometry is not None:
            raise click.UsageError("--recipe says base model and shape itself: leave the other options out.")
        base_model, geometry, expected = _from_recipe(recipe)
    if base_model is None:
        raise click.UsageError("Name the base model: --base-model ID, or --recipe NAME.")
    try:
        imported = import_published_lock(file, base_model=base_model, geometry=geometry)
    except RecipeError as error:  # no recipe knows the base's shape
        raise RecipeError(
            error.cause,
            next_step="Say its shape: --layers, --heads, --head-dim and --hidden; or name a base that a "
            "recipe knows: safelock recipes",
        ) from error
    if expected is not None and len(imported.heads) != expected:
        raise LockMismatchError(
            f"{file} holds {len(imported.heads)} heads, and the recipe {recipe} expects {expected}.",
            next_step="See the recipes of this base: safelock recipes",
        )
    deliver(imported, output, mlflow_address if register else None, form)


@lock.command(
    cls=Command,
    short_help="Show what a lock holds.",
    examples=(
        "safelock lock inspect llama-3-8b.safetensors",
        "safelock lock inspect models:/safelock.meta-llama--Meta-Llama-3-8B-Instruct/1 --format json",
    ),
)
@click.argument("reference", metavar="PATH_OR_URI")
@format_option
@mlflow_options
def inspect(reference: str, form: str, mlflow_address: MlflowAddress) -> None:
    """Show what a lock holds: base model, heads, scales, scores, digest.

    PATH_OR_URI is a lock file, or an MLflow URI such as models:/safelock.org--base/1.
    """
    found = _load(reference, mlflow_address)
    if form == "json":
        show_json(lock_facts(found))
    else:
        show_lock(found, by_layer=True)


@lock.command(
    cls=Command,
    short_help="Register a lock in MLflow.",
    examples=("safelock lock register llama-3-8b.safetensors --tracking-uri http://mlflow:5000",),
)
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Registered model to put it in; the gate looks only where the default puts it.")
@signer_options
@mlflow_options
def register(
    path: Path, name: str | None, key: Path | None, sigstore: bool, mlflow_address: MlflowAddress
) -> None:
    """Register the lock file PATH in MLflow, as the newest lock of its base model.

    From then on every promotion of a fine-tune of that base uses it. It becomes a version of the registered
    model "safelock." and the base's name, with "/" written "--". With --key or
    --sigstore it is signed; a signature that lies beside the file already, as "lock sign" wrote it, is
    registered with it.
    """
    found = load_lock_reference(str(path))
    signature = signature_for(found, path, signer_of(key, sigstore))
    uri = register_lock(found, mlflow_address, name, signature)
    show_lines(f"Registered {uri}", f"digest     {found.digest}", *(["signed     yes"] if signature else []))


@lock.command(
    cls=Command,
    short_help="Add what a lock lacks of its base's weights.",
    examples=(
        "safelock lock enroll nemo.safetensors --base ./Mistral-Nemo --output nemo-2.safetensors",
        "safelock lock enroll models:/safelock.org--base/1 --base ./base --output full.safetensors",
    ),
)
@click.argument("reference", metavar="PATH_OR_URI")
@click.option(
    "--base",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the base model's weights, unquantised.",
)
@output_file_option("Lock file to write.")
@click.option("--register", is_flag=True, help="Register it in MLflow too, as the base's newest lock.")
@format_option
@mlflow_options
def enroll(
    reference: str, base: Path, output: Path, register: bool, form: str, mlflow_address: MlflowAddress
) -> None:
    """Add a sketch of its base's weights to a lock, by which the gate tells descendants from strangers.

    PATH_OR_URI is a lock file, or an MLflow URI such as models:/safelock.org--base/1. Forged locks have a
    sketch; published ones have none. Only some hundred kilobytes and the locked columns of the weights are
    read. Where the folder has a tokenizer.json, a digest of the base's vocabulary is added, too.
    """
    from mlflow_safelock.forging import enroll as enrolled

    bare = _load(reference, mlflow_address)
    announce(f"Reading {base}")
    deliver(enrolled(bare, base), output, mlflow_address if register else None, form)


@lock.command(
    cls=Command,
    short_help="Say that a registered lock may not be applied any more.",
    examples=(
        "safelock lock revoke models:/safelock.org--base/1 --reason 'forged from the wrong pairs' \\",
        "    --registry-uri safelock+postgresql://mlflow@db/mlflow",
    ),
)
@click.argument("version", metavar="URI", callback=version_of)
@reason_option
@click.option("--digest", metavar="sha256:…", help="Which lock, where another has that URI by now.")
@format_option
@mlflow_options
def revoke(
    version: tuple[str, int], reason: str, digest: str | None, form: str, mlflow_address: MlflowAddress
) -> None:
    """Put on record that the lock at URI may not be applied any more; it may be deleted by now.

    No promotion applies it from then on, under whatever version it is registered again. What runs it already
    goes on, with a warning in the log, or is refused, as the policy says (lock: revoked). It cannot be taken
    back. This works on a registry that is guarded in this process (--registry-uri safelock+...).
    """
    name, number = version
    revoked = open_guarded(mlflow_address).revoke_lock(name, number, reason, digest)
    if form == "json":
        show_json(revoked.model_dump(mode="json"))
    else:
        show_lines(f"Revoked models:/{name}/{number}", f"digest     {revoked.digest}")


@lock.command(
    cls=Command,
    short_help="Check a lock, and that it fits a model.",
    examples=(
        "safelock lock verify llama-3-8b.safetensors --against ./my-fine-tune --digest sha256:9f2c…",
        "safelock lock verify models:/safelock.org--base/2 --public-key key.pub.pem",
        "safelock lock verify base.safetensors --identity safety@example.org https://accounts.example.org",
    ),
)
@click.argument("reference", metavar="PATH_OR_URI")
@click.option("--against", metavar="MODEL", help="Folder, hub id or MLflow URI of a model that it must fit.")
@click.option("--digest", metavar="sha256:…", help="Digest that it must have.")
@signatory_options
@format_option
@mlflow_options
def verify(
    reference: str,
    against: str | None,
    digest: str | None,
    public_keys: tuple[Path, ...],
    identities: tuple[tuple[str, str], ...],
    form: str,
    mlflow_address: MlflowAddress,
) -> None:
    """Check that a lock is sound, has the digest and the signature it should have, and fits a model.

    PATH_OR_URI is a lock file, or an MLflow URI such as models:/safelock.org--base/1. The command exits with
    0 only if everything that was asked for holds. Of the model only its configuration is read; a model in
    MLflow has to be fetched for that.
    """
    found = _load(reference, mlflow_address)
    checks = {"sound": f"{len(found.heads)} heads of {found.base_model}"}
    if digest is not None:
        _check_digest(found, digest, reference)
        checks["digest"] = found.digest
    signatories = signatories_of(public_keys, identities)
    if signatories:
        checks["signed by"] = check_signature(found, reference, signatories)
    if against is not None:
        announce(f"Reading the configuration of {against}")
        if is_mlflow_model(against):
            mlflow_address.reach()
        geometry = geometry_of(against)
        if geometry != found.geometry:
            raise LockMismatchError(
                f"The lock {reference} is for {found.geometry}, and {against} has {geometry}.",
                next_step=f"It is for fine-tunes of {found.base_model}.",
            )
        checks["fits"] = f"{against}: {geometry}"
    if form == "json":
        show_json({"ok": True, "digest": found.digest, "checks": checks})
    else:
        show_table(facts_table("The lock holds", checks.items()))


lock.add_command(sign)


def _check_digest(found: SafetyLock, digest: str, reference: str) -> None:
    if found.digest != digest:
        raise LockMismatchError(
            f"The lock {reference} has the digest {found.digest}, and not {digest}.",
            next_step="Fetch it again from where the digest was published.",
        )


def _load(reference: str, mlflow_address: MlflowAddress) -> SafetyLock:
    if not is_mlflow_model(reference):
        return load_lock_reference(reference)
    announce(f"Fetching {reference}")
    mlflow_address.reach()
    return load_lock_reference(reference)


def _geometry(
    layers: int | None, heads: int | None, head_dim: int | None, hidden: int | None
) -> AttentionGeometry | None:
    sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "hidden": hidden}
    if not any(sizes.values()):
        return None
    if not all(sizes.values()):
        missing = ", ".join(f"--{name.replace('_', '-')}" for name, size in sizes.items() if size is None)
        raise click.UsageError(f"A shape needs all four sizes; missing: {missing}.")
    from mlflow_safelock.lock import AttentionGeometry

    return AttentionGeometry.model_validate(sizes)


def _from_recipe(name: str) -> tuple[str, AttentionGeometry, int | None]:
    """Base model, shape and expected number of heads, as a recipe has them."""
    from mlflow_safelock.recipes import LockRecipe, load_recipe

    recipe = load_recipe(name)
    if not isinstance(recipe, LockRecipe):
        raise RecipeError(f"The recipe {name} is not one of a lock.", next_step="See: safelock recipes")
    expected = None if recipe.published is None else recipe.published.heads
    return recipe.base.model, recipe.base.geometry, expected
