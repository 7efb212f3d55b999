r"""Conversations to learn from: read, laid out by the checkpoint's own template, and put into batches.

    a file of JSON lines    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", ...}]}
                       or   {"prompt": "Hi", "completion": "Hello!"}, which is a conversation of two messages
    the word stdlib         what the functions of Python's library do: the first line of each one's docstring

    <s> ### user \n Hi \n ### assistant \n Hello ! </s> \n
                                           1     1 1           what the model learns to say

Which tokens those are is found without knowing the template, by laying out beginnings of the conversation. An
answer begins where the messages before it end, laid out with the invitation to answer. It ends where those up
to it end, or rather with the special token that ends a turn, if there is one. That is true as long as each
beginning is one of the whole, too. A template that writes a message otherwise once more follow (some drop the
thoughts of earlier answers) is refused, and the message named.

A tenth is held out, by a hash of the first question, or of the standard library by the same hash of a file's
name as in text_data.py: what a model of language_model.py never saw is held out here too.
Shapes: B conversations in a batch, T tokens of the longest.
Proof: tests/test_train_sft.py, token by token against what `transformers` marks.
"""

import ast
import hashlib
import json
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from models.utils.errors import UserError
from models.utils.files import read_text
from runs_train.pair_data import Rows
from runs_train.passage_data import spans
from runs_train.text_data import Document, is_held_out, split_documents

ROLES = ("system", "developer", "user", "assistant", "tool")
# For checkpoints that have none: what a model of plain text learns soon.
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '### ' + message.role + '\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}
"""


class Conversation(NamedTuple):
    messages: list
    where: str  # of the data it stands: "line 3"


class Corpus(NamedTuple):
    train: list  # of Conversation
    held_out: list
    facts: dict  # how many there are, and the hash of them


# Which conversations ----------------------------------------------------------------------------------------


def read_corpus(data):
    return corpus_of(data, read_conversation, split_library)


def corpus_of(data, read_row, split_library):
    """The Corpus of a file of JSON lines, each of which `read_row` makes an example, or of the library."""
    train, held_out = split_library() if data == "stdlib" else split_file(data, read_row)
    if not train or not held_out:
        count = len(train) + len(held_out)
        raise UserError(
            f"--data {data}: {count} conversations, too few to hold a tenth of them out; give more"
        )
    digest = hashlib.sha256()
    for example in [*train, *held_out]:
        digest.update((json.dumps(example[:-1], sort_keys=True) + "\n").encode())  # all but its place
    facts = {"data": str(data), "data_sha256": digest.hexdigest()}
    return Corpus(train, held_out, facts | {"train": len(train), "held_out": len(held_out)})


def split_file(path, read_row):
    """(training, held-out) examples of a file; read_row(row, its place, the same for errors): one of them."""
    examples = []
    for number, line in enumerate(read_text(path, "--data").splitlines(), 1):
        if line.strip():
            where = f"--data {path}, line {number}"
            examples.append(read_row(read_object(line, where), f"line {number}", where))
    held_out = [example for example in examples if is_held_out(first_question(example.messages))]
    return [e for e in examples if not is_held_out(first_question(e.messages))], held_out


def first_question(messages):
    return next(message["content"] for message in messages if message["role"] != "system")


def read_object(line, where):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({error}); give one object on each line") from None


def read_conversation(row, place, where):
    if isinstance(row, dict) and "messages" not in row and {"prompt", "completion"} <= row.keys():
        row = {"messages": messages_of(row["prompt"], row["completion"])}
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UserError(f"{where}: has neither messages (a list) nor prompt and completion")
    for number, message in enumerate(row["messages"], 1):
        check_message(message, f"{where}: message {number}")
    roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
    if not roles or roles[0] == "assistant" or "assistant" not in roles:
        raise UserError(f"{where}: is no question with an answer of the assistant's behind it")
    return Conversation(row["messages"], place)


def messages_of(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_message(message, where):
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where} has no content, which is a text")


def as_messages(content, role, where):
    messages = [{"role": role, "content": content}] if isinstance(content, str) else content
    if not isinstance(messages, list) or not (messages or role == "user"):
        raise UserError(f"{where} is neither a text nor a list of messages")
    for number, message in enumerate(messages, 1):
        check_message(message, f"{where}: message {number}")
    return messages


def split_library():
    """(training, held-out) conversations about the functions of Python's standard library."""
    train, held_out = split_documents("stdlib")
    asked = {}
    for part in train, held_out:
        for document in part:
            for question, answer in functions(document):
                asked.setdefault(question, (part, answer))
    return [
        [Conversation(messages_of(q, a), q) for q, (where, a) in asked.items() if where is part]
        for part in (train, held_out)
    ]


def functions(document: Document):
    """(question, answer) of a module's public functions, and its classes', that have a first line."""
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(document.text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for place, body in [(module, tree.body), *((f"{module}.{node.name}", node.body) for node in classes)]:
        for node in body:
            if isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef)
            ) and not f".{place}.{node.name}".count("._"):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if 10 <= len(line) <= 100:
                    yield f"What does {place}.{node.name} do?", line


# Which tokens -----------------------------------------------------------------------------------------------


def lay_out(tokenizer, messages, first=0):
    """(token ids of a conversation, for each of them whether it is one of the assistant's).

    first: the number of the first message that may count; earlier answers are read, as questions are.
    """
    text, ids = tokenizer.lay_out_chat(messages, add_generation_prompt=False)
    is_answer = [False] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant" and n >= first:
            start, stop = answer_span(tokenizer, messages, n, text, ids)
            is_answer[start:stop] = [True] * (stop - start)
    return ids, is_answer


def answer_span(tokenizer, messages, n, text, ids):
    """(start, stop) of the n-th message, an answer, in the token ids of the whole conversation."""
    before, ids_before = tokenizer.lay_out_chat(messages[:n], add_generation_prompt=True)
    through, ids_through = tokenizer.lay_out_chat(messages[: n + 1], add_generation_prompt=False)
    if not (through.startswith(before) and text.startswith(through)):
        raise UserError(
            f"message {n + 1}: the chat template writes it, or what is before it, otherwise once more "
            "messages follow; give conversations that end with it"
        )
    # A token that holds the last letters before an answer and its first is the answer's.
    start, stop = num_shared(ids_before, ids), num_shared(ids_through, ids)
    ends = [place for place in range(start, stop) if ids[place] in tokenizer.special_ids]
    return start, (ends[-1] + 1 if ends else stop)


def num_shared(some, others):
    """How many tokens two lists begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))


# Batches ----------------------------------------------------------------------------------------------------


class Batches:
    """Conversations as padded token ids; every one is read once before any is read again.

    A row is one conversation, and no token sees what stands to its right, so that none ever sees a pad or
    another conversation. A batch has conversations of about one length and at most `batch_tokens` places: few
    are pads, without one being packed behind the other.
    Batch n is a function of n and the seed alone, so that a run that goes on needs to know no more.
    """

    NOTHING = "no answer of the assistant's begins"
    ROWS = 1  # of each example

    def __init__(self, examples, tokenizer, context, batch_tokens, seed, option="--data"):
        self.ids, self.answers, self.seed = Rows(), Rows(), seed
        self.num_cut = self.num_lost = self.num_left_out = 0
        for example in tqdm(examples, desc="encoding", leave=False, disable=None):
            try:
                self.add(example, tokenizer, context)
            except UserError as error:
                raise UserError(f"{option}, {example.where}: {error}") from None
        if not len(self.ids):
            raise UserError(f"{option}: {self.NOTHING} within {context} tokens")
        # Of each example: that of its longest row.
        self.lengths = self.ids.lengths().view(-1, self.ROWS).amax(dim=1).numpy()
        self.spans = spans(np.sort(self.lengths), max(batch_tokens // self.ROWS, context))
        self.per_pass, self.orders = len(self.spans), {}

    def add(self, conversation, tokenizer, context):
        """What is longer than the context is cut, and counted; what then has no answer is left out."""
        ids, is_answer = lay_out(tokenizer, conversation.messages)
        kept = sum(is_answer[1:context])
        self.num_lost += sum(is_answer[1:]) - kept
        self.num_cut += len(ids) > context
        if kept:
            self.ids.append(ids[:context])
            self.answers.append(is_answer[:context])
        else:
            self.num_left_out += 1

    def what_was_lost(self, name, context):
        """A line of what truncation took, or None."""
        if not self.num_cut:
            return None
        return (
            f"{self.num_cut:,} {name} conversations of more than {context} tokens are cut, by "
            f"{self.num_lost:,} tokens of answers; {self.num_left_out:,} have no answer left and are left out"
        )

    def batch(self, n):
        """(tokens (B, T), is_answer (B, T)): rows padded on the right with what is no answer."""
        return self.padded(self.examples(n))

    def padded(self, rows):
        return tuple(padded([side[row] for row in rows]) for side in (self.ids, self.answers))

    def examples(self, n):
        """The numbers of those that make batch n."""
        number_of_pass, index = divmod(n, self.per_pass)
        by_length, batches = self.order(number_of_pass)
        start, stop = self.spans[batches[index]]
        return by_length[start:stop]

    def order(self, number_of_pass):
        """(the examples by length, those of one length shuffled; the batches, shuffled) in a pass."""
        if number_of_pass not in self.orders:
            generator = np.random.default_rng([self.seed, number_of_pass])
            shuffled = generator.permutation(len(self.lengths))
            by_length = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
            self.orders = {number_of_pass: (by_length, generator.permutation(self.per_pass))}
        return self.orders[number_of_pass]

    def tokens_per_batch(self):
        return int(self.ids.lengths().sum()) / self.per_pass

    def share_of_pads(self):
        """Of the places of all batches."""
        ordered = np.sort(self.lengths)
        places = sum((stop - start) * int(ordered[stop - 1]) for start, stop in self.spans)
        return 1 - int(self.ids.lengths().sum()) / (places * self.ROWS)


def padded(rows):
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
