"""Marian's tokenizer: two sentencepiece models and one vocabulary (Helsinki-NLP/opus-mt-*).

    source.spm   cuts a text of the source language into pieces        "Hallo Welt" -> "▁Hallo", "▁Welt"
    target.spm   the same for the target language; joins pieces to a text again
    vocab.json   gives each piece of either language its id; both share one embedding matrix

A sentencepiece model has ids of its own, which mean nothing here: only the spelling of a piece counts, and a
piece that vocab.json lacks is <unk>. Each text ends with </s>. There is no BOS: the target of a translation
begins with <pad>.

A multilingual checkpoint expects in front of the text the language to translate into, ">>fra<< Hello". Such
a code is one token, cut off before sentencepiece sees the text. Nothing else that is typed becomes a special
token.

Marian's training data went through Moses' punctuation normalisation. `transformers` holds a function for it
(MarianTokenizer.normalize, with the package sacremoses), but nothing there calls it: with the package or
without, ids are made of the text as it is. So it is here. sentencepiece's own normaliser (NFKC), which
source.spm carries with it, does apply.

Proof: tests/test_marian_tokenizer.py, against `transformers`.
"""

import re

from models.utils.errors import UserError
from models.utils.files import read_bytes, read_json
from models.utils.tokenizers.base import Tokenizer, check_text, ends_in_half_a_character
from models.utils.tokenizers.pipeline import BYTE_TOKEN
from models.utils.tokenizers.sentencepiece_model import read_sentencepiece
from models.utils.tokenizers.settings import read_json_if_there

NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# `transformers` takes everything from ">>" to the next "<<" for a code; a code has no space in it.
LANGUAGE_CODE = re.compile(r">>\S*?<<")


class MarianTokenizer(Tokenizer):
    """Like every Tokenizer, and beyond that: pad_id, unk_id, language_codes, encode_target.

    encode cuts a text with source.spm, encode_target with target.spm; decode joins with target.spm.
    """

    def __init__(self, settings):
        self.ids = read_vocabulary(settings)
        self.pieces = list(self.ids)
        self.vocab_size = len(self.pieces)
        self.language_codes = [piece for piece in self.pieces if LANGUAGE_CODE.fullmatch(piece)]
        self.source = read_half(settings.folder / "source.spm")
        self.target = read_half(settings.folder / "target.spm")

        names = {name: settings.names.get(name) or token for name, token in NAMES.items()}
        for name, token in names.items():
            if token not in self.ids:
                raise UserError(f"{settings.folder / 'vocab.json'}: {name} {token!r} is missing")
        self.special_tokens = {token: self.ids[token] for token in (names["pad_token"], names["eos_token"])}
        super().__init__(settings, names)
        self.bos_id, self.eos_id = None, self.ids[names["eos_token"]]
        self.pad_id, self.unk_id = self.ids[names["pad_token"]], self.ids[names["unk_token"]]
        self.ids_before, self.ids_after = [], [self.eos_id]
        self.never_typed = {self.eos_id, self.pad_id, *map(self.id_of, self.language_codes)}
        self.special_ids.add(self.unk_id)  # not shown by decode, though a text may hold it

    def id_of(self, token):
        return self.ids.get(token)

    def encode_text(self, text):
        """A leading language code, if there is one, and the pieces of the rest."""
        code = LANGUAGE_CODE.match(text)
        if code is None:
            return self.ids_of_pieces(self.source.encode(text, out_type=str))
        pieces = self.source.encode(text[code.end() :], out_type=str)
        return [self.ids.get(code[0], self.unk_id), *self.ids_of_pieces(pieces)]

    def encode_target(self, text):
        """What the model learns to say: the ids of a text of the target language, </s> at the end."""
        return [*self.ids_of_pieces(self.target.encode(check_text(text), out_type=str)), self.eos_id]

    def ids_of_pieces(self, pieces):
        # A run of characters that sentencepiece does not know comes out as one piece, spelt as it was typed;
        # it may be spelt like a special token.
        typed = [self.ids.get(piece, self.unk_id) for piece in pieces]
        return [self.unk_id if id in self.never_typed else id for id in typed]

    def decode(self, ids):
        """Text of the ids, without white space at its ends, as in `transformers`."""
        pieces = [self.pieces[id] for id in self.visible(ids)]
        return self.target.decode_pieces(pieces).replace("▁", " ").strip()

    def token_bytes(self, id):
        """The bytes a token stands for inside a text, None for a special token."""
        if not self.visible([id]):
            return None
        piece = self.pieces[id]
        return bytes([int(piece[3:5], 16)]) if BYTE_TOKEN.match(piece) else piece.replace("▁", " ").encode()

    def is_unfinished(self, ids):
        """Whether the text ends in a space, which shows only if more follows, or in half a character."""
        content = b"".join(map(self.token_bytes, ids[-4:]))
        return content.decode(errors="replace")[-1:].isspace() or ends_in_half_a_character(content)


def read_vocabulary(settings):
    """Piece -> id, in the order of the ids, which are 0, 1, 2, ..."""
    folder = settings.folder
    config = read_json_if_there(folder / "tokenizer_config.json")
    if (folder / "target_vocab.json").is_file() or config.get("separate_vocabs"):
        raise UserError(
            f"{folder}: has a vocabulary of its own for the target (target_vocab.json), and only one that "
            "source and target share is supported; choose a checkpoint with vocab.json alone"
        )
    path = folder / "vocab.json"
    ids = read_json(path)
    if not all(type(id) is int for id in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f"{path}: its ids are not 0, 1, 2, ..., each once; fetch it again")
    unknown = [token.content for token in settings.added.values() if token.content not in ids]
    if unknown:
        raise UserError(f"{path}: lacks {unknown[0]!r}, which tokenizer_config.json adds; fetch both again")
    return dict(sorted(ids.items(), key=lambda entry: entry[1]))


def read_half(path):
    """source.spm or target.spm."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Marian tokenizer is source.spm, target.spm and vocab.json")
    return read_sentencepiece(read_bytes(path), path)
