"""The update of one online step against its floor: `python -m benchmarks.online_step`.

The floor is the backbone's forward and backward over the same tokens, and three bare matrix products with the vocabulary over
the answers' tokens. The update is OnlineTrainer's own `compute_loss` and its backward, at the first step on a batch of answers
(which also measures log-probs and entropies) and at a later one. The shapes are SmolLM2-135M's, the weights random.
Writes benchmarks/results/cpu/online_step.md.
"""

from __future__ import annotations

import statistics
import tempfile

import torch

from benchmarks.report import RESULTS
from entropy_po.bench.timing import ratio, spread, time_interleaved
from entropy_po.trainer import OnlineConfig, OnlineTrainer

PROMPTS, GROUP, PROMPT_TOKENS, ANSWER_TOKENS, ROUNDS = 2, 4, 32, 96, 7


def make_trainer(folder: str) -> OnlineTrainer:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    args = OnlineConfig(
        output_dir=folder, method="qempo", lam=100.0, num_generations=GROUP, per_device_train_batch_size=PROMPTS,
        report_to="none", check_head=False, max_completion_length=ANSWER_TOKENS, num_iterations=2,
    )  # fmt: skip
    rows = [{"prompt": "a " * PROMPT_TOKENS}] * PROMPTS
    return OnlineTrainer(LlamaForCausalLM(config), args, rows, None, lambda **_: [], tokenizer)


def main() -> int:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
    model = trainer.model.train()
    answers = torch.randint(1, 49152, (PROMPTS * GROUP, ANSWER_TOKENS)).tolist()
    rewards = torch.rand(PROMPTS * GROUP)
    batch = trainer._padded(trainer.train_dataset, answers, rewards, rewards[:, None])
    n, weight = PROMPTS * GROUP * ANSWER_TOKENS, model.lm_head.weight
    hidden, logits, gradient = torch.randn(n, 576), torch.empty(n, 49152), torch.randn(n, 49152)
    dweight, dhidden = torch.empty_like(weight), torch.empty(n, 576)

    def update(fresh: bool) -> None:
        if fresh:
            batch["rollout"].old_logps = None
        model.zero_grad(set_to_none=True)
        trainer.compute_loss(model, batch).backward()

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        output = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        output.last_hidden_state.backward(torch.ones_like(output.last_hidden_state))
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(gradient, weight, out=dhidden)
            torch.mm(gradient.t(), hidden, out=dweight)

    candidates = {"floor": floor, "first step": lambda: update(True), "later step": lambda: update(False)}
    seconds = time_interleaved(candidates, ROUNDS)
    lines = [
        "# One online update on a CPU",
        "",
        f"`python -m benchmarks.online_step`: {PROMPTS * GROUP} answers of {ANSWER_TOKENS} tokens, fp32, medians of {ROUNDS} "
        "interleaved rounds. Wanted: at most 1.15 times the backbone and three bare products.",
        "",
        "| | ms | spread | times the floor |",
        "|---|---:|---:|---:|",
    ]
    for name, values in seconds.items():
        ms, times = 1e3 * statistics.median(values), ratio(values, seconds["floor"])
        lines.append(f"| {name} | {ms:.0f} | {spread(values):.2f} | {times:.2f} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "cpu" / "online_step.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
