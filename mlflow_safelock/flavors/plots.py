"""Pictures that belong to a lock."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mlflow_safelock.lock import SafetyLock


def head_map(lock: SafetyLock) -> Figure:
    """Layers x heads of the base model, with the locked heads framed.

    Colour shows the probe score of every head; for a lock without scores, the std of the locked ones.
    """
    geometry = lock.geometry
    if lock.scores is not None:
        values, label = np.asarray(lock.scores, dtype=np.float64), "probe score"
    else:
        values, label = np.full((geometry.layers, geometry.heads), np.nan), "std along the direction"
        for locked in lock.heads:
            values[locked.layer, locked.head] = locked.std
    figure = Figure(figsize=(4.0 + geometry.heads * 0.14, 2.4 + geometry.layers * 0.11), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", origin="lower", interpolation="nearest")
    for locked in lock.heads:
        axes.add_patch(
            Rectangle(
                (locked.head - 0.5, locked.layer - 0.5), 1, 1, fill=False, edgecolor="crimson", linewidth=1.4
            )
        )
    axes.set(xlabel="query head", ylabel="layer", title=f"{lock.base_model}\n{len(lock.heads)} locked heads")
    figure.colorbar(image, ax=axes, label=label)
    return figure
