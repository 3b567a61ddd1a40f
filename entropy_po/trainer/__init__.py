"""Preference and online training on transformers.Trainer."""

from entropy_po.trainer.config import EntropyPOConfig as EntropyPOConfig
from entropy_po.trainer.config import OnlineConfig as OnlineConfig
from entropy_po.trainer.data import PairCollator as PairCollator
from entropy_po.trainer.data import PairDataset as PairDataset
from entropy_po.trainer.data import load_rows as load_rows
from entropy_po.trainer.data import tokenize_pairs as tokenize_pairs
from entropy_po.trainer.online import OnlineTrainer as OnlineTrainer
from entropy_po.trainer.preference import PreferenceTrainer as PreferenceTrainer
