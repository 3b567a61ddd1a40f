"""Deliberate faults, put into a copy of the sources one at a time; of each, the test that must fail: `python tests/mutants.py`.

A test suite that passes says little by itself. This shows of each line below that some test would notice if it were wrong.
Words after the command choose faults by what they say. tests/test_mutants.py keeps this list in step with the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    what: str
    file: str
    right: str  # occurs once in the file
    wrong: str
    test: str  # under tests/, as pytest takes it


CPP, STATE, TRITON = "csrc/tile.h", "entropy_po/types.py", "kernels/row_math.py"
PAIR, SUMS, STATS, OBJECTIVE = (
    "entropy_po/ops/linear_preference_loss.py",
    "entropy_po/ops/sequences.py",
    "entropy_po/ops/linear_token_stats.py",
    "entropy_po/objective.py",
)
WHOLE_FOLD, SPLIT_FOLD = (
    "test_tiles.py::test_fold_and_grad_agree_with_fp64",
    "test_tiles.py::test_tiles_in_any_split_and_order_equal_the_whole",
)
STRATEGIES, LOSSES = (
    "test_sequence_losses.py::test_every_strategy_agrees_with_fp64",
    "test_objective.py::test_losses_match_their_definitions",
)
FROZEN = "test_linear_token_stats.py::test_a_frozen_head_whose_rows_rise_from_tile_to_tile"

FAULTS = [
    # the tile mathematics in C++
    Fault("t is not moved to the new maximum", CPP, "t = shrink == T(0) ? T(0) : (t + s * delta) * shrink;", "t *= shrink;", SPLIT_FOLD),
    Fault("q shrinks once instead of twice", CPP, "q *= shrink * shrink;", "q *= shrink;", SPLIT_FOLD),
    Fault("the label's distance stays at the old maximum", CPP, "label_d += delta;", "", SPLIT_FOLD),
    Fault("sign of the entropy's gradient at the label", CPP, "- from_entropy * std::exp(log_p)", "+ from_entropy * std::exp(log_p)", WHOLE_FOLD),
    Fault("a polynomial of exp with a digit too few", CPP, "0.16666576266288757f", "0.16666f", "test_tiles.py::test_exp_of_the_kernels"),
    Fault("a bf16 tie rounds up instead of to even", "csrc/half.h", "0x7fffu + ((b >> 16) & 1u)", "0x8000u", "test_tiles.py::test_every_half_precision_result_rounds_as_torch_does"),
    Fault("ignored rows are folded", "csrc/tile_cpu_impl.h", "if (a.labels[i] == a.ignore_index) {", "if (false) {", "test_kernels_cpu.py::test_ignored_and_undifferentiated_rows"),
    Fault("the first tile reads what the memory held", "csrc/tile_cpu_impl.h", "a.first ? RowState<double>::empty() : ", "", "test_kernels_cpu.py::test_the_first_tile_begins_the_state"),
    Fault("a row that is not computed has an entropy", CPP, "return {0, 1, 0, 0, -1, 1, 0, 1};", "return {0, 2, 0, 0, -1, 1, 0, 1};", "test_kernels_cpu.py::test_the_first_tile_begins_the_state"),
    Fault("sign of t in the entropy of C++", CPP, "log_s - state.t / state.s", "log_s + state.t / state.s", "test_kernels_cpu.py::test_outputs_of_a_state"),
    Fault("the maximum starts at 0", "csrc/tile_cpu_impl.h", "T m = Numeric<T>::kMinusInf;", "T m = T(0);", "test_traps.py::test_all_negative_logits"),
    Fault("masked entries count as live", "csrc/tile_cpu_impl.h", "live += alive ? T(1) : T(0);", "live += T(1);", WHOLE_FOLD),
    Fault("the softcap's slope is dropped", "csrc/tile_cpu_impl.h", "dz[j] *= slope[j];", "dz[j] *= T(1);", WHOLE_FOLD),
    Fault("the entropy's mean is dropped from its gradient", "csrc/tile_cpu_impl.h", "entropy_scale * (d - mean_d)", "entropy_scale * d", WHOLE_FOLD),
    Fault("a bf16 product forgets what it adds to", "csrc/gemm.cpp", "g.accumulate || now.begin > 0", "now.begin > 0", "test_gemm.py"),
    Fault("a product of several passes is scaled after the first", "csrc/gemm.cpp", "now.begin + now.depth == g.k && g.scaled", "g.scaled != nullptr", "test_gemm.py"),
    Fault("a sequence's log-prob is a sum of rounded ones", STATE, "return state[3].double() - state[1].double().log()", "return (state[3].double() - state[1].double().log()).float().double()", "test_sequence_losses.py::test_a_long_answer_s_log_prob_is_no_sum_of_rounded_ones"),
    Fault("a loss of one's own sees sums of rounded log-probs", "entropy_po/ops/sequence_loss.py", "_Unrounded.apply(logps, exact), entropy  # type: ignore[no-untyped-call]", "logps, entropy", "test_sequence_losses.py::test_a_long_answer_s_log_prob_is_no_sum_of_rounded_ones"),
    Fault("a term of weight 0 counts where it is infinite", "entropy_po/objective.py", "if flipped else value", "if True else value", "test_objective.py::test_a_pair_that_cannot_be_lost_costs_nothing"),
    Fault("fp16 gradients are rounded before the loss is scaled", PAIR, "needs, to_be_scaled=True)", "needs)", "test_sequence_losses.py::test_small_fp16_gradients_live_until_the_loss_is_scaled"),
    Fault("the reference's tile stays beside the policy's", PAIR, "        del ref_head  #", "        # del ref_head  #", "test_sequence_losses.py::test_the_references_tile_is_gone_before_the_policys_is_made"),
    Fault("a long pair of weight 0 takes part", PAIR, "pair_loss.weights[start // 2] != 0", "pair_loss.weights[start // 2] >= 0", "test_sequence_losses.py::test_a_pair_of_weight_0_takes_no_part"),
    Fault("a hinge's slope is 0 where there is no number", OBJECTIVE, "(z >= 1).to(z.dtype) - 1", "-(z < 1).to(z.dtype)", "test_objective.py::test_a_margin_without_a_number_has_no_sound_gradient"),
    Fault("a checkpoint's hooks see the tiles' own graphs", "entropy_po/ops/sequence_loss.py", "torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)", "torch.enable_grad()", "test_sequence_losses.py::test_a_loss_of_ones_own_inside_a_checkpoint"),
    Fault("a strategy asked for by name needs its budget", SUMS, "    if strategy == \"auto\":\n", "    if True:\n", "test_sequence_losses.py::test_a_name_is_obeyed_whatever_the_budget"),
    Fault("taller tiles are made beside lower ones", PAIR, "    tiles.reserve(chain.from_iterable(parts.values()))\n", "", "test_sequence_losses.py::test_tiles_that_grow_share_the_memory_of_the_tallest"),
    Fault("terms of sequences without a label are left out", "entropy_po/ops/sequence_loss.py", "        for group in plan.groups:  # those", "        for group in [g for g in plan.groups if any(self.seqs.longest_parts[g.start : g.stop])]:  # those", "test_sequence_losses.py::test_terms_of_sequences_without_a_label_are_part_of_a_loss_of_ones_own"),
    Fault("a tile ends amid a block of rows", "entropy_po/plan.py", "block * math.ceil(length / pieces / block)", "math.ceil(length / pieces)", "test_plan.py::test_tiles_of_rows_are_whole_blocks_of_the_device"),
    Fault("a long pair's fp32 dW is scaled twice", SUMS, "grad_weight, grad_bias = self.finished, None", "grad_weight, grad_bias = self.finished if self.finished is not self.weight else None, None", "test_sequence_losses.py::test_a_pair_far_longer_than_the_budget"),
    Fault("what all threads pack begins at the wrong word", "csrc/gemm.cpp", "begin + from * E::kPerWord, deep", "begin + from, deep", "test_gemm.py"),
    Fault("gradients of fp16 are multiplied in fp32 on a GPU", "entropy_po/ops/gemm.py", '"tf32")', '"ieee")', "test_fake_cuda.py"),
    Fault("operands are copied for the logits on a GPU too", "entropy_po/ops/gemm.py", "self.copied if on_cpu and", "self.copied if", "test_fake_cuda.py"),
    # what is made of the row state
    Fault("sign of t in the entropy", STATE, "(log_s - t / s)", "(log_s + t / s)", WHOLE_FOLD),
    Fault("a shard's t is not moved to the common maximum", STATE, "0, (t + s * delta) * shrink)", "0, t * shrink)", "test_kernels_cpu.py::test_states_of_shards_merge_into_that_of_the_whole"),
    Fault("a shard's label is not moved to the common maximum", STATE, "at_owner(label_d + delta)", "at_owner(label_d)", "test_kernels_cpu.py::test_states_of_shards_merge_into_that_of_the_whole"),
    # the tile mathematics in Triton
    Fault("Triton: t is not moved to the new maximum", TRITON, "(t + s * floored(delta, FLOOR_OF_U)) * shrink", "t * shrink", "test_kernels_triton.py::test_split_tiles_equal_the_whole"),
    Fault("Triton: sign of the entropy's gradient at the label", TRITON, "- g_entropy * p * (d - mean_d)", "+ g_entropy * p * (d - mean_d)", "test_kernels_triton.py::test_statistics_and_gradients"),
    Fault("Triton: columns past the vocabulary count as exp(0)", TRITON, "mask=mask_v, other=MINUS_INF", "mask=mask_v, other=0.0", "test_kernels_triton.py::test_every_tail"),
    Fault("Triton: 0 times infinity", TRITON, "return tl.maximum(d, floor)", "return d", "test_kernels_triton.py::test_statistics_and_gradients"),
    Fault("Triton: infinity times 0 of a masked tile", TRITON, "(t + s * floored(delta, FLOOR_OF_U)) * shrink", "(t + s * delta) * shrink", "test_kernels_triton.py::test_the_least_number_may_stand_for_minus_inf"),
    Fault("torch: infinity times 0 of a masked tile", "entropy_po/reference.py", "moved.masked_fill(factor == 0, 0)", "moved", "test_kernels_cpu.py::test_the_least_number_is_no_trap_of_plain_torch_s_either"),
    Fault("Triton: the columns after a row's last boundary are left out", TRITON, "offs_v, offs_v + n_body)", "offs_v, offs_v + 2 * n_body)", "test_kernels_triton.py::test_rows_may_begin_and_end_anywhere"),
    Fault("Triton: 0 times infinity in a gradient", TRITON, "tl.constexpr(-1e15)", "tl.constexpr(-3e38)", "test_kernels_triton.py::test_what_the_mask_removes_has_no_gradient_however_cold_the_row"),
    Fault("Triton: a NaN has a tanh", TRITON, "tl.where(tl.abs(v) >= 0.3, (1.0 - e) * inverse, small)", "tl.where(tl.abs(v) < 0.3, small, (1.0 - e) * inverse)", "test_kernels_triton.py::test_a_nan_spreads_under_a_softcap_and_an_infinity_is_the_cap"),
    Fault("Triton: the distance of what is not live", TRITON, "tl.where(live == 0.0, 0.0, live * delta)", "live * delta", "test_kernels_triton.py::test_logits_of_any_size"),
    Fault("Triton: tanh cancels near 0", TRITON, "tl.abs(v) >= 0.3, (1.0", "tl.abs(v) >= 0.0, (1.0", "test_kernels_triton.py::test_softcap_keeps_digits_near_zero_and_at_saturation"),
    Fault("Triton: what rounding took from the maximum is forgotten", "kernels/fold.py", "tl.fma(u_max, k, -m))", "u_max * k - m)", "test_kernels_triton.py::test_a_common_offset_is_no_error_without_contraction_either"),
    Fault("Triton: the label's gradient is as any other's", "kernels/grad.py", "mask=here)", "mask=here & (k < 0.0))", "test_kernels_triton.py::test_statistics_and_gradients"),
    Fault("Triton: the first tile reads what the memory held", "kernels/fold.py", "old = first == 0", "old = first < 2", "test_kernels_triton.py::test_the_first_tile_begins_the_state"),
    Fault("Triton: an entropy below 0", "kernels/stats.py", "tl.where(entropy < 0.0, 0.0, entropy)", "entropy", "test_kernels_triton.py::test_outputs_of_a_state"),
    # the tile mathematics in CUDA C++
    Fault("CUDA: the label's logit is read when it may have been written over", "csrc/cuda/tile_cuda_impl.h", "  __syncthreads();\n  Src edge{};", "  Src edge{};", "test_kernels_cuda.py::test_statistics_and_gradients"),
    Fault("CUDA: the label's gradient is as any other's", "csrc/cuda/tile_cuda_impl.h", "if (has_label) store<1>", "if (false) store<1>", "test_kernels_cuda.py::test_statistics_and_gradients"),
    # objectives
    Fault("sign of the reference in the margin", OBJECTIVE, "return z - self.ref_coef * (ref_w - ref_l)", "return z + self.ref_coef * (ref_w - ref_l)", "test_objective.py::test_margin_and_loss_match_the_printed_vectors"),
    Fault("label smoothing is missing from the slope", OBJECTIVE, "eps), eps * torch.sigmoid(z) - (1 - eps) * torch.sigmoid(-z)", "eps), -torch.sigmoid(-z)", "test_objective.py::test_slope_is_the_derivative_of_the_loss"),
    Fault("IPO without its coefficient", OBJECTIVE, "gap = (z - 0.5) / self.policy_coef", "gap = z - 0.5", LOSSES),
    Fault("sign of the entropy in the shaped reward", OBJECTIVE, 'at_least_fp32("rewards", rewards) - self.implicit', 'at_least_fp32("rewards", rewards) + self.implicit', "test_objective.py::test_policy_gradient_of_shaped_reward_is_the_gradient_of_the_objective"),
    Fault("the baseline holds the answer itself", "entropy_po/policy_gradient.py", " * (size / (size - 1))", "", "test_online.py::test_expected_gradient_is_the_objectives_over_all_answers"),
    Fault("the optimistic side of the clip", "entropy_po/policy_gradient.py", "torch.minimum(whole, clipped)", "torch.maximum(whole, clipped)", "test_online.py::test_later_steps_use_the_ratio_to_the_policy_that_sampled"),
    # gradients over tiles
    Fault("the anchor is dropped from dH of a long pair", PAIR, "sums.scale_hidden_(chosen, scalar - anchor)", "sums.scale_hidden_(chosen, scalar)", STRATEGIES),
    Fault("the rejected answer begins one row late", PAIR, "g_logp[max(chosen.stop - part.start, 0) :].neg_()", "g_logp[max(chosen.stop - part.start, 0) + 1 :].neg_()", STRATEGIES),
    Fault("each tile's dW overwrites the last one's", SUMS, "self.empty, self.factor = False, factor", "self.factor = factor", STRATEGIES),
    Fault("dW is rounded before the last pair's part is added", PAIR, "last = group is plan.groups[-1]", "last = True", "test_sequence_losses.py::test_one_long_pair_among_short_ones"),
    Fault("a long pair's scalar also multiplies what is added after it", SUMS, "        tensor. `last`: nothing will be added after it.\"\"\"\n        self._multiply()", "        tensor. `last`: nothing will be added after it.\"\"\"", "test_sequence_losses.py::test_one_long_pair_among_short_ones"),
    Fault("the upstream gradient is dropped from a second backward", SUMS, "return (saved * _with_all_digits(factor, saved)).to(dtype)", "return saved.to(dtype)", "test_sequence_losses.py::test_backward_again"),
    Fault("a row without an upstream gradient keeps its NaN", SUMS, ".masked_fill_(factor == 0, 0)", "", "test_linear_token_stats.py::test_a_row_without_an_upstream_gradient_has_none_even_if_it_is_nan"),
    Fault("a kept gradient is scaled in place although it is read again", SUMS, "result = torch.empty_like(saved) if _graph_is_kept() else saved", "result = saved", "test_linear_token_stats.py::test_frozen_head_takes_two_products"),
    Fault("an entropy gradient that was not expected is dropped", STATS, "if ctx.ahead and grad_entropy is None:", "if ctx.ahead and grad_logps is not None:", "test_linear_token_stats.py::test_an_entropy_gradient_that_was_not_expected_is_right"),
    Fault("sums keep an older maximum", STATS, "total *= _moved(before, part[0])[:, None]", "pass", FROZEN),
    Fault("the label stays among the others", STATS, "            head.take_labels_(tile, rows, cols, labels)\n", "", FROZEN),
    Fault("an empty row so far is no row", STATS, "part[1].sign()", "1", FROZEN),
    Fault("kept rows are spread over those not yet moved", "entropy_po/ops/lm_head.py", "for part in reversed(list(slices(0, head.num_kept, chunk))):", "for part in slices(0, head.num_kept, chunk):", "test_linear_token_stats.py::test_many_ignored_rows_among_many"),
    Fault("dH of a split vocabulary is not summed", "entropy_po/ops/lm_head.py", "        head.shards.ranks.sum_(result[: head.num_kept])\n", "", "test_parallel.py::test_linear_token_stats_over_a_split_vocabulary"),
    Fault("memory goes back while a tensor is over it", "entropy_po/pages.py", "    weakref.finalize(array, _give_back, pages).atexit = False\n", "    _give_back(pages)\n", "test_pages.py"),
]  # fmt: skip


def copy_sources(folder: Path) -> None:
    """What git tracks and the compiled core, so that a fault never touches the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in [*filter(None, listed.split("\0")), *(p.relative_to(ROOT) for p in ROOT.glob("entropy_po/_C*.so"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "ENTROPY_PO_CUDA": "0"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode or "failed" in done.stderr:  # setup.py goes on without the core where it does not compile
        raise RuntimeError(done.stderr[-2000:])


def passes(folder: Path, test: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test} did not run: {(done.stdout + done.stderr)[-2000:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if all(word.lower() in fault.what.lower() for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        for test in dict.fromkeys(fault.test for fault in faults):
            if not passes(folder, test):
                raise SystemExit(f"{test} fails without any fault")
        cores = {path: path.read_bytes() for path in folder.glob("entropy_po/_C*.so")}
        for number, fault in enumerate(faults, 1):
            start, path = time.monotonic(), folder / fault.file
            text = path.read_text()
            assert text.count(fault.right) == 1, fault
            path.write_text(text.replace(fault.right, fault.wrong))
            compiled = fault.file.startswith("csrc/")
            if compiled:
                build(folder)
            caught = not passes(folder, fault.test)
            path.write_text(text)
            if compiled:
                for core, content in cores.items():
                    core.write_bytes(content)
            survivors += not caught
            seconds = time.monotonic() - start
            print(f"{number}/{len(faults)} {'caught' if caught else 'SURVIVED'} {seconds:4.0f} s  {fault.what}  [{fault.test}]", flush=True)  # fmt: skip
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
