"""What Triton's disassembler tells of NVIDIA machine code."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest


def cuobjdump(*arguments):
    """Its output on both streams, or the test is skipped."""
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    if path is None or not path.exists():
        pytest.skip("Triton, which carries cuobjdump, is not installed")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def listing(text):
    """[(address, instruction)] of one function."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    return [(int(address, 16), what) for address, what in found]


def hot_loop(instructions, pattern):
    """The instructions of the loop that has the pattern most often, the shortest of those."""
    loops = []
    at = {address: i for i, (address, _) in enumerate(instructions)}
    for end, (address, what) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", what) if "BRA" in what else None
        if target and int(target[1], 16) < address:
            loops.append([instruction for _, instruction in instructions[at[int(target[1], 16)] : end + 1]])

    return max(loops, key=lambda loop: (sum(re.search(pattern, what) is not None for what in loop), -len(loop)))
