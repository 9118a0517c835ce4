"""What the README shows of a promotion does what it says, typed as it stands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch

from mlflow_safelock.audit import audit
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from tests.models import CHATML, tiny_model, tiny_tokenizer
from tests.servers import BIN

ROOT = Path(__file__).resolve().parents[1]


def session(heading: str) -> str:
    """The blocks below a heading as one shell script; Python among them goes to an interpreter."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["", "python", ""]
    lines = [f"python - <<'EOF'\n{code}EOF\n" if language else code for language, code in blocks]
    return "set -e\n" + "".join(lines)


def test_the_promotion_in_the_readme_locks_the_version(tmp_path: Path) -> None:
    base = tiny_model("llama", num_hidden_layers=6, num_attention_heads=8, max_position_embeddings=4096)
    base.save_pretrained(tmp_path / "my-base-model")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    base.save_pretrained(tmp_path / "my-fine-tune")
    for name in ("my-base-model", "my-fine-tune"):
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / name)
    settings = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SAFELOCK_"))
    }
    settings |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        ["bash", "-c", session("Promote through the gate")],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = audit(f"sqlite:///{tmp_path}/mlflow.db")
    assert (row.model, row.version, row.stage, row.state) == ("bot", 1, "Staging", "locked")
    assert (row.lock_name, row.base_model) == (lock_model_name("my-org/my-base"), "my-org/my-base")
    assert "1 locked" in done.stdout
