"""dpo.py made H-DPO with three lines changed; the loop forms no logits. alpha=1.0 prints what dpo.py prints."""

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_po import EntropyObjective, linear_preference_loss

torch.manual_seed(0)
config = LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

ids = torch.randint(2048, (8, 33))  # chosen_0, rejected_0, chosen_1, ...: four pairs, their first 8 tokens a prompt
labels = ids.masked_fill(torch.arange(33) < 8, -100)[:, 1:].flatten()
with torch.no_grad():  # the model as it is now is the reference; [4, 2] summed log-probs of its answers
    ref = -cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels, reduction="none").view(4, 2, 32).sum(-1)
hdpo, offsets = EntropyObjective.hdpo(beta=0.1, alpha=0.9), 32 * torch.arange(9)

for step in range(8):
    hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    loss = linear_preference_loss(hidden, model.lm_head.weight, labels, offsets, objective=hdpo, ref_logps=ref).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
