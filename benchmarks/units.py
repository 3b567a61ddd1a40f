"""Units of work of a study that takes long: each leaves a file, and is not done again where that file is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path


def unit(path: Path, name: str, make: Callable[[], dict]) -> dict:
    """What `make` found, with its `seconds`: from the file where there is one, and else written to it whole."""
    if not path.exists():
        start = time.perf_counter()
        result = make()
        result["seconds"] = round(time.perf_counter() - start, 1)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(result))
        os.replace(scratch, path)
        print(f"{name}: {result['seconds']} s", flush=True)
    return json.loads(path.read_text())
