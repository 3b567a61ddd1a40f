"""The cases of test_parallel.py and the trainer over NCCL, with a GPU for each of two ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parallel_cases
from ranks import Ranks
from test_parallel import KINDS, STRATEGIES, TRANSFORMS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SPLITS = [(2, 1), (1, 2)]  # ranks over the vocabulary, over the sequences


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2, "nccl")
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_linear_token_stats(ranks, seed, kind, transform):
    ranks.run(parallel_cases.on_its_gpu, seed, "linear_stats", 2, kind, transform)


@pytest.mark.parametrize("transform, inplace", [("plain", True), *((name, False) for name in TRANSFORMS)])
def test_token_stats(ranks, seed, transform, inplace):
    ranks.run(parallel_cases.on_its_gpu, seed, "logit_stats", 2, "uneven", transform, inplace)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vocab, sequence", SPLITS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_preference_loss(ranks, seed, vocab, sequence, strategy, transform):
    ranks.run(parallel_cases.on_its_gpu, seed, "preference", vocab, sequence, strategy, transform)


@pytest.mark.parametrize("strategy", ["resident", "recompute"])
@pytest.mark.parametrize("vocab, sequence", SPLITS)
@pytest.mark.parametrize("rule", parallel_cases.RULES)
def test_losses_of_ones_own(ranks, seed, vocab, sequence, strategy, rule):
    ranks.run(parallel_cases.on_its_gpu, seed, "own_loss", vocab, sequence, strategy, rule)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process(ranks, tmp_path, engine):
    trainer_cases = pytest.importorskip("trainer_cases")
    from test_trainer_ranks import FP32, assert_same_run

    one = trainer_cases.run(tmp_path / "one", per_device_train_batch_size=4, num_pairs=7, bf16=False)
    options = {"engine": engine, "flags": FP32, "num_pairs": 7, "bf16": False}
    assert_same_run(ranks.run(trainer_cases.run, 0, tmp_path / "two", per_device_train_batch_size=2, **options)[0], one)
