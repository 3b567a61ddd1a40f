"""Process groups inside the operators: who holds which part of the vocabulary or of the sequences, and what they exchange.

Over `vocab_group` every rank has the same rows and its own rows of the weight; per row it exchanges the state of a fold,
20 to 32 bytes, and once per call dH is summed. Over `sequence_group` every rank has its own rows of every sequence; it
exchanges a few numbers per sequence. Everything but dH is gathered and then reduced alike on every rank, in the order of
ranks: all of them hold the same bits, run after run. An all-reduce of the state would move less from eight ranks on
(2 (P - 1) / P times 16 bytes a row, where the gather moves P - 1 times 20), but is two dependent collectives, the maximum
and then the sums, with an order of their own; beside dH's 8 D (P - 1) / P bytes a row, either is under 2 % at D = 4096.
"""

from __future__ import annotations

import zlib
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from entropy_po.arguments import whole
from entropy_po.ops.checks import check_offsets
from entropy_po.types import IGNORED, IfAsked, merge_states, state_column

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def group_name(argument: str, group: ProcessGroup | None) -> str:
    """The name by which a group crosses an operator's schema; "" for none.

    Raises:
        ValueError: it is no process group, or this process is not one of its ranks.
    """
    if group is None:
        return ""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{argument} must be a torch.distributed.ProcessGroup that this process belongs to, got {group!r}; a "
            "DeviceMesh has one per dimension: mesh.get_group(name)."
        )
    return group.group_name


class Ranks:
    """The processes that share one axis of a call: this one alone where no group was given."""

    def __init__(self, argument: str, name: str):
        self.argument = argument  # for messages
        resolve: Any = dist.distributed_c10d._resolve_process_group
        self.group: ProcessGroup | None = resolve(name) if name else None
        self.rank = self.group.rank() if self.group is not None else 0

    def gather(self, x: Tensor) -> Tensor:
        """[P, *x.shape], in the order of ranks, the same on all of them."""
        if self.group is None:
            return x[None]
        gathered = x.new_empty((self.group.size(), *x.shape))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        return gathered

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks. Every rank goes on alike from it, so the derivative by its own part is 1."""
        if self.group is None:
            return part
        summed: Tensor = _Sum.apply(part, self)  # type: ignore[no-untyped-call]
        return summed

    def sum_(self, x: Tensor) -> None:
        """The sum over ranks, in place: for what is too large to gather."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)

    def smallest(self, value: int, device: torch.device) -> int:
        """Of the ranks' values: decisions that lead to an exchange must be taken from the same numbers."""
        if self.group is None:
            return value
        return int(self.gather(torch.tensor([value], device=device)).min())

    def agree(self, device: torch.device, *own: int, **facts: object) -> list[list[int]]:
        """The `own` numbers of every rank, once all ranks are known to be in the same call.

        Raises:
            ValueError: on every rank, if they differ in one of the facts, which it names.
        """
        if self.group is None:
            return [list(own)]
        codes = [_code(fact) for fact in facts.values()]
        rows = self.gather(torch.tensor([*codes, *own], device=device)).tolist()
        for i, (name, fact) in enumerate(facts.items()):
            if any(row[i] != codes[i] for row in rows):
                mine = "values of its own" if isinstance(fact, Tensor) else repr(fact)
                others = [r for r, row in enumerate(rows) if row[i] != codes[i]]
                raise ValueError(
                    f"the ranks of {self.argument} differ in {name}: rank {self.rank} has {mine}, rank(s) {others} "
                    "something else."
                )
        return [row[len(codes) :] for row in rows]


def _code(fact: object) -> int:
    """Equal for equal facts; a tensor's from its values and their places."""
    if isinstance(fact, Tensor):
        bits = fact.detach().flatten()
        bits = bits.double().view(torch.int64) if bits.is_floating_point() else bits.long()
        return int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())
    return fact if isinstance(fact, int) else zlib.crc32(repr(fact).encode())


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.gather(part).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class VocabShards:
    """Which columns of the logits this rank holds: [start, start + V_r) of `total`, the shards in the order of ranks."""

    def __init__(self, name: str, columns: int, labels: Tensor, **facts: object):
        """
        Args:
            name: of the group, "" for none.
            columns: V_r, of this rank.
            labels: [N], the same on all ranks.
            facts: whatever else must be equal on all ranks.
        """
        self.ranks = Ranks("vocab_group", name)
        facts = {"the number of rows": labels.numel(), **facts, "labels": labels}
        sizes = [size for (size,) in self.ranks.agree(labels.device, columns, **facts)]
        self.stops = list(accumulate(sizes))
        self.start, self.total, self.widest = self.stops[self.ranks.rank] - columns, self.stops[-1], max(sizes)

    def complete_(self, state: Tensor, labels: Tensor, ignore_index: int) -> None:
        """Turn the row state [5 or 8, n] of this rank's columns into that of all; labels [n] are ids in all of them."""
        if self.ranks.group is not None:
            stops = torch.tensor(self.stops, device=labels.device)
            owner = torch.searchsorted(stops, labels, right=True).clamp(max=len(self.stops) - 1)
            merged = merge_states(self.ranks.gather(state), owner)
            torch.where(labels == ignore_index, state_column(IGNORED, state), merged, out=state)


def sequence_shard(cu_seqlens: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """One rank's part of packed sequences, for `sequence_group`: an even piece of each.

    A row's label is the next token, so labels are shifted first and then split, as every other tensor of rows is: no label
    crosses an edge afterwards. Any other assignment of rows to ranks does as well; a model's context parallelism has its own.

    Args:
        cu_seqlens: [S + 1], of the whole sequences. rank, size: of the group.

    Returns:
        rows [N_r] int64, places among the N rows, and cu_seqlens [S + 1] of the part, in the same dtype.

    Example:
        >>> rows, cu_seqlens = sequence_shard(torch.tensor([0, 4, 9]), rank=1, size=2)
        >>> rows.tolist(), cu_seqlens.tolist()
        ([2, 3, 6, 7, 8], [0, 2, 5])
    """
    check_offsets(cu_seqlens)
    whole("size", size, 1, "it is that of the group")
    if whole("rank", rank, 0, "it is one of the group's") >= size:
        raise ValueError(f"rank={rank} is not one of the size={size} ranks.")
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    if cu_seqlens[0] != 0 or bool((lengths < 0).any()):
        raise ValueError("cu_seqlens must start with 0 and rise; its last entry is the number of rows.")
    first, last = starts + lengths * rank // size, starts + lengths * (rank + 1) // size
    rows = [torch.arange(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    part = torch.nn.functional.pad((last - first).cumsum(0), (1, 0)).to(cu_seqlens.dtype)
    return torch.cat([torch.empty(0, dtype=torch.int64), *rows]).to(cu_seqlens.device), part


def local_shards(group: ProcessGroup | None, **tensors: Tensor | None) -> list[IfAsked]:
    """This rank's rows of weights and biases: a tensor itself, or the local part of a DTensor that `group` shards by rows;
    None stays None.

    Raises:
        ValueError: a DTensor without a group (under FSDP every rank has rows of its own, and needs the whole weight), or
            placed otherwise.
    """
    return [_local(name, x, group) if _is_dtensor(x) else x for name, x in tensors.items()]


def _local(name: str, tensor: DTensor, group: ProcessGroup | None) -> Tensor:
    if group is None:
        raise ValueError(
            f"{name} is a DTensor: under FSDP gather it first, {name}.full_tensor(); if its vocabulary is sharded over "
            "ranks that hold the same rows, pass vocab_group=weight.device_mesh.get_group(...)."
        )
    mesh = tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if not (placement.is_shard(0) if mesh.get_group(axis) == group else placement.is_replicate()):
            raise ValueError(
                f"{name} is placed {tensor.placements} over {mesh}; it must be Shard(0) over vocab_group and Replicate "
                "elsewhere."
            )
    return tensor.to_local()


def _is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    if type(tensor) in (type(None), Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
