"""The command `entropy-po`: demo, train, train-online, evaluate, bench, plan, doctor.

Each subcommand is imported when it is called. An error the user can act on is one line on stderr and exit status 2;
`--traceback`, or ENTROPY_PO_TRACEBACK=1, shows where it came from.
"""

import difflib
import importlib
import logging as stdlib_logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = {
    "demo": ("entropy_po.demo.run", "the whole method on a small model, in minutes"),
    "train": ("entropy_po.cli", "offline preference training: H-DPO, DPO, SPL, QEMPO, QEMPO-KL"),
    "train-online": ("entropy_po.cli", "online training on a model's own answers: QEMPO, QEMPO-KL, RLHF"),
    "evaluate": ("entropy_po.evaluation.cli", "quality, diversity and length of a model's answers"),
    "bench": ("entropy_po.bench.command", "time, memory and error at a shape of yours, against torch and peers"),
    "plan": ("entropy_po.forecast", "memory, bytes on the wire and time on many GPUs, by counting"),
    "doctor": ("entropy_po.doctor", "what this installation can do, and what it lacks"),
}
USAGE = "usage: entropy-po COMMAND [options]\n\n" + "\n".join(
    f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()
)
USAGE += "\n\nentropy-po COMMAND --help tells the options; --traceback, anywhere, shows where an error came from."


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None for those of the process.
    Returns:
        Exit status: 0, 2 for a user's error, 130 for an interrupt, 141 for a reader that has gone, or what the command
            returned.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv or os.environ.get("ENTROPY_PO_TRACEBACK", "0") not in ("", "0")
    argv = [arg for arg in argv if arg != "--traceback"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        from entropy_po import __version__

        print(f"entropy_po {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(COMMANDS)}."
        print(f"entropy-po: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    try:
        run = TRAINING.get(command) or importlib.import_module(COMMANDS[command][0]).main
        status = run(rest) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        print(f"entropy-po: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError) as error:
        if traceback:
            raise
        print(f"entropy-po {command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass
class TrainSources:
    """What a run trains on; everything else is an argument of EntropyPOConfig or OnlineConfig."""

    model: str = field(metadata={"help": "smollm2-135m, a hub id or a model folder."})
    train_data: str = field(metadata={"help": "A .jsonl or .jsonl.gz file, a datasets folder or a dataset's name."})
    eval_data: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, where it has several."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, where it has several."})
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights; small updates are lost in bfloat16 without LoRA."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})


def train(argv: list[str]) -> int:
    """`entropy-po train [config.yaml] [--flags]`: flags win over the file. Leaves the model in output_dir."""
    from entropy_po.trainer.config import EntropyPOConfig

    sources, args = _parse_train(argv, "train", EntropyPOConfig)
    from entropy_po.trainer.preference import PreferenceTrainer

    shown = {"loss": "train_loss", "eval loss": "eval_loss", "eval accuracy": "eval_rewards/accuracies"}
    _run(sources, args, PreferenceTrainer, "pairs", shown)
    return 0


def train_online(argv: list[str]) -> int:
    """`entropy-po train-online [config.yaml] [--flags]`. Reward functions are looked for in the current folder too."""
    from entropy_po.trainer.config import OnlineConfig

    sources, args = _parse_train(argv, "train-online", OnlineConfig)
    from entropy_po.trainer.online import OnlineTrainer
    from entropy_po.trainer.rewards import Rewards

    sys.path.insert(0, "")  # as `python -m` has it
    rewards = Rewards(args.reward_funcs, args.reward_weights)  # a typing error should not wait for a model

    def make(model, args, train_rows, eval_rows, tokenizer):
        return OnlineTrainer(model, args, train_rows, eval_rows, rewards.functions, tokenizer)

    shown = {"eval reward": "eval_reward", "eval entropy": "eval_entropy"}
    trainer = _run(sources, args, make, "prompts", shown)
    if trainer.ascent is not None and trainer.is_world_process_zero():
        print(f"constraints: {trainer.ascent.verdict()}")
    return 0


def _run(sources: TrainSources, args, make: Callable, items: str, shown: dict[str, str]):
    """Load, train, save, and print two lines around it; the trainer."""
    from transformers.utils import logging

    # The Trainer logs its own bookkeeping at warning level; none of it is a user's to act on.
    logging.set_verbosity_error()
    stdlib_logging.getLogger("huggingface_hub").setLevel(stdlib_logging.ERROR)  # its retries, when offline
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\.")
    args.log_level = args.log_level if args.log_level != "passive" else "error"

    from entropy_po.models import load_model, load_tokenizer
    from entropy_po.trainer.data import load_rows

    # Data first: a typing error in a path should not wait for a model.
    train_rows = load_rows(sources.train_data, sources.train_split)
    eval_rows = load_rows(sources.eval_data, sources.eval_split) if sources.eval_data else None
    if sources.model.startswith((".", "/", "~")) and not Path(sources.model).expanduser().is_dir():
        raise FileNotFoundError(f"model: {sources.model}: no such folder; give a model folder or a hub id.")
    options = {"attn_implementation": sources.attn_implementation} if sources.attn_implementation else {}
    model = load_model(sources.model, dtype=sources.dtype, **options)
    tokenizer = load_tokenizer(sources.model)
    logging.disable_progress_bar()  # one bar: that of the steps
    if not args.process_index:
        a, b = args.entropy_objective.policy_coef, args.entropy_objective.ref_coef
        print(
            f"{sources.model}: {len(train_rows)} {items}, method {args.method} (a={a:g} on log pi, b={b:g} on log ref)"
        )
    trainer = make(model, args, train_rows, eval_rows, tokenizer)
    metrics = trainer.train(_resume(args.resume_from_checkpoint)).metrics
    trainer.save_model()
    if eval_rows is not None:
        metrics = {**metrics, **trainer.evaluate()}
    if trainer.is_world_process_zero():
        numbers = [f"{label} {metrics[name]:.4f}" for label, name in shown.items() if name in metrics]
        steps = ", ".join([f"{trainer.state.global_step} steps", *numbers])
        print(f"{steps}; model and metrics.jsonl in {args.output_dir}")
    return trainer


def _parse_train(argv: list[str], command: str, config_class: type):
    from transformers import HfArgumentParser

    classes: Any = (TrainSources, config_class)
    parser: Any = HfArgumentParser(
        classes,
        prog=f"entropy-po {command}",
        usage=f"entropy-po {command} [config.yaml] --model NAME --train_data FILE --output_dir FOLDER [--method NAME ...]",
    )

    def error(message: str) -> NoReturn:
        # argparse would print the usage of some 150 arguments before it.
        raise ValueError(message)

    parser.error = error
    if argv and not argv[0].startswith("-"):
        config, *argv = argv
        _defaults_from_yaml(parser, config)
    unknown = [flag for flag in parser.parse_known_args(argv)[1] if flag.startswith("--")]
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise ValueError(f"no option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "."))
    return parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)


def _defaults_from_yaml(parser, config: str) -> None:
    import yaml

    if not Path(config).is_file():
        raise FileNotFoundError(f"{config}: no such file; give a YAML file, or options that start with --.")
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: not YAML ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config}: expected lines of `name: value`, got {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, n=1)
            raise ValueError(f"{config}: no option {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
        action = actions[name]
        action.required = False
        # YAML reads 1e-6 as text, and argparse converts only text: hand each scalar over as the flag would.
        convert = action.type if action.type is not None and isinstance(value, str | int | float) else None
        try:
            action.default = convert(str(value)) if convert else value
        except (ValueError, TypeError) as error:
            raise ValueError(f"{config}: {name}={value!r} is no {getattr(action.type, '__name__', 'value')}") from error


def _resume(value: str | None) -> str | bool | None:
    return value.lower() in ("true", "1") if value and value.lower() in ("true", "false", "0", "1") else value


TRAINING = {"train": train, "train-online": train_online}


if __name__ == "__main__":
    sys.exit(main())
