"""FSDP and DeepSpeed through accelerate where there is no GPU, which accelerate has neither for.

`accelerate launch ... tests/cpu_as_gpu.py train ...` is `-m entropy_po.cli train ...` in processes that accelerate takes for
GPUs; everything else, the file of the engine and what accelerate makes of it, is as it would be there.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

CONFIGS = Path(__file__).resolve().parent.parent / "docs" / "accelerate"


@contextmanager
def cpu_as_gpu() -> Iterator[None]:
    import torch.distributed as dist
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare(self, *args, **kwargs):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    device = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    with mock.patch.dict(os.environ, device), mock.patch.object(PartialState, "_prepare_backend", prepare):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            backend = importlib.import_module("deepspeed.comm.torch")  # by attribute it is torch itself
            backend.build_shm_op = lambda: None  # it would compile one, and do the rest over gloo all the same
        yield


@contextmanager
def engine(name: str, *flags: str) -> Iterator[None]:
    """This process as `accelerate launch --config_file docs/accelerate/NAME.yaml FLAGS` would start it."""
    from accelerate.commands import launch

    started = []
    flags = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_machines", "1", "--main_process_port", "0", *flags]
    with mock.patch("torch.distributed.run.run", lambda args: started.append(dict(os.environ))):
        launch.launch_command(launch.launch_command_parser().parse_args([*flags, "a script"]))
    environment = {name: x for name, x in started[0].items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    with mock.patch.dict(os.environ, environment):
        if name == "ddp" or torch.cuda.is_available():
            yield
        else:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            with cpu_as_gpu():
                yield
            unset_hf_deepspeed_config()  # it would make shards of the next model


if __name__ == "__main__":
    from entropy_po.cli import main

    with cpu_as_gpu():
        sys.exit(main())
