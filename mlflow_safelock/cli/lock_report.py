"""What people and programs are told about a lock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_safelock.cli.output import facts_table, new_table, show_lines, show_table, shown

if TYPE_CHECKING:
    from mlflow_safelock.lock import SafetyLock


def lock_facts(lock: SafetyLock) -> dict[str, Any]:
    """Everything about a lock but its directions, as plain values.

    ``digest``, ``metadata`` (as in the lock file), ``heads`` (``layer``, ``head``, ``std`` and ``score``,
    which is ``None`` where it is not known), ``std`` and ``score`` (``min`` and ``max`` over those heads).
    """
    heads = [
        {
            "layer": head.layer,
            "head": head.head,
            "std": head.std,
            "score": _score(lock, head.layer, head.head),
        }
        for head in lock.heads
    ]
    scores = _kept_scores(lock)
    return {
        "digest": lock.digest,
        "metadata": lock.metadata.model_dump(mode="json"),
        "heads": heads,
        "std": _range([head.std for head in lock.heads]),
        "score": _range(scores) if scores else None,
    }


def show_lock(
    lock: SafetyLock,
    *,
    by_layer: bool = False,
    written: Path | None = None,
    registered: str | None = None,
) -> None:
    """Show a lock as a table, where it was written and registered, and, if asked for, its heads by layer."""
    places = [("file", written), ("registered as", registered)]
    show_table(facts_table("Lock", [*_facts(lock), *((name, place) for name, place in places if place)]))
    if not by_layer:
        return
    table = new_table("Locked heads", "layer", "heads", "std", "score")
    for layer in lock.layers:
        heads = lock.heads_of_layer(layer)
        scores = [_score(lock, head.layer, head.head) for head in heads]
        table.add_row(
            str(layer),
            ", ".join(str(head.head) for head in heads),
            ", ".join(shown(round(head.std, 4)) for head in heads),
            ", ".join(shown(score) for score in scores) if lock.scores is not None else "-",
        )
    show_lines("")
    show_table(table)


def _facts(lock: SafetyLock) -> Iterator[tuple[str, object]]:
    about, geometry = lock.metadata, lock.geometry
    scores = _kept_scores(lock)
    yield "base model", about.base_model + (f" @ {about.base_revision}" if about.base_revision else "")
    yield "architecture", about.architecture
    yield "geometry", geometry
    yield "heads", f"{len(lock.heads)} of {geometry.layers * geometry.heads}"
    yield "layers", f"{lock.layers[0]}-{lock.layers[-1]}, {len(lock.layers)} of them locked"
    yield "std", _spread([head.std for head in lock.heads])
    yield "probe scores", _spread(scores) if scores else "not known"
    yield "kept of the base", _kept_of_the_base(lock)
    yield "alpha", about.default_alpha
    yield "origin", about.origin
    if about.origin == "forged":
        yield "forged from", f"{about.pairs} pairs, last {about.last_tokens} tokens of each answer"
        yield "split", f"by {about.split}, seed {about.seed}, {about.train_fraction} for training"
        yield "system prompt", about.system_prompt
        yield "dataset", _dataset(about.dataset_digest)
        yield "created", about.created
        yield "tools", ", ".join(f"{name} {version}" for name, version in (about.tools or {}).items())
    yield "digest", lock.digest


def _dataset(digest: str | None) -> str | None:
    from mlflow_safelock.forging import dataset_digest, starter_preference_pairs

    is_starter = digest is not None and digest == dataset_digest(starter_preference_pairs())
    return f"{digest} (the starter pairs of this package)" if is_starter else digest


def _score(lock: SafetyLock, layer: int, head: int) -> float | None:
    return None if lock.scores is None else round(float(lock.scores[layer, head]), 6)


def _kept_of_the_base(lock: SafetyLock) -> str:
    kept = {"sketch": lock.sketch, "unit biases": lock.unit_biases, "tokenizer": lock.metadata.tokenizer}
    return ", ".join(name for name, part in kept.items() if part is not None) or "nothing (lock enroll)"


def _kept_scores(lock: SafetyLock) -> list[float]:
    if lock.scores is None:
        return []
    return [round(float(lock.scores[head.layer, head.head]), 6) for head in lock.heads]


def _range(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "max": max(values)}


def _spread(values: list[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"
