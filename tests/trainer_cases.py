"""What the ranks of test_trainer_ranks.py run: training runs whose history and weights are compared outside."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))


def run(folder, num_pairs=8, tied=False, resume=None, die_at=None, engine=None, flags=(), **options):
    """(rows of metrics, evaluation, all weights as one vector) of a run on this many ranks, this process being one.

    `engine` names a file of docs/accelerate, `flags` are accelerate's beside it."""
    import cpu_as_gpu

    with nullcontext() if engine is None else cpu_as_gpu.engine(engine, *flags):
        return _run(folder, num_pairs, tied, resume, die_at, **options)


def _run(folder, num_pairs, tied, resume, die_at, **options):
    from test_trainer import make_model, make_rows, make_trainer
    from transformers import TrainerCallback

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == die_at and args.process_index == 1:
                os._exit(1)

    options = {"optim": "sgd", "logging_steps": 1, "max_grad_norm": 0.0, "num_train_epochs": 2, **options}
    trainer = make_trainer(folder, make_rows(num_pairs), make_model(tie_word_embeddings=tied), make_rows(5), **options)
    trainer.add_callback(Die)
    trainer.train(resume)
    evaluation = trainer.evaluate()
    history = [row for row in trainer.state.log_history if "loss" in row]
    return history, evaluation, torch.cat([_whole(p).flatten().cpu() for p in trainer.model.parameters()])


def run_online(folder, resume=None, **options):
    """The prompts of each step that this rank asked."""
    from test_online import make_trainer

    asked = []

    def reward(prompts, completions, **_):
        asked.append(sorted({*prompts}))
        return [0.0] * len(completions)

    rows = [{"prompt": word} for word in ("the", "sky", "is", "blue", "green", "what")]
    make_trainer(folder, rows=rows, reward_funcs=reward, per_device_train_batch_size=1, **options).train(resume)
    return asked


def _whole(parameter):
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor().detach() if hasattr(parameter, "full_tensor") else parameter.detach()


def fully_sharded(tied, reshard, own_unit):
    """Gradients, evaluation and state dict of a model under FSDP2, against the whole model on the whole batch."""
    from test_trainer import make_model, make_rows
    from test_trainer_data import make_tokenizer
    from torch.distributed.fsdp import fully_shard

    from entropy_po import EntropyObjective, linear_preference_loss
    from entropy_po.answers import Answers, answer_logps
    from entropy_po.trainer import PairCollator, tokenize_pairs

    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = tokenize_pairs(make_rows(8), make_tokenizer()).pairs
    mine = pairs[rank * 8 // size : (rank + 1) * 8 // size]

    def loss_of(model, pairs):
        answers = Answers.of(model, PairCollator()(pairs))
        return answers.loss(linear_preference_loss, objective=EntropyObjective.qempo(2.0), reduction="sum").loss

    whole, model = make_model(tie_word_embeddings=tied), make_model(tie_word_embeddings=tied)
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    for _ in range(2):  # accumulated
        loss_of(whole, pairs).backward()
        (size * loss_of(model, mine)).backward()  # FSDP averages
    for (name, ours), truth in zip(model.named_parameters(), whole.parameters(), strict=True):
        error = (ours.grad.full_tensor() - truth.grad).norm() / truth.grad.norm()
        assert error <= 2e-6, f"{name}: {error:.1e}"
    batch = PairCollator()(pairs)
    with torch.no_grad():
        torch.testing.assert_close(answer_logps(model, batch), answer_logps(whole, batch), rtol=1e-5, atol=1e-4)
    shard = model.state_dict()["lm_head.weight"].to_local()
    assert shard.shape[0] < model.config.vocab_size


def fused_head_fully_sharded(own_unit):
    """Loss and gradients of a model with `fuse_lm_head` under FSDP2, against the whole model's own loss on the whole batch."""
    from test_trainer import make_model
    from torch.distributed.fsdp import fully_shard

    from entropy_po.integrations.transformers import fuse_lm_head

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    ids = torch.randint(3, 32, (2 * size, 7))
    whole, model = make_model(tie_word_embeddings=not own_unit), make_model(tie_word_embeddings=not own_unit)
    fuse_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    expected = whole(input_ids=ids, labels=ids).loss
    expected.backward()
    mine = ids[2 * rank : 2 * rank + 2]
    output = model(input_ids=mine, labels=mine)
    output.loss.backward()
    loss = output.loss.detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / size, expected.detach(), rtol=1e-5, atol=1e-5)
    for (name, ours), truth in zip(model.named_parameters(), whole.parameters(), strict=True):
        error = (ours.grad.full_tensor() - truth.grad).norm() / truth.grad.norm()
        assert error <= 5e-6, f"{name}: {error:.1e}"
    assert model(input_ids=mine).logits.shape == (2, 7, 32)


def run_trl(folder, path, batch_size):
    """(rows of metrics, evaluation, weights) of H-DPO on TRL's trainer on this many ranks."""
    from test_integrations_trl import QUIET, load, make_trainer
    from test_integrations_trl import run as run_trainer

    from entropy_po.integrations.trl import HDPOConfig, HDPOTrainer

    options = {
        **QUIET,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "alpha": 0.8,
    }
    return run_trainer(make_trainer(HDPOTrainer, HDPOConfig, folder, load(path), **options))
