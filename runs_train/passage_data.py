"""Passages for BERT: texts of a few lines, a WordPiece vocabulary that suits them, padded batches, masks.

    files --passages--> [CLS] return the length of the list . [SEP] [CLS] ...     one uint16 per token
    batches of whole passages, filled up with [PAD]; some tokens hidden, which the model has to guess:
                        [CLS] return the [MASK] of the list . [SEP] [PAD] [PAD]

A passage is a docstring of the standard library where the data are `stdlib`, a paragraph where they are other
text. Which files are held out is decided by a hash of their names, as in text_data.py.
Shapes: B passages in a batch, T tokens of the longest of them.
Proof: tests/test_train_masked_language_model.py.
"""

import ast
import json
import math
import re
from collections import Counter
from functools import partial

import numpy as np
import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_train.text_data import Document, facts_of, make_once, open_corpus, split_documents

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
TOKENIZER_CONFIG = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS)),
}
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# Passages ---------------------------------------------------------------------------------------------------


def docstrings(document):
    """The docstrings of a module, its classes and its functions, without their indentation."""
    nodes = [node for node in ast.walk(ast.parse(document.text)) if isinstance(node, HAS_DOCSTRING)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def paragraphs(document):
    """What stands between empty lines."""
    return [text.strip() for text in re.split(r"\n\s*\n", document.text) if text.strip()]


def split_passages(data):
    """(training documents, held-out documents, passages of the former, passages of the latter)"""
    train, held_out = split_documents(data)
    passages_of = docstrings if data == "stdlib" else paragraphs
    passages = [
        [Document(document.name, text) for document in part for text in passages_of(document)]
        for part in (train, held_out)
    ]
    if not all(passages):
        raise UserError(f"--data {data}: no passages in one of its two parts; give more text")
    return train, held_out, *passages


def prepare(data, training, vocab_size):
    """The corpus `data` as tokens inside the folder `training`; those of an earlier call serve again."""
    train, held_out, train_passages, held_out_passages = split_passages(data)
    facts = facts_of(data, train, held_out) | {
        "vocab_size": vocab_size,
        "train_passages": len(train_passages),
        "train_bytes": sum(len(passage.text.encode()) for passage in train_passages),
        "held_out_passages": len(held_out_passages),
        "held_out_bytes": sum(len(passage.text.encode()) for passage in held_out_passages),
    }

    write = partial(write_corpus, train_passages, held_out_passages, vocab_size)
    corpus = open_corpus(make_once(training, facts, write), facts)
    for name, tokens in ("train", corpus.train), ("held_out", corpus.held_out):
        if tokens[0] != CLS or tokens[-1] != SEP:
            raise UserError(
                f"{corpus.folder / name}.bin: is damaged; remove that folder, and it is made again"
            )
    return corpus


def write_corpus(train, held_out, vocab_size, folder):
    pieces = train_vocabulary(train, vocab_size)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    tokenizer = load_tokenizer(folder)
    tokenizer.core.save(str(folder / "tokenizer.json"))
    write_tokens(tokenizer, train, folder / "train.bin")
    write_tokens(tokenizer, held_out, folder / "held_out.bin")


def write_tokens(tokenizer, passages, path):
    with open(path, "wb") as file:
        for passage in tqdm(passages, desc=path.name, unit="passage", leave=False, disable=None):
            ids = tokenizer.encode(passage.text)
            # A passage of nothing but characters that the vocabulary does not have teaches nothing.
            if max(ids) >= len(SPECIAL_TOKENS):
                file.write(np.array(ids, dtype=np.uint16).tobytes())


# Vocabulary -------------------------------------------------------------------------------------------------


def train_vocabulary(passages, vocab_size):
    """Pieces of words in lower case without accents, as bert-base-uncased has them; the place is the id."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    normalized = (normalizer.normalize_str(passage.text) for passage in passages)
    words = Counter(word for text in normalized for word, _ in splitter.pre_tokenize_str(text))
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The library numbers these single letters in another order each time it runs, and breaks ties by
        # number. Given in advance they have an order, and the same text always gives the same vocabulary.
        special_tokens=[*SPECIAL_TOKENS, *sorted({f"##{letter}" for word in words for letter in word[1:]})],
        show_progress=False,
    )
    core.train_from_iterator(words.elements(), trainer)
    vocabulary = core.get_vocab()
    if len(vocabulary) != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} does not suit this text, which gives {len(vocabulary)} pieces"
        )
    return sorted(vocabulary, key=vocabulary.get)


# Batches ----------------------------------------------------------------------------------------------------


class Passages:
    """Passages in batches of about as many tokens each; every one is read once before any is read again.

    A batch holds passages of about the same length, so that few of its places are [PAD]. Like the windows of
    text_data.py, batch n is a function of n and the seed alone.
    """

    def __init__(self, tokens, context, batch_tokens, seed):
        self.rows, self.seed = cut(tokens, context), seed
        self.lengths = np.array([len(row) for row in self.rows])
        self.spans = spans(np.sort(self.lengths), max(batch_tokens, context))
        self.per_pass = len(self.spans)
        self.orders = {}  # of the pass that is under way

    def batch(self, n):
        """(B, T): whole passages, padded to the longest."""
        number_of_pass, index = divmod(n, self.per_pass)
        rows, batches = self.order(number_of_pass)
        start, stop = self.spans[batches[index]]
        return padded([self.rows[row] for row in rows[start:stop]])

    def order(self, number_of_pass):
        """(the passages by length, those of one length shuffled; the batches, shuffled) in a pass."""
        if number_of_pass not in self.orders:
            generator = np.random.default_rng([self.seed, number_of_pass])
            shuffled = generator.permutation(len(self.rows))
            by_length = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
            self.orders = {number_of_pass: (by_length, generator.permutation(self.per_pass))}
        return self.orders[number_of_pass]


def cut(tokens, context):
    """The passages as arrays; one that is longer than the context as several of equal length."""
    passages = np.split(tokens, np.flatnonzero(tokens == CLS)[1:])
    rows = []
    for passage in passages:
        body = passage[1:-1]
        parts = np.array_split(body, math.ceil(len(body) / (context - 2)))
        rows += [np.concatenate([[CLS], part, [SEP]]).astype(np.int64) for part in parts]
    return rows


def spans(lengths, batch_tokens):
    """(start, stop) of each batch, of rows with these ascending lengths: padded, at most `batch_tokens`."""
    found, start = [], 0
    for n, length in enumerate(lengths):
        if (n + 1 - start) * length > batch_tokens:
            found.append((start, n))
            start = n
    return [*found, (start, len(lengths))]


def padded(rows):
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=PAD)


# Masks ------------------------------------------------------------------------------------------------------


def choose(tokens, share, generator):
    """(B, T): True for this share of each passage's tokens, at least one, none of them special."""
    can_be = tokens >= len(SPECIAL_TOKENS)  # (B, T)
    draws = torch.rand(tokens.shape, generator=generator).masked_fill(~can_be, 2.0)  # (B, T)
    ranks = draws.argsort(dim=1).argsort(dim=1)  # (B, T)
    num_chosen = (can_be.sum(dim=1) * share).round().clamp(min=1)  # (B,)
    return (ranks < num_chosen[:, None]) & can_be


def hide_for_training(tokens, share, vocab_size, seed):
    """(what the model reads, which tokens it has to guess), each (B, T).

    Of the chosen tokens 80% become [MASK], 10% any token, 10% stay what they are (Devlin et al. 2019, section
    3.1 and appendix A.1): texts outside of training have no [MASK], so it must learn to read every token.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = choose(tokens, share, generator)
    fate = torch.rand(tokens.shape, generator=generator)  # (B, T)
    others = torch.randint(len(SPECIAL_TOKENS), vocab_size, tokens.shape, generator=generator)  # (B, T)
    inputs = torch.where(chosen & (fate < 0.9), others, tokens)  # (B, T)
    return inputs.masked_fill(chosen & (fate < 0.8), MASK), chosen


def hide_for_evaluation(tokens, seed):
    """The same for 15% of the tokens, which all become [MASK], as when a reader asks for them."""
    chosen = choose(tokens, 0.15, torch.Generator().manual_seed(seed))
    return tokens.masked_fill(chosen, MASK), chosen
