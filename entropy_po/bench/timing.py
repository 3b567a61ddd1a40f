"""Times on machines that other work shares: interleaved rounds, and ratios within a round."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NOISY = 0.25  # a spread above which a few percent are not to be believed
# A call is repeated until one reading takes this long: on CUDA so that its launch does not count, on a CPU so that an
# interruption or the state in which the one before left caches and allocator does not.
READING_SECONDS = {"cuda": 0.02, "cpu": 0.1}
FEW_FAULTS = 1000  # 4 MiB, of milliseconds
_LIBC: Any = ctypes.CDLL(None) if os.name == "posix" else None
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have this process keep what is freed, until `give_back_memory`, as a GPU's allocator and jemalloc do. Whether it can.

    glibc returns large blocks to the system at once, and each call that takes them anew has the system zero every page: that
    is most of the time of implementations that hold logits, and differs with the state of the machine's memory."""
    return hasattr(_LIBC, "mallopt") and bool(_LIBC.mallopt(M_MMAP_MAX, 0) and _LIBC.mallopt(M_TRIM_THRESHOLD, -1))


def stock_memory(num_bytes: int = 6 << 30) -> None:
    """Have this process hold so much free memory, at most a third of what is free, after `keep_freed_memory`.

    A large block that is freed and asked for again may come from elsewhere, from pages that no call has used yet, if other blocks lie
    in between: then it costs as much as if nothing had been kept, in some calls and not in others."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.empty(min(num_bytes, free // 3), dtype=torch.uint8).fill_(1)


def give_back_memory() -> None:
    """What is free in this process goes back to the system, so that the next case does not start in pieces of the last."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    torch.cuda.empty_cache()  # nothing where CUDA was not used


def page_faults() -> int:
    """How many pages this process has taken from the system so far; 0 where that is not told."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def settle(run: Callable[[], Any], calls: int) -> None:
    """Call until a call finds its memory in the process, at most so many times: where large blocks are free depends on what ran before."""
    for _ in range(calls):
        before = page_faults()
        run()
        if page_faults() - before < FEW_FAULTS:
            return


def timed(run: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, all of its work done."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def repeats_for(run: Callable[[], Any]) -> int:
    """How often a reading calls `run`, which has been called before."""
    seconds = READING_SECONDS["cuda" if torch.cuda.is_available() else "cpu"]
    return max(1, round(seconds / timed(run)))


def median_ms(run: Callable[[], Any], rounds: int = 7) -> float:
    """Of one candidate by itself, in milliseconds."""
    run()
    repeats = repeats_for(run)
    return 1e3 * statistics.median(timed(run, repeats) for _ in range(rounds))


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The order within a round: each starts one further on than the last, so that a drift of the machine, and what one
    leaves in the caches for the next, fall on all alike."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], rounds: int, progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; each round runs all of them. `progress` may show the rounds."""
    names = list(candidates)
    repeats = {}
    for name, run in candidates.items():
        run()
        repeats[name] = repeats_for(run)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in progress(range(rounds)):
        for name in rotated(names, i):
            seconds[name].append(timed(candidates[name], repeats[name]))
    return seconds


def typical(seconds: Sequence[float]) -> float:
    """The mean of the faster half, of at least two. What else a machine does only ever adds time, and how much differs from one hour to
    the next: of two runs these means agree better than medians do, and than medians of ratios within a round."""
    return statistics.fmean(sorted(seconds)[: max(2, len(seconds) // 2)])


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(seconds: Sequence[float]) -> float:
    """(third quartile - first) / median; 0 of a single reading."""
    if len(seconds) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return (third - first) / middle
