"""What the ranks of test_parallel.py run: the operators on parts, against the same call on the whole in the same process."""

from collections import Counter
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from entropy_po import (
    EntropyObjective,
    TokenStats,
    linear_preference_loss,
    linear_token_stats,
    sequence_loss,
    sequence_shard,
    token_stats,
)
from entropy_po.testing import allocations

N, D, V = 61, 16, 301
CU = torch.tensor([0, 10, 17, 17, 30, 45, 61])  # one chosen sequence is empty
OBJECTIVE = EntropyObjective.hdpo(beta=0.1, alpha=1.2)
PADDED = 40  # ids at the end of the vocabulary that are no label
SMALL = 40_000  # bytes: tiles of a few rows
BOUND = 2e-6  # relative norm of an fp32 difference


@cache
def mesh():
    """Four ranks as 2 x 2. One dimension alone is two groups of two, which run side by side."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("vocab", "sequence"))


def group_of(size):
    if size in (1, dist.get_world_size()):
        return None if size == 1 else dist.group.WORLD
    return mesh().get_group("vocab")


def on_its_gpu(case, *args, **kwargs):
    """One of the cases below, its tensors made on the rank's own device."""
    with torch.device("cuda", dist.get_rank()):
        return globals()[case](*args, **kwargs)


def place_in(group):
    return (0, 1) if group is None else (group.rank(), group.size())


def problem(dtype=torch.float32, n=N, d=D, v=V):
    """hidden [n, d], weight [v, d], bias [v], labels [n]: the first and the last id among them, every fourth ignored."""
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d) / d**0.5, torch.randn(v)
    labels = torch.randint(v - PADDED if v > PADDED else v, (n,))
    labels[1], labels[2] = 0, max(v - PADDED, 1) - 1
    labels[::4] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def transform_of(name, labels, v=V):
    n = len(labels)
    keep = (torch.rand(n, v) < 0.7).scatter_(1, labels.clamp_min(0)[:, None], True)
    return {
        "plain": {},
        "scalars": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3},
        "row temperature": {"temperature": 0.5 + torch.rand(n)},
        "keep mask": {"keep_mask": keep, "softcap": 6.0},
        "padding": {"keep_mask": torch.arange(v) < v - PADDED},
    }[name]


def shard_of(v, kind, group):
    """This rank's columns of v."""
    rank, size = place_in(group)
    if size == 1:
        return slice(0, v)
    even = -(-v // size)
    stops = {
        "even": [min(even * (i + 1), v) for i in range(size)],  # torch.chunk: the last is smaller
        "uneven": [7 + (v - 7) * i // (size - 1) for i in range(size)],
        "one is empty": [v // 2 if i < size - 1 else v for i in range(size)] if size > 2 else [v, v],
    }[kind]
    return slice(stops[rank - 1] if rank else 0, stops[rank])


def sharded(transform, cols):
    keep = transform.get("keep_mask")
    return transform if keep is None else {**transform, "keep_mask": keep[..., cols]}


def with_rows(transform, rows):
    """The transform of some rows."""
    parts = dict(transform)
    if torch.is_tensor(parts.get("temperature")):
        parts["temperature"] = parts["temperature"][rows]
    if "keep_mask" in parts and parts["keep_mask"].ndim > 1:
        parts["keep_mask"] = parts["keep_mask"][rows]
    return parts


def leaves(*tensors, trained=(True, True, True)):
    return [x.detach().clone().requires_grad_(t) for x, t in zip(tensors, trained, strict=True)]


def assert_close(ours, whole, what, bound=BOUND, of=None):
    """`of`: the tensor that both are a part of. A narrow shard of a gradient in which chosen and rejected tokens cancel has
    the rounding of the whole (seen: 7 entries of dbias with 1/140 of its norm), so the error is relative to that."""
    assert ours.shape == whole.shape and ours.dtype == whole.dtype, what
    if ours.dtype == torch.bool or ours.dtype == torch.int64:
        assert torch.equal(ours, whole), what
        return
    error = (ours.double() - whole.double()).norm() / (whole if of is None else of).double().norm().clamp_min(1e-30)
    assert error <= bound, f"{what}: relative error {error:.2e}"


def assert_same_bits(group, **tensors):
    """On every rank of the group."""
    for name, x in tensors.items():
        gathered = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(gathered, x.detach().contiguous(), group=group)
        assert all(torch.equal(x.detach(), other) for other in gathered), name


def assert_stats(ours, whole):
    for name, x, y in zip(whole._fields, ours, whole, strict=True):
        assert (x is None) == (y is None), name
        if name == "mean_logit" and y is not None:  # near 0: it has the digits of the logits
            assert (x - y).norm() <= BOUND * whole.lse.norm(), name
        elif y is not None:
            assert_close(x, y, name)


# ---- statistics ----


def linear_stats(size, kind, transform, outputs=TokenStats._fields, dtype=torch.float32, bound=BOUND, backend=None):
    group, (hidden, weight, bias, labels) = group_of(size), problem(dtype)
    cols, transform = shard_of(V, kind, group), transform_of(transform, labels)
    g_logp, g_ent = torch.randn(N), torch.randn(N)
    results = []
    for part, where in ((slice(None), None), (cols, group)):
        inputs = leaves(hidden, weight[part], bias[part])
        stats = linear_token_stats(
            inputs[0], inputs[1], labels, bias=inputs[2], outputs=outputs, workspace_bytes=SMALL, vocab_group=where,
            backend=backend, **sharded(transform, part),
        )  # fmt: skip
        loss = 0
        for values, upstream in ((stats.logps, g_logp), (stats.entropy, g_ent)):
            loss = loss + (values.masked_fill(labels == -100, 0) * upstream).sum() if values is not None else loss
        loss.backward()
        results.append((stats, *(x.grad for x in inputs)))
    (whole, *exact), (ours, *grads) = results
    assert_stats(ours, whole)
    assert_close(grads[0], exact[0], "dH", bound)
    assert_close(grads[1], exact[1][cols], "dW", bound, of=exact[1])
    assert_close(grads[2], exact[2][cols], "dbias", bound, of=exact[2])
    if kind != "uneven":
        assert_same_bits(group, dH=grads[0], **{k: v for k, v in ours._asdict().items() if v is not None})


def logit_stats(size, kind, transform, inplace):
    group, (hidden, weight, _, labels) = group_of(size), problem()
    cols, transform = shard_of(V, kind, group), transform_of(transform, labels)
    logits, g_logp, g_ent = hidden @ weight.t(), torch.randn(N), torch.randn(N)
    results = []
    for part, where in ((slice(None), None), (cols, group)):
        leaf = logits[:, part].clone().requires_grad_()
        stats = token_stats(
            leaf * 1, labels, outputs=TokenStats._fields, vocab_group=where, inplace_backward=inplace,
            **sharded(transform, part),
        )  # fmt: skip
        ((stats.logps.masked_fill(labels == -100, 0) * g_logp).sum() + (stats.entropy * g_ent).sum()).backward()
        results.append((stats, leaf.grad))
    assert_stats(results[1][0], results[0][0])
    assert_close(results[1][1], results[0][1][:, cols], "dlogits", of=results[0][1])


def nothing_to_compute(size):
    """No rows, and rows that are all ignored: every rank still leaves with results of the right shape."""
    group = group_of(size)
    for n, label in ((0, 0), (5, -100)):
        inputs = leaves(torch.randn(n, D), torch.randn(7, D), torch.randn(7))
        stats = linear_token_stats(
            inputs[0], inputs[1], torch.full((n,), label), bias=inputs[2], outputs=TokenStats._fields, vocab_group=group
        )
        assert all(x.shape == (n,) and not x.any() for x in stats)
        (stats.logps.sum() + stats.entropy.sum()).backward()
        assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


def dtensor_weights(size):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    tensors, weights = problem(), []
    hidden, weight, bias, labels = tensors
    axis = mesh()["vocab"] if size == 2 else init_device_mesh("cpu", (4,))
    group = axis.get_group()
    exact = leaves(hidden, weight, bias)
    linear_token_stats(exact[0], exact[1], labels, bias=exact[2]).logps.sum().backward()
    placed = [distribute_tensor(x, axis, [Shard(0)]).requires_grad_() for x in (weight, bias)]
    ours = hidden.clone().requires_grad_()
    linear_token_stats(ours, placed[0], labels, bias=placed[1], vocab_group=group).logps.sum().backward()
    assert_close(ours.grad, exact[0].grad, "dH")
    for name, x, truth in (("dW", placed[0], exact[1]), ("dbias", placed[1], exact[2])):
        assert x.grad.placements == (Shard(0),), name
        assert_close(x.grad.full_tensor(), truth.grad, name)
    weights += [(placed[0], None, "full_tensor"), (distribute_tensor(weight, axis, [Replicate()]), group, "Shard")]
    for wrong, where, message in weights:
        try:
            linear_token_stats(hidden, wrong, labels, vocab_group=where)
        except ValueError as error:
            assert "weight" in str(error) and message in str(error)
        else:
            raise AssertionError(f"no error that speaks of {message}")


# ---- losses over sequences ----


def parts_of(vocab, sequence, kind="even", split="even"):
    """(group over the vocabulary, this rank's columns, group over the sequences, its rows, its offsets)."""
    vocab_group = None if vocab == 1 else group_of(vocab)
    if vocab == 2 and sequence == 2:
        sequence_group = mesh().get_group("sequence")
    else:
        sequence_group = None if sequence == 1 else group_of(sequence)
    cols = shard_of(V, kind, vocab_group)
    rank, size = place_in(sequence_group)
    rows, cu = sequence_shard(CU, rank, size)
    if split == "any":  # rows dealt at random, so that some parts are long and some empty
        owner = torch.randint(size, (N,)).masked_fill(torch.arange(N) < 17, size - 1)
        rows = (owner == rank).nonzero()[:, 0]
        cu = torch.searchsorted(rows, CU)
    return vocab_group, cols, sequence_group, rows, cu


def preference(
    vocab, sequence, strategy, transform="plain", kind="even", split="even", workspace=SMALL, reference="logps",
    trained=(True, True, True), dtype=torch.float32, bound=BOUND, **options,
):  # fmt: skip
    if isinstance(workspace, list):
        workspace = workspace[dist.get_rank()]
    hidden, weight, bias, labels = problem(dtype)
    transform = transform_of(transform, labels)
    ref_logps, pair_weights = torch.randn(3, 2) * 3 - 50, torch.rand(3)
    ref_hidden, ref_weight = torch.randn(N, 8, dtype=dtype), torch.randn(V, 8, dtype=dtype)
    everything = None, slice(None), None, slice(None), CU
    results = []
    for vocab_group, cols, sequence_group, rows, cu in (everything, parts_of(vocab, sequence, kind, split)):
        inputs = leaves(hidden[rows], weight[cols], bias[cols], trained=trained)
        ref = {"ref_logps": ref_logps}
        if reference == "hidden":
            ref = {"ref_hidden_states": ref_hidden[rows], "ref_weight": ref_weight[cols]}
        output = linear_preference_loss(
            inputs[0], inputs[1], labels[rows], cu, bias=inputs[2], objective=OBJECTIVE, pair_weights=pair_weights,
            strategy=strategy, workspace_bytes=workspace, vocab_group=vocab_group, sequence_group=sequence_group,
            **ref, **options, **with_rows(sharded(transform, cols), rows),
        )  # fmt: skip
        if any(trained):
            (output.loss * 3).backward()
        results.append((output, *(x.grad for x in inputs)))
    (whole, *exact), (ours, *grads) = results
    assert strategy == "auto" or ours.strategy == strategy or not any(trained)
    for name in ("loss", "losses", "margins", "logps", "ref_logps", "rewards", "entropy", "lengths"):
        assert_close(getattr(ours, name), getattr(whole, name), name)
    assert_close_gradients(grads, exact, cols, rows, sequence_group, bound)
    if any(trained):
        shared = {name: getattr(ours, name) for name in ("loss", "logps", "entropy")}
        assert_same_bits(dist.group.WORLD if vocab * sequence == 4 else vocab_group or sequence_group, **shared)
    return ours.strategy


def assert_close_gradients(grads, exact, cols, rows, sequence_group, bound=BOUND):
    for name, ours, whole in zip(("dH", "dW", "dbias"), grads, exact, strict=True):
        assert (ours is None) == (whole is None), name
        if whole is None:
            continue
        if name != "dH" and sequence_group is not None:
            dist.all_reduce(ours, group=sequence_group)  # the rows' parts, as a model's other gradients are summed
        assert_close(ours, whole[rows] if name == "dH" else whole[cols], name, bound, of=whole)


def orpo(batch, ratio=0.3):
    mean = batch.logps / batch.lengths[batch.sequences].clamp_min(1)
    odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))
    return (-mean[0::2] - ratio * torch.nn.functional.logsigmoid(odds[0::2] - odds[1::2])).sum()


def with_entropy(batch):
    margin = batch.logps[0::2] - batch.logps[1::2]
    return (-torch.nn.functional.logsigmoid(0.1 * margin) - 0.05 * batch.entropy.view(-1, 2).sum(1)).sum()


def tokens_alone(batch):
    weight = 1 + batch.sequence_ids
    return -((batch.token_logps.exp() * weight + 0.1 * batch.token_entropy) / batch.lengths[batch.sequence_ids]).sum()


RULES = {"orpo": (orpo, 2, False), "entropy": (with_entropy, 2, True), "tokens": (tokens_alone, 0, True)}


def own_loss(vocab, sequence, strategy, rule, transform="plain", split="even"):
    loss_fn, coupled, wants_entropy = RULES[rule]
    hidden, weight, bias, labels = problem()
    transform = transform_of(transform, labels)
    everything = None, slice(None), None, slice(None), CU
    results = []
    for vocab_group, cols, sequence_group, rows, cu in (everything, parts_of(vocab, sequence, split=split)):
        inputs = leaves(hidden[rows], weight[cols], bias[cols])
        output = sequence_loss(
            inputs[0], inputs[1], labels[rows], cu, loss_fn, coupled=coupled, bias=inputs[2], strategy=strategy,
            outputs=("logps", "entropy") if wants_entropy else ("logps",), workspace_bytes=SMALL,
            vocab_group=vocab_group, sequence_group=sequence_group, **with_rows(sharded(transform, cols), rows),
        )  # fmt: skip
        output.loss.backward()
        results.append((output, *(x.grad for x in inputs)))
    (whole, *exact), (ours, *grads) = results
    assert strategy == "auto" or ours.strategy == strategy
    for name in ("loss", "logps", "lengths"):
        assert_close(getattr(ours, name), getattr(whole, name), name)
    assert_close(ours.token_logps, whole.token_logps[rows], "token_logps")
    assert_close_gradients(grads, exact, cols, rows, sequence_group)


# ---- what goes over the wire, and what lies in memory ----


class Wire:
    """Counts the collectives of this process and the bytes that each puts in."""

    def __enter__(self):
        self.calls, self.bytes = Counter(), Counter()
        self.patches = [mock.patch.object(dist, name, self._counting(name)) for name in ("all_gather", "all_reduce")]
        forbidden = [
            name for name in dir(dist) if name.startswith(("reduce", "broadcast", "gather", "scatter", "send"))
        ]
        forbidden += [name for name in dir(dist) if name.startswith(("all_to", "all_gather_", "_all_gather", "isend"))]
        self.patches += [mock.patch.object(dist, name, None) for name in forbidden if callable(getattr(dist, name))]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()

    def _counting(self, name):
        original = getattr(dist, name)

        def counted(*args, **kwargs):
            tensor = args[1] if name == "all_gather" else args[0]
            self.calls[name] += 1
            self.bytes[name] += tensor.nbytes
            return original(*args, **kwargs)

        return counted


def wire(size, n, d, v, call, strategy="auto", workspace=None):
    """(collectives, bytes put in) by name, of one forward and backward."""
    group = group_of(size)
    hidden, weight, _, labels = problem(n=n, d=d, v=v)
    inputs = leaves(hidden, weight[shard_of(v, "even", group)], trained=(True, True))
    with Wire() as wire:
        if call == "linear_token_stats":
            stats = linear_token_stats(*inputs, labels, workspace_bytes=workspace, vocab_group=group)
            (stats.logps.sum() + stats.entropy.sum()).backward()
        else:
            offsets = torch.linspace(0, n, 9).long()
            linear_preference_loss(
                *inputs, labels, offsets, objective=EntropyObjective.qempo(1.0), vocab_group=group, strategy=strategy,
                workspace_bytes=workspace,
            ).loss.backward()  # fmt: skip
    return dict(wire.calls), dict(wire.bytes)


def memory(size, n, d, v, strategy):
    """Peak bytes of a forward and backward beside its inputs, with dH's [n, d] taken off."""
    group = group_of(size)
    hidden, weight, _, labels = problem(n=n, d=d, v=v)
    cols = shard_of(v, "even", group)
    inputs, offsets = leaves(hidden, weight[cols], trained=(True, True)), torch.linspace(0, n, 9).long()

    def call():
        linear_preference_loss(
            *inputs, labels, offsets, objective=EntropyObjective.qempo(1.0), vocab_group=group, strategy=strategy,
            workspace_bytes=4 * 128 * (cols.stop - cols.start),
        ).loss.backward()  # fmt: skip

    call()  # the first call's own allocations: gradients stay, so drop them
    for x in inputs:
        x.grad = None
    return allocations(call)[0] - hidden.nbytes


def twice(size, strategy):
    """The same call has the same bits again."""
    group, (hidden, weight, _, labels) = group_of(size), problem()
    cols, seen = shard_of(V, "even", group), []
    for _ in range(2):
        inputs = leaves(hidden, weight[cols], trained=(True, True))
        output = linear_preference_loss(
            *inputs, labels, CU, objective=EntropyObjective.qempo(0.5), vocab_group=group, strategy=strategy,
            workspace_bytes=SMALL,
        )  # fmt: skip
        output.loss.backward()
        seen.append((output.loss.detach(), output.logps, *(x.grad for x in inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ---- errors ----


def disagreement(what):
    """The message that every rank gets."""
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, _, labels = problem()
    cols, options, preference = shard_of(V, "even", group), {}, {}
    dtype = torch.float32
    odd = rank == 1
    if what == "rows":
        hidden, labels = (x[: N - odd] for x in (hidden, labels))
    elif what == "labels":
        labels = labels.roll(int(odd))
    elif what == "temperature":
        options["temperature"] = 0.9 if odd else 1.0
    elif what == "outputs":
        options["outputs"] = ("logps",) if odd else ("logps", "entropy")
    elif what == "dtype":
        dtype = torch.bfloat16 if odd else torch.float32
    elif what == "label out of range":
        labels[3] = V
    elif what == "strategy":
        preference = {"strategy": "deferred" if odd else "resident"}
    elif what == "sequences":
        preference = {"cu_seqlens": torch.tensor([0, 20, N]) if odd else CU}
    elif what == "ref_logps":  # the sums of the rank's own rows, say
        preference = {"ref_logps": torch.full((3, 2), -5.0 - rank)}
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    try:
        if preference:
            cu = preference.pop("cu_seqlens", CU)
            over_rows = what in ("sequences", "ref_logps")
            axis = {"sequence_group": group} if over_rows else {"vocab_group": group}
            weight = weight if over_rows else weight[cols]
            objective = OBJECTIVE if what == "ref_logps" else EntropyObjective.qempo(1.0)
            linear_preference_loss(hidden, weight, labels, cu, objective=objective, **axis, **preference)
        else:
            linear_token_stats(hidden, weight[cols], labels, vocab_group=group, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def compiled(size):
    """One graph, also with a group: only its name is in it."""
    group, (hidden, weight, _, labels) = group_of(size), problem()
    cols = shard_of(V, "even", group)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, weight):
        stats = linear_token_stats(hidden, weight, labels, vocab_group=group)
        return (stats.logps - 0.1 * stats.entropy).sum()

    inputs, whole = leaves(hidden, weight[cols], trained=(True, True)), leaves(hidden, weight, trained=(True, True))
    loss(*inputs).backward()
    stats = linear_token_stats(*whole, labels)
    (stats.logps - 0.1 * stats.entropy).sum().backward()
    assert_close(inputs[0].grad, whole[0].grad, "dH")
    assert_close(inputs[1].grad, whole[1].grad[cols], "dW")


def verl_linear_cross_entropy(size):
    """The adapter for verl: whole results, the shard's gradient of the weight, and gradients of hidden that sum to the whole."""
    from entropy_po.integrations.verl import linear_cross_entropy

    group = group_of(size)
    rank, size = place_in(group)
    hidden, weight, _, labels = problem(v=size * 64)
    whole = [x.clone().requires_grad_() for x in (hidden, weight)]
    mine = [x.clone().requires_grad_() for x in (hidden, weight.chunk(size)[rank])]
    expected = linear_cross_entropy(*whole, labels, 0.7)
    ours = linear_cross_entropy(*mine, labels, 0.7, "none", group)
    for value, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    for logps, entropy in (expected, ours):
        (logps.sum() - 0.3 * entropy.sum()).backward()
    total = mine[0].grad.clone()
    dist.all_reduce(total, group=group)
    for grad, truth in ((total, whole[0].grad), (mine[1].grad, whole[1].grad.chunk(size)[rank])):
        assert (grad - truth).norm() <= 5 * BOUND * truth.norm()
