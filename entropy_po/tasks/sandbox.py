"""Python programs that a model wrote, run in a process of their own with limits.

What holds (Linux): a limit on CPU and wall time, address space, size of a file and number of open files; no processes or
threads of the program's own; no environment variables; the standard library alone; a temporary working directory that is
removed; no network where the kernel lets a namespace be made (`Outcome.network_cut` tells). Where the caller is root the
program runs as user 65534, since limits on processes do not bind root.

**This is no security boundary.** The program can read and write whatever its user can, and the kernel is shared. It stops
accidents and the cheap ways for a policy to spoil its own training, not an attacker. Run untrusted programs in a virtual
machine or a container without secrets.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from entropy_po.arguments import positive, whole

LAUNCHER = Path(__file__).with_name("_launcher.py")
MOST_OUTPUT = 4096  # bytes of the launcher's report that are read


class Outcome(NamedTuple):
    """What became of a program."""

    passed: bool  # it ran to its end, without an exception and without leaving early
    reason: str  # "passed", "timed out", the exception's name and text, or how it ended
    network_cut: bool


def run_program(source: str, *, timeout: float = 5.0, memory_mib: int = 512, file_mib: int = 1) -> Outcome:
    """Run a program to its end.

    A program passes if its last line is reached: `sys.exit(0)` and `os._exit(0)` do not pass. What it prints is dropped.

    Args:
        source: Python source.
        timeout: seconds of wall time, and, rounded up, of CPU time; starting the interpreter counts.
        memory_mib: address space of the process.
        file_mib: largest file it may write.
    Raises:
        ValueError: a limit that is not > 0. OSError: not on Linux.
    Example:
        >>> run_program("assert sorted([2, 1]) == [1, 2]").reason
        'passed'
    """
    if not isinstance(source, str):
        raise ValueError(f"source must be text, got {type(source).__name__}.")
    remedy = "it limits a program that nobody has read"
    positive("timeout", timeout, remedy)
    for name, value in (("memory_mib", memory_mib), ("file_mib", file_mib)):
        whole(name, value, 1, remedy)
    if not sys.platform.startswith("linux"):
        raise OSError(f"programs are run with Linux's limits on processes, and this is {sys.platform}; use Linux.")
    # Proof that the end was reached: told to the launcher alone, so that a program that leaves early, or prints a report of
    # its own, has none. (One that searches the interpreter's frames for it would find it.)
    token = secrets.token_hex(16)
    limits = {"cpu": timeout, "memory": memory_mib << 20, "file": file_mib << 20}
    job = json.dumps({"source": source, "token": token, **limits}).encode()
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"TMPDIR": folder, "HOME": folder},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        timed_out = False
        try:
            process.stdin.write(job)
            process.stdin.close()
            process.wait(timeout)
        except BrokenPipeError:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill(process)
        with process.stdout as pipe:
            os.set_blocking(pipe.fileno(), False)
            written = pipe.read(MOST_OUTPUT) or b""
    try:
        said = json.loads(written)
        error, cut, proof = said["error"], bool(said["network_cut"]), said["token"]
    except (ValueError, KeyError, TypeError):
        error, cut, proof = None, False, None
    if proof == token and error is None:
        return Outcome(True, "passed", cut)
    # -SIGXCPU is what the CPU limit sends; SIGKILL follows a second later where a program ignores it.
    if timed_out or process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(False, "timed out", cut)
    return Outcome(False, error or f"ended early with status {process.returncode}", cut)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
