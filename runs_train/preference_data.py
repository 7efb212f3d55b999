"""Pairs of answers to learn from: which of two is better, laid out by the checkpoint's template, in batches.

    a file of JSON lines    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
                            each a text or a list of messages; a list may hold the whole conversation
    the word stdlib         what a function does: chosen is its own docstring's first line, rejected that of
                            another function of the same module or class

Both answers stand behind the same messages, and the answer alone counts: what a conversation holds before it,
earlier answers too, is read. A pair that is longer than the context is left out, and counted: half an answer
is another one than the one that somebody liked.

Shapes: B pairs in a batch, T tokens of the longest row.
Proof: tests/test_train_dpo.py.
"""

from itertools import groupby
from typing import NamedTuple

from models.utils.errors import UserError
from runs_train.chat_data import Batches, as_messages, corpus_of, first_question, lay_out, split_library


class Pair(NamedTuple):
    messages: list  # the conversation that ends with the chosen answer
    rejected: list  # the same with the rejected one
    where: str  # of the data it stands: "line 3"


def read_pairs(data):
    return corpus_of(data, read_pair, library_pairs)


def read_pair(row, place, where):
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise UserError(f"{where}: has not both chosen and rejected")
    prompt = as_messages(row.get("prompt", []), "user", f"{where}: prompt")
    sides = [conversation(prompt, row[name], f"{where}: {name}") for name in ("chosen", "rejected")]
    chosen, rejected = sides
    is_pair = chosen[:-1] == rejected[:-1] and chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
    if not is_pair or all(message["role"] in ("system", "assistant") for message in chosen):
        raise UserError(f"{where}: chosen and rejected are no two answers to the same question")
    return Pair(chosen, rejected, place)


def conversation(prompt, answer, where):
    """One side as messages: the answer behind the prompt, or, as some data have it, the whole of it."""
    answer = as_messages(answer, "assistant", where)
    return prompt + answer if answer[:1] and answer[0]["role"] == "assistant" else answer


def library_pairs():
    return [list(pairs_within(part)) for part in split_library()]


def pairs_within(conversations):
    """A pair for each conversation beside which there is one of the same module with another answer."""
    for _, group in groupby(conversations, lambda each: first_question(each.messages).rpartition(".")[0]):
        group = list(group)
        for n, (messages, where) in enumerate(group):
            others = (other for other, _ in group[n + 1 :] + group[:n] if other[-1] != messages[-1])
            if other := next(others, None):
                yield Pair(messages, messages[:-1] + other[-1:], where)


class PairBatches(Batches):
    """Pairs as padded token ids: of pair n row 2 n has the chosen answer and row 2 n + 1 the rejected one."""

    NOTHING = "no pair fits"
    ROWS = 2

    def add(self, pair, tokenizer, context):
        last = len(pair.messages) - 1
        sides = [lay_out(tokenizer, messages, first=last) for messages in (pair.messages, pair.rejected)]
        if sides[0] == sides[1]:
            raise UserError("chosen and rejected are the same answer; a pair needs a difference")
        if max(len(ids) for ids, _ in sides) > context:
            self.num_left_out += 1
            return
        for ids, is_answer in sides:
            self.ids.append(ids)
            self.answers.append(is_answer)

    def what_was_lost(self, name, context):
        return (
            self.num_left_out
            and f"{self.num_left_out:,} {name} pairs of more than {context} tokens are left out"
        )

    def batch(self, n):
        """(tokens (2 B, T), is_answer (2 B, T), the numbers of its pairs): first the B chosen answers."""
        pairs = self.examples(n)
        return *self.padded([*(2 * pairs), *(2 * pairs + 1)]), pairs
