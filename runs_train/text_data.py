"""Text for a language model: which files, a tokenizer that suits them, tokens on disk, windows of tokens.

    files --nine tenths--> train.bin        BOS text EOS BOS text EOS ...     one uint16 per token
          --one tenth----> held_out.bin     seen in training neither by the model nor by the tokenizer

Which files are held out follows from a hash of their names: the same ones on every machine, whatever other
files come or go. Token files are mapped into memory, so a corpus may be larger than the RAM.

`stdlib` is a corpus that every machine with Python has: the source of its standard library.
Shapes: B windows in a batch.
Proof: tests/test_train_language_model.py.
"""

import hashlib
import io
import json
import platform
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from models.utils.errors import UserError, one_line
from models.utils.files import read_json, remove, write_atomically
from runs_train.folder import writing
from runs_train.options import MOST_TOKENS

HELD_OUT_ONE_IN = 10

# Folders of the standard library that hold tests, or packages that are not part of it.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Written when Python is built; they say more about the machine than about Python.
BUILD_RECORDS = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    name: str  # the path inside the corpus, with forward slashes on every system
    text: str


class Corpus(NamedTuple):
    folder: Path  # where its tokens and tokenizer are
    train: np.ndarray  # token ids, mapped from disk
    held_out: np.ndarray  # likewise
    facts: dict  # what data.json says: where the text comes from and how much there is


# Which files ------------------------------------------------------------------------------------------------


def split_documents(data):
    """(training documents, held-out documents) of a text file, a folder, or the word `stdlib`."""
    if data == "stdlib":
        documents = read_folder(Path(sysconfig.get_path("stdlib")), is_library_module)
    elif Path(data).is_dir():
        documents = read_folder(Path(data), is_not_hidden)
    elif Path(data).is_file():
        return split_file(Path(data))
    else:
        raise UserError(f"--data {data}: no such file or folder (the word stdlib means Python's own source)")

    train = [document for document in documents if not is_held_out(document.name)]
    held_out = [document for document in documents if is_held_out(document.name)]
    if not train or not held_out:
        raise UserError(
            f"--data {data}: {len(documents)} text files, too few to hold a tenth of them out; "
            "give more files, or one file with all the text, whose last tenth will be held out"
        )
    return train, held_out


def is_held_out(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def read_folder(folder, is_wanted):
    """The files under `folder` that are wanted and hold text, ordered by name."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    texts = [(name, read_text(paths[name])) for name in sorted(paths) if is_wanted(name)]
    return [Document(name, text) for name, text in texts if text]


def is_library_module(name):
    """All modules but tests."""
    parts = name.split("/")
    return name.endswith(".py") and NOT_LIBRARY.isdisjoint(parts) and not parts[0].startswith(BUILD_RECORDS)


def is_not_hidden(name):
    return not any(part.startswith(".") for part in name.split("/"))


def read_text(path):
    """The text of a file exactly, its line ends too; None for what is no text, or none that can be kept."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        return None
    # To sentencepiece NUL is the end of a text and U+2581 a space; neither would come back as it was.
    return None if "\0" in text or "\u2581" in text else text


def split_file(path):
    """A single file is cut at a line end: its last tenth is held out."""
    text = read_text(path)
    if text is None:
        raise UserError(f"--data {path}: not UTF-8 text; give a text file, a folder of them, or stdlib")
    cut = text.rfind("\n", 0, len(text) * (HELD_OUT_ONE_IN - 1) // HELD_OUT_ONE_IN) + 1
    if cut == 0:
        raise UserError(f"--data {path}: no line ends in its first nine tenths, where it could be cut in two")
    return [Document(path.name, text[:cut])], [Document(path.name, text[cut:])]


# Tokenizer --------------------------------------------------------------------------------------------------


def train_tokenizer(documents, vocab_size):
    """A sentencepiece BPE that gives every text back as it was, as the bytes of a tokenizer.model."""
    model = io.BytesIO()
    lines = (line for document in documents for line in document.text.splitlines(keepends=True))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # Nothing is normalised, trimmed or put in front.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Rare characters, and the newline, are spelled in bytes, so that nothing is unknown.
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            # Python's indentation: a run of spaces may be one piece.
            allow_whitespace_only_pieces=True,
            max_sentence_length=1_000_000,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # What stands before the bracket is a place in the library's source.
        reason = one_line(error).rpartition("] ")[2]
        raise UserError(f"--vocab-size {vocab_size} does not suit this text ({reason})") from None
    return model.getvalue()


def load_sentencepiece(path):
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: no sentencepiece model ({one_line(error)})") from None


# Tokens on disk ---------------------------------------------------------------------------------------------


def prepare(data, training, vocab_size, tokenizer=None):
    """The corpus `data` as tokens inside the folder `training`; those of an earlier call serve again.

    tokenizer: the path of a tokenizer.model to use; None trains one with `vocab_size` pieces.
    """
    train, held_out = split_documents(data)
    facts = facts_of(data, train, held_out) | {
        "tokenizer_sha256": hashlib.sha256(read_bytes(tokenizer)).hexdigest() if tokenizer else None,
        "vocab_size": load_sentencepiece(tokenizer).vocab_size() if tokenizer else vocab_size,
        "train_bytes": num_bytes(train),
        "held_out_bytes": num_bytes(held_out),
    }
    if facts["vocab_size"] > MOST_TOKENS:
        raise UserError(
            f"--tokenizer {tokenizer}: has {facts['vocab_size']} pieces; {MOST_TOKENS} are the most"
        )

    folder = make_once(training, facts, partial(write_corpus, train, held_out, vocab_size, tokenizer))
    return open_corpus(folder, facts)


def open_corpus(folder, facts):
    tokens = [read_tokens(folder / f"{part}.bin", facts["vocab_size"]) for part in ("train", "held_out")]
    return Corpus(folder, *tokens, facts)


def facts_of(data, train, held_out):
    """Where a corpus comes from."""
    return {
        "data": str(data),
        "file_list_sha256": file_list_hash(train, held_out),
        "python": platform.python_version() if data == "stdlib" else None,
        "train_files": len(train),
        "held_out_files": len(held_out),
    }


def make_once(training, facts, write):
    """The folder inside `training` that write(folder) filled, now or at an earlier call with the same facts.

    Other facts have another folder: a command that does not go on with a run leaves the run's tokens alone.
    """
    text = json.dumps(facts, indent=2) + "\n"
    folder = training / f"tokens-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if (folder / "data.json").is_file() and read_json(folder / "data.json") == facts:
        return folder
    with writing(folder), write_atomically(folder) as new:
        new.mkdir()
        write(new)
        (new / "data.json").write_text(text, encoding="utf-8")
    return folder


def forget_others(folder):
    """Delete what make_once made of other facts beside `folder`, for a run that has been replaced."""
    for path in folder.parent.glob("tokens-*"):
        if path != folder:
            remove(path)


def write_corpus(train, held_out, vocab_size, tokenizer, folder):
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    else:
        (folder / "tokenizer.model").write_bytes(train_tokenizer(train, vocab_size))
    processor = load_sentencepiece(folder / "tokenizer.model")
    write_tokens(processor, train, folder / "train.bin")
    write_tokens(processor, held_out, folder / "held_out.bin")


def write_tokens(processor, documents, path):
    """BOS in front, as prompts have it when the model runs; EOS at the end, so that it learns to stop."""
    bos, eos = processor.bos_id(), processor.eos_id()
    if bos < 0 or eos < 0:
        raise UserError("--tokenizer has no BOS or no EOS, which mark where a text begins and ends")
    with open(path, "wb") as file:
        for document in tqdm(documents, desc=path.name, unit="file", leave=False, disable=None):
            ids = processor.encode(document.text)
            if processor.decode(ids) != document.text:
                raise UserError(f"{document.name}: --tokenizer does not give this text back; train one on it")
            file.write(np.array([bos, *ids, eos], dtype=np.uint16).tobytes())


def read_tokens(path, vocab_size):
    """The tokens of a file, mapped; UserError if they are not what was written there."""
    try:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        is_whole = tokens.max() < vocab_size
    except (OSError, ValueError):  # empty, or an odd number of bytes
        is_whole = False
    if not is_whole:
        raise UserError(f"{path}: is damaged; remove {path.parent}, and it is made again")
    return tokens


def file_list_hash(train, held_out):
    """One hash for all: of the lines that `sha256sum` prints for the files, ordered by name."""
    lines = [f"{hashlib.sha256(d.text.encode()).hexdigest()}  {d.name}\n" for d in [*train, *held_out]]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def num_bytes(documents):
    return sum(len(document.text.encode()) for document in documents)


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


# Windows ----------------------------------------------------------------------------------------------------


class Windows:
    """The tokens in windows of context + 1: every window is read once before any is read again.

    Each pass cuts the tokens at other places and shuffles the windows. Batch n is a function of n and the
    seed alone, so that a run that goes on after an interruption needs to know no more than its step.
    """

    def __init__(self, tokens, context, batch_size, seed):
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        # Room for all windows of a pass, wherever in the first `context` tokens it begins.
        self.per_pass = (len(tokens) - context) // context
        if self.per_pass < 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens, too few for a context of {context}; "
                "give more text, or a smaller --context"
            )
        self.starts = {}  # of the pass that is under way

    def batch(self, n):
        indices = range(n * self.batch_size, (n + 1) * self.batch_size)
        starts = [self.start(*divmod(index, self.per_pass)) for index in indices]
        return windows_at(self.tokens, starts, self.context)

    def start(self, number_of_pass, index):
        if number_of_pass not in self.starts:
            generator = torch.Generator().manual_seed(self.seed + number_of_pass)
            offset = torch.randint(self.context, (), generator=generator)
            order = torch.randperm(self.per_pass, generator=generator)
            self.starts = {number_of_pass: (offset + order * self.context).tolist()}
        return self.starts[number_of_pass][index]


def windows_at(tokens, starts, context):
    """(B, context + 1): one token more than a model reads, since the last is only predicted."""
    return torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))
