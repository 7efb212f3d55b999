"""tokenizer.json, a whole pipeline as data, read by the `tokenizers` library; GPT-2's two files as well."""

import json
import re
from itertools import takewhile

import tokenizers

from models.utils.errors import UserError
from models.utils.files import one_line, read_json
from models.utils.tokenizers.base import ByteStream, PieceStream, Tokenizer


class TokenizersTokenizer(Tokenizer):
    """tokenizer.json: normaliser, split into words, merges, and what is added around a text, all as data.

    The file is taken at its word, whatever class tokenizer_config.json names. The library's object carries a
    switch that encoding sets each time, so one tokenizer serves one thread.
    """

    def __init__(self, core, settings, default_names=None):
        self.core = core
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

    def encode_text(self, text):
        self.core.encode_special_tokens = True  # "encode" them: as any other text
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text, mark):
        """The whole text in one call, since a word may be split differently at the start of a text."""
        self.core.encode_special_tokens = False
        if not mark:
            return self.core.encode(text, add_special_tokens=False).ids
        # Special tokens are looked for first, then the normaliser runs: the right moment to drop the marks.
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
    read_json(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(
            f"{path}: no tokenizer that can be read ({one_line(error)}); fetch it again"
        ) from None


GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def gpt2_pipeline(folder, settings):
    """GPT-2's pipeline around its two files: byte-level, nothing added unless the configuration says so."""
    # The two files do not say how text is split into words; other models split differently from GPT-2.
    if settings.tokenizer_class not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(
            f"{folder}: vocab.json and merges.txt do not say how a {settings.tokenizer_class} splits text; "
            "copy its tokenizer.json beside them"
        )
    read_json(folder / "vocab.json")
    try:
        merges = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise UserError(
            f"{folder}: vocab.json and merges.txt cannot be read ({one_line(error)}); fetch them again"
        ) from None
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
