"""Every argument of every operator gets every strange value there is: refused in one sentence that names the argument, or the
result is that of the definition in fp64. Never a crash, a silent NaN, or an error from somewhere below."""

import inspect
import itertools

import numpy as np
import oracles
import pytest
import torch
from hostile import (
    INF,
    NAN,
    STRANGE_INTS,
    STRANGE_NUMBERS,
    STRANGE_WORDS,
    complaints,
    one_at,
    randn,
    strange_floats,
    strange_tensors,
)

from entropy_po import EntropyObjective, linear_preference_loss, linear_token_stats, sequence_loss, token_stats

N, V, D = 6, 11, 5


STRANGE_LABELS = [
    ("out of range", lambda x: one_at(x, V)), ("negative", lambda x: one_at(x, -1)), ("largest", lambda x: one_at(x, 2**63 - 1)),
    ("smallest", lambda x: one_at(x, -(2**63))), ("int32", torch.Tensor.int), ("float", torch.Tensor.float), ("bool", torch.Tensor.bool),
    ("a row less", lambda x: x[:-1]), ("a dimension more", lambda x: x[None]), ("empty", lambda x: x[:0]), ("list", torch.Tensor.tolist),
    ("None", lambda x: None), ("meta", lambda x: x.to("meta")), ("strided", lambda x: torch.stack([x, x], 1)[:, 0]),
    ("all ignored", lambda x: torch.full_like(x, -100)), ("expanded", lambda x: x[:1].expand(N)), ("numpy", torch.Tensor.numpy),
]  # fmt: skip
STRANGE_OUTPUTS = ["logps", "entropy", (), None, ("logps", "nonsense"), 3, ("logps", "logps"), {"logps"}, [3], "log"]
STRANGE_OFFSETS = [
    [0, 3, 6], torch.tensor([0, 3, 6]).float(), torch.tensor([0, 3]), torch.tensor([0, 3, 7]), torch.tensor([1, 3, 6]),
    torch.tensor([0, 4, 3, 6, 6]), torch.tensor([0, 3, 2**62]), torch.tensor([0, -3, 6]), torch.tensor([[0, 3, 6]]), torch.tensor([]),
    torch.tensor(6), None, "036", torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 0, 6]), torch.tensor([0, 3, 6]).to("meta"),
    torch.tensor([0, 3, 6, 6, 6]), np.array([0, 3, 6]),
]  # fmt: skip


def keep_masks():
    mask = torch.ones(N, V, dtype=torch.bool)
    yield from [
        ("none kept", ~mask),
        ("one row of none", mask.index_fill(0, torch.tensor([2]), False)),
        ("[V]", mask[0]),
        ("int", mask.int()),
    ]
    yield from [("too narrow", mask[:, 1:]), ("too short", mask[:2]), ("0-d", mask[0, 0]), ("list", mask.tolist())]
    yield from [
        ("expanded", mask[:1].expand(N, V)),
        ("strided", torch.stack([mask, mask], -1)[..., 0]),
        ("a word", "all"),
    ]
    yield from [("meta", mask.to("meta")), ("[1, V]", mask[:1]), ("[N, 1]", mask[:, :1])]


# ---- the functions, each with a call that works and its definition


def labels_and_logits():
    return {"logits": randn(N, V), "labels": torch.randint(V, (N,))}


def head():
    return {"hidden_states": randn(N, D), "weight": randn(V, D), "labels": torch.randint(V, (N,))}


def pairs():
    return head() | {
        "cu_seqlens": torch.tensor([0, 2, 6]),
        "objective": EntropyObjective.hdpo(beta=0.1, alpha=1.1),
        "ref_logps": -10 * torch.rand(1, 2),
    }


def per_sequence(batch):
    logps = batch.token_logps if batch.logps is None else batch.logps
    return (logps * torch.arange(1.0, len(logps) + 1)).sum()


def transform_of(call):
    names = ("bias", "temperature", "softcap", "logit_scale", "keep_mask")
    return {name: call[name] for name in names if call.get(name) is not None}


def exact_stats(logits, call):
    transform = transform_of(call)
    if torch.is_tensor(transform.get("temperature")):
        transform["temperature"] = transform["temperature"].reshape(-1).expand(N)
    ignore = call.get("ignore_index", -100)
    ignored = call["labels"] == ignore
    log_p = oracles.transformed(logits, **transform).log_softmax(-1)
    entropy = -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)
    return [
        x.masked_fill(ignored, 0.0)
        for x in (log_p.gather(1, call["labels"].masked_fill(ignored, 0)[:, None])[:, 0], entropy)
    ]


def exact_logits(call):
    """NaN where a product leaves the range of fp32: its row says so by being NaN."""
    hidden, weight = call["hidden_states"], call["weight"]
    exact = hidden.double() @ weight.double().t()
    overflows = exact.isfinite() & ~(hidden.float() @ weight.float().t()).isfinite()
    return exact.masked_fill(overflows, NAN) if hidden.dtype != torch.float64 else exact


def depends_on_order(call):
    """[N] bool: what the order of a product's sum decides. Terms of both signs, some of whose partial sums leave the range of fp32
    and some do not; or two largest logits that lie closer than a sum's rounding, where that is more than a nat's."""
    rows = torch.zeros(N, dtype=torch.bool)
    for hidden, weight in (("hidden_states", "weight"), ("ref_hidden_states", "ref_weight")):
        if call.get(hidden) is not None and call[hidden].dtype != torch.float64:
            w = call["weight"] if call.get(weight) is None else call[weight]
            terms = call[hidden].double()[:, None] * w.double()
            above, below = terms.clamp_min(0).sum(-1), -terms.clamp_max(0).sum(-1)
            largest = torch.finfo(torch.float32).max
            rows |= ((torch.maximum(above, below) > largest) & (torch.minimum(above, below) > 0)).any(-1)
            rounding = D * torch.finfo(torch.float32).eps * (above + below).amax(-1)
            two = (above - below).topk(2).values
            rows |= rounding.isfinite() & (rounding > 1e-5) & ~(two[:, 0] - two[:, 1] > rounding)
    return rows


def definition_of_token_stats(call):
    return exact_stats(call["logits"].double(), call)


def definition_of_linear_token_stats(call):
    return exact_stats(exact_logits(call), call)


def sums(call):
    logps = exact_stats(exact_logits(call), call)[0]
    offsets = call["cu_seqlens"].tolist()
    return torch.stack([logps[a:b].sum() for a, b in itertools.pairwise(offsets)])


def definition_of_preference_loss(call):
    logps, objective = sums(call).view(-1, 2), call["objective"]
    if call.get("ref_hidden_states") is not None:
        ref_weight = call.get("ref_weight")
        other = call | {"hidden_states": call["ref_hidden_states"], "bias": call.get("ref_bias", call.get("bias"))}
        ref = sums(other | {"weight": call["weight"] if ref_weight is None else ref_weight}).view(-1, 2)
    else:
        ref = call["ref_logps"]
    ref = (None, None) if not objective.needs_reference else ref.double().unbind(1)
    z = objective.margin(*logps.unbind(1), *ref)
    losses = objective.pair_loss(z, call.get("loss", "sigmoid"), float(call.get("label_smoothing", 0.0)))
    lengths = torch.tensor(
        [
            (call["labels"][a:b] != call.get("ignore_index", -100)).sum()
            for a, b in itertools.pairwise(call["cu_seqlens"].tolist())
        ]
    )
    if call.get("nll_coef"):
        losses = losses - call["nll_coef"] * logps[:, 0] / lengths[0::2].clamp_min(1)
    if call.get("pair_weights") is not None:
        losses = losses * call["pair_weights"].double()
    return [losses.sum() if call.get("reduction") == "sum" else losses.mean(), z]


def definition_of_sequence_loss(call):
    logps = sums(call)
    if call.get("coupled") == 0:
        tokens = exact_stats(exact_logits(call), call)[0]
        return [(tokens * torch.arange(1.0, N + 1)).sum(), logps]
    return [(logps * torch.arange(1.0, len(logps) + 1)).sum(), logps]


def run_stats(function):
    return lambda call: list(function(**call))[:2]


def run_preference(call):
    output = linear_preference_loss(**call)
    return [output.loss, output.margins]


def run_sequence(call):
    output = sequence_loss(**call)
    return [output.loss, output.logps]


FUNCTIONS = {
    "token_stats": (token_stats, run_stats(token_stats), labels_and_logits, definition_of_token_stats),
    "linear_token_stats": (linear_token_stats, run_stats(linear_token_stats), head, definition_of_linear_token_stats),
    "linear_preference_loss": (linear_preference_loss, run_preference, pairs, definition_of_preference_loss),
    "sequence_loss": (sequence_loss, run_sequence, lambda: {k: v for k, v in pairs().items() if k not in ("objective", "ref_logps")} | {"loss_fn": per_sequence}, definition_of_sequence_loss),
}  # fmt: skip


def hostile_values(name, valid):
    """[what it is, value] for the argument `name` of a call that is otherwise `valid`."""
    if name in ("logits", "hidden_states", "weight"):
        yield from strange_floats(valid[name])
        yield from strange_tensors(valid[name])
    elif name == "ref_hidden_states":
        yield from strange_floats(randn(N, D))
        yield from (pair for pair in strange_tensors(randn(N, D)) if pair[0] != "None")
    elif name in ("bias", "ref_bias"):
        x = randn(V)
        yield from ((what, value) for what, value in strange_floats(x) if what != "transposed")
        yield from (pair for pair in strange_tensors(x) if pair[0] not in ("None", "a dimension less"))
    elif name == "ref_weight":
        yield from [("without its hidden states", randn(V, D)), ("a word", "weight")]
    elif name in ("ref_logps", "pair_weights"):
        x = randn(1, 2) if name == "ref_logps" else randn(1)
        yield from [
            ("NaN", x * NAN),
            ("inf", x * INF),
            ("float64", x.double()),
            ("bfloat16", x.bfloat16()),
            ("a pair more", x.repeat_interleave(2, 0)),
        ]
        yield from [
            ("flat", torch.randn(6)),
            ("list", x.tolist()),
            ("int64", x.long()),
            ("a word", "-10"),
            ("meta", x.to("meta")),
            ("complex", x * 1j),
        ]
    elif name == "labels":
        yield from ((what, make(valid["labels"])) for what, make in STRANGE_LABELS)
    elif name in ("temperature", "softcap", "logit_scale", "label_smoothing", "nll_coef"):
        yield from STRANGE_NUMBERS
        yield from (("per row", torch.full((N,), value)) for value in (NAN, -1.0, 1.5))
    elif name == "keep_mask":
        yield from keep_masks()
    elif name in ("ignore_index", "workspace_bytes", "coupled"):
        yield from ((repr(value), value) for value in STRANGE_INTS)
    elif name == "outputs":
        yield from ((repr(value), value) for value in STRANGE_OUTPUTS)
    elif name == "cu_seqlens":
        yield from ((str(i), value) for i, value in enumerate(STRANGE_OFFSETS))
    elif name in ("backend", "strategy", "reduction", "loss", "vocab_group", "sequence_group", "inplace_backward", "expect_entropy_grad"):  # fmt: skip
        yield from ((repr(value), value) for value in STRANGE_WORDS)
    elif name in ("objective", "loss_fn"):
        yield from (
            (repr(value), value)
            for value in (None, "hdpo", 0.1, {"beta": 0.1}, lambda *_: None, lambda _: "loss", lambda b: b.logps)
        )
    else:
        raise AssertionError(f"{name} is not among the arguments that this file knows: say what is strange for it")  # fmt: skip


ARGUMENTS = [
    pytest.param(function_name, name, id=f"{function_name}-{name}")
    for function_name, (function, *_) in FUNCTIONS.items()
    for name in inspect.signature(function).parameters
]
COUNTED = []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("function_name, name", ARGUMENTS)
def test_refused_by_name_or_right(function_name, name, seed):
    function, run, make, definition = FUNCTIONS[function_name]
    valid = make()
    problems = []
    for what, value in hostile_values(name, valid):
        call = valid | {name: value}
        if name in ("ref_hidden_states", "ref_bias"):
            call = {k: v for k, v in call.items() if k != "ref_logps"}
            if name == "ref_hidden_states":  # a bias is tried with the policy's weight
                call["ref_weight"] = randn(V, D)
            call.setdefault("ref_hidden_states", randn(N, D))
        COUNTED.append((function_name, name, what))
        try:
            ours = run(call)
        except Exception as error:
            problems += complaints(what, error, inspect.signature(function).parameters)
            continue
        try:
            exact = definition(call)
        except Exception as error:
            problems.append(f"{what}: accepted, but its definition says {type(error).__name__}: {str(error)[:100]}")
            continue
        undecided = depends_on_order(call)
        for a, b in zip(ours, exact, strict=True):
            if a is None or undecided.all():
                continue
            if undecided.any():
                if a.shape != undecided.shape:
                    continue  # a sum over rows
                a, b = a[~undecided], b[~undecided]
            low = call.get("hidden_states", call.get("logits"))
            tolerance = 5e-2 if low.dtype in (torch.bfloat16, torch.float16) or "bfloat16" in what else 2e-4
            product = "hidden_states" in call
            # one unit in the last place of logits so large is that many nats
            scale = {"huge": 1e31, "largest": 1e36 if product else 1.0}.get(what, 1.0)
            b = b.to(torch.float32)
            if not torch.allclose(a.float(), b, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
                problems.append(f"{what}: {a.tolist()} instead of {b.tolist()}")
    assert not problems, "\n".join([f"{function_name}, {name}:", *problems])


def test_there_are_five_hundred():
    if len({function for function, *_ in COUNTED}) == len(FUNCTIONS):  # not when only some of this file is run
        assert len(COUNTED) >= 500
