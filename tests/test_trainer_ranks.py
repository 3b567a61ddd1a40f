"""The trainer on several ranks, real processes over gloo, step by step against one process with the same global batch."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parent))
import trainer_cases as cases
from ranks import RankError, Ranks
from test_trainer import CHECKPOINTING

from entropy_po.trainer.checkpoints import last_checkpoint

FP32 = ("--mixed_precision", "no")
UNLIKE = ("tokens_per_second", "peak_memory_mib", "runtime", "samples_per_second", "steps_per_second")


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def assert_same_run(ours, one):
    """Two (history, evaluation, weights)."""
    assert [row["step"] for row in ours[0]] == [row["step"] for row in one[0]]
    for mine, theirs in zip((*ours[0], ours[1]), (*one[0], one[1]), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.removeprefix("eval_").startswith(UNLIKE):
                assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    assert torch.linalg.norm(ours[2] - one[2]) <= 2e-6 * torch.linalg.norm(one[2])


OPTIONS = {
    "plain": {},
    "uneven batches": {"num_pairs": 7},
    "tied embeddings": {"tied": True},
    "accumulation": {"gradient_accumulation_steps": 2, "num_pairs": 7},
    "adapter": {"lora_r": 4},
    "checkpointing": {CHECKPOINTING: True},
    "clipping": {"max_grad_norm": 1.0},
    "no reference": {"method": "qempo", "lam": 2.0},
    "recompute": {"strategy": "recompute"},
}
# FSDP2's file asks for checkpointing itself; under ZeRO-2 parameters are whole, as under DDP
ENGINES = {
    "ddp": list(OPTIONS),
    "fsdp2": [name for name in OPTIONS if name != "checkpointing"],
    "zero2": ["uneven batches", "accumulation", "clipping"],
    "zero3": list(OPTIONS),
}


def batches(name, ranks):
    """A global batch of four pairs."""
    return 4 // ranks // OPTIONS[name].get("gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a name in one process."""
    runs = {}

    def run(name):
        if name not in runs:
            options = {"per_device_eval_batch_size": 2, **OPTIONS[name]}
            folder = tmp_path_factory.mktemp("alone")
            runs[name] = cases.run(folder, per_device_train_batch_size=batches(name, 1), **options)
        return runs[name]

    return run


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    """(a file of docs/accelerate, two processes that stay with it)."""
    if request.param.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed")
    ranks = Ranks(2)
    yield request.param, ranks
    ranks.stop()


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_train_as_one_process(engine, alone, tmp_path, name):
    """Evaluation has 5 pairs in batches of 2, training 7 in global batches of 4: on two ranks the last batches are filled up
    with pairs that count already."""
    engine, ranks = engine
    if name not in ENGINES[engine]:
        pytest.skip("tested under DDP")
    options = {"engine": engine, "flags": FP32, "per_device_eval_batch_size": 2, **OPTIONS[name]}
    two = ranks.run(cases.run, 0, tmp_path, per_device_train_batch_size=batches(name, 2), **options)
    assert_same_run(two[0], alone(name))
    assert torch.equal(two[0][2], two[1][2])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [row["step"] for row in two[0][0]]  # written by one rank


def test_bf16_mixed_precision(engine, alone, tmp_path):
    """As the files ask for it."""
    engine, ranks = engine
    two = ranks.run(cases.run, 0, tmp_path, engine=engine, per_device_train_batch_size=2)[0]
    assert [row["loss"] for row in two[0]] == pytest.approx([row["loss"] for row in alone("plain")[0]], abs=0.02)


SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("first", ["one", "two"])
def test_resume_on_another_number_of_ranks(ranks, tmp_path, first):
    """The same global batch, split otherwise."""

    def on(where, folder, **options):
        options = {**SAVING, **options}
        if where == "one":
            return cases.run(folder, per_device_train_batch_size=4, **options)
        return ranks.run(cases.run, 0, folder, per_device_train_batch_size=2, **options)[0]

    whole = on("one", tmp_path / "whole")
    on(first, tmp_path / "parts", max_steps=2)
    resumed = on(
        "two" if first == "one" else "one", tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2")
    )
    assert_same_run(resumed, whole)


def test_resume_within_an_epoch(ranks, tmp_path):
    """Whose last batch is filled up with pairs that count already."""
    options = {**SAVING, "num_pairs": 11, "num_train_epochs": 3, "save_steps": 1, "per_device_train_batch_size": 2}
    whole = ranks.run(cases.run, 0, tmp_path, **options)[0]
    resumed = ranks.run(cases.run, 0, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)[0]
    assert len(whole[0]) == 9
    assert_same_run(resumed, whole)
    one = cases.run(tmp_path / "one", **{**options, "per_device_train_batch_size": 4})
    assert_same_run(resumed, one)


def test_an_online_run_resumed_within_an_epoch_asks_what_it_would_have_asked(ranks, tmp_path):
    """In the second epoch, whose order is not the first one's."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = ranks.run(cases.run_online, 0, tmp_path, **options)
    resumed = ranks.run(cases.run_online, 0, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)
    both = [[sorted(a + b) for a, b in zip(*run, strict=True)] for run in (whole, resumed)]
    assert len(both[0]) == 6 and both[1] == both[0][4:]
    assert both[0][1:3] != both[0][4:]


def test_four_ranks_go_on_from_the_shards_of_two(engine, tmp_path):
    """FSDP2's checkpoint is cut anew; DeepSpeed's is for as many ranks as wrote it."""
    engine, ranks = engine
    options = {"engine": engine, "flags": FP32, "optim": "adamw_torch", **SAVING}
    whole = cases.run(tmp_path / "whole", per_device_train_batch_size=4, **{**options, "engine": None})
    ranks.run(cases.run, 0, tmp_path / "parts", per_device_train_batch_size=2, max_steps=2, **options)
    resumed = {"resume": str(tmp_path / "parts" / "checkpoint-2"), **options}
    if not engine.startswith("zero"):
        four = Ranks(4)
        try:
            two = four.run(cases.run, 0, tmp_path / "parts", per_device_train_batch_size=1, **resumed)
        finally:
            four.stop()
    else:
        two = ranks.run(cases.run, 0, tmp_path / "parts", per_device_train_batch_size=2, **resumed)
    assert_same_run(two[0], whole)


def test_a_killed_rank_leaves_an_error_and_a_checkpoint(tmp_path):
    ranks = Ranks(2)
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(RankError, match=r"rank 0 of 2 lost another one after step 2.* goes on from .*checkpoint-2"):
        ranks.run(cases.run, 0, tmp_path, die_at=2, **options)
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    resumed = cases.run(tmp_path, resume=last_checkpoint(tmp_path), **{**options, "per_device_train_batch_size": 4})
    assert_same_run(resumed, cases.run(tmp_path / "whole", per_device_train_batch_size=4))


@pytest.mark.parametrize("tied, own_unit", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("reshard", [True, None])
def test_fully_sharded_data_parallelism(ranks, seed, tied, own_unit, reshard):
    ranks.run(cases.fully_sharded, seed, tied, reshard, own_unit)


@pytest.mark.parametrize("own_unit", [False, True])
def test_a_fused_head_under_fsdp2_has_the_whole_models_loss_and_gradients(ranks, own_unit):
    ranks.run(cases.fused_head_fully_sharded, 0, own_unit)


def test_hdpo_on_trls_trainer_on_two_ranks(ranks, tmp_path):
    """Steps and training metrics are those of one process with the same global batch."""
    pytest.importorskip("trl")
    from test_trainer import make_model

    make_model().save_pretrained(tmp_path / "model")
    one = cases.run_trl(tmp_path / "one", str(tmp_path / "model"), 8)
    two = ranks.run(cases.run_trl, 0, tmp_path / "two", str(tmp_path / "model"), 4)[0]
    for mine, theirs in zip(two[0], one[0], strict=True):
        for name, value in theirs.items():
            if name.split("/")[0] in ("loss", "rewards", "logps", "entropy", "num_tokens"):
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name
    assert torch.linalg.norm(two[2] - one[2]) <= 1e-5 * torch.linalg.norm(one[2])
