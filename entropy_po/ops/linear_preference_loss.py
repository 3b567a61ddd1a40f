"""`linear_preference_loss`: H-DPO, DPO, SPL and QEMPO from hidden states and the lm_head weight, in three products.

A pair loss sees the model through one number per pair, the margin z. So all of a pair's gradients are one unknown scalar
c = a dloss/dz times what is known while its logits are there: + c for chosen tokens, - c for rejected ones. The forward
makes logits, their gradient, dH and dW tile by tile and multiplies c in at the end; the backward only scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from entropy_po.arguments import non_negative
from entropy_po.objective import EntropyObjective, PairLoss, check_smoothing
from entropy_po.ops import checks, linear_token_stats, parallel, schema, sequences
from entropy_po.ops.lm_head import LmHead
from entropy_po.ops.sequences import GradientSums, RowTiles, Sequences, VocabSums
from entropy_po.plan import Choice, Group, SequencePlan, Strategy, check_strategy, row_slices
from entropy_po.types import IfAsked, exact_logps, state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from entropy_po.tiles import BackendName

schema.LIBRARY.define(
    "linear_preference_loss(Tensor hidden_states, Tensor weight, Tensor? bias, Tensor labels, Tensor cu_seqlens, "
    "Tensor? ref_logps, Tensor? ref_hidden_states, Tensor? ref_weight, Tensor? ref_bias, Tensor? pair_weights, "
    f"{schema.OPTIONS}, float policy_coef, float ref_coef, str loss, float label_smoothing, float nll_coef, bool mean, "
    "str strategy, int? workspace_bytes, str sequence_group, bool[] needs) "
    f"-> ({', '.join(['Tensor'] * 11)})",
    tags=(torch.Tag.cudagraph_unsafe,),  # where sequences lie is asked of the device
)


class PreferenceOutput(NamedTuple):
    """What `linear_preference_loss` returns, for B pairs. Only `loss` is differentiable. Log-probs and entropies are sums
    over a sequence's tokens, in nats; [B, 2] holds the chosen sequence first."""

    loss: Tensor  # scalar
    losses: Tensor  # [B], before weights and reduction
    margins: Tensor  # [B], a [log pi(w) - log pi(l)] - b [log ref(w) - log ref(l)]
    logps: Tensor  # [B, 2]
    ref_logps: IfAsked  # [B, 2]; None where b = 0
    rewards: Tensor  # [B, 2], a log pi - b log ref
    entropy: Tensor  # [B, 2]
    lengths: Tensor  # [B, 2], int64, tokens with a label
    choice: Tensor  # int64, on the CPU: `strategy` and `reason` read it

    @property
    def accuracy(self) -> Tensor:
        """[B] bool: the chosen sequence has the larger implicit reward."""
        return self.margins > 0

    @property
    def strategy(self) -> str:
        """How the gradients were made: "resident", "deferred" or "recompute"."""
        return Choice(*self.choice.tolist()).name

    @property
    def reason(self) -> str:
        """Why that strategy."""
        return Choice(*self.choice.tolist()).reason


def linear_preference_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    objective: EntropyObjective,
    ref_logps: Tensor | None = None,
    ref_hidden_states: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    loss: PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
    pair_weights: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    strategy: Strategy = "auto",
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    backend: BackendName | None = None,
) -> PreferenceOutput:
    """The loss of preference pairs, with gradients for hidden states, weight and bias, at three vocabulary products.

    For pair i with summed log-probs log pi and the objective's coefficients (a, b),

        z_i    = a [log pi(w_i) - log pi(l_i)] - b [log ref(w_i) - log ref(l_i)]
        loss_i = pair_loss(z_i) + nll_coef * -log pi(w_i) / |w_i|
        loss   = sum_i pair_weights_i loss_i, divided by B for the mean

    The gradients are made in this call and only scaled in the backward: two products where the head is frozen, three where
    it is trained (`recompute`: one more). Without grad mode, or with nothing to train, it is one pass over the logits.

    Args:
        hidden_states: [N, D], fp32 / bf16 / fp16 / fp64, of the packed sequences chosen_0, rejected_0, chosen_1, ...
        weight: [V, D], the same dtype and device; under autocast both are cast, as `torch.nn.functional.linear` does.
        labels: [N], int64, already shifted. Rows with `ignore_index`, a prompt's for example, count for nothing.
        cu_seqlens: [2B + 1], int32 or int64: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. Best on the CPU: its
            values are needed on the host.
        objective: the coefficients; H-DPO is EntropyObjective.hdpo(beta, alpha).
        ref_logps: [B, 2], summed reference log-probs; needed where b > 0, unless `ref_hidden_states` is given.
        ref_hidden_states: [N, D'], of the reference at the same rows; its log-probs are then computed here, tile by tile,
            without gradient, with `ref_weight` [V, D'] and `ref_bias`. Without a ref_weight it is the policy's, and its bias unless
            there is a ref_bias.
        loss, label_smoothing: as in `EntropyObjective.pair_loss`.
        nll_coef: >= 0, weight of the mean NLL of the chosen sequence: an anchor against falling log-probs.
        pair_weights: [B], constants. A pair of weight 0 takes no part, even if its loss is infinite.
        reduction: "mean" or "sum".
        workspace_bytes: bound on what lives beside inputs, gradients and the fp32 sum of a half-precision weight's
            gradient (of the hidden states' too over a vocab_group, by "recompute", in fp16, where both are kept in fp32 until the
            loss is scaled, and on a CPU without bf16 products); None for 256 MiB on a
            CPU and a quarter of the free memory on a GPU, with a frozen head for 64 MiB and 1 GiB.
        strategy: "auto", "resident", "deferred" or "recompute" (`entropy_po.plan.plan_sequences`); a name is obeyed.
        vocab_group: the ranks that split the vocabulary, as in `linear_token_stats`; ref_weight is split as weight is.
        sequence_group: the ranks that split the sequences (context parallelism), None for none: each calls this with its
            own rows of every pair, any of them (`sequence_shard`), and cu_seqlens [2B + 1] of those. Labels are shifted
            before they are split; ref_logps and pair_weights are whole, and the same on all ranks. All get the same
            results; the gradients are those of the rank's own rows, so that of the weight is still to be summed over the
            group, with all others of the model.
        bias, temperature, softcap, logit_scale, keep_mask, ignore_index, backend: as in `linear_token_stats`.

    Returns:
        PreferenceOutput. `loss` is differentiable once, by hidden_states, weight and bias.

    Raises:
        ValueError: a shape, dtype, device or range that can never work; the message names the argument. Ranks of a group
            that were called differently.

    CUDA graphs:
        Not captured: which tiles there are follows from where the sequences and their labels lie, which is asked of the device.
        torch.compile knows and leaves the call out of its graphs.

    Numerics:
        Tile values and sums of products are fp32 whatever the operands are; log-probs of sequences, margins and losses are summed in
        fp64. All strategies agree to rounding. The bf16 dH of a deferred pair is rounded as it is kept, and again as it is scaled.

    Example:
        >>> hidden, head = torch.randn(9, 16, requires_grad=True), torch.nn.Linear(16, 50, bias=False)
        >>> labels, cu_seqlens = torch.randint(50, (9,)), torch.tensor([0, 4, 9])
        >>> objective, ref_logps = EntropyObjective.hdpo(beta=0.1, alpha=1.1), torch.tensor([[-17.0, -18.0]])
        >>> output = linear_preference_loss(
        ...     hidden, head.weight, labels, cu_seqlens, objective=objective, ref_logps=ref_logps
        ... )
        >>> output.loss.backward()
        >>> output.strategy
        'resident'

    Source: arXiv 2411.07595 (H-DPO), arXiv 2602.15894 (QEMPO).
    """
    weight, bias, ref_weight, ref_bias = parallel.local_shards(
        vocab_group, weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias
    )
    hidden_states, weight, transform = checks.check_linear(
        hidden_states, weight, labels, bias, temperature, softcap, logit_scale, keep_mask, workspace_bytes
    )
    num_pairs = _check_pairs(cu_seqlens, objective, ref_logps, ref_hidden_states, pair_weights, hidden_states.device)
    label_smoothing = check_smoothing(loss, label_smoothing)
    check_strategy(strategy)
    nll_coef = non_negative("nll_coef", nll_coef, "0 for no anchor")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'; `losses` holds the value of each pair.")
    if not objective.needs_reference:
        ref_logps = ref_hidden_states = None
    if ref_hidden_states is None:
        ref_weight = ref_bias = None  # they say how to read the hidden states
    else:
        names = "ref_hidden_states", "weight" if ref_weight is None else "ref_weight"
        if ref_weight is None:
            ref_weight = weight.detach()
            ref_bias = bias.detach() if ref_bias is None and bias is not None else ref_bias
        checks.check_matrix(names[0], ref_hidden_states, "[N, D']")
        checks.check_device(names[0], ref_hidden_states, hidden_states.device)
        ref_hidden_states, ref_weight = checks.check_head(ref_hidden_states, ref_weight, names)
        if len(ref_hidden_states) != len(hidden_states):
            raise ValueError(
                f"ref_hidden_states has {len(ref_hidden_states)} rows, hidden_states has {len(hidden_states)}; give the same rows."
            )
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"ref_weight has {ref_weight.shape[0]} rows, weight has {weight.shape[0]}: one vocabulary, please."
            )
        checks.check_bias("ref_bias", ref_bias, ref_weight.shape[0], ref_hidden_states.device)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_states, weight, bias)]
    results = torch.ops.entropy_po.linear_preference_loss(
        hidden_states, weight, bias, labels, cu_seqlens, None if ref_logps is None else ref_logps.detach().reshape(-1),
        ref_hidden_states, ref_weight, ref_bias, None if pair_weights is None else pair_weights.detach(),
        *schema.flat_options(transform, ignore_index, ("logps", "entropy"), backend, vocab_group),
        objective.policy_coef, objective.ref_coef, loss, label_smoothing, nll_coef, reduction == "mean",
        strategy, workspace_bytes, parallel.group_name("sequence_group", sequence_group), needs,
    )  # fmt: skip
    total, losses, margins, logps, entropy, ref, lengths, choice = results[:8]
    has_reference = objective.needs_reference
    ref = ref.view(num_pairs, 2) if has_reference else None
    logps = logps.view(num_pairs, 2)
    return PreferenceOutput(
        total,
        losses,
        margins,
        logps,
        ref,
        objective.implicit_reward(logps, ref),
        entropy.view(num_pairs, 2),
        lengths.view(num_pairs, 2),
        choice,
    )


def _check_pairs(
    cu_seqlens: Tensor,
    objective: EntropyObjective,
    ref_logps: Tensor | None,
    ref_hidden_states: Tensor | None,
    pair_weights: Tensor | None,
    device: torch.device,
) -> int:
    checks.check_offsets(cu_seqlens)
    if cu_seqlens.numel() % 2 == 0:
        raise ValueError(
            f"cu_seqlens has {cu_seqlens.numel()} entries, for {cu_seqlens.numel() - 1} sequences; pairs need 2B + 1."
        )
    num_pairs = cu_seqlens.numel() // 2
    if not isinstance(objective, EntropyObjective):
        raise ValueError(
            f"objective must be an EntropyObjective, got {objective!r}; EntropyObjective.hdpo(0.1, 1.1) is one."
        )
    if objective.needs_reference:
        if (ref_logps is None) == (ref_hidden_states is None):
            raise ValueError(
                f"ref_coef={objective.ref_coef:g} needs a reference: give one of ref_logps and ref_hidden_states, "
                "or use EntropyObjective.qempo."
            )
        if ref_logps is not None:
            checks.check_matrix("ref_logps", ref_logps, "[B, 2]")
            checks.check_device("ref_logps", ref_logps, device)
            if tuple(ref_logps.shape) != (num_pairs, 2):
                raise ValueError(
                    f"ref_logps has shape {tuple(ref_logps.shape)}, expected ({num_pairs}, 2): chosen, rejected."
                )
    if pair_weights is not None:
        checks.check_matrix("pair_weights", pair_weights, "[B]")
        checks.check_device("pair_weights", pair_weights, device)
        if tuple(pair_weights.shape) != (num_pairs,):
            raise ValueError(f"pair_weights has shape {tuple(pair_weights.shape)}, expected ({num_pairs},).")
    return num_pairs


@dataclass(frozen=True)
class _PairLoss:
    """The loss of pairs as the operator needs it: its value, and its derivatives by a pair's log-probs."""

    objective: EntropyObjective
    loss: PairLoss
    label_smoothing: float
    nll_coef: float
    ref_logps: Tensor | None  # [2B], fp64
    weights: Tensor  # [B], fp64, divided by B for the mean

    def __call__(
        self, logps: Tensor, lengths: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, margins, scalars) of the pairs in sequences [start, stop), from log-probs in fp64; the scalar is the
        unknown one, a dloss/dz."""
        stop = 2 * len(self.weights) if stop is None else stop
        chosen, rejected = logps[0::2], logps[1::2]
        ref: tuple[Tensor, Tensor] | tuple[None, None] = None, None
        if self.ref_logps is not None:
            ref = self.ref_logps[start:stop:2], self.ref_logps[start + 1 : stop : 2]
        margins = self.objective.margin(chosen, rejected, *ref)
        losses, slope = self.objective.pair_loss_and_slope(margins, self.loss, self.label_smoothing)
        if self.nll_coef:
            losses = losses - self._nll_per_token(lengths) * chosen
        return losses, margins, self._weighted(slope, start, stop) * self.objective.policy_coef

    def total(self, losses: Tensor) -> Tensor:
        """The loss of all pairs, from their own."""
        return self._weighted(losses, 0, 2 * len(self.weights)).sum()

    def anchors(self, lengths: Tensor, start: int, stop: int) -> Tensor:
        """The known weight of each pair's chosen log-prob; 0 without an anchor."""
        return self.weights[start // 2 : stop // 2] * self._nll_per_token(lengths)

    def upstream(self, logps: Tensor, lengths: Tensor, start: int, stop: int) -> Tensor:
        """dloss/dlogp of sequences [start, stop)."""
        scalars = self(logps, lengths, start, stop)[2]
        return torch.stack([scalars - self.anchors(lengths, start, stop), -scalars], dim=1).view(-1)

    def _weighted(self, values: Tensor, start: int, stop: int) -> Tensor:
        weights = self.weights[start // 2 : stop // 2]
        return (weights * values).masked_fill(weights == 0, 0)  # even where a value is infinite

    def _nll_per_token(self, lengths: Tensor) -> Tensor:
        return self.nll_coef / lengths[0::2].clamp_min(1).double()


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor,  # given with ref_hidden
    ref_bias: Tensor | None,
    pair_weights: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *flat, a, b, loss, label_smoothing, nll_coef, mean, strategy, workspace_bytes, sequence_group, needs = rest
    options, objective = tuple(flat), EntropyObjective(a, b)
    num_pairs = cu_seqlens.numel() // 2
    # what the exchanges of a group follow from must be the same on all of its ranks
    shared = {"loss": (a, b, loss, label_smoothing, nll_coef, mean), "strategy": strategy, "needs_grad": needs}
    shared |= {"ref_logps": ref_logps, "pair_weights": pair_weights}
    head = LmHead(hidden, weight, bias, labels, options, **shared)
    seqs = Sequences(head, cu_seqlens, sequence_group, **shared)
    row_by_row = needs == [True, False, False]
    plan = sequences.plan_for(
        head, seqs, needs, strategy, workspace_bytes, row_by_row, coupled=2, can_defer=True, anchored=nll_coef > 0
    )
    budget = sequences.any_shape_budget(head, plan.choice.workspace_bytes, strategy)
    if ref_hidden is not None:
        ref_head = LmHead(ref_hidden, ref_weight, ref_bias, labels, (*options[:6], ["logps"], *options[7:]))
        ref_budget = sequences.any_shape_budget(ref_head, plan.choice.workspace_bytes, strategy)
        ref_logps = _reference_logps(ref_head, seqs, ref_budget)
        del ref_head  # its tile, before the policy's is made
    if pair_weights is None:
        pair_weights = hidden.new_ones(num_pairs, dtype=torch.float64)
    pair_loss = _PairLoss(
        objective,
        loss,
        label_smoothing,
        nll_coef,
        None if ref_logps is None else ref_logps.double(),
        pair_weights.double() / (max(num_pairs, 1) if mean else 1),
    )
    if plan.choice.name == "recompute":
        token_logps, token_entropy, grads = _recompute(head, seqs, pair_loss, budget, needs)
    elif plan.choice.name == "deferred" and row_by_row:
        token_logps, token_entropy, grads = _two_products(head, seqs, pair_loss, budget)
    else:
        token_logps, token_entropy, grads = _three_products(head, seqs, plan, pair_loss, needs)
    logps = seqs.sums(token_logps)
    losses, margins, _ = pair_loss(logps, seqs.lengths)
    out = state_dtype(hidden.dtype)
    return (
        pair_loss.total(losses).to(out),
        losses.to(out),
        margins.to(out),
        logps.to(out),
        seqs.sums(token_entropy).to(out),
        hidden.new_empty(0, dtype=out) if ref_logps is None else ref_logps.to(out, copy=True),
        seqs.lengths,
        torch.tensor(plan.choice, dtype=torch.int64),
        *grads,
    )


def _reference_logps(head: LmHead, seqs: Sequences, workspace_bytes: int) -> Tensor:
    """[2B] in fp64, tile by tile and without gradient."""
    return seqs.sums(exact_logps(linear_token_stats.fold(head, workspace_bytes)))


def _recompute(
    head: LmHead, seqs: Sequences, pair_loss: _PairLoss, workspace_bytes: int, needs: list[bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Logits once for the log-probs, and once more for the gradients; tiles of any shape."""
    state = linear_token_stats.fold(head, workspace_bytes)
    logps, entropy = _logps_and_entropy(head, state)
    grads: tuple[Tensor, ...] = tuple(head.hidden.new_empty(0) for _ in needs)
    if any(needs):
        upstream = pair_loss.upstream(seqs.sums(logps), seqs.lengths, 0, len(seqs))
        g_logp = seqs.per_row(upstream).to(head.arithmetic)
        grads = linear_token_stats.gradients(head, workspace_bytes, state, g_logp, None, needs, to_be_scaled=True)
    return logps, entropy, grads


def _logps_and_entropy(head: LmHead, state: Tensor) -> tuple[Tensor, Tensor]:
    """[K] each, of the kept rows; log-probs in fp64."""
    entropy = head.stats(state, ("entropy",)).entropy
    assert entropy is not None
    return exact_logps(state), entropy


def _two_products(
    head: LmHead, seqs: Sequences, pair_loss: _PairLoss, workspace_bytes: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """With a frozen head: logits once, in tiles of any shape; the gradients of log-probs are scaled when the loss is known."""
    state, hidden_sum = linear_token_stats.fold_and_gradient(head, workspace_bytes)
    logps, entropy = _logps_and_entropy(head, state)
    upstream = pair_loss.upstream(seqs.sums(logps), seqs.lengths, 0, len(seqs))
    rows = hidden_sum.rows[: head.num_kept]
    sequences.scale_rows(rows, seqs.per_row(upstream).to(head.arithmetic), out=rows)
    empty = head.hidden.new_empty(0)
    return logps, entropy, (hidden_sum.finish(), empty, empty.clone())


def _three_products(
    head: LmHead, seqs: Sequences, plan: SequencePlan, pair_loss: _PairLoss, needs: list[bool]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    tiles = RowTiles(head, plan.weight_cols)
    sums = GradientSums(tiles, needs, num_tiles=len(plan.groups) if plan.choice.name == "resident" else 2)
    second, parts = None, {group: _tiles_of(head, seqs, plan, group, pair_loss.nll_coef > 0) for group in plan.groups}
    tiles.reserve(chain.from_iterable(parts.values()))
    for group in plan.groups:
        if not group.deferred:
            _resident(tiles, seqs, sums, pair_loss, group.start, group.stop)
            continue
        # The first long pair needs no sum of its own: nothing else is in dW yet, and it is scaled there.
        if (not sums.vocab.empty or pair_loss.nll_coef) and second is None:
            second = sums.another_vocab()
        last = group is plan.groups[-1]
        _deferred(tiles, seqs, sums, second, pair_loss, group.start, parts[group], last)
    return tiles.exact_logps, tiles.entropy, sums.finish()


def _tiles_of(head: LmHead, seqs: Sequences, plan: SequencePlan, group: Group, anchored: bool) -> list[slice]:
    """The rows of each tile of a group. With an anchor, of which only the chosen tokens have a part, none holds both answers."""
    if not group.deferred:
        return [seqs.rows(group.start, group.stop)]
    bounds = range(group.start, group.stop) if anchored else (group.start,)
    spans = (seqs.rows(i, i + 1 if anchored else group.stop) for i in bounds)
    tiles = (row_slices(x.start, x.stop, plan.choice.tile_rows, head.hidden.device.type) for x in spans)
    return list(chain.from_iterable(tiles))


def _resident(
    tiles: RowTiles, seqs: Sequences, sums: GradientSums, pair_loss: _PairLoss, start: int, stop: int
) -> None:
    """Whole pairs in one tile: their margins, and so their upstream gradients, are known while their logits are there."""
    rows = seqs.rows(start, stop)
    folded = tiles.fold(rows) if rows.stop > rows.start else None
    upstream = pair_loss.upstream(
        seqs.sums(tiles.exact_logps[rows], start, stop), seqs.lengths[start:stop], start, stop
    )
    if folded is None:  # only now: over a sequence_group the others have rows, and the sum is an exchange
        return
    hidden, tile, state = folded
    g_logp = seqs.per_row(upstream, start, stop).to(state.dtype)
    gradient = tiles.head.grad_(tile, rows, tiles.all_cols, state, g_logp, None)
    sums.add(rows, gradient, hidden, sums.vocab)


def _deferred(
    tiles: RowTiles,
    seqs: Sequences,
    sums: GradientSums,
    second: VocabSums | None,
    pair_loss: _PairLoss,
    start: int,
    parts: list[slice],
    last: bool,
) -> None:
    """One long pair in several tiles: gradients of log pi(w) - log pi(l), scaled when the margin is known, which is before the last
    tile's products. `last`: no other pair follows.

    The anchor's weight on the chosen tokens is known, but another: their part of dW is added with it on the way.
    """
    stop = start + 2
    # where a row's upstream is 0 its gradient is, even of logits that are no numbers
    counts = pair_loss.weights[start // 2] != 0
    chosen, rejected = seqs.rows(start, start + 1), seqs.rows(start + 1, stop)
    lengths = seqs.lengths[start:stop]
    anchor = pair_loss.anchors(lengths, start, stop)[0]
    total = sums.vocab if second is None else second
    total.clear()
    pair, scalar = slice(chosen.start, rejected.stop), None

    def known() -> Tensor:
        return pair_loss(seqs.sums(tiles.exact_logps[pair], start, stop), lengths, start, stop)[2][0]

    for part in parts:
        hidden, tile, state = tiles.fold(part)
        if part.stop == pair.stop:
            scalar = known()
        g_logp = counts.to(state.dtype).repeat(part.stop - part.start)
        g_logp[max(chosen.stop - part.start, 0) :].neg_()
        gradient = tiles.head.grad_(tile, part, tiles.all_cols, state, g_logp, None)
        sums.add(part, gradient, hidden, total, factor=scalar if second is None else None, last=last)
        if pair_loss.nll_coef and part.stop == chosen.stop:
            sums.vocab.add_(total, -anchor)
    if scalar is None:  # no rows here; over a sequence_group the others have some, and the sum is an exchange
        known()
        return
    if second is not None:
        sums.vocab.add_(second, scalar)
    sums.scale_hidden_(chosen, scalar - anchor)
    sums.scale_hidden_(rejected, scalar)


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    out, num_pairs, needs = state_dtype(hidden.dtype), cu_seqlens.shape[0] // 2, rest[-1]
    has_reference = ref_logps is not None or ref_hidden is not None

    def made(n: int) -> Tensor:
        return hidden.new_empty((n,), dtype=out)

    return (
        hidden.new_empty((), dtype=out),
        made(num_pairs),
        made(num_pairs),
        made(2 * num_pairs),
        made(2 * num_pairs),
        made(2 * num_pairs if has_reference else 0),
        hidden.new_empty((2 * num_pairs,), dtype=torch.int64),
        torch.empty(len(Choice._fields), dtype=torch.int64, device="cpu"),
        *(
            torch.empty(x.shape, dtype=sequences.held_dtype(x.dtype), device=x.device) if need else hidden.new_empty(0)
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.num_inputs = len(inputs)


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * ctx.num_inputs
    if grad_loss is None or not any(ctx.needs_input_grad[:3]):
        return nothing
    schema.refuse_second_order("linear_preference_loss")
    return *sequences.all_scaled(ctx, grad_loss), *nothing[3:]


schema.register_kernel("linear_preference_loss", _forward)
torch.library.register_fake("entropy_po::linear_preference_loss", _fake_forward, lib=schema.LIBRARY)
torch.library.register_autograd(
    "entropy_po::linear_preference_loss", _autograd, setup_context=_setup_context, lib=schema.LIBRARY
)
