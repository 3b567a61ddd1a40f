"""What this library promises, held against what was measured. Limits are ratios, errors in nats or relative norms, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from entropy_po.bench.implementations import OURS, RECOMPUTE
from entropy_po.plan import DEFAULT_CPU_SEQUENCE_WORKSPACE, DEFAULT_CPU_WORKSPACE, DEFAULT_GPU_WORKSPACE

CUDA_SHAPE = 8192, 151936  # tokens, words
MEMORY_BAR = DEFAULT_CPU_SEQUENCE_WORKSPACE + (32 << 20)  # bytes of a pair's loss beside inputs and gradients


class Bar(NamedTuple):
    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bars(report: dict) -> list[Bar]:
    """Every promise that the report has figures for."""
    found: list[Bar] = []
    on_cpu = report["machine"]["device"] == "CPU"
    for row in report["rows"]:
        by_name = {who["name"]: who for who in row["who"]}
        if OURS in by_name and row["suite"] in PROMISES:
            # on a GPU times are promised of one shape: what passes over tiles cost beside the products depends on D above all
            if on_cpu or (row["case"]["n"], row["case"]["v"]) == CUDA_SHAPE:
                found += PROMISES[row["suite"]](row, by_name, on_cpu)
            found += _errors(row, by_name[OURS]["errors"], on_cpu)
        if OURS in by_name and "eager" in by_name and report["machine"].get("keeps_memory") is False:
            found += _as_torch_comes(row, by_name["eager"])
    return found + list(_memory(report["memory"], on_cpu))


def _logits(row: dict, who: dict, on_cpu: bool) -> Iterator[Bar]:
    ours, case = who[OURS], row["case"]
    if not on_cpu:
        yield Bar(f"{row['name']}: share of the copy's bandwidth", 1 / ours["times_floor"], 0.85 if case["backward"] else 0.88, True)  # fmt: skip
    elif not case["backward"] and "torch.compile" in who:
        yield Bar(f"{row['name']}: times faster than torch.compile", who["torch.compile"]["times_ours"], 1.8, True)


def _hidden(row: dict, who: dict, on_cpu: bool) -> Iterator[Bar]:
    case, ours = row["case"], who[OURS]
    exact = case["dtype"] == "float32"
    if case["backward"] and case["trained"] and case["entropy"]:
        limit = (1.10 if exact else 1.45) if on_cpu else 1.12
        yield Bar(f"{row['name']}: times the four bare products", ours["times_floor"], limit)
    if case["backward"] and not case["trained"]:
        if not case["entropy"]:
            yield Bar(f"{row['name']}: times the two bare products", ours["times_floor"], 1.10 if on_cpu else 1.25)
        elif not on_cpu:
            yield Bar(f"{row['name']}: times the three bare products", ours["times_floor"], 1.12)


def _errors(row: dict, errors: dict, on_cpu: bool) -> Iterator[Bar]:
    """Peaked logits of 30 are sums in fp32, each rounded to 2e-6. A GPU's products are less exact sums than a CPU's."""
    name, suite, case = row["name"], row["suite"], row["case"]
    if case["dtype"] == "float16":
        return
    if suite in ("logits", "hidden"):
        limit = 4e-5 if suite == "hidden" and case["peaked"] else 1e-5 if on_cpu else 2e-5
        yield Bar(f"{name}: worst error, nats", errors["value"], limit)
    elif "relative" in errors:
        limit = 2e-6 if on_cpu else 2e-5
        yield Bar(f"{name}: error of the loss, over the loss where that is above 1", errors["relative"], limit)
    if suite != "logits" and "gradient" in errors:
        yield Bar(f"{name}: relative gradient error", errors["gradient"], 1e-5 if case["dtype"] == "float32" else 5e-3)


def _pair(row: dict, who: dict, on_cpu: bool) -> Iterator[Bar]:
    case, ours = row["case"], who[OURS]
    if case["dtype"] == "float16":  # two of its three products are TF32's, at half the rate: nothing is promised
        return
    products, limit = ("three", 1.08 if case["dtype"] == "float32" else 1.35) if case["trained"] else ("two", 1.10)
    yield Bar(f"{row['name']}: times the {products} bare products", ours["times_floor"], limit if on_cpu else 1.12)
    if case["trained"] and RECOMPUTE in who:
        yield Bar(f"{row['name']}: times faster than recompute", who[RECOMPUTE]["times_ours"], 1.25, True)


def _as_torch_comes(row: dict, eager: dict) -> Iterator[Bar]:
    """Without a backward or whole, against plain torch, most of whose time is that of fresh memory."""
    limit = {"logits": 12, "step": 1.4}.get(row["suite"])
    if limit is not None and not row["case"].get("backward"):
        yield Bar(f"{row['name']}: times faster than eager", eager["times_ours"], limit, True)


PROMISES: dict[str, Callable] = {"logits": _logits, "hidden": _hidden, "pair": _pair}


def beside(row: dict) -> int:
    """Peak bytes of a memory reading beside inputs and gradients."""
    return max(row["forward"], row["backward"]) - row["results"]


def _memory(rows: list[dict], on_cpu: bool) -> Iterator[Bar]:
    """The default budgets, whatever the number of tokens; that of a pair on a GPU depends on what is free there.

    How much of its budget a call uses does vary with N: rows are cut into tiles of about one height.
    """
    for row in (row for row in rows if row["who"] == OURS and "error" not in row and "sizes" not in row):
        if row["path"] == "hidden":
            name = f"linear_token_stats, {row['case']}: peak beside gradients and outputs, MiB"
            budget = DEFAULT_CPU_WORKSPACE if on_cpu else DEFAULT_GPU_WORKSPACE
            # per row 7 fp32 of state and outputs, and two upstream gradients
            yield Bar(name, (beside(row) - row["n"] * 4 * 9) / 2**20, 1.1 * (budget >> 20))
        elif on_cpu:
            name = f"{row['case']}: peak beside inputs and gradients, MiB"
            yield Bar(name, beside(row) / 2**20, MEMORY_BAR / 2**20)
