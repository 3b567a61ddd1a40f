"""The three matrix products of the hidden path, with tile values in fp32 whatever the operands are.

A bf16 product would round the logits to 8 bits (error 3e-2 at |z| = 10), which biases the entropy. So a GPU is asked for
fp32 results; and on a CPU, where torch has no such product, bf16 operands go to the compiled core's on AVX512_BF16, or
are copied to fp32 tile by tile, which the matrix library then multiplies in its bf16 mode where it has one (AMX).

A gradient tile of fp16 operands stays in fp32, for a gradient of 1e-8 is 0 in fp16. It is multiplied with fp32 copies of them, on
NVIDIA's GPUs in TF32: that holds fp16 exactly, has fp32's range, and runs at half the rate of fp16, not at a tenth as fp32 does.

fp32 products are the matrix library's, but for processors that it has no code of its own for: MKL, which torch's builds for
x86-64 bring, runs 256-bit code on AMD's AVX-512, and the compiled core's takes less time there (`benchmarks/gemm.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from entropy_po import pages
from entropy_po.plan import slices
from entropy_po.tiles import DTYPES, bf16_overlay, compiled_core
from entropy_po.types import state_dtype

_precision_lock = threading.Lock()

# Of the one product that deterministic mode makes logits from: large enough to run at the library's full rate, small enough
# to lie beside the budget, 12 MiB at D = 8192.
BLOCK_ROWS, BLOCK_COLS = 128, 256
PRODUCT_ELEMENTS = 1 << 22  # of a product at a time that is not made in its place


@contextmanager
def _precision(matmul: Any, precision: str, wanted: bool) -> Iterator[None]:
    """Multiply fp32 in a mode of fewer digits. The setting is the process's, so it is held for one product under a lock, and where
    it is not wanted the user's own choice stands."""
    if not wanted:
        yield
        return
    with _precision_lock:
        before = matmul.fp32_precision
        if before == precision:  # perhaps inherited, and to be set nowhere by name
            yield
            return
        matmul.fp32_precision = precision
        try:
            yield
        finally:
            matmul.fp32_precision = before


# For products of two copies of bf16 operands, which it holds exactly, on a CPU's matrix unit.
_in_bf16 = partial(_precision, torch.backends.mkldnn.matmul, "bf16")  # type: ignore[attr-defined]  # set when torch is imported
# For products of a gradient with a copy of an fp16 operand, which it holds exactly.
in_tf32 = partial(_precision, torch.backends.cuda.matmul, "tf32")


@cache
def native_bf16(device_type: str) -> bool:
    """Whether bf16 products run on bf16 hardware. Without it they are emulated, and fp32 is faster and more exact."""
    return device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def compiled_bf16() -> bool:
    """Whether `_C.gemm` makes the fp32 tiles of bf16 operands. With AMX the matrix library is faster than it."""
    core = compiled_core()
    return core is not None and core.gemm_supported(DTYPES[torch.bfloat16]) and not torch.cpu._is_amx_tile_supported()


@cache
def compiled_fp32() -> bool:
    """Whether `_C.gemm` makes the products of fp32 operands. On Intel's processors MKL does."""
    core = compiled_core()
    if core is None or not core.gemm_supported(DTYPES[torch.float32]):
        return False
    return bool(core.is_amd()) and torch.backends.mkl.is_available()


def _is_compiled(left: Tensor, right: Tensor) -> bool:
    """Whether `_C.gemm` makes the product, which is fp32."""
    if left.device.type != "cpu" or left.dtype != right.dtype:
        return False
    return compiled_bf16() if left.dtype == torch.bfloat16 else left.dtype == torch.float32 and compiled_fp32()


def operand_copies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some product takes fp32 copies of its operands."""
    if dtype == torch.float16:
        return True
    return dtype == torch.bfloat16 and device.type == "cpu" and not compiled_bf16()


class Scratch:
    """Named buffers that one call reuses from tile to tile, and on a CPU the next call after it: fresh memory costs more
    time than the conversion of a bf16 weight that is written to it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.block: Tensor | None = None  # what is left of it

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous [shape] of memory, valid until the name is asked for again."""
        size = shape[0] * shape[1]
        if (buffer := self.buffers.get((name, dtype))) is None or buffer.numel() < size:
            self.buffers.pop((name, dtype), None)
            buffer = None  # gone before the larger one is made
            buffer = self.buffers[name, dtype] = self._allocate(size, dtype)
        return buffer[:size].view(shape)

    def _allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        num_bytes = size * dtype.itemsize
        if self.device.type == "cpu" and num_bytes >= pages.PAGE_BYTES:
            if self.block is None:
                self.block = pages.block()
            if self.block is not None and num_bytes <= self.block.numel():
                whole = min(-(-num_bytes // pages.PAGE_BYTES) * pages.PAGE_BYTES, self.block.numel())
                buffer, self.block = self.block[:num_bytes], self.block[whole:]
                return buffer.view(dtype)
        return torch.empty(size, dtype=dtype, device=self.device)


class Operand:
    """Rows [n, D] of hidden states or weight: as they were given, and the copy in fp32 that some products take."""

    def __init__(self, given: Tensor, name: str, scratch: Scratch):
        self.given, self._name, self._scratch = given, name, scratch

    @cached_property
    def copied(self) -> Tensor:
        """Made when it is first asked for, in memory that the name's next copy is made in."""
        return self._scratch(self._name, tuple(self.given.shape), torch.float32).copy_(self.given)

    @property
    def for_logits(self) -> Tensor:
        """As `logits_tile` takes it: only a CPU has no product of narrow operands with a result in fp32."""
        on_cpu = self.given.device.type == "cpu"
        return self.copied if on_cpu and operand_copies(self.given.dtype, self.given.device) else self.given

    def beside(self, gradient: Tensor) -> Tensor:
        """As a product with a gradient tile takes it."""
        return self.given if self.given.dtype == gradient.dtype else self.copied


def _compiled_product(
    left: Tensor, right: Tensor, out: Tensor, accumulate: bool, scaled: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """out (+)= left @ right, rounded nowhere but in fp32. Of an operand, rows or columns are contiguous; of results, rows.

    With `scaled`: factor * (out (+) left @ right), rounded once to the operands' dtype, goes there, and `out` may hold anything."""
    layout: dict[str, Any] = {}
    if scaled is not None:
        assert scaled.dtype == left.dtype
        layout |= {"scaled": scaled.data_ptr(), "scaled_stride": scaled.stride(0), "factor": factor}
    for name, x in (("a", left), ("b", right)):
        transposed = x.stride(1) != 1
        layout |= {name: x.data_ptr(), f"{name}_transposed": transposed, f"{name}_stride": x.stride(int(transposed))}
    compiled_core().gemm(
        **layout,
        dtype=DTYPES[left.dtype],
        out=out.data_ptr(),
        out_stride=out.stride(0),
        m=left.shape[0],
        n=right.shape[1],
        k=left.shape[1],
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )
    return out


def logits_tile(hidden: Tensor, weight: Tensor, out: Tensor, model_dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """hidden [n, D] @ weight [v, D].T into `out` [n, v], fp32 (fp64 for fp64). Operands are as `for_logits` has them.

    Under torch.use_deterministic_algorithms a row of `out` has the same bits on a CPU whatever n is and wherever it stands.
    """
    if hidden.device.type != "cpu":
        options = {} if hidden.dtype == out.dtype else {"out_dtype": out.dtype}
        return torch.mm(hidden, weight.t(), out=out, **options)
    copied_bf16 = model_dtype == torch.bfloat16 and hidden.dtype == torch.float32
    if not copied_bf16 and _is_compiled(hidden, weight):  # its order of sums depends on D alone
        return _compiled_product(hidden, weight.t(), out, accumulate=False)
    with _in_bf16(copied_bf16):
        if torch.are_deterministic_algorithms_enabled():
            return _product_in_blocks(hidden, weight, out, scratch)
        return torch.mm(hidden, weight.t(), out=out)


def _product_in_blocks(hidden: Tensor, weight: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """hidden @ weight.T from products of one shape, [BLOCK_ROWS, D] @ [D, BLOCK_COLS], whose operands end in zeros.

    A matrix library chooses its kernel, and with it the order of a row's sums, by the shape, by where rows begin in memory
    and by what is left over at an edge; here these never differ.
    """
    depth = -(-hidden.shape[1] // 16) * 16  # so that every row begins at a multiple of 64 bytes
    left = scratch("left block", (BLOCK_ROWS, depth), out.dtype).zero_()
    right = scratch("right block", (BLOCK_COLS, depth), out.dtype).zero_()
    product = scratch("block", (BLOCK_ROWS, BLOCK_COLS), out.dtype)
    for cols in slices(0, out.shape[1], BLOCK_COLS):
        _fill(right, weight[cols])
        for rows in slices(0, out.shape[0], BLOCK_ROWS):
            _fill(left, hidden[rows])
            torch.mm(left, right.t(), out=product)
            out[rows, cols] = product[: rows.stop - rows.start, : cols.stop - cols.start]
    return out


def _fill(block: Tensor, part: Tensor) -> None:
    """The part, then rows of zeros; the columns after the part's are zeros already."""
    block[: len(part), : part.shape[1]] = part
    block[len(part) :] = 0


def gradient_tile(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """Where `grad_` writes: over the tile, narrowed to bf16 for bf16 operands, which are then multiplied natively."""
    return bf16_overlay(tile) if dtype == torch.bfloat16 and native_bf16(tile.device.type) else tile


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool, scratch: Scratch) -> None:
    """total (+)= left @ right. `total` of the operands' dtype takes one product; sums of several are kept in fp32.

    One that is the result by itself is torch's: where cuBLAS splits its sum, the parts are added in bf16 if the user lets it.
    GPUs and the compiled core add several bf16 products in fp32. Elsewhere each is rounded once, as any bf16 GEMM's result is,
    before it is added.
    """
    compiled = _is_compiled(left, right)
    if compiled and total.dtype == torch.float32:
        _compiled_product(left, right, total, accumulate=not first)
        return
    if total.dtype == left.dtype and not compiled:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
        return
    # torch has it for fp32 results of narrow operands alone
    if left.device.type != "cpu" and left.dtype == torch.bfloat16:
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    rounded_on_the_way = first and scales_sums(left, right, total.dtype)
    for rows in slices(0, len(total), max(1, PRODUCT_ELEMENTS // max(total.shape[1], 1))):
        part = total[rows]
        product = scratch("product", tuple(part.shape), torch.float32 if compiled else left.dtype)
        if compiled:
            rounded = part if rounded_on_the_way else None
            _compiled_product(left[rows], right, product, accumulate=False, scaled=rounded)
        else:
            torch.mm(left[rows], right, out=product)
        if not first:
            part += product
        elif not rounded_on_the_way:
            part.copy_(product)


def scales_sums(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product has a result of that dtype which is the fp32 sum times a factor, rounded once."""
    return dtype == left.dtype and _is_compiled(left, right)


def add_last_product(total: Tensor, left: Tensor, right: Tensor, first: bool, factor: Tensor, out: Tensor) -> None:
    """out = factor * (total (+) left @ right): what is added last is also scaled and rounded, without a pass of its own over `total`,
    which may then hold anything. Of fp32 operands the two may be one tensor."""
    _compiled_product(left, right, total, accumulate=not first, scaled=out, factor=float(factor))


def accumulator_dtype(dtype: torch.dtype, products: int) -> torch.dtype:
    """The dtype to sum `products` products in: fp32 as soon as there are two, so that chunking never costs digits."""
    return dtype if products == 1 else state_dtype(dtype)
