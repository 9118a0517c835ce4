"""Comparisons that went well, remembered by this process while what was compared is listed as it was.

Whoever reads a version asks again and again, and comparing a folder may mean reading much of it. What the
store tells of each file is asked each time: its size, its ETag, or when the file system changed it last,
which cannot be set back as a time of modification can. An ETag speaks of the bytes. The others do not quite:
a link can be put elsewhere, and a store may tell sizes alone. So what they tell is believed for a minute.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from mlflow_safelock.provenance import ArtifactReader

KEPT_SECONDS = 60.0
"""How long a comparison holds where the store keeps no checksum of each file."""

KEPT_COMPARISONS = 1024

_held_until: OrderedDict[tuple[str, str, str], float] = OrderedDict()
_remembering = threading.Lock()


def holds(reader: ArtifactReader, what: str, compare: Callable[[], bool]) -> bool:
    """Whether a folder is as it has to be, by a comparison made now or a while ago.

    Args:
        reader: The folder; it is listed.
        what: What it is compared with, such as a digest.
        compare: Compares. Only that all was well is remembered.

    Raises:
        SourceError: The folder cannot be listed; and what ``compare`` raises.
    """
    files = reader.files()
    listing = [
        [file.path, file.size, file.checksum and file.checksum.model_dump(), file.changed] for file in files
    ]
    key = reader.location, what, json.dumps(listing)
    with _remembering:
        if _held_until.get(key, 0.0) > time.monotonic():
            _held_until.move_to_end(key)
            return True
    if not compare():
        return False
    has_checksums = all(file.checksum is not None for file in files)
    with _remembering:
        _held_until[key] = float("inf") if has_checksums else time.monotonic() + KEPT_SECONDS
        while len(_held_until) > KEPT_COMPARISONS:
            _held_until.popitem(last=False)
    return True
