"""Vocabulary and sequences split over real processes: the same results as one process has, and what they exchange."""

import parallel_cases as cases
import pytest
import torch
from ranks import Ranks

from entropy_po import linear_token_stats, sequence_shard
from entropy_po.forecast import forecast

TRANSFORMS = ["plain", "scalars", "row temperature", "keep mask", "padding"]
SIZES = [2, 4]
KINDS = ["even", "uneven", "one is empty"]
STRATEGIES = ["resident", "deferred", "recompute"]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_token_stats_over_a_split_vocabulary(ranks, seed, size, kind, transform):
    ranks.run(cases.linear_stats, seed, size, kind, transform)


@pytest.mark.parametrize("outputs", [("logps",), ("entropy",), ("logps", "is_top1", "lse")])
def test_outputs_that_are_asked_for(ranks, seed, outputs):
    ranks.run(cases.linear_stats, seed, 4, "even", "plain", outputs)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    # a bf16 gradient has 8 bits: dW's rows differ where a rounding falls the other way
    "dtype, bound",
    [(torch.float64, 1e-13), (torch.bfloat16, 3e-3), (torch.float16, 3e-4)],
    ids=str,
)
def test_other_dtypes_and_backends(ranks, seed, dtype, bound, backend):
    ranks.run(cases.linear_stats, seed, 2, "uneven", "scalars", dtype=dtype, bound=bound, backend=backend)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform, inplace", [("plain", True), *((name, False) for name in TRANSFORMS)])
def test_token_stats_over_a_split_vocabulary(ranks, seed, size, kind, transform, inplace):
    ranks.run(cases.logit_stats, seed, size, kind, transform, inplace)


def test_no_rows_and_only_ignored_rows(ranks, seed):
    ranks.run(cases.nothing_to_compute, seed, 4)


@pytest.mark.parametrize("size", SIZES)
def test_dtensor_weights(ranks, seed, size):
    ranks.run(cases.dtensor_weights, seed, size)


SPLITS = [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]  # ranks over the vocabulary, over the sequences


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vocab, sequence", SPLITS)
@pytest.mark.parametrize("nll_coef", [0.0, 0.3])
def test_preference_loss(ranks, seed, vocab, sequence, strategy, nll_coef):
    ranks.run(cases.preference, seed, vocab, sequence, strategy, nll_coef=nll_coef)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vocab, sequence", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("transform", TRANSFORMS[1:])
def test_preference_loss_with_transforms(ranks, seed, vocab, sequence, strategy, transform):
    ranks.run(cases.preference, seed, vocab, sequence, strategy, transform, kind="uneven")


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("vocab, sequence", [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("workspace", [cases.SMALL, 200_000, None])
def test_parts_of_any_length_and_of_none(ranks, seed, vocab, sequence, strategy, workspace):
    """Rank 0 has no row of the first pair: its plan, left alone, would be another, and the ranks would wait for ever."""
    strategies = ranks.run(cases.preference, seed, vocab, sequence, strategy, split="any", workspace=workspace)
    assert len(set(strategies)) == 1


@pytest.mark.parametrize("vocab, sequence", SPLITS)
def test_budgets_of_their_own(ranks, seed, vocab, sequence):
    """As the default is on a GPU, where it depends on the memory that is free: the smallest decides for all."""
    budgets = [30_000, 60_000, 200_000, 1 << 20]
    strategies = ranks.run(cases.preference, seed, vocab, sequence, "auto", workspace=budgets)
    assert strategies[0] == strategies[2]  # of one group, however many there are


@pytest.mark.parametrize("vocab, sequence", SPLITS)
@pytest.mark.parametrize("kind", ["uneven", "one is empty"])
def test_reference_in_the_same_pass(ranks, seed, vocab, sequence, kind):
    ranks.run(cases.preference, seed, vocab, sequence, "resident", kind=kind, reference="hidden")


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_only_where_needed(ranks, seed, strategy, trained):
    ranks.run(cases.preference, seed, 2, 2, strategy, trained=trained, nll_coef=0.1)


@pytest.mark.parametrize("vocab, sequence", [(4, 1), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["plain", "keep mask"])
def test_a_frozen_head_in_tiles_of_any_shape(ranks, seed, vocab, sequence, kind, transform):
    trained = True, False, False
    ranks.run(cases.preference, seed, vocab, sequence, "auto", transform, kind, trained=trained, nll_coef=0.1)


def test_preference_loss_in_bf16(ranks, seed):
    ranks.run(cases.preference, seed, 2, 2, "resident", dtype=torch.bfloat16, bound=6e-3)


@pytest.mark.parametrize("strategy", ["resident", "recompute"])
@pytest.mark.parametrize("vocab, sequence", SPLITS)
@pytest.mark.parametrize("rule", cases.RULES)
def test_losses_of_ones_own(ranks, seed, vocab, sequence, strategy, rule):
    ranks.run(cases.own_loss, seed, vocab, sequence, strategy, rule, "row temperature", split="any")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_bits_again(ranks, seed, strategy):
    ranks.run(cases.twice, seed, 4, strategy)


def test_compiles_whole_with_a_group(ranks, seed):
    ranks.run(cases.compiled, seed, 2)


@pytest.mark.parametrize("call", ["linear_token_stats", *STRATEGIES])
@pytest.mark.parametrize("size", SIZES)
def test_what_goes_over_the_wire(ranks, seed, call, size):
    """Row states, a few facts, and dH once. Not the weight, not the hidden states, not logits; and no tile adds a dH."""
    n, d, v = 96, 64, 5000
    name, strategy = (call, "auto") if call == "linear_token_stats" else ("linear_preference_loss", call)
    kept = n - n // 4
    for calls, sent in ranks.run(cases.wire, seed, size, n, d, v, name, strategy, 1_000_000):
        assert calls["all_reduce"] == 1 and sent["all_reduce"] == 4 * kept * d
        facts = 8 * 100 * calls["all_gather"]  # at most 100 numbers each
        assert 5 * 4 * kept <= sent["all_gather"] <= 5 * 4 * kept + facts
        planned = forecast(v, d, kept, size, vocab_ranks=size, sequence_ranks=1)
        assert planned.state_wire_bytes == (size - 1) * 5 * 4 * kept  # a gather is received from the others
        assert planned.hidden_wire_bytes == 2 * (size - 1) * sent["all_reduce"] // size  # a sum in two rounds of parts
        assert sent["all_gather"] < 4 * n * d and sent["all_gather"] < v * d // size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_falls_with_the_number_of_ranks(ranks, seed, strategy):
    """Tile, dW and its sums: all of a rank's memory but dH."""
    n, d, v = 256, 32, 32768
    peak = {size: max(ranks.run(cases.memory, seed, size, n, d, v, strategy)) for size in (1, 2, 4)}
    for size in (2, 4):
        assert peak[size] <= 1.1 * peak[1] / size + 4 * n * d, peak


@pytest.mark.parametrize(
    "what, message",
    [
        ("rows", "vocab_group differ in the number of rows"),
        ("labels", "vocab_group differ in labels"),
        ("temperature", "vocab_group differ in temperature"),
        ("outputs", "vocab_group differ in outputs"),
        ("dtype", "vocab_group differ in dtype"),
        ("strategy", "vocab_group differ in strategy"),
        ("sequences", "sequence_group differ in sequences"),
        ("ref_logps", "sequence_group differ in ref_logps"),
        ("label out of range", r"is outside [0, 301)"),
    ],
)
def test_every_rank_is_told_what_they_differ_in(ranks, seed, what, message):
    told = ranks.run(cases.disagreement, seed, what)
    assert all(message in text for text in told), told


def test_a_group_that_is_none():
    for group in ("tp", 3, -100):
        with pytest.raises(ValueError, match=r"vocab_group must be a torch\.distributed\.ProcessGroup"):
            linear_token_stats(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]), vocab_group=group)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_sequence_shards_cover_every_row_once(size):
    cu = torch.tensor([0, 1, 1, 8, 30], dtype=torch.int32)
    shards = [sequence_shard(cu, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([rows for rows, _ in shards]).sort().values, torch.arange(30))
    for rows, part in shards:
        assert part.dtype == cu.dtype and part[-1] == len(rows)
        for s in range(4):
            mine = rows[part[s] : part[s + 1]]
            assert ((mine >= cu[s]) & (mine < cu[s + 1])).all()
            assert abs(len(mine) - (cu[s + 1] - cu[s]) / size) < 1
    with pytest.raises(ValueError, match="rank=2"):
        sequence_shard(cu, 2, 2)


@pytest.mark.parametrize("size", SIZES)
def test_the_adapter_for_verl_leaves_the_sum_over_ranks_to_megatron(ranks, seed, size):
    ranks.run(cases.verl_linear_cross_entropy, seed, size)
