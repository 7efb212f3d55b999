"""Tiny Marians as a reader finds them: tokenizers trained here, random weights, saved by `transformers`."""

import io
import json

import sentencepiece
import torch
from transformers import MarianConfig, MarianMTModel

from conversion.convert import convert
from models import load_model

SOURCE_TEXT = """The quick brown fox isn't lazy; it's 12345 years old, they'll say. Where is the station?
We do not know whether it will rain tomorrow, but the garden needs water. Please close the window!
She said: "I have never seen such a beautiful house," and went on reading. It costs 9.99 (or 10).
Größe, façade, naïve, œuvre. Tiếng Việt có dấu.
"""
TARGET_TEXT = """Le renard brun et rapide n'est pas paresseux ; il a 12345 ans, disent-ils. Où est la gare ?
Nous ne savons pas s'il pleuvra demain, mais le jardin a besoin d'eau. Veuillez fermer la fenêtre !
Elle a dit : « Je n'ai jamais vu une si belle maison », et continua de lire le journal. Привет, как дела?
"""
CODES = [">>fra<<", ">>rus<<", ">>zho_Hans<<"]


def train(text, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, minloglevel=2, hard_vocab_limit=False,
        num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


OPUS = {"vocab_size": 110, "model_type": "unigram"}
BYTES = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True}
DIGITS = {"vocab_size": 20, "model_type": "unigram"}
KINDS = {
    "opus": ((OPUS, SOURCE_TEXT), (OPUS, TARGET_TEXT), CODES),
    "bytes": ((BYTES, SOURCE_TEXT), (BYTES, TARGET_TEXT), []),
    "bytes-in-target": ((OPUS, SOURCE_TEXT), (BYTES, TARGET_TEXT), CODES),
    # All characters of ">>fra<<", "</s>" and "<pad>" are unknown to this one, and come out as one piece.
    "digits": ((DIGITS, "12 34 5\n"), (DIGITS, "12 67"), CODES),
}


def write_tokenizer(folder, name):
    folder.mkdir()
    *models, codes = KINDS[name]
    pieces = set()
    for file, (options, text) in zip(("source.spm", "target.spm"), models):
        content = train(text, **options)
        (folder / file).write_bytes(content)
        core = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces |= {core.id_to_piece(id) for id in range(core.vocab_size())}
    # As published: </s> and <unk> first, <pad> last, no <s>, and some pieces of the models are missing.
    pieces = sorted(pieces - {"<s>", "</s>", "<unk>", "▁T", "ou"})
    vocabulary = ["</s>", "<unk>", *codes, *pieces, "<pad>"]
    ids = {piece: id for id, piece in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    config = {"source_lang": "eng", "target_lang": "fra", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": len(vocabulary) - 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def oracle_model(seed, vocab_size, eos_bias=0.0, max_seq_len=64):
    """Random weights. eos_bias: how soon targets end.

    Small embeddings, not scaled, leave much to the positions, and the large one of the end token lets it come
    sooner or later; otherwise a random model repeats itself for ever, or stops at once.
    """
    config = MarianConfig(
        vocab_size=vocab_size, max_position_embeddings=max_seq_len, d_model=32, encoder_layers=2,
        decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, activation_function="swish", scale_embedding=False, pad_token_id=vocab_size - 1,
        eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=vocab_size - 1, init_std=0.15,
    )  # fmt: skip
    torch.manual_seed(seed)
    oracle = MarianMTModel(config).eval()
    oracle.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
        oracle.model.shared.weight.copy_(0.2 * torch.randn(oracle.model.shared.weight.shape))
        oracle.model.shared.weight[0] *= 3
        oracle.final_logits_bias.copy_(0.3 * torch.randn(oracle.final_logits_bias.shape))
        oracle.final_logits_bias[:, 0] += eos_bias
    return oracle


def save_checkpoint(folder, seed=0, tokenizer=None, eos_bias=0.0, generation=None, vocab_size=60):
    """Write the checkpoint and return the oracle."""
    if tokenizer:
        write_tokenizer(folder, tokenizer)
        vocab_size = len(json.loads((folder / "vocab.json").read_text()))
    oracle = oracle_model(seed, vocab_size, eos_bias)
    oracle.save_pretrained(folder)
    pad = {"pad_token_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1}
    published = {"eos_token_id": 0, "forced_eos_token_id": 0, "bad_words_ids": [[vocab_size - 1]], **pad}
    published |= {"max_length": 24, "num_beams": 4, "bos_token_id": 0, **(generation or {})}
    (folder / "generation_config.json").write_text(json.dumps(published))
    return oracle


def load(folder):
    """The model of a checkpoint, converted here."""
    convert(folder)
    return load_model(folder)
