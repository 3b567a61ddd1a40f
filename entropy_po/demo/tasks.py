"""Short writing tasks whose constraints a few lines of Python can check: the demo's data and its reward.

A task asks for a few words about a topic under two constraints, such as "Use between 10 and 20 words." and
"Use exactly one exclamation mark." SmolLM2-135M-Instruct meets each kind sometimes and misses it sometimes, so that
preference pairs and a reward can be had without a judge. Nothing is stored: the tasks are a function of a seed.

    train, heldout = train_tasks(), heldout_tasks()  # no (topic, kind of constraint) occurs in both
    quality(train[0], "Tea is a drink.")  # fraction of its constraints met

`python -m entropy_po.demo.tasks > prompts.jsonl` writes the training tasks as prompts for `entropy-po train-online`, whose
reward is `--reward_funcs entropy_po.demo.tasks:constraints_met`.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest

from entropy_po.tasks import add_text_option, chat, print_rows

# Topic, and the word that is hard to avoid when writing about it.
TOPICS = (
    ("a cup of tea", "tea"),
    ("riding a bicycle", "bicycle"),
    ("the moon", "moon"),
    ("a rainy day", "rain"),
    ("baking bread", "bread"),
    ("a lost cat", "cat"),
    ("the ocean", "ocean"),
    ("an old library", "books"),
    ("learning to swim", "water"),
    ("a birthday party", "birthday"),
    ("growing tomatoes", "tomatoes"),
    ("a train journey", "train"),
    ("mountains in winter", "snow"),
    ("playing chess", "chess"),
    ("a morning walk", "walk"),
    ("honey bees", "bees"),
    ("a busy market", "market"),
    ("learning the guitar", "guitar"),
    ("a summer storm", "storm"),
    ("washing the dishes", "dishes"),
    ("a family dinner", "food"),
    ("a new pair of shoes", "shoes"),
    ("a small garden", "garden"),
    ("reading a newspaper", "news"),
    ("elephants", "elephants"),
    ("a good night's sleep", "sleep"),
    ("saving money", "money"),
    ("a football match", "football"),
    ("drinking coffee", "coffee"),
    ("a walk in the forest", "trees"),
    ("the first day of school", "school"),
    ("a broken clock", "time"),
    ("making new friends", "friends"),
    ("a ferry to an island", "island"),
    ("flying a kite", "kite"),
    ("the desert at night", "desert"),
    ("a visit to the dentist", "teeth"),
    ("painting a wall", "paint"),
    ("a dog at the beach", "dog"),
    ("cooking rice", "rice"),
    ("stars in the sky", "stars"),
    ("a museum visit", "museum"),
    ("writing a letter", "letter"),
    ("a long bridge", "bridge"),
    ("running a marathon", "running"),
    ("autumn leaves", "leaves"),
    ("a quiet village", "village"),
    ("fixing a bicycle tyre", "tyre"),
    ("the smell of coffee", "smell"),
    ("a hot air balloon", "balloon"),
    ("keeping a diary", "diary"),
    ("a bowl of soup", "soup"),
    ("planting a tree", "tree"),
    ("the city at midnight", "night"),
    ("a fishing trip", "fish"),
    ("folding paper", "paper"),
    ("a wedding", "love"),
    ("public transport", "bus"),
    ("wild horses", "horses"),
    ("a snowman", "snow"),
)

OPENINGS = (
    "Write a short note about {}.",
    "Describe {} in a few words.",
    "Tell a friend something about {}.",
    "Say why people like {}.",
    "Write a short thought about {}.",
    "Give one fact or idea about {}.",
)
WORDS_TO_USE = (
    "always",
    "simple",
    "quiet",
    "bright",
    "together",
    "often",
    "little",
    "world",
    "heart",
    "enjoy",
    "great",
)
FIRST_WORDS = ("Sometimes", "Today", "Every", "Imagine", "When", "My", "In", "Once", "Perhaps")
COLOURS = {
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "gray",
    "gold",
}
WEEKDAYS = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
WORD_RANGES = ((5, 12), (10, 18), (15, 25), (20, 30), (30, 45))
CLOSING_MARKS = " \n\"'”’"  # may follow the mark or word that ends an answer


def words(text: str) -> list[str]:
    """Words of a text, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _count_word(text: str, word: str) -> int:
    return sum(w.lower() == word for w in words(text))


def _count_sentences(text: str) -> int:
    """Parts with a word in them that end with . ! ? or with the text."""
    return sum(bool(words(part)) for part in re.split(r"[.!?]+[\"'”’)]*(?:\s+|$)", text))


@dataclass(frozen=True)
class Kind:
    """A kind of constraint: how it is asked for, how an answer is checked, how its arguments are drawn.

    `slots` names the parts of an answer that it rules; kinds that share one never meet in a task.
    """

    instruction: str
    check: Callable[..., bool]  # (text, *args) -> met or not
    slots: frozenset[str]
    draw: Callable[[random.Random, str], tuple] = lambda rng, word: ()  # (rng, the topic's word) -> args


KINDS = {
    "word_range": Kind(
        "Use between {} and {} words.",
        lambda text, low, high: low <= len(words(text)) <= high,
        frozenset({"length"}),
        lambda rng, word: rng.choice(WORD_RANGES),
    ),
    "sentences": Kind(
        "Write exactly {} sentences.",
        lambda text, count: _count_sentences(text) == count,
        frozenset({"length"}),
        lambda rng, word: (rng.choice((2, 3)),),
    ),
    "numbered_list": Kind(
        "Answer with a numbered list of exactly {} items.",
        lambda text, count: len(re.findall(r"(?m)^\s*\d+[.)]\s", text)) == count,
        frozenset({"length", "start", "end"}),
        lambda rng, word: (rng.choice((2, 3, 4)),),
    ),
    "use_word": Kind(
        'Use the word "{}".',
        lambda text, word: _count_word(text, word) > 0,
        frozenset({"words"}),
        lambda rng, word: (rng.choice(WORDS_TO_USE),),
    ),
    "use_word_twice": Kind(
        'Use the word "{}" exactly twice.',
        lambda text, word: _count_word(text, word) == 2,
        frozenset({"words"}),
        lambda rng, word: (word,),
    ),
    "avoid_word": Kind(
        'Do not use the word "{}".',
        lambda text, word: _count_word(text, word) == 0,
        frozenset({"words"}),
        lambda rng, word: (word,),
    ),
    "first_word": Kind(
        'Start with the word "{}".',
        lambda text, word: words(text)[:1] == [word],
        frozenset({"start"}),
        lambda rng, word: (rng.choice(FIRST_WORDS),),
    ),
    "title": Kind(
        'Begin with a title on a line of its own, in the form "Title: ...".',
        lambda text: re.match(r"\W*title:.*\w.*\n\s*\w", text, re.IGNORECASE) is not None,
        frozenset({"start"}),
    ),
    "question": Kind(
        "Write it as a question that ends with a question mark.",
        lambda text: text.rstrip(CLOSING_MARKS).endswith("?"),
        frozenset({"end"}),
    ),
    "the_end": Kind(
        'End with "the end."',
        lambda text: re.search(r"\bthe end\W*$", text, re.IGNORECASE) is not None,
        frozenset({"end"}),
    ),
    "exclamation": Kind(
        "Use exactly one exclamation mark.",
        lambda text: text.count("!") == 1,
        frozenset({"marks", "end"}),
    ),
    "no_commas": Kind(
        "Do not use any commas.",
        lambda text: "," not in text,
        frozenset({"marks"}),
    ),
    "weekday": Kind(
        "Mention a day of the week.",
        lambda text: any(word.lower() in WEEKDAYS for word in words(text)),
        frozenset({"content"}),
    ),
    "colour": Kind(
        "Name a colour.",
        lambda text: any(word.lower() in COLOURS for word in words(text)),
        frozenset({"content"}),
    ),
}
HELDOUT_KINDS_PER_TOPIC = 3


@dataclass(frozen=True)
class Constraint:
    """A kind of constraint (a key of `KINDS`) with its arguments."""

    kind: str
    args: tuple = ()

    @property
    def instruction(self) -> str:
        return KINDS[self.kind].instruction.format(*self.args)

    def met(self, text: str) -> bool:
        return KINDS[self.kind].check(text, *self.args)


@dataclass(frozen=True)
class Task:
    """A prompt for the model, what an answer to it must meet, and what it is about."""

    prompt: str
    constraints: tuple[Constraint, ...]
    topic: str


def quality(task: Task, text: str) -> float:
    """Fraction of the task's constraints that the answer meets, in [0, 1].

    An answer of fewer than three words has quality 0: it would meet "Do not use any commas." by saying nothing.
    """
    if len(words(text)) < 3:
        return 0.0
    return sum(constraint.met(text) for constraint in task.constraints) / len(task.constraints)


def prompt_rows(tasks: Iterable[Task]) -> list[dict]:
    """The tasks as rows for online training: a chat prompt, and the constraints that `constraints_met` reads."""
    return [
        {
            "prompt": chat(task.prompt),
            "constraints": [[constraint.kind, list(constraint.args)] for constraint in task.constraints],
        }
        for task in tasks
    ]


def constraints_met(completions: Sequence, constraints: Sequence, **_) -> list[float]:
    """`quality` of every answer, as a reward function of `OnlineTrainer` (and of TRL): "entropy_po.demo.tasks:constraints_met".

    Args:
        completions: texts, or lists with one assistant message.
        constraints: of each answer's prompt, as in `prompt_rows`.
    """
    rewards = []
    for completion, given in zip(completions, constraints, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        task = Task("", tuple(Constraint(kind, tuple(args)) for kind, args in given), "")
        rewards.append(quality(task, text))
    return rewards


def train_tasks(count: int = 512, seed: int = 0) -> list[Task]:
    """The first `count` training tasks of a seed; prompts are distinct, neighbours have different topics.

    Raises:
        ValueError: fewer than `count` tasks exist.
    """
    return _take(count, seed, heldout=False)


def heldout_tasks(count: int = 64, seed: int = 0) -> list[Task]:
    """As `train_tasks`, but every (topic, kind of constraint) in them is absent from all training tasks of the seed."""
    return _take(count, seed, heldout=True)


def _take(count: int, seed: int, heldout: bool) -> list[Task]:
    per_topic = [_topic_tasks(topic, word, seed, heldout) for topic, word in TOPICS]
    tasks = [task for turn in zip_longest(*per_topic) for task in turn if task is not None]
    if not 0 <= count <= len(tasks):
        raise ValueError(f"count: got {count}, expected 0 to {len(tasks)}, the number of different tasks")
    return tasks[:count]


def _topic_tasks(topic: str, word: str, seed: int, heldout: bool) -> list[Task]:
    """One task for each pair of compatible kinds on this side of the topic's split, in random order."""
    rng = random.Random(f"{seed} {topic}")
    kinds = rng.sample(list(KINDS), len(KINDS))
    kinds = kinds[:HELDOUT_KINDS_PER_TOPIC] if heldout else kinds[HELDOUT_KINDS_PER_TOPIC:]
    pairs = [(a, b) for a, b in combinations(kinds, 2) if not KINDS[a].slots & KINDS[b].slots]
    rng.shuffle(pairs)
    tasks = []
    for pair in pairs:
        constraints = tuple(Constraint(kind, KINDS[kind].draw(rng, word)) for kind in pair)
        sentences = [rng.choice(OPENINGS).format(topic), *(constraint.instruction for constraint in constraints)]
        tasks.append(Task(" ".join(sentences), constraints, topic))
    return tasks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_option(parser)
    print_rows(prompt_rows(train_tasks()), parser.parse_args().text)
