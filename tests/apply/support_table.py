"""The support table of docs/applying.md, made from the table of architectures: ``python -m`` prints it.

``test_families.py`` measures every cell of it on a tiny random model.
"""

from __future__ import annotations

from mlflow_safelock.apply.architectures import ARCHITECTURES, Architecture

HEADER = (
    "| model type | output projection | forge, apply, undo | overlay | standalone | how |\n"
    "|---|---|---|---|---|---|\n"
)


def support_table() -> str:
    """One row for each architecture, in Markdown."""
    return HEADER + "".join(support_row(row) for _, row in sorted(ARCHITECTURES.items()))


def support_row(row: Architecture) -> str:
    """The row of one architecture."""
    standalone = "no" if row.standalone is None else "yes"
    path = f"{row.layers}.*.{row.output_projection}"
    return f"| `{row.model_type}` | `{path}` | yes | yes | {standalone} | {_how(row)} |\n"


def _how(row: Architecture) -> str:
    conditional = "own bias" if row.output_bias == "always" else f"own bias, if `{row.output_bias}`"
    return {
        None: "no bias, and no flag for one",
        "rewritten": "written as `llama`; as `smollm3` with a sliding window",
        "own_bias": conditional,
        "flag": f"`{row.output_bias}`",
    }[row.standalone]


if __name__ == "__main__":
    print(support_table())
