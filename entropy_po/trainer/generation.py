"""What draws the answers that online training learns from: transformers' generate, or vLLM.

Both draw from the very distribution that the loss differentiates: the model's softmax at one temperature, with nothing
cut off (top-k, top-p) and nothing penalised, whatever the model's own generation settings say.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig

from entropy_po.heads import evaluation_mode, unwrap


class Generation(Protocol):
    """(model, ids of the prompts, answers per prompt, seed) -> ids of the answers, `num` to the first prompt, and so on.

    An answer's end-of-sequence token belongs to it; one without was cut at the longest length. The same arguments give the
    same answers, and torch's own random state is left as it was.
    """

    def __call__(self, model: nn.Module, prompts: Sequence[list[int]], num: int, seed: int) -> list[list[int]]: ...


class TransformersGeneration:
    """`model.generate`, many prompts at a time, in evaluation mode, without a gradient.

    Args:
        end_ids: tokens that end an answer.
        pad_token_id: any id; what is padded is masked.
        max_new_tokens, temperature: of the sampling.
        batch_size: answers drawn at a time, rounded down to whole prompts; None for all.
    """

    def __init__(
        self, end_ids: Sequence[int], pad_token_id: int, max_new_tokens: int, temperature: float, batch_size: int | None
    ):
        self.end_ids, self.pad_token_id, self.batch_size = list(end_ids), pad_token_id, batch_size
        self.config = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids or None,
            pad_token_id=pad_token_id,
        )

    def __call__(self, model: nn.Module, prompts: Sequence[list[int]], num: int, seed: int) -> list[list[int]]:
        # Adapters sit inside the base model's layers, so its own generate runs them.
        policy: Any = unwrap(model)
        per_call = len(prompts) if self.batch_size is None else max(1, self.batch_size // num)
        # generate() fills what a config leaves open from the model's own, penalties and forced tokens with it.
        own, policy.generation_config = policy.generation_config, self.config
        devices = [policy.device] if policy.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), evaluation_mode(policy):
                torch.manual_seed(seed)
                answers = []
                for start in range(0, len(prompts), per_call):
                    answers += self._batch(policy, prompts[start : start + per_call], num)
        finally:
            policy.generation_config = own
        return answers

    def _batch(self, model: Any, prompts: Sequence[list[int]], num: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: every prompt ends where its answers start
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = (x.repeat_interleave(num, dim=0).to(model.device) for x in (ids, mask))
        drawn = model.generate(input_ids=ids, attention_mask=mask)[:, longest:]
        return [_until_end(row, self.end_ids) for row in drawn.tolist()]


class VLLMGeneration:
    """vLLM in this process, on this rank's GPU; it is given the policy's weights before every draw.

    Raises:
        ImportError: vLLM is not installed. ValueError: the model carries an adapter.
    """

    def __init__(self, end_ids: Sequence[int], max_new_tokens: int, temperature: float, gpu_memory_utilization: float):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "generation='vllm' needs the package vllm, which is not installed; pip install vllm, or use "
                "generation='transformers'."
            ) from error
        self.vllm = vllm
        self.engine: Any = None
        self.end_ids, self.gpu_memory_utilization = list(end_ids), gpu_memory_utilization
        self.sampling = {
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "max_tokens": max_new_tokens,
            "stop_token_ids": self.end_ids,
            "ignore_eos": False,
            "detokenize": False,
        }

    def __call__(self, model: nn.Module, prompts: Sequence[list[int]], num: int, seed: int) -> list[list[int]]:
        if hasattr(model, "peft_config"):
            raise ValueError("generation='vllm' does not take a model with an adapter; use generation='transformers'.")
        policy: Any = unwrap(model)
        if self.engine is None:
            self.engine = self.vllm.LLM(
                model=policy.config._name_or_path,
                skip_tokenizer_init=True,
                distributed_executor_backend="external_launcher",  # in this process, so that weights can be handed over
                gpu_memory_utilization=self.gpu_memory_utilization,
                generation_config="vllm",  # not the checkpoint's own top-k and penalties
            )
        inner = self.engine.llm_engine.model_executor.driver_worker.model_runner.model
        inner.load_weights([(name, parameter.data) for name, parameter in policy.named_parameters()])
        self.engine.reset_prefix_cache()
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        sampling = self.vllm.SamplingParams(n=num, seed=seed, **self.sampling)
        outputs = self.engine.generate(given, sampling_params=sampling, use_tqdm=False)
        return [_until_end(list(answer.token_ids), self.end_ids) for output in outputs for answer in output.outputs]


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    """What was drawn, up to the first token that ends an answer, with it; the padding after it may have the same id."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in end_ids), ids)
