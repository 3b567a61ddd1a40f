"""What tests/test_hostile.py does to the operators, done to every other public function: each argument gets every strange value of
its kind, and is refused in one sentence that names it, or the result is that of the definition."""

import inspect
import math
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hostile import (
    INF,
    NAN,
    STRANGE_INTS,
    STRANGE_NUMBERS,
    STRANGE_WORDS,
    complaints,
    strange_floats,
    strange_tensors,
)

import entropy_po
from entropy_po import EntropyObjective, policy_gradient, sequence_shard, solve_dual
from entropy_po.dual import DualAscent
from entropy_po.evaluation import metrics, pairs
from entropy_po.forecast import forecast
from entropy_po.integrations import logits, openrlhf, verl
from entropy_po.policy_gradient import clipped_surrogate, leave_one_out, sequence_advantages, token_advantages
from entropy_po.tasks.sandbox import run_program
from entropy_po.trainer.rewards import Rewards

HDPO = EntropyObjective.hdpo(beta=0.1, alpha=1.1)
NUMBERS = [
    ("a list of words", ["a", "b"]),
    ("NaN in it", [1.0, NAN]),
    ("inf in it", [1.0, INF]),
    ("none", []),
    ("None", None),
]
NUMBERS += [
    ("a word", "12"),
    ("a number", 1.0),
    ("nested", [[1.0], [2.0]]),
    ("None in it", [None, 1.0]),
    ("huge", [1e300, -1e300]),
]
NUMBERS += [
    ("denormal", [1e-310, 3.0]),
    ("ints", [1, 2]),
    ("big int", [10**400, 1]),
    ("tensor", torch.tensor([1.0, 2.0])),
]
NUMBERS += [("numpy", np.array([1.0, 2.0])), ("bools", [True, False]), ("zeros", [0.0, 0.0]), ("negative", [-1.0, 2.0])]
TEXTS = [
    ("a word", "a b c"),
    ("None", None),
    ("none", []),
    ("numbers", [1, 2]),
    ("None in it", ["a b", None]),
    ("bytes", [b"a b", b"c"]),
]
TEXTS += [
    ("empty ones", ["", ""]),
    ("one", ["a b"]),
    ("a number", 3),
    ("a tuple", ("a b", "b a")),
    ("NULs", ["\0 \0", "a \ud800"]),
]
GROUPS = [
    ("flat", ["a b", "c d"]),
    ("None", None),
    ("none", []),
    ("an empty one", [[], ["a b"]]),
    ("numbers", [[1, 2]]),
    ("a word", "ab"),
]
OFFSETS = [
    [0, 3, 6],
    torch.tensor([0.0, 3.0]),
    torch.tensor([0, 7, 6]),
    torch.tensor([1, 3]),
    torch.tensor([-1, 3]),
    torch.tensor([]),
]
OFFSETS += [
    torch.tensor(6),
    None,
    "036",
    torch.tensor([0, 3, 6], dtype=torch.int32),
    torch.tensor([[0, 3]]),
    torch.tensor([0]),
]
OFFSETS += [
    torch.tensor([0, 3]).to("meta"),
    np.array([0, 3]),
    torch.tensor([], dtype=torch.int64),
    torch.tensor([0, 0, 0]),
]


def hostile_values(kind, valid):
    if kind == "tensor":
        yield from strange_floats(valid)
        # whole numbers are numbers here; and a result without values, of a tensor without values, is the right one
        yield from ((what, value) for what, value in strange_tensors(valid) if what != "meta")
    elif kind == "number":
        yield from STRANGE_NUMBERS
    elif kind == "int":
        yield from ((repr(value), value) for value in STRANGE_INTS if not isinstance(value, int) or abs(value) < 2**40)
        yield "too large", 10**30
    elif kind == "word":
        yield from ((repr(value), value) for value in STRANGE_WORDS)
    else:
        yield from ((str(i), value) if not isinstance(value, tuple) else value for i, value in enumerate(kind))


class Case(NamedTuple):
    """A function, a call of it that works, the kind of each argument that is tried, and what the result is by definition."""

    function: Any
    valid: Any  # () -> keyword arguments
    kinds: dict
    definition: Any = None  # keyword arguments -> the result; None: it must hold no NaN
    also: tuple = ()  # names that a message may speak of, beside the arguments'


def four(*names):
    return lambda: {name: -10 * torch.rand(4) for name in names}


def fp64(function):
    """The definition is the function's own formula, written here and evaluated on fp64 copies."""

    def definition(**call):
        return function(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()})

    return definition


def pair_loss_of(margin, loss="sigmoid", label_smoothing=0.0):
    p = torch.nn.functional.logsigmoid
    e = float(label_smoothing)
    forms = {"hinge": lambda z: (1 - z).clamp_min(0), "ipo": lambda z: ((z - 0.5) / HDPO.policy_coef) ** 2}
    forms["sigmoid"] = lambda z: -(1 - e) * p(z) - (e * p(-z) if e else 0)
    forms["robust"] = lambda z: (-(1 - e) * p(z) + (e * p(-z) if e else 0)) / (1 - 2 * e)
    return forms[loss](margin)


def margin_of(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
    return HDPO.policy_coef * (chosen_logps - rejected_logps) - HDPO.ref_coef * (ref_chosen_logps - ref_rejected_logps)


def others_mean(values):
    return torch.stack(
        [values[:, i] - (values.sum(1) - values[:, i]) / (values.shape[1] - 1) for i in range(values.shape[1])], 1
    )


def clipped_of(logps, old_logps, advantages, epsilon, epsilon_high):
    ratio = (logps - old_logps).exp()
    whole, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
    return torch.minimum(whole, clipped)


def distinct_of(texts, n=2):
    grams = [tuple(text.lower().split()[i : i + n]) for text in texts for i in range(len(text.split()) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def ead_of(texts, num_types, n=1):
    grams = [tuple(text.lower().split()[i : i + n]) for text in texts for i in range(len(text.split()) - n + 1)]
    return len(set(grams)) / (num_types * (1 - (1 - 1 / num_types) ** len(grams))) if grams else 0.0


def similarities(embeddings):
    x = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    return x @ x.t()


def semantic_of(embeddings):
    k = similarities(embeddings)
    values = [1 - k[i, j] for i, j in combinations(range(len(k)), 2)]
    return sum(values) / len(values)


def vendi_of(embeddings):
    values = torch.linalg.eigvalsh(similarities(embeddings) / len(embeddings)).clamp_min(0)
    return torch.special.entr(values).sum().exp()


def shard_of(cu_seqlens, rank, size):
    rows = []
    for a, b in pairwise(cu_seqlens.tolist()):
        rows += range(a + (b - a) * rank // size, a + (b - a) * (rank + 1) // size)
    return torch.tensor(rows, dtype=torch.int64)


def logps_of(logits, labels, temperature=1.0):
    return (logits.double() / temperature).log_softmax(-1).gather(-1, labels.long()[..., None])[..., 0]


def entropy_of(logits):
    log_p = logits.double().log_softmax(-1)
    return -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)


def objective(name, formula, **arguments):
    function = getattr(EntropyObjective, name)
    return Case(lambda **call: (lambda o: [o.policy_coef, o.ref_coef])(function(**call)), lambda: arguments, dict.fromkeys(arguments, "number"), formula, ("policy_coef", "ref_coef"))  # fmt: skip


WEIGHTS = {"values": NUMBERS, "weights": NUMBERS, "level": "number", "draws": "int", "seed": "int"}
LOGITS = {"logits": lambda: torch.randn(6, 11), "labels": lambda: torch.randint(11, (6,))}
CASES = {
    "dpo": objective("dpo", lambda beta: [beta, beta], beta=0.1),
    "hdpo": objective("hdpo", lambda beta, alpha: [alpha * beta, beta], beta=0.1, alpha=0.9),
    "spl": objective("spl", lambda alpha_s, beta_s: [alpha_s, beta_s], alpha_s=0.1, beta_s=0.2),
    "qempo": objective("qempo", lambda lam: [1 / lam, 0.0], lam=2.0),
    "qempo_kl": objective("qempo_kl", lambda lam, mu: [(1 + mu) / lam, mu / lam], lam=2.0, mu=0.5),
    "margin": Case(HDPO.margin, four("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), dict.fromkeys(("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), "tensor"), fp64(margin_of)),
    "pair_loss": Case(HDPO.pair_loss, lambda: {"margin": torch.randn(4), "loss": "sigmoid", "label_smoothing": 0.1}, {"margin": "tensor", "loss": "word", "label_smoothing": "number"}, fp64(pair_loss_of)),
    "pair_loss robust": Case(HDPO.pair_loss, lambda: {"margin": torch.randn(4), "loss": "robust", "label_smoothing": 0.1}, {"margin": "tensor", "label_smoothing": "number"}, fp64(pair_loss_of)),
    "pair_loss ipo": Case(HDPO.pair_loss, lambda: {"margin": torch.randn(4), "loss": "ipo"}, {"margin": "tensor"}, fp64(pair_loss_of)),
    "pair_loss hinge": Case(HDPO.pair_loss, lambda: {"margin": torch.randn(4), "loss": "hinge"}, {"margin": "tensor"}, fp64(pair_loss_of)),
    "openrlhf.compute_entropy": Case(openrlhf.compute_entropy, lambda: {"logits": torch.randn(6, 11)}, {"logits": "tensor"}, entropy_of),
    "implicit_reward": Case(HDPO.implicit_reward, four("logps", "ref_logps"), {"logps": "tensor", "ref_logps": "tensor"}, fp64(lambda logps, ref_logps: HDPO.policy_coef * logps - HDPO.ref_coef * ref_logps)),
    "shaped_reward": Case(HDPO.shaped_reward, four("rewards", "logps", "ref_logps"), dict.fromkeys(("rewards", "logps", "ref_logps"), "tensor"), fp64(lambda rewards, logps, ref_logps: rewards - HDPO.policy_coef * logps + HDPO.ref_coef * ref_logps)),
    "optimal_policy": Case(HDPO.optimal_policy, four("rewards", "ref_logps"), dict.fromkeys(("rewards", "ref_logps"), "tensor"), fp64(lambda rewards, ref_logps: ((rewards + HDPO.ref_coef * ref_logps) / HDPO.policy_coef).log_softmax(-1))),
    "solve_dual": Case(lambda **call: [(s := solve_dual(**call)).entropy, s.reward], lambda: {"rewards": torch.tensor([0.0, 1.0, 3.0]), "ref_logps": torch.randn(3).log_softmax(0), "min_reward": 1.9, "max_kl": 5.0}, {"rewards": "tensor", "ref_logps": "tensor", "min_reward": "number", "max_kl": "number"}),
    "DualAscent": Case(lambda **call: [DualAscent(**call).lam], lambda: {"lam": 2.0, "mu": 0.5, "min_reward": 0.5, "max_kl": 1.0}, dict.fromkeys(("lam", "mu", "min_reward", "max_kl", "lam_step", "mu_step", "horizon", "tolerance"), "number") | {"warmup": "int", "window": "int", "lam_bounds": NUMBERS, "mu_bounds": NUMBERS}),
    "DualAscent.update": Case(lambda **call: (lambda a: (a.update(**call), [a.lam, a.mu])[1])(DualAscent(lam=2.0, min_reward=0.5, max_kl=1.0)), lambda: {"reward": 0.4, "kl": 0.5}, {"reward": "number", "kl": "number"}),
    "leave_one_out": Case(leave_one_out, lambda: {"values": torch.randn(3, 4)}, {"values": "tensor"}, fp64(others_mean)),
    "sequence_advantages": Case(lambda **call: sequence_advantages(HDPO, **call), lambda: {name: torch.randn(3, 4) for name in ("rewards", "logps", "ref_logps")}, dict.fromkeys(("rewards", "logps", "ref_logps"), "tensor"), fp64(lambda rewards, logps, ref_logps: others_mean(rewards - HDPO.policy_coef * logps + HDPO.ref_coef * ref_logps)), ("values",)),
    "token_advantages": Case(lambda **call: token_advantages(HDPO, **call), lambda: {"rewards": torch.randn(3, 4), "entropy": torch.rand(3, 4, 5), "ref_logps": -torch.rand(3, 4, 5)}, dict.fromkeys(("rewards", "entropy", "ref_logps"), "tensor"), None, ("values",)),
    "clipped_surrogate": Case(lambda **call: clipped_surrogate(**call)[0], lambda: four("logps", "old_logps", "advantages")() | {"epsilon": 0.2, "epsilon_high": 0.3}, dict.fromkeys(("logps", "old_logps", "advantages"), "tensor") | dict.fromkeys(("epsilon", "epsilon_high"), "number"), fp64(clipped_of)),
    "sequence_shard": Case(lambda **call: sequence_shard(**call)[0], lambda: {"cu_seqlens": torch.tensor([0, 3, 9]), "rank": 1, "size": 2}, {"cu_seqlens": OFFSETS, "rank": "int", "size": "int"}, shard_of),
    "distinct_n": Case(metrics.distinct_n, lambda: {"texts": ["a b a", "b c"]}, {"texts": TEXTS, "n": "int"}, distinct_of),
    "distinct_n_per_prompt": Case(metrics.distinct_n_per_prompt, lambda: {"answers": [["a b"], ["c d c"]]}, {"answers": GROUPS, "n": "int"}, None, ("texts",)),
    "expectation_adjusted_distinct_n": Case(metrics.expectation_adjusted_distinct_n, lambda: {"texts": ["a b a", "b c"], "num_types": 10}, {"texts": TEXTS, "num_types": "int", "n": "int"}, ead_of),
    "self_bleu": Case(metrics.self_bleu, lambda: {"texts": ["a b a", "b c"]}, {"texts": TEXTS}),
    "vendi_score": Case(metrics.vendi_score, lambda: {"embeddings": torch.randn(4, 6)}, {"embeddings": "tensor"}, vendi_of),
    "semantic_distance": Case(metrics.semantic_distance, lambda: {"embeddings": torch.randn(4, 6)}, {"embeddings": "tensor"}, semantic_of),
    "pass_at_k": Case(metrics.pass_at_k, lambda: {"num_samples": 4, "num_right": 1, "k": 2}, dict.fromkeys(("num_samples", "num_right", "k"), "int"), lambda num_samples, num_right, k: 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)),
    "bootstrap_interval": Case(metrics.bootstrap_interval, lambda: {"values": [1.0, 2.0], "weights": [1.0, 2.0], "draws": 20}, WEIGHTS),
    "paired_interval": Case(metrics.paired_interval, lambda: {"values": [1.0, 2.0], "others": [2.0, 2.0], "weights": [1.0, 2.0], "draws": 20}, WEIGHTS | {"others": NUMBERS, "other_weights": NUMBERS}),
    "accuracy": Case(pairs.accuracy, lambda: {"logps": torch.randn(4, 2), "ref_logps": torch.randn(4, 2)}, {"logps": "tensor", "ref_logps": "tensor"}),
    "forecast": Case(lambda **call: [forecast(**call).total_ms], lambda: {"vocab": 1000, "hidden": 64, "tokens": 100, "gpus": 4}, dict.fromkeys(("vocab", "hidden", "tokens", "gpus", "vocab_ranks", "sequence_ranks", "workspace_bytes"), "int"), None, ("vocabulary", "sequence")),
    "logps_from_logits": Case(logits.logps_from_logits, lambda: {k: f() for k, f in LOGITS.items()}, {"logits": "tensor", "labels": OFFSETS}, logps_of),
    "entropy_from_logits": Case(logits.entropy_from_logits, lambda: {"logits": torch.randn(6, 11)}, {"logits": "tensor"}, entropy_of),
    "openrlhf.log_probs_from_logits": Case(openrlhf.log_probs_from_logits, lambda: {k: f() for k, f in LOGITS.items()}, {"logits": "tensor", "labels": OFFSETS, "temperature": "number"}, logps_of),
    "verl.linear_cross_entropy": Case(lambda **call: verl.linear_cross_entropy(**call)[0], lambda: {"hidden": torch.randn(6, 5), "weight": torch.randn(11, 5), "labels": torch.randint(11, (6,))}, {"hidden": "tensor", "weight": "tensor", "labels": OFFSETS, "temperature": "number", "reduction": "word"}, lambda hidden, weight, labels, **_: logps_of(hidden.double().reshape(-1, 5) @ weight.double().t(), labels.flatten(), _.get("temperature", 1.0)), ("hidden_states",)),
    "Rewards": Case(lambda **call: Rewards(**call).weights, lambda: {"functions": [len, max], "weights": [1.0, 2.0]}, {"functions": [None, [], "", "nonsense", 3, [3], ["os:nonsense"], ["os:sep"], "no.such:thing", len], "weights": NUMBERS}, None, ("reward_funcs", "reward_weights")),
    "run_program": Case(lambda **call: [run_program(**call).passed], lambda: {"source": "pass"}, {"source": [None, 3, b"pass", "\0", "\ud800"], "timeout": [("NaN", NAN), ("negative", -1), ("None", None), ("a word", "1")], "memory_mib": [0, None, "1"], "file_mib": [0, None, "1"]}),
}  # fmt: skip


def numbers_in(value):
    if isinstance(value, torch.Tensor):
        return value.detach().flatten().double().tolist() if value.is_floating_point() else []
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in numbers_in(part)]
    return [float(value)] if isinstance(value, float) else []


def as_tensor(value):
    return value.detach().double() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def judged(case, what, call, result):
    """What is wrong with a result that was given."""
    # a sum that leaves the range of fp32 may say so too, by being no number
    finite = all(abs(x) < 1e37 for value in call.values() for x in numbers_in(value))
    if finite and any(math.isnan(x) for x in numbers_in(result)):
        yield f"{what}: NaN from numbers: {result}"
    if case.definition is None:
        return
    try:
        exact = as_tensor(case.definition(**call)).float()
    except Exception as error:
        yield f"{what}: accepted, but its definition says {type(error).__name__}: {str(error)[:100]}"
        return
    ours = as_tensor(result).float()
    low = any(isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in call.values())
    tolerance = 5e-2 if low else 2e-4
    scale = max([1.0, *(abs(x) for value in call.values() for x in numbers_in(value) if math.isfinite(x))])
    if ours.shape != exact.shape:
        yield f"{what}: of shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
        return
    near = torch.isclose(ours, exact, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    said = ~ours.isfinite() & (not finite)
    if not bool((near | said).all()):
        yield f"{what}: {result} instead of {exact.tolist()}"


ARGUMENTS = [
    pytest.param(name, argument, id=f"{name}-{argument}") for name, case in CASES.items() for argument in case.kinds
]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_refused_by_name_or_right(name, argument):
    case = CASES[name]
    problems = []
    valid = case.valid()
    for what, value in hostile_values(case.kinds[argument], valid.get(argument)):
        call = valid | {argument: value}
        try:
            result = case.function(**call)
        except Exception as error:
            problems += complaints(what, error, [*call, *case.also])
            continue
        problems += judged(case, what, call, result)
    assert not problems, "\n".join([f"{name}, {argument}:", *problems])


def test_no_public_function_is_left_out():
    """Of the package, and of the modules of plain functions; the operators are in test_hostile.py, results have no arguments."""
    elsewhere = {
        "linear_preference_loss",
        "linear_token_stats",
        "sequence_loss",
        "token_stats",
        "describe",
        "available_backends",
    }
    results = {"PreferenceOutput", "SequenceBatch", "SequenceLossOutput", "TokenStats", "EntropyObjective"}
    assert set(entropy_po.__all__) - elsewhere - results <= CASES.keys()
    for module in (metrics, policy_gradient, logits, openrlhf):
        functions = {
            name for name, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module.__name__
        }
        known = CASES.keys() | {name.partition(".")[2] for name in CASES}
        assert {name for name in functions if name[0] != "_"} - {"as_ids"} <= known, module
    methods = {name for name, x in vars(EntropyObjective).items() if callable(x) or isinstance(x, classmethod)}
    assert {name for name in methods if name[0] != "_"} - {"pair_loss_and_slope"} <= CASES.keys()
