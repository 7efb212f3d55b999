"""What every tokenizer offers: special tokens, BOS and EOS, chats, and text that appears token by token."""

import codecs
import re
from functools import cached_property

from models.utils.errors import UserError
from models.utils.tokenizers.chat_template import render, render_guarded
from models.utils.tokenizers.settings import MAX_ID


class Tokenizer:
    """What every kind of tokenizer offers. The kinds below say how text without special tokens is encoded.

    vocab_size      one more than the largest id
    special_tokens  name -> id of the control tokens: never made from a user's text, skipped by decode
    bos_id, eos_id  begin and end of a text, None where the checkpoint has none
    chat_template   the Jinja source, None where the checkpoint has none
    """

    def __init__(self, settings, default_names):
        self.folder = settings.folder
        self.chat_template = settings.chat_template
        # "bos_token" -> "<s>": the names under which a chat template may use the special tokens.
        self.names = {**default_names, **settings.names}
        self.special_ids = set(self.special_tokens.values())
        if not 0 < self.vocab_size <= MAX_ID:
            raise UserError(
                f"{self.folder}: the vocabulary ends at id {self.vocab_size - 1}; no model has that"
            )
        self.bos_id = self.named_id("bos_token", settings)
        self.eos_id = self.named_id("eos_token", settings)

    def named_id(self, name, settings):
        """The tokenizer's own files decide, also when they say null; then the model's files."""
        if name in self.names:
            return None if self.names[name] is None else self.id_of(self.names[name])
        return settings.model_ids.get(name)

    def encode(self, text, bos=None):
        """Text to ids. Whatever looks like a special token stays plain text.

        bos: None adds what the checkpoint's configuration says (BOS for Llama, nothing for GPT-2), True the
        same and a BOS if that is not among it, False nothing.
        """
        return self.surround(self.encode_text(check_text(text)), bos)

    def surround(self, ids, bos):
        """The ids with those that stand before and after a text; bos as for encode."""
        if bos is False:
            return ids
        before = self.ids_before
        if bos and before[:1] != [self.bos_id]:
            if self.bos_id is None:
                raise UserError(f"{self.folder}: bos=True, but this tokenizer has no BOS token")
            before = [self.bos_id, *before]
        return before + ids + self.ids_after

    def add_bos_eos(self, settings):
        """Set the ids around a text where the vocabulary file is silent; Llama's own code begins with BOS."""
        add_bos = settings.add_bos is not False
        self.ids_before = [self.bos_id] if add_bos and self.bos_id is not None else []
        self.ids_after = [self.eos_id] if settings.add_eos and self.eos_id is not None else []

    def visible(self, ids):
        """The ids that have text: in range, special tokens left out."""
        ids = [int(id) for id in ids]
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise UserError(
                    f"token id {id} is not in the vocabulary of {self.folder} (0 to {self.vocab_size - 1})"
                )
        return [id for id in ids if id not in self.special_ids]

    def stream(self):
        """For printing while a model writes: `.push(id)` and `.finish()` return the text that is complete."""
        return PieceStream(self)

    def render_chat(self, messages, add_generation_prompt=True, **variables):
        """The conversation as text in the model's own layout; variables are what its template may ask for."""
        given = {"messages": messages, **variables}
        return render(self.need_chat_template(), self.names_for_template(add_generation_prompt), given)

    def encode_chat(self, messages, add_generation_prompt=True, **variables):
        """The conversation as ids. The template's special tokens become tokens, the messages' stay text."""
        return self.lay_out_chat(messages, add_generation_prompt, **variables)[1]

    def lay_out_chat(self, messages, add_generation_prompt=True, **variables):
        """(text, ids) of the conversation, as render_chat and encode_chat give them, from one rendering."""
        given, names = {"messages": messages, **variables}, self.names_for_template(add_generation_prompt)
        text, mark = render_guarded(self.need_chat_template(), names, given, self.special_tokens)
        ids = self.encode_rendered(check_text(text), mark)
        return text.replace(mark, "") if mark else text, ids

    def need_chat_template(self):
        if self.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template (looked for chat_template.jinja and for chat_template in "
                "tokenizer_config.json); this checkpoint continues text, it does not chat"
            )
        return self.chat_template

    def names_for_template(self, add_generation_prompt):
        names = {name: token for name, token in self.names.items() if token is not None}
        return {**names, "add_generation_prompt": add_generation_prompt}

    def encode_rendered(self, text, mark):
        """Cut at the special tokens that `render_guarded` left whole, encode what lies between."""
        ids = []
        for index, piece in enumerate(self.special_pattern.split(text)):
            # The pattern is one group, so split returns text, token, text, token, ..., text.
            ids += [self.special_tokens[piece]] if index % 2 else self.encode_text(piece.replace(mark, ""))
        return ids

    @cached_property
    def anchor(self):
        """Any token that is a letter or a word by itself; PieceStream decodes behind it. Else 0."""
        ids = range(self.vocab_size)
        return next((id for id in ids if self.decode([id]).isalnum() and not self.is_unfinished([id])), 0)

    @cached_property
    def special_pattern(self):
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def check_text(text):
    """Text from a broken pipe or a wrong escape may hold half of a UTF-16 pair, which has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: character {error.start} is a lone surrogate"
        ) from None
    return text


class ByteStream:
    """Where tokens are bytes, text is these bytes as UTF-8; an incremental decoder keeps what is open."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id):
        return self.decoder.decode(self.tokenizer.token_bytes(int(id)) or b"")

    def finish(self):
        return self.decoder.decode(b"", final=True)


class PieceStream:
    """Where a token's text depends on its place: the first loses its leading space, bytes join to characters.

    What is pending is decoded behind an anchor, one visible token that stands for all the text before it. So
    a token costs the same however long the text has become.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before = []
        self.pending = []

    def push(self, id):
        visible = self.tokenizer.visible([id])
        self.pending += visible
        return "" if not visible or self.tokenizer.is_unfinished(self.pending) else self.finish()

    def finish(self):
        decode = self.tokenizer.decode
        text = decode(self.before + self.pending)[len(decode(self.before)) :]
        if text and not self.before:
            self.before = [self.tokenizer.anchor]
        if self.before:
            self.pending = []
        return text


def ends_in_half_a_character(content):
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(content)
    return bool(decoder.getstate()[0])
