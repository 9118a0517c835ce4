"""The files that a sweep writes, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from mlflow_safelock.cli.options import beside


@dataclass(frozen=True)
class SweepFiles:
    """Where a sweep puts what it finds.

    Attributes:
        result: Every figure, as JSON.
        lock: The chosen lock; ``None``: it is not written.
        policy: The policy that is proposed; ``None``: none is.
    """

    result: Path
    lock: Path | None
    policy: Path | None

    @classmethod
    def of(cls, output: Path, lock: Path | None, policy: Path | None, *, forged: bool) -> SweepFiles:
        """The files, as the options name them; locks that are forged for the sweep are nowhere else."""
        return cls(output, lock or (beside(output, "lock.safetensors") if forged else None), policy)

    def picture(self, name: str) -> Path:
        """Where a picture is put."""
        return beside(self.result, f"{name}.png")

    def refuse_what_cannot_be_written(self) -> None:
        """Know before anything is loaded that each can be written in the end.

        Raises:
            click.UsageError: Two are the same file, or a directory is in the place of one.
        """
        from mlflow_safelock.evaluate.plots import PICTURES

        named = {"--output": self.result, "--write-lock": self.lock, "--write-policy": self.policy}
        named |= {f"the picture {name}": self.picture(name) for name in PICTURES}
        places: dict[Path, str] = {}
        for name, path in named.items():
            if path is None:
                continue
            if path.is_dir():
                raise click.UsageError(f"{name}: {path} is a directory.")
            other = places.setdefault(path.resolve(), name)
            if other != name:
                raise click.UsageError(f"{other} and {name} are the same file, {path}.")
