"""What calls on a CPU leave for the next one, that nothing else ever sees it, and the gauge that counts it."""

import mmap
import os
import threading

import pytest
import torch

from entropy_po import EntropyObjective, linear_preference_loss, pages
from entropy_po.memory import held_bytes, peak_bytes, reset_peak
from entropy_po.ops.gemm import Scratch

CPU = torch.device("cpu")

counted_by_the_system = pytest.mark.skipif(torch.cuda.is_available(), reason="the gauge is CUDA's allocator's here")

pytestmark = pytest.mark.skipif(not pages.CAN_FREE_LAZILY, reason="this system does not take memory back lazily")


@pytest.fixture(autouse=True)
def nothing_left():
    pages.release()
    yield
    pages.release()


def test_the_next_call_gets_the_same_memory_but_never_while_a_tensor_is_over_it():
    first = pages.block()
    address, part = first.data_ptr(), first[5000:6000].view(torch.float32)
    part.fill_(3.0)
    del first
    other = pages.block()
    other.fill_(7)
    assert other.data_ptr() != address and (part == 3.0).all()
    del part
    assert pages.block().data_ptr() == address


def test_buffers_of_a_call_do_not_overlap_and_are_aligned():
    scratch = Scratch(CPU)
    shapes = {"tile": (37, 1001), "hidden": (13, 999), "dW": (1001, 64), "product": (5, 1000)}
    buffers = {name: scratch(name, shape, torch.float32) for name, shape in shapes.items()}
    for i, (name, buffer) in enumerate(buffers.items()):
        assert tuple(buffer.shape) == shapes[name] and buffer.data_ptr() % 64 == 0
        buffer.fill_(i)
    assert all((buffer == i).all() for i, buffer in enumerate(buffers.values()))
    assert scratch("tile", (10, 10), torch.float32).data_ptr() == buffers["tile"].data_ptr()


def test_what_does_not_fit_comes_from_the_system_and_goes_back_to_it():
    scratch = Scratch(CPU)
    big = scratch("tile", (1, pages.BLOCK_BYTES + 4096), torch.uint8)
    assert big.numel() > pages.BLOCK_BYTES
    small = scratch("hidden", (1, pages.BLOCK_BYTES), torch.uint8)  # all of it
    more = scratch("dW", (64, 64), torch.float32)
    more.fill_(1.0)
    small[0, -16384:].fill_(0)
    assert (more == 1.0).all()


def test_without_lazy_freeing_memory_comes_from_torch():
    with pages.from_torch():
        assert pages.block() is None
        assert Scratch(CPU)("tile", (64, 64), torch.float32).shape == (64, 64)
    assert not pages._free and pages.block() is not None


@counted_by_the_system
def test_peak_memory_sees_what_was_freed_before_the_end():
    size = 200 << 20
    reset_peak()
    before = peak_bytes()
    # Pages of its own: an allocator may have resident ones left, which raise no peak.
    with mmap.mmap(-1, size) as block:
        for _ in range(size >> 20):
            block.write(bytes(1 << 20))
    assert 0.9 * size < peak_bytes() - before < 1.5 * size
    reset_peak()
    assert peak_bytes() - before < 0.5 * size


@counted_by_the_system
def test_left_memory_does_not_count_as_held_and_is_in_the_next_peak():
    size = 64 << 20
    reset_peak()
    before = held_bytes()
    block = pages.block()
    block[:size].fill_(1)
    assert held_bytes() - before > 0.9 * size
    del block
    assert held_bytes() - before < 0.1 * size
    reset_peak()
    before = held_bytes()
    pages.block()[:size].fill_(1)
    assert peak_bytes() - before > 0.9 * size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_writes_to_pages_of_its_own():
    block = pages.block()
    block[:8192].fill_(1)
    child = os.fork()
    if child == 0:
        block[:8192].fill_(9)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (block[:8192] == 1).all()


def test_calls_of_several_threads_agree_with_one_alone():
    generator = torch.Generator().manual_seed(0)
    labels, cu_seqlens = torch.randint(3000, (64,), generator=generator), torch.tensor([0, 20, 64])
    weight = torch.randn(3000, 32, generator=generator)
    inputs = [torch.randn(64, 32, generator=generator) for _ in range(4)]

    def gradient(hidden):
        hidden = hidden.clone().requires_grad_()
        loss = linear_preference_loss(hidden, weight, labels, cu_seqlens, objective=EntropyObjective.qempo(0.1)).loss
        return torch.autograd.grad(loss, hidden)[0]

    alone, together = [gradient(x) for x in inputs], [None] * len(inputs)

    def work(i):
        for _ in range(20):
            together[i] = gradient(inputs[i])
            if not torch.allclose(together[i], alone[i], rtol=1e-4, atol=1e-6):
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert 1 <= len(pages._free) <= len(inputs)
