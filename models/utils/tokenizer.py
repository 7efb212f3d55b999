"""Tokenizers: text to token ids and back, with exactly the ids that the model was trained on.

Three libraries read six kinds of files, and `load_tokenizer` finds out which a folder holds by looking:

    tokenizer.json                  tokenizers     a whole pipeline as data; most checkpoints have it
    vocab.json + merges.txt         tokenizers     GPT-2's two files, from which the same pipeline is built
    vocab.txt                       tokenizers     BERT's file, likewise (tokenizers/wordpiece.py)
    tokenizer.model (protobuf)      sentencepiece  Llama 2, and the small checkpoints of this project
    tokenizer.model (base64 lines)  tiktoken       Llama 3 as Meta publishes it
    source.spm, target.spm,         sentencepiece  Marian's translators (tokenizers/marian.py)
        vocab.json

Language models mostly use byte-pair encoding: start from bytes or characters and merge, again and again, the
neighbours whose union comes first in a learned list. The libraries do that part; this page what lies around:

    which ids are special, and that no text a user types ever becomes one
    where BOS and EOS go, by the checkpoint's own configuration (read in tokenizers/settings.py)
    chat templates (rendered in tokenizers/chat_template.py)
    streaming: text that appears token by token and never shows half a character

    tokenizer = load_tokenizer("checkpoints/tiny-llama-python")
    ids = tokenizer.encode("def main():")
    text = tokenizer.decode(ids)

The proof is tests/test_tokenizer.py, against the libraries themselves and `transformers`.
"""

from pathlib import Path

import tokenizers

from models.utils.errors import UserError
from models.utils.files import plain_file, read_bytes, reading
from models.utils.tokenizers.pipeline import GPT2_NAMES, TokenizersTokenizer, gpt2_pipeline, read_pipeline
from models.utils.tokenizers.sentencepiece_model import SentencePieceTokenizer
from models.utils.tokenizers.settings import Settings
from models.utils.tokenizers.tiktoken_ranks import RANK_LINE, TiktokenTokenizer


def load_tokenizer(folder, config=None):
    """The tokenizer of a checkpoint: `checkpoints/NAME`, its `converted/`, or any folder that has one.

    config: the fields of the folder's config.json, from whoever has read them already.
    """
    folder = tokenizer_folder(Path(folder))
    with reading(folder, "fetch the tokenizer's files again"):
        return choose_tokenizer(folder, Settings(folder, config))


def choose_tokenizer(folder, settings):
    if (folder / "source.spm").is_file():
        # Imported here, since that page builds on this one.
        from models.utils.tokenizers.marian import MarianTokenizer

        return MarianTokenizer(settings)
    # Where a folder has several, tokenizer.json goes first, as in `transformers`: it alone holds the whole
    # pipeline, also the split pattern, the normaliser and the tokens added after training.
    if (folder / "tokenizer.json").is_file():
        core = read_pipeline(folder / "tokenizer.json")
        if isinstance(core.model, tokenizers.models.WordPiece):
            return wordpiece_tokenizer(settings, core)
        return TokenizersTokenizer(core, settings)
    if (folder / "vocab.txt").is_file():
        return wordpiece_tokenizer(settings)
    if not (folder / "tokenizer.model").is_file():
        return TokenizersTokenizer(gpt2_pipeline(folder, settings), settings, GPT2_NAMES)
    content = read_bytes(folder / "tokenizer.model")
    if RANK_LINE.match(content):
        return TiktokenTokenizer(content, settings)
    return SentencePieceTokenizer(content, settings)


def wordpiece_tokenizer(settings, core=None):
    # Imported here, since that page builds on this one.
    from models.utils.tokenizers.wordpiece import WordPieceTokenizer

    return WordPieceTokenizer(settings, core)


def tokenizer_folder(folder):
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; checkpoints are folders under checkpoints/")
    for candidate in (folder / "converted", folder):
        has = [(candidate / name).is_file() for name in VOCABULARY_FILES]
        if has[0] or has[1] or (has[2] and (has[3] or has[4])) or has[5]:
            for name, there in zip(VOCABULARY_FILES, has):
                if there:
                    plain_file(candidate / name, folder)
            return candidate
    raise UserError(
        f"{folder}: no tokenizer here (looked for tokenizer.json, tokenizer.model, vocab.txt, and vocab.json "
        "with merges.txt or source.spm); copy these files from where the checkpoint was published"
    )


VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
VOCABULARY_FILES += ("source.spm", "vocab.txt")
