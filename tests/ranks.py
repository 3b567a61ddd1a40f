"""Processes that stay up over gloo, or over NCCL with a GPU each, and run one function after another on all ranks: starting them is what costs."""

import importlib
import os
import queue
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120  # seconds, counted one by one: on a shared machine all processes are paused at times, this one too


class RankError(AssertionError):
    """What the ranks raised, each with its traceback."""


class Ranks:
    """`size` processes. `run` calls a module's function on all of them, each with its own rank.

    A function is named by its module and name, as the processes import it themselves. After a failure the processes are
    ended: one that failed between two collectives leaves the others waiting.
    """

    def __init__(self, size: int, backend: str = "gloo"):
        self.size, self.backend, self.processes = size, backend, []

    def run(self, function, seed: int, *args, **kwargs) -> list:
        """What the function returned, by rank."""
        if not self.processes:
            self._start()
        for inbox in self.inboxes:
            inbox.put((function.__module__, function.__name__, seed, args, kwargs))
        results, errors = {}, {}
        patience = PATIENCE
        while len(results) + len(errors) < self.size and patience > 0:
            try:
                rank, value, error = self.outbox.get(timeout=1)
            except queue.Empty:
                patience -= 1
                continue
            if error is None:
                results[rank] = value
            else:
                errors[rank] = error
                patience = min(patience, 5)
        if len(results) < self.size:
            self.stop()
            shown = "\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors))
            raise RankError(f"{shown}\nno answer from the others: {sorted(results) if results else 'none finished'}")
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.inboxes, self.outbox = [context.Queue() for _ in range(self.size)], context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, self.size, port, self.backend, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(rank: int, size: int, port: int, backend: str, inbox, outbox) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    # as torchrun sets it, for accelerate
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(
        {name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    while True:
        module, name, seed, args, kwargs = inbox.get()
        torch.manual_seed(seed)  # the same on all ranks: every rank makes the whole problem, and takes its part
        try:
            outbox.put((rank, getattr(importlib.import_module(module), name)(*args, **kwargs), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
