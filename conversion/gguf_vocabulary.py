"""A tokenizer as the fields of a GGUF file: the way back from conversion/gguf_tokenizer.py.

llama.cpp knows tokenizers by their kind and, of byte-level BPE, by a name for how a text is cut before pieces
are merged. It has no normalisers of its own making and no other patterns, so that a tokenizer is written only
where it is one of those that llama.cpp has; of any other it is said what stands against it.

    tokenizer.json, byte-level BPE      "gpt2"     tokens, merges, and the pattern's name (PATTERNS)
    tokenizer.model, sentencepiece BPE  "llama"    tokens with scores, by which neighbours are merged
    vocab.txt, WordPiece                "bert"     a "▁" before what begins a word, no "##" elsewhere

Proof: tests/test_gguf_tokenizers.py, by llama.cpp and by our own reader, id for id.
"""

import json

from tokenizers import normalizers

from conversion.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PATTERNS,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_START,
    WORDPIECE_SPECIAL,
    cutting,
)
from models.utils.errors import UserError
from models.utils.files import read_bytes, read_json
from models.utils.tokenizer import load_tokenizer
from models.utils.tokenizers.sentencepiece_model import SentencePieceTokenizer, varint
from models.utils.tokenizers.sentencepiece_model import fields as protobuf_fields
from models.utils.tokenizers.wordpiece import WordPieceTokenizer

BPE = 2  # sentencepiece's number for a model that merges; 1 chooses pieces by their probability
EOTS = ("eos", "eot", "eom")  # where several tokens end a text


def vocabulary_fields(folder, config):
    """{name of a field: value} for the tokenizer of a converted checkpoint, chat template included.

    config: the model's fields; a file has as many tokens as the model's table has rows.
    """
    tokenizer = load_tokenizer(folder, config)
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields = from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, WordPieceTokenizer):
        fields = from_wordpiece(tokenizer)
    elif getattr(tokenizer, "decoder_steps", None) == ["ByteLevel"]:
        fields = from_bpe(tokenizer)
    else:
        raise UserError(
            f"{folder}: its tokenizer is no byte-level BPE in a tokenizer.json, no sentencepiece model and "
            "no WordPiece, the ones that are written as GGUF"
        )
    size = config["vocab_size"]
    if len(fields["tokens"]) > size:
        raise UserError(f"{folder}: its tokenizer has more than the {size} tokens of the model")
    pad(fields, size)
    if not isinstance(tokenizer, WordPieceTokenizer):  # for which llama.cpp knows what stands around a text
        fields |= special_fields(tokenizer, folder)
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def pad(fields, size):
    """As many tokens as the model has rows; those that no text becomes have names that no text has."""
    missing = range(len(fields["tokens"]), size)
    fields["tokens"] += [f"[PAD{id}]" for id in missing]
    fields["token_type"] += [UNUSED for _ in missing]
    if "scores" in fields:
        fields["scores"] += [-10000.0 for _ in missing]


def special_fields(tokenizer, folder):
    """Which ids are special, and which stand around a text."""
    ids = {
        theirs: tokenizer.id_of(name)
        for ours, theirs in SPECIAL.items()
        if (name := tokenizer.names.get(ours))
    }
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    if isinstance(ends, list) and len(ends) > 1:  # the first is what ends a text, the last a turn
        ids |= dict(zip(EOTS, [ends[0], *reversed(ends[1:])]))
    elif "eos" not in ids and type(tokenizer.eos_id) is int:
        ids["eos"] = tokenizer.eos_id
    around = {"bos": tokenizer.ids_before, "eos": tokenizer.ids_after}
    for name, given in around.items():
        if given not in ([], [ids.get(name)]):
            raise UserError(f"{folder}: puts the tokens {given} around a text, which no GGUF file can say")
    adds = {f"add_{name}_token": bool(given) for name, given in around.items()}
    return {f"{name}_token_id": id for name, id in ids.items() if id is not None} | adds


# Byte-level BPE ---------------------------------------------------------------------------------------------


def from_bpe(tokenizer):
    core = tokenizer.core
    spec = json.loads(core.to_str())
    names = {id: token for token, id in core.get_vocab().items()}
    added = core.get_added_tokens_decoder()
    tokens = [names.get(id, f"[PAD{id}]") for id in range(tokenizer.vocab_size)]
    kinds = [
        (CONTROL if added[id].special else USER_DEFINED) if id in added else NORMAL if id in names else UNUSED
        for id in range(tokenizer.vocab_size)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pattern_name(tokenizer),
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
    }


WRITTEN = [name for name in PATTERNS if name != "default"]  # under which llama.cpp does not cut as GPT-2


def pattern_name(tokenizer):
    """llama.cpp's name for how a tokenizer cuts a text; UserError where it has none."""
    core, cuts = tokenizer.core, settings_of(tokenizer.core.pre_tokenizer)
    # NFC is what llama.cpp passes over in silence: hardly any text is written otherwise.
    if core.normalizer is None or isinstance(core.normalizer, normalizers.NFC):
        for name in WRITTEN:
            if settings_of(cutting(PATTERNS[name])) == cuts:
                return name
    raise UserError(
        f"{tokenizer.folder}: its tokenizer cuts or normalises texts in a way that llama.cpp has no name "
        f"for; written are those that cut as {', '.join(WRITTEN)} do"
    )


def settings_of(cutter):
    """What of a pre-tokenizer's settings decides where a text is cut."""
    state = json.loads(cutter.__getstate__()) if cutter else {}

    def plain(part):
        if isinstance(part, list):
            return [plain(each) for each in part]
        if isinstance(part, dict):
            return {name: plain(value) for name, value in part.items() if name != "trim_offsets"}
        return part

    return plain(state.get("pretokenizers", [state]))


# sentencepiece ----------------------------------------------------------------------------------------------


def from_sentencepiece(tokenizer):
    core, folder = tokenizer.core, tokenizer.folder
    content = read_bytes(folder / "tokenizer.model")
    trainer, normalizer = (numbers_of(content, field) for field in (2, 3))
    charsmap = [part for whole in protobuf_fields(content, 3) for part in protobuf_fields(whole, 2)]
    problems = {
        "chooses pieces by probability (unigram)": trainer.get(3, 1) != BPE,
        "puts a space behind words": trainer.get(24),
        "normalises texts": any(charsmap),
        "drops spaces": normalizer.get(4, 1),
        "keeps spaces": not normalizer.get(5, 1),
    }
    if found := [what for what, is_so in problems.items() if is_so]:
        raise UserError(
            f"{folder / 'tokenizer.model'}: {', '.join(found)}, which llama.cpp's tokenizer for "
            "sentencepiece does not; this checkpoint is not written as GGUF"
        )
    kinds = {core.is_unknown: UNKNOWN, core.is_control: CONTROL, core.is_unused: UNUSED, core.is_byte: BYTE}
    tokens, scores, types = [], [], []
    for id in range(tokenizer.num_pieces):
        tokens.append(core.id_to_piece(id))
        scores.append(core.get_score(id))
        types.append(next((kind for asks, kind in kinds.items() if asks(id)), NORMAL))
    for id in range(tokenizer.num_pieces, tokenizer.vocab_size):
        special = tokenizer.added.get(id) in tokenizer.special_tokens
        tokens.append(tokenizer.added.get(id, f"[PAD{id}]"))
        scores.append(-1000.0)
        types.append((CONTROL if special else USER_DEFINED) if id in tokenizer.added else UNUSED)
    for id in tokenizer.special_ids:
        types[id] = CONTROL
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": bool(normalizer.get(3, 1)),
    }


def numbers_of(content, field):
    """{number of a field: value} of the whole numbers in a part of sentencepiece's ModelProto."""
    found = {}
    for message in protobuf_fields(content, field):
        at = 0
        while at < len(message):
            tag, at = varint(message, at)
            if tag & 7 == 0:
                found[tag >> 3], at = varint(message, at)
            elif tag & 7 == 2:
                size, at = varint(message, at)
                at += size
            else:
                at += {1: 8, 5: 4}[tag & 7]
    return found


# WordPiece --------------------------------------------------------------------------------------------------


def from_wordpiece(tokenizer):
    core, folder = tokenizer.core, tokenizer.folder
    normalizer = core.normalizer
    cleans = isinstance(normalizer, normalizers.BertNormalizer)
    if not cleans or not normalizer.lowercase or normalizer.strip_accents is False:
        raise UserError(
            f"{folder}: its tokenizer keeps capitals or accents, which llama.cpp's for BERT drops; this "
            "checkpoint is not written as GGUF"
        )
    names = {id: token for token, id in core.get_vocab().items()}
    special = {id for id, token in core.get_added_tokens_decoder().items() if token.special}
    tokens, types = [], []
    for id in range(tokenizer.vocab_size):
        token = names.get(id, f"[PAD{id}]")
        types.append(CONTROL if id in special else NORMAL if id in names else UNUSED)
        if types[-1] == NORMAL:
            token = token[2:] if token.startswith("##") else WORD_START + token
        tokens.append(token)
    ids = {
        f"{theirs}_token_id": tokenizer.id_of(tokenizer.names[ours])
        for ours, names in WORDPIECE_SPECIAL.items()
        for theirs in names
    }
    return {
        "model": "bert",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        **{name: id for name, id in ids.items() if id is not None},
    }
