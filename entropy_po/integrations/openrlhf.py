"""OpenRLHF's helpers on logits, with its signatures (0.11); OpenRLHF itself is not needed here.

import openrlhf.models.actor as actor
from entropy_po.integrations.openrlhf import compute_entropy, log_probs_from_logits

actor.log_probs_from_logits, actor.compute_entropy = log_probs_from_logits, compute_entropy
"""

from torch import Tensor

from entropy_po.integrations.logits import entropy_from_logits, logps_from_logits


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`openrlhf.models.utils.log_probs_from_logits`: [..., V] and [...] to [...] in nats, fp32.

    OpenRLHF divides the caller's logits by the temperature in place; these stay as they are.
    """
    return logps_from_logits(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """`openrlhf.models.utils.compute_entropy`: [..., V] to [...] in nats, fp32."""
    return entropy_from_logits(logits)
