"""Online QEMPO in plain PyTorch, a GRPO-style loop: sample groups, score them, shape the reward, take steps. Neither the
scoring nor the steps hold logits. The reward is the share of even tokens in an answer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_po import EntropyObjective, linear_token_stats, sequence_loss
from entropy_po.policy_gradient import clipped_surrogate, sequence_advantages

PROMPTS, GROUP, PROMPT, ANSWER = 2, 8, 4, 12
torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
model.generation_config.eos_token_id = None  # all answers are of one length, and drawn from the policy itself
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
objective = EntropyObjective.qempo(lam=1000.0)
prompts = torch.randint(512, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
options = {"max_new_tokens": ANSWER, "do_sample": True, "top_k": 0, "pad_token_id": 0}


def hidden_states(ids):  # those that predict the answers' tokens, packed
    return model.model(ids).last_hidden_state[:, PROMPT - 1 : -1].flatten(0, 1)


def clipped_loss(old_logps, advantages):
    def loss_of(batch):
        old, advantage = old_logps[batch.rows], advantages[batch.sequence_ids]
        gain, _ = clipped_surrogate(batch.token_logps, old, advantage, epsilon=0.2, epsilon_high=0.2)
        return -gain.sum() / len(advantages)

    return loss_of


for step in range(8):
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    labels, offsets = ids[:, PROMPT:].flatten(), ANSWER * torch.arange(len(ids) + 1)
    rewards = (ids[:, PROMPT:] % 2 == 0).float().mean(1)
    with torch.no_grad():
        logps, entropy, *_ = linear_token_stats(hidden_states(ids), model.lm_head.weight, labels)
    sums = logps.view(-1, ANSWER).sum(1)
    advantages = sequence_advantages(objective, rewards.view(-1, GROUP), sums.view(-1, GROUP)).flatten()
    for _ in range(2):  # optimiser steps on the same samples
        loss_of = clipped_loss(logps, advantages)
        sequence_loss(hidden_states(ids), model.lm_head.weight, labels, offsets, loss_of, coupled=0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {step}: reward {rewards.mean():.3f}, entropy {entropy.mean():.3f} nats per token")
