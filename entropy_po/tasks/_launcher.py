"""Run by `sandbox.run_program` as a script of its own: takes limits on, runs the program, says whether it came to its end.

Imports the standard library alone; entropy_po and torch are never loaded here.
"""

import ctypes
import json
import math
import os
import resource
import sys

NEW_USER, NEW_NETWORK, NOBODY = 0x10000000, 0x40000000, 65534


def cut_network() -> bool:
    """A network namespace of its own has no way out; an ordinary user needs a user namespace to make one."""
    flags = NEW_NETWORK if os.geteuid() == 0 else NEW_USER | NEW_NETWORK
    return ctypes.CDLL(None).unshare(flags) == 0


def become_nobody() -> None:
    """Root's number of processes has no limit. The standard library may lie where only root can look, so it is held open."""
    held = {path: f"/proc/self/fd/{os.open(path, os.O_RDONLY)}" for path in sys.path if os.path.isdir(path)}
    sys.path[:] = held.values()
    for module in list(sys.modules.values()):  # packages that are loaded know their own folders
        paths = getattr(module, "__path__", ())
        moved = [held[root] + path[len(root) :] for path in paths for root in held if path.startswith(root + os.sep)]
        if moved:
            module.__path__ = moved
    sys.path_importer_cache.clear()
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def limit(cpu: float, memory: int, file: int) -> None:
    seconds = math.ceil(cpu)
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (file, file),
        resource.RLIMIT_NOFILE: (32, 32),
        resource.RLIMIT_NPROC: (0, 0),  # counts all of a user's: with 0 no fork and no thread succeeds
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, both in limits.items():
        resource.setrlimit(kind, both)


def main() -> None:
    job = json.load(sys.stdin)
    # The report's way out is moved from where the program prints to.
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    said = {"token": job.pop("token"), "error": None, "network_cut": cut_network()}
    source = job.pop("source")
    # What the program may have replaced by the time it has ended.
    write, dumps, leave = os.write, json.dumps, os._exit
    if os.geteuid() == 0:
        become_nobody()
    limit(**job)
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        said["error"] = f"{type(error).__name__}: {error}"[:300]
    write(report, dumps(said).encode())
    leave(0)


main()
