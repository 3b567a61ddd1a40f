"""H-DPO in a LightningModule: the training step returns the fused loss, and logs what came with it. Needs `lightning`."""

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_po import EntropyObjective, linear_preference_loss
from entropy_po.answers import Answers, answer_logps


class HDPO(lightning.LightningModule):
    """Batches are {"input_ids", "attention_mask", "labels"}, [2B, L] each: chosen_0, rejected_0, chosen_1, ...; and
    "ref_logps" [B, 2]."""

    def __init__(self, model, beta=0.1, alpha=0.9):
        super().__init__()
        self.model, self.objective = model, EntropyObjective.hdpo(beta, alpha)

    def training_step(self, batch, _):
        answers = Answers.of(self.model, batch)  # one forward of the model, without logits
        output = answers.loss(linear_preference_loss, objective=self.objective, ref_logps=batch["ref_logps"])
        self.log("margin", output.margins.mean())
        print(
            f"loss {output.loss.item():.4f}, entropy {output.entropy.sum() / output.lengths.sum():.3f} nats per token"
        )
        return output.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(512, (4, 17))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = ids.masked_fill(torch.arange(17) < 4, -100)
    with torch.no_grad():
        batch["ref_logps"] = answer_logps(model, batch).view(2, 2)
    loader = torch.utils.data.DataLoader([batch] * 4, batch_size=None)
    lightning.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="auto",
    ).fit(HDPO(model), loader)  # fmt: skip
