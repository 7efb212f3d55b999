"""tokenizer.json, a whole pipeline as data, read by the `tokenizers` library; GPT-2's two files as well."""

import base64
import json
import math
import os
import re
import tempfile
import threading
from contextlib import contextmanager
from functools import lru_cache
from itertools import takewhile

import tokenizers

from models.utils.errors import UserError, one_line
from models.utils.files import plain_file, read_bytes, read_json, reading
from models.utils.tokenizers.base import ByteStream, PieceStream, Tokenizer
from models.utils.tokenizers.sentencepiece_model import longest_replacement, refuse_growth


class TokenizersTokenizer(Tokenizer):
    """tokenizer.json: normaliser, split into words, merges, and what is added around a text, all as data.

    The file is taken at its word, whatever class tokenizer_config.json names.
    """

    def __init__(self, core, settings, default_names=None):
        self.core, self.folder = core, settings.folder
        # The file may tell training to cut or pad; a prompt is never cut.
        core.no_truncation()
        core.no_padding()
        self.add_tokens(settings)
        added = core.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self.vocab_size = max(core.get_vocab().values(), default=-1) + 1
        self.decoder_steps = decoder_steps(core)
        super().__init__(settings, default_names or {})
        # Which ids the file puts around a text: encode one and see what does not come from it.
        with self.guarded():
            probe = core.encode("a")
        outside = [sequence is None for sequence in probe.sequence_ids]
        self.ids_before = probe.ids[: len(list(takewhile(bool, outside)))]
        self.ids_after = probe.ids[len(self.ids_before) + outside.count(False) :]

    def add_tokens(self, settings):
        """The tokens that tokenizer_config.json names beyond tokenizer.json, as `transformers` adds them."""
        self.core.add_tokens([settings.added[id] for id in sorted(settings.added)])
        known = {token.content for token in self.core.get_added_tokens_decoder().values()}
        named = dict.fromkeys(name for name in settings.special_names if name not in known)
        self.core.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in named])
        if self.core.normalizer is None:
            # Without a normaliser "normalized" means nothing; encode_rendered counts on it being unset.
            for token in self.core.get_added_tokens_decoder().values():
                if token.special:
                    self.core.add_special_tokens([not_normalized(token)])

    def id_of(self, token):
        return self.core.token_to_id(token)

    @contextmanager
    def guarded(self):
        """For a call of the library: one thread at a time, and its panics as errors of ours.

        The library's object carries a switch, and lets itself be changed, which encoding does. A regular
        expression that takes too many steps makes the library panic, with a report of its own on standard
        error and an exception that is no Exception.
        """
        with ONE_AT_A_TIME, rust_reports_held() as held:
            try:
                yield
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                held.truncate(0)
                raise UserError(
                    f"{self.folder}: its tokenizer fails on this text ({one_line(error)}); a pattern in "
                    "tokenizer.json takes too many steps"
                ) from None

    def encode_text(self, text):
        with self.guarded():
            self.core.encode_special_tokens = True  # "encode" them: as any other text
            return self.core.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text, mark):
        """The whole text in one call, since a word may be split differently at the start of a text."""
        with self.guarded():
            self.core.encode_special_tokens = False
            if not mark:
                return self.core.encode(text, add_special_tokens=False).ids
            # Special tokens are looked for first, then the normaliser runs: the moment to drop the marks.
            normalizer = self.core.normalizer
            drop_marks = [tokenizers.normalizers.Replace(mark, "")]
            try:
                steps = drop_marks + ([normalizer] if normalizer else [])
                self.core.normalizer = tokenizers.normalizers.Sequence(steps)
                encoding = self.core.encode(text, add_special_tokens=False)
            finally:
                self.core.normalizer = normalizer
        for id, (start, end) in zip(encoding.ids, encoding.offsets):
            if id in self.special_ids and mark in text[start:end]:
                name = self.core.id_to_token(id)
                raise UserError(
                    f"the message holds {name}, which this tokenizer cannot keep as text; leave it out"
                )
        return encoding.ids

    def decode(self, ids):
        return self.core.decode(self.visible(ids), skip_special_tokens=True)

    def token_bytes(self, id):
        """The bytes a token stands for inside a text; None for a special token, or where no rule is known."""
        if not self.visible([id]) or (token := self.core.id_to_token(id)) is None:
            return None
        if self.decoder_steps == ["ByteLevel"]:
            # Each byte is written as one printable character; a token added as plain text is what it says.
            in_alphabet = all(character in BYTE_OF for character in token)
            return bytes(BYTE_OF[character] for character in token) if in_alphabet else token.encode()
        if "ByteFallback" not in self.decoder_steps:
            return None
        return bytes([int(token[3:5], 16)]) if BYTE_TOKEN.match(token) else token.replace("▁", " ").encode()

    def stream(self):
        return ByteStream(self) if self.decoder_steps == ["ByteLevel"] else PieceStream(self)

    def is_unfinished(self, ids):
        """Whether the next token may still change the text of these.

        The library takes a run of byte tokens as one: all of it valid UTF-8, or a "�" for each byte.
        """
        if "ByteFallback" in self.decoder_steps:
            return bool(BYTE_TOKEN.match(self.core.id_to_token(ids[-1]) or ""))
        return "ByteLevel" in self.decoder_steps and self.decode(ids).endswith("\ufffd")


BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>$")


def decoder_steps(core):
    """The names of what turns tokens into text: ["ByteLevel"], ["Replace", "ByteFallback", "Fuse", ...]"""
    state = json.loads(core.decoder.__getstate__()) if core.decoder else {}
    return [step.get("type") for step in state.get("decoders", [state])]


def not_normalized(token):
    """A special token that is looked for in the text as it is, before the normaliser runs."""
    where = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
    return tokenizers.AddedToken(token.content, special=True, normalized=False, **where)


def read_pipeline(path):
    """The `tokenizers` object of a tokenizer.json."""
    spec = read_json(path)
    with reading(path):
        parts = [spec.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
        for part in parts:
            refuse_growth(growth(part), path)
        return tokenizers.Tokenizer.from_buffer(read_bytes(path))


def growth(part):
    """How many times as long a part of a tokenizer.json can make a text; steps follow each other."""
    if isinstance(part, list):
        return math.prod(map(growth, part))
    if not isinstance(part, dict):
        return 1
    steps = [growth(value) for name, value in part.items() if name.endswith(("normalizers", "tokenizers"))]
    steps += [growth(part.get(name)) for name in ("processors", "decoders")]
    if part.get("type") in ("Replace", "Prepend"):
        steps.append(1 + len(part.get("content", part.get("prepend"))))
    if part.get("type") == "TemplateProcessing":
        steps.append(max(1, len(part["single"]), len(part["pair"])))
    if part.get("type") == "Precompiled":
        steps.append(longest_replacement(base64.b64decode(part["precompiled_charsmap"])))
    return math.prod(steps)


ONE_AT_A_TIME = threading.Lock()  # there is but one standard error


@lru_cache(None)
def held_reports():
    return tempfile.TemporaryFile(buffering=0)


@contextmanager
def rust_reports_held():
    """Yield the file that takes what is meanwhile written to standard error, which it is passed to after."""
    held = held_reports()
    try:
        real = os.dup(2)
    except OSError:  # there is none
        yield held
        return
    os.dup2(held.fileno(), 2)
    try:
        yield held
    finally:
        os.dup2(real, 2)
        if held.seek(0, os.SEEK_END):
            held.seek(0)
            os.write(real, held.read())
            held.truncate(0)
            held.seek(0)
        os.close(real)


GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def gpt2_pipeline(folder, settings):
    """GPT-2's pipeline around its two files: byte-level, nothing added unless the configuration says so."""
    # The two files do not say how text is split into words; other models split differently from GPT-2.
    if settings.tokenizer_class not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(
            f"{folder}: vocab.json and merges.txt do not say how a {settings.tokenizer_class} splits text; "
            "copy its tokenizer.json beside them"
        )
    vocabulary, merges = plain_file(folder / "vocab.json"), plain_file(folder / "merges.txt")
    read_json(vocabulary)
    with reading(f"{folder}: vocab.json and merges.txt", "fetch them again"):
        merges = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    core = tokenizers.Tokenizer(merges)
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space)
    core.decoder = tokenizers.decoders.ByteLevel()
    bos, eos = [settings.names.get(name) or GPT2_NAMES[name] for name in ("bos_token", "eos_token")]
    core.add_special_tokens([bos, eos])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=[bos] * bool(settings.add_bos) + ["$A"] + [eos] * bool(settings.add_eos),
        special_tokens=[(name, core.token_to_id(name)) for name in {bos, eos}],
    )
    return core


def byte_alphabet():
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF = byte_alphabet()
