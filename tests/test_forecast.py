"""`entropy-po plan`: what it counts scales as it must, and the page shows what the command prints."""

import json
from pathlib import Path

import pytest

from entropy_po.cli import main
from entropy_po.forecast import GIB, Rates, forecast, grid, table

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_shows_what_the_command_prints(capsys):
    assert main(["plan"]) == 0
    printed = capsys.readouterr().out
    assert printed == table(grid()) and printed.count("\n") == 2 + 18
    assert printed in (ROOT / "docs" / "parallel.md").read_text()


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_weight_and_products_fall_with_the_vocabulary_and_rows_with_the_sequences(ranks):
    one = forecast(131072, 4096, 1 << 20, 1)
    split = forecast(131072, 4096, 1 << 20, ranks, vocab_ranks=ranks, sequence_ranks=1)
    parts = forecast(131072, 4096, 1 << 20, ranks, vocab_ranks=1, sequence_ranks=ranks)
    for name in ("weight_bytes", "grad_weight_bytes", "products_ms"):
        assert getattr(split, name) == pytest.approx(getattr(one, name) / ranks)
    assert split.rows == one.rows and parts.rows == one.rows / ranks and parts.weight_bytes == one.weight_bytes
    assert one.wire_ms == 0 and split.hidden_wire_bytes == 8 * (ranks - 1) * (1 << 20) * 4096 // ranks
    assert parts.hidden_wire_bytes == parts.state_wire_bytes == 0 and parts.sequence_wire_bytes > 0


def test_by_hand():
    """8192 x 4096 x 151936 on one GPU with a trained head: three products, ten bytes a logit, one sum of dW."""
    f = forecast(151936, 4096, 8192, 1, workspace_bytes=16 * GIB, rates=Rates(tflops=100.0, memory=1000.0))
    assert f.products_ms == pytest.approx(3 * 2 * 8192 * 151936 * 4096 / 1e14 * 1e3)
    assert f.memory_ms == pytest.approx((10 * 8192 * 151936 + 8 * 151936 * 4096) / 1e12 * 1e3)
    assert f.strategy == "resident" and f.memory_bytes == 8 * 151936 * 4096 + 4 * 8192 * 4096 + 16 * GIB
    frozen = forecast(151936, 4096, 8192, 1, trained=False)
    assert frozen.grad_weight_bytes == 0
    assert frozen.products_ms == pytest.approx(forecast(151936, 4096, 8192, 1).products_ms * 2 / 3)


def test_one_case_as_json(capsys):
    assert (
        main(
            [
                "plan",
                "--tokens",
                "65536",
                "--vocab",
                "151936",
                "--hidden",
                "5120",
                "--gpus",
                "16",
                "--vocab_ranks",
                "8",
                "--json",
            ]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert row["vocab_ranks"] == 8 and row["sequence_ranks"] == 2 and row["rows"] == 32768


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--tokens 0", "tokens must be a whole number >= 1"),
        ("--tokens 9 --gpus 8 --vocab_ranks 3", "must divide the 8 GPUs"),
        ("--tokens 9 --sequence_ranks 0", "sequence_ranks must be a whole number >= 1"),
    ],
)
def test_numbers_that_cannot_be(flags, said, capsys):
    assert main(["plan", *flags.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_its_configurations(name):
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "docs" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 16 and config.num_machines == 2
