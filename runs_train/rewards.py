"""Prompts to be continued, and rewards that a program gives to what a model makes of them.

    a file of JSON lines    {"prompt": "What is 3 + 4?", "answer": 7}
                            the prompt a text or a list of messages; what else there is, is for the reward
    the word stdlib         the first lines of functions: def read_lines(path):

    --reward parses         1 if prompt and continuation are Python, as far as Python's own parser knows
    --reward answer         1 if the last number in the text is the line's "answer"
    --reward mine.py        reward(text, row, is_whole) of that file: any finite number, the higher the better

A reward looks at the text and nothing else: no model judges here, so nothing has to be believed. What it does
not ask for, it will not get: a body of `pass` parses as well as a useful one.

A prompt is a text that the model goes on with, and both together are judged. If the checkpoint has a chat
template, the prompt is a question, and the answer alone is judged.
Proof: tests/test_train_grpo.py.
"""

import ast
import re
import runpy
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.utils.errors import UserError, one_line
from models.utils.files import read_text
from runs_train.chat_data import as_messages, corpus_of
from runs_train.text_data import split_documents


class Prompt(NamedTuple):
    messages: list
    row: dict  # the line of the data, for the reward
    where: str


def read_prompts(data, reward):
    """The Corpus of --data; reward: the word or the path of --reward."""

    def read_prompt(row, place, where):
        if not isinstance(row, dict) or not row.get("prompt"):
            raise UserError(f"{where}: has no prompt")
        if reward == "answer" and number_of(row.get("answer")) is None:
            raise UserError(f"{where}: answer is {row.get('answer')!r}; --reward answer expects a number")
        return Prompt(as_messages(row["prompt"], "user", f"{where}: prompt"), row, place)

    return corpus_of(data, read_prompt, library_prompts)


def library_prompts():
    """(training, held-out) first lines of functions that are not within anything, every line once."""
    train, held_out = split_documents("stdlib")
    lines, parts = {}, ([], [])
    for n, document in [(0, document) for document in train] + [(1, document) for document in held_out]:
        for line in re.findall(r"^def \w+\([^()\n]*\):\n", document.text, re.MULTILINE):
            lines.setdefault(line, (parts[n], document.name))
    for line, (part, name) in lines.items():
        part.append(Prompt(as_messages(line, "user", name), {"prompt": line}, name))
    return parts


class Prompts:
    """Those that leave room for what is written, as (Prompt, token ids)."""

    def __init__(self, prompts, tokenizer, longest, option):
        self.tokenizer, self.found = tokenizer, []
        for prompt in prompts:
            try:
                ids = self.encode(prompt)
            except UserError as error:
                raise UserError(f"{option}, {prompt.where}: {error}") from None
            self.found += [(prompt, ids)] if len(ids) <= longest else []
        if not self.found:
            raise UserError(f"{option}: --new-tokens leaves no prompt room; {longest} tokens are left for it")

    def __len__(self):
        return len(self.found)

    def encode(self, prompt):
        if self.tokenizer.chat_template:
            return self.tokenizer.encode_chat(prompt.messages)
        if not isinstance(prompt.row["prompt"], str):
            raise UserError(
                "prompt is a list of messages, but the checkpoint has no chat template; give a text"
            )
        return self.tokenizer.encode(prompt.row["prompt"], bos=True if self.tokenizer.bos_id else None)

    def ask(self, number, count, seed):
        """The `count` prompts of batch `number`; every one is asked once before any is asked again."""
        places = [divmod(n, len(self.found)) for n in range(number * count, (number + 1) * count)]
        orders = {n: np.random.default_rng([seed, n]).permutation(len(self.found)) for n, _ in places}
        return [self.found[orders[number_of_pass][place]] for number_of_pass, place in places]

    def spread(self, most):
        """At most so many, from everywhere among them."""
        return self.found[:: -(-len(self.found) // most)]


# Rewards ----------------------------------------------------------------------------------------------------


def find_reward(name):
    """reward(text, row, is_whole) -> number; is_whole: the model ended the text, not --new-tokens."""
    if name in REWARDS:
        return REWARDS[name]
    path = Path(name)
    if path.suffix != ".py":
        raise UserError(f"--reward {name}: is none of {', '.join(REWARDS)}, and no file that ends in .py")
    read_text(path, "--reward")
    try:
        found = runpy.run_path(str(path)).get("reward")
    except Exception as error:
        raise UserError(f"--reward {name}: {type(error).__name__}: {one_line(error)}") from None
    if not callable(found):
        raise UserError(f"--reward {name}: has no function reward(text, row, is_whole)")
    return found


def parses(text, row, is_whole):
    r"""Of a text that broke off, the last line does not count: nobody knows how it goes on.

    >>> parses("def add(a, b): return a + b", {}, is_whole=True)
    1.0
    >>> parses("def add(a, b): return a +", {}, is_whole=True)
    0.0
    >>> parses("def add(a, b): return a\nclass Su", {}, is_whole=False)
    1.0
    """
    if not is_whole:
        text = text[: text.rfind("\n") + 1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in a string, say
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return 1.0


def answer(text, row, is_whole):
    """The last number decides; those of a prompt do not count.

    >>> answer("3 and 4 make 7.", {"answer": "7"}, is_whole=True)
    1.0
    """
    if isinstance(row.get("prompt"), str):
        text = text.removeprefix(row["prompt"])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == number_of(row["answer"]))


def number_of(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


REWARDS = {"parses": parses, "answer": answer}
