from __future__ import annotations

import subprocess
import sys

import mlflow_safelock
from mlflow_safelock import forging


def test_every_name_is_there() -> None:
    for name in forging.__all__:
        assert getattr(forging, name) is not None
    assert set(forging.__all__) <= set(dir(forging))
    assert (
        sorted(forging.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
        == forging.__all__
    )


def test_the_room_does_not_take_the_functions_name() -> None:
    assert mlflow_safelock.forge is forging.forge
    assert callable(mlflow_safelock.forge)


def test_pairs_can_be_read_without_torch() -> None:
    program = (
        "import sys; from mlflow_safelock.forging import starter_preference_pairs; "
        "assert len(starter_preference_pairs()) >= 200; assert 'torch' not in sys.modules, 'torch'; "
        "assert 'mlflow' not in sys.modules, 'mlflow'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
