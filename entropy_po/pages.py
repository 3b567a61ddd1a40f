"""Memory of the CPU that outlives a call: a CUDA workspace comes from torch's caching allocator, this does it for a CPU.

Memory fresh from the system costs a fault and 4096 zeros per page, which for a tile of logits shows beside the products that
make it (`python -m benchmarks.tile_rows`). So it is given back to the system lazily (MADV_FREE): the system takes a page when
it needs one, and a page it has not taken costs the next call nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Address space of one block, and with that the most that a thread's calls leave to be taken back: the default workspace.
BLOCK_BYTES = 256 << 20
PAGE_BYTES = mmap.PAGESIZE
CAN_FREE_LAZILY = hasattr(mmap, "MADV_FREE")

_free: list[mmap.mmap] = []  # as many as calls have run at the same time
_from_torch = ContextVar("from_torch", default=False)


def block() -> Tensor | None:
    """[BLOCK_BYTES] of uint8 with any contents, which go back when the last tensor over them is gone; None where it is to come
    from torch's allocator instead."""
    if not CAN_FREE_LAZILY or _from_torch.get():
        return None
    try:
        pages = _free.pop()
    except IndexError:
        # private: a forked process must not share them
        try:
            pages = mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # address space is limited; a small call may still fit
            return None
    array = (ctypes.c_char * BLOCK_BYTES).from_buffer(pages)
    weakref.finalize(array, _give_back, pages).atexit = False
    return torch.frombuffer(array, dtype=torch.uint8)


def release() -> None:
    """Give back at once what calls have left; a measurement of memory starts with this."""
    _free.clear()


@contextmanager
def from_torch() -> Iterator[None]:
    """All memory from torch's allocator, whose observers then see it."""
    token = _from_torch.set(True)
    try:
        yield
    finally:
        _from_torch.reset(token)


def _give_back(pages: mmap.mmap) -> None:
    pages.madvise(mmap.MADV_FREE)
    _free.append(pages)
