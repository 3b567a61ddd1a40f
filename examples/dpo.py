"""DPO in plain PyTorch, on pairs of random tokens. hdpo.py is this file with three lines changed."""

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

ids = torch.randint(2048, (8, 33))  # chosen_0, rejected_0, chosen_1, ...: four pairs, their first 8 tokens a prompt
labels = ids.masked_fill(torch.arange(33) < 8, -100)[:, 1:].flatten()
with torch.no_grad():  # the model as it is now is the reference; [4, 2] summed log-probs of its answers
    ref = -cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels, reduction="none").view(4, 2, 32).sum(-1)
beta = 0.1

for step in range(8):
    hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    logps = -cross_entropy(model.lm_head(hidden), labels, reduction="none").view(4, 2, 32).sum(-1)
    loss = -logsigmoid(beta * (logps - ref).diff().neg()).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
