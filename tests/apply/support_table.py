"""The support table of docs/applying.md, made from the table of architectures: ``python -m`` prints it."""

from __future__ import annotations

from mlflow_safelock.apply.architectures import ARCHITECTURES, Architecture

HEADER = "| model type | output projection | standalone checkpoint |\n|---|---|---|\n"


def support_table() -> str:
    """One row for each architecture, in Markdown."""
    rows = (
        f"| `{name}` | `{row.layers}.*.{row.output_projection}` | {_standalone(row)} |\n"
        for name, row in sorted(ARCHITECTURES.items())
    )
    return HEADER + "".join(rows)


def _standalone(row: Architecture) -> str:
    conditional = "own bias" if row.output_bias == "always" else f"own bias, if `{row.output_bias}`"
    return {
        None: "in memory only",
        "as_llama": "written as `llama`",
        "own_bias": conditional,
        "flag": f"`{row.output_bias}`",
    }[row.standalone]


if __name__ == "__main__":
    print(support_table())
