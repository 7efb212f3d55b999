"""The tokenizer of a GGUF file, written as the files that load_tokenizer reads.

    tokenizer.ggml.model     "gpt2": byte-level BPE          -> tokenizer.json
                             "llama": sentencepiece's BPE    -> tokenizer.model
                             "bert": WordPiece               -> vocab.txt
    tokenizer.ggml.tokens, .scores, .token_type, .merges     the vocabulary
    tokenizer.ggml.pre       how a text is cut before BPE merges within the pieces (PATTERNS)
    tokenizer.ggml.bos_token_id, .add_bos_token, ...         what stands around a text
    tokenizer.chat_template

The way back is conversion/gguf_vocabulary.py.
Proof: tests/test_gguf.py, against the tokenizers that the files were made from, and transformers.
"""

import json
import struct

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from models.utils.errors import UserError, printable
from models.utils.files import reading
from models.utils.tokenizers.tiktoken_ranks import TiktokenTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type, as sentencepiece counts too
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Those of BERT: llama.cpp calls [CLS] and [SEP] also what begins and ends a text.
WORDPIECE_SPECIAL = {
    "cls_token": ("cls", "bos"),
    "sep_token": ("seperator", "eos"),  # their spelling
    "unk_token": ("unknown",),
    "pad_token": ("padding",),
    "mask_token": ("mask",),
}
WORD_START = "▁"  # of a piece that begins a word; what goes on has no mark, where BERT's own files have "##"
# tokenizer.ggml.pre -> the pattern that cuts a text, or several, one after the other; None is GPT-2's,
# "digits" the same after every digit.
LLAMA3_PATTERN = TiktokenTokenizer.pattern
ONE_DIGIT = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS,
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
])  # fmt: skip
DEEPSEEK_PATTERNS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PATTERNS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), None),
    **dict.fromkeys(("smollm", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), LLAMA3_PATTERN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), ONE_DIGIT),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O_PATTERN),
    "deepseek-v3": DEEPSEEK_PATTERNS,
}
BOS_UNLESS_SAID = ("llama-bpe", "llama3", "llama-v3")  # these put BOS before a text where no field says it


def special_ids(fields):
    """What generation_config.json says: the ids of the special tokens; of the ends of a text all."""
    if fields.get("tokenizer.ggml.model") == "bert":
        return {}  # nothing is generated
    ids = {f"{name}_id": id for name, id in named_ids(fields).items() if name != "unk_token"}
    ends = [ids.get("eos_token_id")]
    ends += [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eom", "eot")]
    ends = list(dict.fromkeys(id for id in ends if type(id) is int))
    if "eos_token_id" in ids and len(ends) > 1:
        ids["eos_token_id"] = ends
    return ids


def named_ids(fields):
    """{"bos_token": id} of the special tokens that the file names."""
    size = len(fields.get("tokenizer.ggml.tokens", ()))
    ids = {name: fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in SPECIAL.items()}
    return {name: id for name, id in ids.items() if type(id) is int and 0 <= id < size}


def tokenizer_files(file):
    """{name of a file: its content} of the tokenizer; none where the file has no vocabulary."""
    fields = file.fields
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return {}
    if not isinstance(kind, str) or kind not in WRITERS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model is {printable(repr(kind))}; read are {', '.join(WRITERS)}"
        )
    vocabulary = Vocabulary(file)
    config = tokenizer_config(vocabulary)
    with reading(file.path):
        files = WRITERS[kind](vocabulary, config)
    return {
        **files,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


class Vocabulary:
    """The lists of a file's tokenizer, checked against each other."""

    def __init__(self, file):
        self.path, self.fields = file.path, file.fields
        self.tokens = self.listed("tokens", str)
        self.types = self.listed("token_type", int) or [NORMAL] * len(self.tokens)
        self.scores = self.listed("scores", float) or [0.0] * len(self.tokens)
        self.merges = self.listed("merges", str)
        if not self.tokens or not len(self.tokens) == len(self.types) == len(self.scores):
            raise UserError(f"{self.path}: tokens, scores and types of its tokenizer differ in number")

    def listed(self, name, kind):
        values = self.fields.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise UserError(
                f"{self.path}: tokenizer.ggml.{name} is no list of {kind.__name__}; fetch it again"
            )
        return values

    def flag(self, name, otherwise):
        value = self.fields.get(f"tokenizer.ggml.{name}", otherwise)
        return value if type(value) is bool else otherwise

    @property
    def pre(self):
        return self.fields.get("tokenizer.ggml.pre", "default")


def tokenizer_config(vocabulary):
    fields = vocabulary.fields
    sentencepiece = fields["tokenizer.ggml.model"] == "llama"
    bos_unless_said = sentencepiece or vocabulary.pre in BOS_UNLESS_SAID
    if fields["tokenizer.ggml.model"] == "bert":
        return wordpiece_config(vocabulary)
    config = {name: vocabulary.tokens[id] for name, id in named_ids(fields).items()}
    config["add_bos_token"] = vocabulary.flag("add_bos_token", bos_unless_said) and "bos_token" in config
    config["add_eos_token"] = vocabulary.flag("add_eos_token", False) and "eos_token" in config
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


# Byte-level BPE ---------------------------------------------------------------------------------------------


def write_bpe(vocabulary, config):
    """tokenizer.json: the pieces, their merges, the pattern, and what is added around a text."""
    if not isinstance(vocabulary.pre, str) or vocabulary.pre not in PATTERNS:
        raise UserError(
            f"{vocabulary.path}: its tokenizer cuts texts as {printable(repr(vocabulary.pre))} does; known "
            f"are {', '.join(PATTERNS)}; copy the tokenizer.json of the original beside the converted weights"
        )
    pattern = PATTERNS[vocabulary.pre]
    pieces = {token: id for id, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    if not all(len(pair) == 2 for pair in merges) or len(pieces) < len(vocabulary.tokens):
        raise UserError(
            f"{vocabulary.path}: its tokenizer has broken merges or a token twice; fetch it again"
        )
    core = tokenizers.Tokenizer(models.BPE(pieces, merges, ignore_merges=pattern == LLAMA3_PATTERN))
    core.pre_tokenizer = cutting(pattern)
    if pattern == ONE_DIGIT:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    for id, token in enumerate(vocabulary.tokens):
        if vocabulary.types[id] in (CONTROL, USER_DEFINED):
            special = vocabulary.types[id] == CONTROL
            core.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    core.post_processor = around(core, config)
    return {"tokenizer.json": core.to_str().encode()}


def cutting(pattern):
    """What cuts a text into the pieces that BPE merges within."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    if pattern is None:
        return as_bytes
    if pattern == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_bytes])
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    cuts = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in patterns]
    return pre_tokenizers.Sequence([*cuts, as_bytes])


def around(core, config):
    """BOS and EOS around a text, where the file asks for them."""
    before = [config.get("bos_token")] * config["add_bos_token"]
    after = [config.get("eos_token")] * config["add_eos_token"]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(name, core.token_to_id(name)) for name in {*before, *after}],
    )


# sentencepiece ----------------------------------------------------------------------------------------------


def write_sentencepiece(vocabulary, config):
    """tokenizer.model: sentencepiece's ModelProto, a protobuf message of few fields.

    1: a piece, with its text (1), score (2) and type (3); 2: how it was trained, of which the kind of the
    model (3, where 2 is BPE) and whether unknown characters become bytes (35) matter; 3: how a text is
    normalised, of which the name (1), the space before a text (3), whether spaces are removed (4) and
    written as "▁" (5) do.
    """
    has_bytes = BYTE in vocabulary.types
    parts = [
        message(1, message(1, token.encode()) + number(2, score) + number(3, kind))
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types)
    ]
    ids = named_ids(vocabulary.fields)
    unknown = next((id for id, kind in enumerate(vocabulary.types) if kind == UNKNOWN), 0)
    trainer = number(3, 2) + number(35, int(has_bytes)) + number(40, unknown)
    trainer += number(41, ids.get("bos_token", -1)) + number(42, ids.get("eos_token", -1)) + number(43, -1)
    prefix = vocabulary.flag("add_space_prefix", True)
    clean = vocabulary.flag("remove_extra_whitespaces", False)
    normalizer = message(1, b"identity") + number(3, int(prefix)) + number(4, int(clean)) + number(5, 1)
    return {"tokenizer.model": b"".join([*parts, message(2, trainer), message(3, normalizer)])}


def message(field, content):
    """A field that holds bytes: its number and kind, its length, the bytes."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def number(field, value):
    """A field that holds a whole number, or a float of 32 bits."""
    if isinstance(value, float):
        return varint(field << 3 | 5) + struct.pack("<f", value)
    return varint(field << 3) + varint(value % 2**64)


def varint(value):
    """Seven bits a byte, the lowest first; all bytes but the last have their highest bit set."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# WordPiece --------------------------------------------------------------------------------------------------


def write_wordpiece(vocabulary, config):
    """vocab.txt: a piece a line, those that go on within a word with "##" in front."""
    lines = [piece(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types)]
    if len(set(lines)) < len(lines) or any(line.split() != [line] for line in lines):
        raise UserError(
            f"{vocabulary.path}: its tokenizer has a token twice, or a space in one; fetch it again"
        )
    return {"vocab.txt": "".join(f"{line}\n" for line in lines).encode()}


def piece(token, kind):
    if kind not in (NORMAL, USER_DEFINED):
        return token
    return token[len(WORD_START) :] if token.startswith(WORD_START) else f"##{token}"


def wordpiece_config(vocabulary):
    """The special tokens, and that a text loses its capitals, unless the vocabulary has some."""
    fields, tokens, config = vocabulary.fields, vocabulary.tokens, {}
    for name, theirs in WORDPIECE_SPECIAL.items():
        ids = [fields.get(f"tokenizer.ggml.{each}_token_id") for each in theirs]
        ids = [id for id in ids if type(id) is int and 0 <= id < len(tokens)]
        config |= {name: tokens[ids[0]]} if ids else {}
    normal = (token for token, kind in zip(tokens, vocabulary.types) if kind == NORMAL)
    capitals = any(token.lower() != token and not token.startswith(f"{WORD_START}[") for token in normal)
    return {**config, "do_lower_case": not capitals}


WRITERS = {"gpt2": write_bpe, "llama": write_sentencepiece, "bert": write_wordpiece}
