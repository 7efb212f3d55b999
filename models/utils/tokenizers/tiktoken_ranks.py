"""tokenizer.model as Meta publishes it for Llama 3: a line of base64 per token, read by tiktoken."""

import base64
import binascii
import re

import tiktoken

from models.utils.errors import UserError
from models.utils.tokenizers.base import ByteStream, Tokenizer


class TiktokenTokenizer(Tokenizer):
    """Llama 3's tokenizer.model: a line per token, its bytes in base64 and its rank, which is also its id.

    Text is cut into words by a pattern, and inside a word the pair with the lowest rank merges first. The 256
    ids behind the ranks are special tokens; a few have a meaning, the rest are reserved.
    """

    # Contractions, letters after one space or sign at most, up to three digits, signs, line ends, spaces.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, content, settings):
        ranks = read_ranks(content, settings.folder / "tokenizer.model")
        # Llama 3.1's names, which give some of Llama 3's reserved ids a meaning; a file may know others.
        names = dict(enumerate(llama3_special_tokens(), start=len(ranks)))
        names |= {id: token.content for id, token in settings.added.items() if id >= len(ranks)}
        names = {id: names.get(id, f"<|reserved_token_{id}|>") for id in range(len(ranks), max(names) + 1)}
        self.special_tokens = {name: id for id, name in names.items()}
        self.vocab_size = max(names) + 1
        self.core = tiktoken.Encoding(
            "llama-3", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        super().__init__(settings, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
        self.add_bos_eos(settings)

    def id_of(self, token):
        return self.special_tokens.get(token)

    def encode_text(self, text):
        ids, start = [], 0
        # tiktoken's regular expressions run out of stack on a million spaces, so endless runs are cut.
        for run in LONG_RUN.finditer(text):
            ids += self.core.encode_ordinary(text[start : run.end()])
            start = run.end()
        return ids + self.core.encode_ordinary(text[start:])

    def decode(self, ids):
        return b"".join(map(self.core.decode_single_token_bytes, self.visible(ids))).decode(errors="replace")

    def token_bytes(self, id):
        return self.core.decode_single_token_bytes(id) if self.visible([id]) else None

    def stream(self):
        return ByteStream(self)


NUM_RANKS = 128_000
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?(\n|$)")
LONG_RUN = re.compile(r"\s{200000}|\S{200000}")


def read_ranks(content, path):
    """Token bytes -> rank. Every single byte must be there, or some text could not be encoded."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}: line {number} is not a base64 token and its rank; fetch it again"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: ranks or single bytes are missing or stand twice; fetch it again")
    if len(ranks) != NUM_RANKS:
        raise UserError(
            f"{path}: has {len(ranks):,} ranks, where Llama 3 has {NUM_RANKS:,}; a later model (Llama 4) "
            "splits text differently, which this file does not say; put its tokenizer.json beside it"
        )
    return ranks


def llama3_special_tokens():
    """The names of the 256 ids behind the ranks, in order (128000 to 128255 in the published file)."""
    named = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(248)]
    first = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|finetune_right_pad_id|>", reserved[2]]
    return [*first, *named, *reserved[3:]]
