"""Peak memory: of the CUDA allocator where there is a GPU, else the resident set of the whole process."""

from __future__ import annotations

import sys

import torch

from entropy_po import pages


def reset_peak() -> None:
    """Start a new peak from what is held now. Without /proc (not Linux) the peak stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    pages.release()
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass


def peak_bytes() -> int:
    """Highest memory since `reset_peak`, or since the start; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return _status()["VmHWM"]
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_bytes() -> int:
    """Memory held now: of the CUDA allocator where there is a GPU, else resident, but for what the system may take back
    without asking. CPU: Linux only."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages_now = _status("smaps_rollup")
    return pages_now["Rss"] - pages_now["LazyFree"]


def _status(file: str = "status") -> dict[str, int]:
    """Bytes by name, of the lines of a file of /proc/self that are in kB."""
    with open(f"/proc/self/{file}") as lines:
        words = [line.split() for line in lines]
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if word[2:] == ["kB"]}
