"""tokenizer.model as sentencepiece writes it: Llama 2's, and that of the small checkpoints here."""

from itertools import groupby, takewhile

import sentencepiece

from models.utils.errors import UserError
from models.utils.tokenizers.base import Tokenizer, ends_in_half_a_character


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model as sentencepiece writes it: a normaliser, pieces with scores, and "▁" for a space.

    A character that no piece covers becomes its UTF-8 bytes, pieces named <0x00> to <0xFF> (byte fallback).
    Tokens that were added after training have ids behind the pieces and stand in tokenizer_config.json.
    """

    def __init__(self, content, settings):
        path = settings.folder / "tokenizer.model"
        self.core = read_sentencepiece(
            content, path, "neither a sentencepiece model nor a tiktoken rank file"
        )
        self.num_pieces = self.core.vocab_size()
        self.added = {id: token.content for id, token in settings.added.items() if id >= self.num_pieces}
        self.vocab_size = max([self.num_pieces - 1, *self.added]) + 1
        self.special_tokens = self.find_special_tokens(settings)
        own = [("bos_token", self.core.bos_id()), ("eos_token", self.core.eos_id())]
        super().__init__(settings, {name: self.core.id_to_piece(id) for name, id in own if id >= 0})
        self.add_bos_eos(settings)

    def find_special_tokens(self, settings):
        """The model's control pieces and what the configuration calls special; <unk> stands for text."""
        pieces = range(self.num_pieces)
        special = {self.core.id_to_piece(id): id for id in pieces if self.core.is_control(id)}
        special |= {name: self.find(name) for name in settings.special_names}
        special |= {token.content: id for id, token in settings.added.items() if token.special}
        return {name: id for name, id in special.items() if id not in (None, self.core.unk_id())}

    def find(self, token):
        """The id of a piece or an added token; sentencepiece itself answers <unk> where it knows none."""
        id = self.core.piece_to_id(token)
        if id != self.core.unk_id() or token == self.core.id_to_piece(id):
            return id
        return next((id for id, name in self.added.items() if name == token), None)

    def id_of(self, token):
        return self.special_tokens.get(token, self.find(token))

    def encode_text(self, text):
        ids = self.core.encode(text)
        # Only a vocabulary that lists a special token among its user-defined symbols finds it in plain text.
        if self.special_ids.isdisjoint(ids):
            return ids
        return [part for id in ids for part in (self.spell(id) if id in self.special_ids else [id])]

    def spell(self, id):
        """A piece in single characters, and these in bytes where they are no piece of their own."""
        ids = []
        for character in self.core.id_to_piece(id):
            is_piece = self.core.piece_to_id(character) != self.core.unk_id()
            names = [character] if is_piece else [f"<0x{byte:02X}>" for byte in character.encode()]
            ids += map(self.core.piece_to_id, names)
        return ids

    def decode(self, ids):
        """Text of the ids; added tokens that are not special show their name."""
        text = ""
        for is_piece, group in groupby(self.visible(ids), key=lambda id: id < self.num_pieces):
            group = list(group)
            text += self.core.decode(group) if is_piece else "".join(self.added.get(id, "") for id in group)
        return text

    def token_bytes(self, id):
        """The bytes a token stands for inside a text, None for a special token."""
        if not self.visible([id]):
            return None
        if id >= self.num_pieces:
            return self.added.get(id, "").encode()
        piece = self.core.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if self.core.is_byte(id) else piece.replace("▁", " ").encode()

    def is_unfinished(self, ids):
        """Whether these ids end in the first bytes of a character."""
        last = [id for id in ids[-4:] if id < self.num_pieces]
        byte_tokens = list(takewhile(self.core.is_byte, reversed(last)))
        return ends_in_half_a_character(b"".join(map(self.token_bytes, reversed(byte_tokens))))


def read_sentencepiece(content, path, otherwise="no sentencepiece model"):
    """The library's object for the content of a file; `otherwise` is what an error says that it is."""
    try:
        # What turns text into what is cut, and pieces into text; ModelProto has them in its fields 3 and 5.
        for normalizer in (*fields(content, 3), *fields(content, 5)):
            for charsmap in fields(normalizer, 2):
                refuse_growth(longest_replacement(charsmap), path)
        if content:
            return sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, IndexError):
        pass
    raise UserError(f"{path}: {otherwise}; fetch it again")


def fields(message, wanted):
    """The byte strings that a protobuf message has in its field of that number."""
    at, found = 0, []
    while at < len(message):
        tag, at = varint(message, at)
        kind, size = tag & 7, 0
        if kind == 0:
            _, at = varint(message, at)
        elif kind == 2:
            size, at = varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(kind, len(message))
        if tag == wanted << 3 | 2:
            found.append(message[at : at + size])
        at += size
    return found


def varint(message, at):
    """(a whole number, where it ends): seven bits a byte, the last byte below 128."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
    return value, at


MOST_GROWTH = 1000  # of a text by a normaliser: that of NFKC makes 18 letters of one


def refuse_growth(growth, path):
    if growth > MOST_GROWTH:
        raise UserError(
            f"{path}: makes a text {growth:,.0f} times as long before it is cut; do not trust this file"
        )


def longest_replacement(charsmap):
    """Of a normaliser as sentencepiece stores it: a table that is looked up, and what it leads to.

    The table's size stands in the first four bytes; behind it come the replacements, each ended by a 0.
    """
    size = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + size :].split(b"\0")))
