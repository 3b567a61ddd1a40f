"""Reward functions: found by import path, called on a batch of answers as TRL calls its own, weighed and added."""

import importlib
import math
import reprlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_po.arguments import numbers

RESERVED = frozenset(("prompts", "completions", "completion_ids", "trainer_state"))  # keywords of a call
RewardFunction = Callable[..., Sequence[float | None]]


class Rewards:
    """Several reward functions and their weights.

    A function is called with keyword arguments, one list entry per answer: `prompts`, `completions` (text, or where the
    prompt holds messages a list with one assistant message), `completion_ids`, every further column of the dataset (None in
    the rows that lack it), and `trainer_state`. It returns one number per answer, or None for an answer that it has nothing
    to say about, if another function has. Functions written for TRL's GRPOTrainer work as they are, unless they are coroutines.

    Args:
        functions: a callable or an import path `module:name`, or several.
        weights: one per function; None for 1 each.
    Raises:
        ValueError: no functions, another number of weights, a weight that is not finite, a path that is none.
        ImportError: a path whose module or name does not exist.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str] | RewardFunction | str | None,
        weights: Sequence[float] | None = None,
    ):
        if isinstance(functions, str) or callable(functions):
            functions = [functions]
        if (
            not functions
            or not isinstance(functions, (list, tuple))
            or not all(isinstance(f, str) or callable(f) for f in functions)
        ):
            raise ValueError(
                f"reward_funcs must be one function or more, or their import paths module:name; got {reprlib.repr(functions)}."
            )
        self.functions = [load_reward(f) if isinstance(f, str) else f for f in functions]
        self.names = _distinct([getattr(f, "__name__", type(f).__name__) for f in self.functions])
        weights = [1.0] * len(self.functions) if weights is None else numbers("reward_weights", weights).tolist()
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights={weights} must be {len(self.functions)} finite numbers, one per reward function."
            )
        self.weights = torch.tensor(weights)

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list], **context
    ) -> tuple[Tensor, Tensor]:
        """(weighted sums [S], each function's own rewards [S, F] with NaN for None), fp32 on the CPU.

        Raises:
            ValueError: a function that returned another number of rewards, or one that is not finite; or an answer that
                no function had a reward for. The message names the function or the prompt.
        """
        given = {**columns, **context}
        parts = torch.stack(
            [
                _checked(
                    name,
                    function(prompts=prompts, completions=completions, completion_ids=completion_ids, **given),
                    len(completions),
                )
                for name, function in zip(self.names, self.functions, strict=True)
            ],
            dim=1,
        )
        silent = parts.isnan().all(1)
        if bool(silent.any()):
            prompt = prompts[int(silent.nonzero()[0, 0])]
            raise ValueError(f"reward_funcs: none of {', '.join(self.names)} gave a reward to an answer to {prompt!r}.")
        return (parts.nan_to_num(0.0) * self.weights).sum(1), parts


def load_reward(path: str) -> RewardFunction:
    """The callable at `module:name` (or `package.module.name`)."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not name:
        raise ValueError(f"reward_funcs: {path!r} is no import path; write module:name.")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reward_funcs: {path}: no module {error.name!r}; it is looked for as `import` does."
        ) from error
    function = getattr(imported, name, None)
    if function is None:
        raise ImportError(f"reward_funcs: {path}: module {module} has no {name}.")
    if not callable(function):
        raise ValueError(f"reward_funcs: {path} is a {type(function).__name__}, not a function.")
    return function


def _checked(name: str, rewards: Sequence[float | None], count: int) -> Tensor:
    if len(rewards) != count:
        raise ValueError(
            f"reward function {name} returned {len(rewards)} rewards for {count} answers; return one each."
        )
    values = torch.tensor([math.nan if r is None else float(r) for r in rewards], dtype=torch.float32)
    said = torch.tensor([r is not None for r in rewards])
    if not bool(values[said].isfinite().all()):
        raise ValueError(f"reward function {name} returned a reward that is not finite; return None to abstain.")
    return values


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
