"""Fused log-probability, entropy and H-DPO / QEMPO losses that never hold the [tokens, vocab] logits.

Importing this needs torch alone; Triton, the compiled core, transformers and the rest load where they are first used.
"""

__version__ = "0.1.0"

from entropy_po.doctor import describe as describe
from entropy_po.dual import solve_dual as solve_dual
from entropy_po.objective import EntropyObjective as EntropyObjective
from entropy_po.ops.linear_preference_loss import PreferenceOutput as PreferenceOutput
from entropy_po.ops.linear_preference_loss import linear_preference_loss as linear_preference_loss
from entropy_po.ops.linear_token_stats import linear_token_stats as linear_token_stats
from entropy_po.ops.parallel import sequence_shard as sequence_shard
from entropy_po.ops.sequence_loss import SequenceBatch as SequenceBatch
from entropy_po.ops.sequence_loss import SequenceLossOutput as SequenceLossOutput
from entropy_po.ops.sequence_loss import sequence_loss as sequence_loss
from entropy_po.ops.token_stats import token_stats as token_stats
from entropy_po.tiles import available_backends as available_backends
from entropy_po.types import TokenStats as TokenStats

__all__ = [
    "EntropyObjective",
    "PreferenceOutput",
    "SequenceBatch",
    "SequenceLossOutput",
    "TokenStats",
    "available_backends",
    "describe",
    "linear_preference_loss",
    "linear_token_stats",
    "sequence_loss",
    "sequence_shard",
    "solve_dual",
    "token_stats",
]
