"""What torch says of a GPU's matrix products where there is none: its rules for dtypes and shapes, on tensors without data."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from entropy_po import linear_token_stats, token_stats
from entropy_po.ops import gemm, sequences
from entropy_po.ops.linear_token_stats import _plan
from entropy_po.ops.lm_head import LmHead
from entropy_po.plan import DEFAULT_GPU_WORKSPACE, plan_sequences, plan_tiles
from entropy_po.types import state_dtype


@contextlib.contextmanager
def but_for_the_device():
    """Where torch was built without CUDA, what is no product asks for the device, and fails for that alone. torch 2.11's fake of addmm
    with an out_dtype takes that for beta; its kernel does not."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if not re.search("not linked with support for cuda|for \\*: 'torch.dtype' and 'FakeTensor'", str(error)):
            raise


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="cuda")


def scratch(_, shape, dtype):
    return empty(*shape, dtype=dtype)


def operand(n, dtype):
    made = gemm.Operand(empty(n, 16, dtype=dtype), "", scratch)
    made.copied = empty(n, 16, dtype=torch.float32)  # to fill it would take the device
    return made


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_gpu_is_planned_as_one(device):
    """Whichever: every table of sizes has its numbers."""
    hidden = SimpleNamespace(device=torch.device(device), requires_grad=True)
    head = SimpleNamespace(
        hidden=hidden, arithmetic=torch.float32, operand_copies=False, dim=64, num_kept=5000, vocab_size=9000
    )
    head.shards = SimpleNamespace(widest=9000)
    assert sequences.any_shape_budget(head, 1 << 40, "auto") == DEFAULT_GPU_WORKSPACE
    plan = _plan(head, DEFAULT_GPU_WORKSPACE)
    assert plan == plan_tiles(
        5000, 9000, 64, element=4, operand_copies=False, workspace_bytes=1 << 30, device_type="cuda"
    )
    sized = {"coupled": 2, "trained": True, "element": 4, "converts": False, "workspace_bytes": 1 << 30}
    by_kind = [plan_sequences([900, 800], 9000, 64, device_type=name, **sized) for name in ("cuda", device)]
    assert by_kind[0] == by_kind[1]


@pytest.mark.parametrize("key", ["CPU", "CUDA", "XPU"])
@pytest.mark.parametrize(
    "name", ["token_stats", "token_stats_backward", "linear_token_stats", "linear_preference_loss"]
)
def test_operators_are_registered_for_every_device_that_is_served(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"entropy_po::{name}", key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"entropy_po::{name}", "MPS")


@pytest.mark.parametrize("device", ["mps"])
def test_another_accelerator_is_refused_by_name(device):
    with FakeTensorMode():
        logits, labels = torch.empty(2, 5, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        with pytest.raises(ValueError, match=f"logits is on {device}.*; move it to a CPU or a CUDA, ROCm or XPU GPU"):
            token_stats(logits, labels)
        with pytest.raises(ValueError, match=f"hidden_states is on {device}"):
            linear_token_stats(logits, logits, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_torch_has_the_products_of_every_dtype(dtype, products, first):
    with FakeTensorMode():
        hidden, weight = operand(4, dtype), operand(7, dtype)
        # rows at a pitch, as the tiles of an odd vocabulary have them
        tile = empty(4, 8, dtype=state_dtype(dtype)).narrow(1, 0, 7)
        gemm.logits_tile(hidden.for_logits, weight.for_logits, tile, dtype, None)
        gradient = empty(4, 16, dtype=dtype).narrow(1, 0, 7) if dtype == torch.bfloat16 else tile
        for left, right in ((gradient, weight), (gradient.t(), hidden)):
            total = empty(left.shape[0], 16, dtype=gemm.accumulator_dtype(dtype, products))
            with but_for_the_device():
                gemm.add_product(total, left, right.beside(gradient), first, scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operands_are_copied_for_gradients_of_fp16_alone(dtype):
    with FakeTensorMode():
        weight = operand(7, dtype)
        assert weight.for_logits is weight.given
        gradient = empty(4, 7, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
        assert weight.beside(gradient) is (weight.copied if dtype == torch.float16 else weight.given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_gradients_of_fp16_are_multiplied_in_tf32_and_the_users_setting_stays(dtype, setting, monkeypatch):
    """A tenth of the time of fp32's products there; fp32 operands are multiplied as the user has it."""
    matmul = torch.backends.cuda.matmul
    used, product = [], torch.mm

    def mm(*args, **kwargs):
        used.append(matmul.fp32_precision)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        with FakeTensorMode():
            total, gradient = (empty(4, n, dtype=torch.float32) for n in (16, 7))
            LmHead.add_product(SimpleNamespace(scratch=scratch), total, gradient, operand(7, dtype), True)
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before
    assert used == ["tf32" if dtype == torch.float16 else setting]


def test_tf32_holds_every_fp16():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    assert not (every.view(torch.int32) & 0x1FFF).any()
