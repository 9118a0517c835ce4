"""The model card of a locked checkpoint."""

from __future__ import annotations

from mlflow_safelock.lock import SafetyLock

_WITHOUT_CARD = "---\nlibrary_name: transformers\n---\n"


def locked_card(card: str, lock: SafetyLock, alpha: float) -> str:
    """The source's card with a section that says which lock, at which alpha.

    Args:
        card: The source's card; empty where it has none.
        lock: The lock.
        alpha: Its strength.
    """
    towards = "safe" if alpha > 0 else "**unsafe**"
    section = f"""
## Safety lock

This model carries a Meta-SafetyLock ([arXiv 2410.10343](https://arxiv.org/abs/2410.10343)): the output of
some attention heads is pushed towards {towards} answers, by biases of the attention output projections. All
other weights are those of the model that was locked.

| | |
|---|---|
| lock | `{lock.digest}` |
| base model | {lock.base_model} |
| heads | {len(lock.heads)}, in layers {lock.layers[0]} to {lock.layers[-1]} |
| alpha | {alpha} |

Do not apply a lock to this model again: the push would be added twice.
"""
    return f"{(card or _WITHOUT_CARD).rstrip()}\n{section}"
