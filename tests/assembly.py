"""The instructions of compiled kernels: NVIDIA's by Triton's disassembler, AMD's from the assembly that LLVM writes."""

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


def amd_listing(text):
    """The same of AMD's assembly, with an instruction's number for its address."""
    instructions, labels = [], {}
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]", line):
            instructions.append(line)
    return [(i, re.sub(r"\.LBB\w+", lambda name: hex(labels[name[0]]), what)) for i, what in enumerate(instructions)]


def hot_loop(instructions, pattern):
    """The instructions of the innermost loop that has the pattern most often, the shortest of those."""
    loops = []
    at = {address: i for i, (address, _) in enumerate(instructions)}
    for end, (address, what) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", what) if re.search("BRA|s_c?branch", what) else None
        if target and int(target[1], 16) < address:
            loops.append((at[int(target[1], 16)], end))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [[what for _, what in instructions[start : end + 1]] for start, end in inner]
    return max(found, key=lambda loop: (sum(re.search(pattern, what) is not None for what in loop), -len(loop)))
