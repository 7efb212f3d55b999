"""Pairs of texts for an encoder-decoder: which are held out, a tokenizer that suits them, batches.

    a file of lines     source TAB target        or        source TAB target TAB kind
    the word dates      what dates_data.py makes: every day in several of its templates

Nine tenths train, a tenth is held out, by a hash of the target: no target, so no day, is on both sides. The
kind, where there is one, says which pairs are counted together when the model is measured.

The tokenizer is laid out as Marian's: source.spm and target.spm cut texts into pieces, and vocab.json gives
the pieces of both their ids. As sentencepiece does by default, it applies NFKC, takes a run of spaces for one
and drops those at the ends, so that odd spacing between words never reaches the model.

Shapes: B pairs in a batch, S tokens of their longest source, T of their longest target.
Proof: tests/test_train_seq2seq.py.
"""

import hashlib
import io
import json
from array import array
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from models.utils.errors import UserError, one_line
from models.utils.tokenizer import load_tokenizer
from runs_train.dates_data import all_days, write_days
from runs_train.text_data import is_held_out, make_once

TEMPLATES_PER_DAY = 10  # of those in dates_data.py, drawn for each day
POOL = 8  # batches that are filled together, by length


class Pair(NamedTuple):
    source: str
    target: str
    kind: str = ""


class Corpus(NamedTuple):
    folder: Path  # where its tokenizer is
    train: list  # of Pair
    held_out: list  # likewise
    tokenizer: object  # models/utils/tokenizers/marian.py
    facts: dict  # what data.json says: how much there is, and the hash of it


# Which pairs ------------------------------------------------------------------------------------------------


def split_pairs(data):
    """(training pairs, held-out pairs) of a file, or of the word `dates`."""
    pairs = dates() if data == "dates" else read_pairs(data)
    train = [pair for pair in pairs if not is_held_out(pair.target)]
    held_out = [pair for pair in pairs if is_held_out(pair.target)]
    if not train or not held_out:
        raise UserError(f"--data {data}: {len(pairs)} pairs, too few to hold a tenth of them out; give more")
    return train, held_out


def dates():
    return [Pair(*row) for row in write_days(all_days(), TEMPLATES_PER_DAY, seed=0)]


def read_pairs(path):
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--data {path}: no such file (the word dates means dates that are made by rule)")
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read as UTF-8 text ({one_line(error)})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        columns = line.split("\t")
        if len(columns) not in (2, 3) or not columns[0].strip() or not columns[1].strip():
            raise UserError(f"--data {path}, line {number}: not source TAB target, or with TAB kind after it")
        pairs.append(Pair(*columns))
    return pairs


# Tokenizer --------------------------------------------------------------------------------------------------


def prepare(data, training, vocab_size=None):
    """The corpus `data`, and inside the folder `training` its tokenizer; an earlier call's serves again.

    vocab_size: the number of pieces of each of source and target; None: their characters.
    """
    train, held_out = split_pairs(data)
    facts = {
        "data": str(data),
        "pairs_sha256": hash_of([*train, *held_out]),
        "pieces": vocab_size,
        "train_pairs": len(train),
        "held_out_pairs": len(held_out),
    }
    folder = make_once(training, facts, partial(write_tokenizer, train, vocab_size))
    return Corpus(folder, train, held_out, load_tokenizer(folder), facts)


def hash_of(pairs):
    """Of the lines that a file of these pairs has, in its order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(("\t".join(pair) + "\n").encode())
    return digest.hexdigest()


def write_tokenizer(pairs, vocab_size, folder):
    """source.spm, target.spm, vocab.json, tokenizer_config.json."""
    pieces = []
    for side in "source", "target":
        model = train_pieces([getattr(pair, side) for pair in pairs], vocab_size)
        (folder / f"{side}.spm").write_bytes(model)
        pieces += normal_pieces(sentencepiece.SentencePieceProcessor(model_proto=model))
    # Marian's order: the end first, the pad last; a piece of both sides has one id.
    names = ["</s>", "<unk>", *dict.fromkeys(pieces), "<pad>"]
    ids = {name: id for id, name in enumerate(names)}
    config = {"tokenizer_class": "MarianTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"pad_token": "<pad>", "separate_vocabs": False, "clean_up_tokenization_spaces": False}
    for name, content in ("vocab.json", ids), ("tokenizer_config.json", config):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def train_pieces(texts, vocab_size):
    """A sentencepiece model as bytes: byte-pair encoding, or characters where vocab_size is None."""
    kind = {"model_type": "char", "use_all_vocab": True}
    if vocab_size:
        kind = {"model_type": "bpe", "vocab_size": vocab_size}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            character_coverage=1.0,
            num_threads=2,
            minloglevel=2,
            **kind,
        )
    except (RuntimeError, OSError) as error:
        # What stands before the bracket is a place in the library's source.
        reason = one_line(error).rpartition("] ")[2]
        raise UserError(f"--vocab-size {vocab_size} does not suit these texts ({reason})") from None
    return model.getvalue()


def normal_pieces(processor):
    """All but <unk>, <s> and </s>, which vocab.json names itself."""
    ids = range(processor.vocab_size())
    return [
        processor.id_to_piece(id) for id in ids if not (processor.is_unknown(id) or processor.is_control(id))
    ]


# Batches ----------------------------------------------------------------------------------------------------


class Batches:
    """Pairs as padded token ids; every pair is read once before any is read again.

    Pairs of about the same length go together (section 5.1 of the paper), which saves padding: every pass
    shuffles all pairs, sorts pools of them by length, cuts these into batches, and shuffles the batches.
    Batch n is a function of n and the seed alone, so that a run that goes on needs to know no more.
    """

    def __init__(self, pairs, tokenizer, longest, batch_size, seed):
        self.pad_id, self.batch_size, self.seed = tokenizer.pad_id, batch_size, seed
        self.sources, self.targets = Rows(), Rows()
        for pair in tqdm(pairs, desc="encoding", unit="pair", leave=False, disable=None):
            source, target = tokenizer.encode(pair.source), tokenizer.encode_target(pair.target)
            if max(len(source), len(target)) <= longest:
                self.sources.append(source)
                self.targets.append(target)
        self.num_left_out = len(pairs) - len(self.sources)
        if not len(self.sources):
            raise UserError(f"every pair is longer than the model's max_seq_len, {longest}")
        self.lengths = self.sources.lengths() + self.targets.lengths()
        self.per_pass = -(-len(self.sources) // batch_size)
        self.cut = {}  # pass -> its batches, of the pass that is under way

    def batch(self, n):
        """(source (B, S), target (B, T)): each row ends with EOS and is padded on the right."""
        number_of_pass, index = divmod(n, self.per_pass)
        if number_of_pass not in self.cut:
            self.cut = {number_of_pass: self.cut_into_batches(number_of_pass)}
        rows = self.cut[number_of_pass][index].tolist()
        return tuple(pad([side[row] for row in rows], self.pad_id) for side in (self.sources, self.targets))

    def cut_into_batches(self, number_of_pass):
        generator = torch.Generator().manual_seed(self.seed + number_of_pass)
        order = torch.randperm(len(self.sources), generator=generator)
        pools = order.split(POOL * self.batch_size)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = [batch for pool in pools for batch in pool.split(self.batch_size)]
        return [batches[n] for n in torch.randperm(len(batches), generator=generator)]


class Rows:
    """Lists of token ids, end to end in one array: a Python list of lists takes twenty times the memory."""

    def __init__(self):
        self.ids, self.ends = array("i"), array("q", [0])

    def append(self, ids):
        self.ids.extend(ids)
        self.ends.append(len(self.ids))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, n):
        return self.ids[self.ends[n] : self.ends[n + 1]].tolist()

    def lengths(self):
        return torch.tensor(self.ends).diff()


def pad(rows, pad_id):
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
