"""Tiny random checkpoints with tokenizers, as a reader finds them: saved by `transformers`, not converted."""

import io
import json
from pathlib import Path

import sentencepiece
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conversion.convert import convert
from models import load_model
from models.utils.tokenizer import load_tokenizer
from tests.oracle import redraw

VOCAB_SIZE = 400
MAX_SEQ_LEN = 96
BOS, EOS = 1, 2
CHAT_SYMBOLS = ["<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def oracle_model(name, max_seq_len):
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=max_seq_len, n_embd=32, n_layer=2, n_head=4, bos_token_id=BOS,
            eos_token_id=EOS,
        )  # fmt: skip
        return redraw(GPT2LMHeadModel(config), std_of_logits=2.0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=max_seq_len, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=False,
    )  # fmt: skip
    return redraw(LlamaForCausalLM(config), std_of_logits=2.0)


def sentencepiece_model():
    """A small vocabulary of its own text's pieces; other characters become bytes."""
    text = Path(__file__).read_text(encoding="utf-8")
    result = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=result, vocab_size=VOCAB_SIZE,
        model_type="bpe", byte_fallback=True, bos_id=BOS, eos_id=EOS, unk_id=0, pad_id=-1,
        control_symbols=CHAT_SYMBOLS, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    return result.getvalue()


def save_checkpoint(folder, name, add_bos=True, chat=False, generation=None, max_seq_len=MAX_SEQ_LEN):
    """Write the checkpoint and return the oracle."""
    oracle = oracle_model(name, max_seq_len)
    oracle.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {"add_bos_token": add_bos, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE if chat is True else chat
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation or {"eos_token_id": EOS}))
    return oracle


def load(folder):
    """(model, tokenizer) of a checkpoint, converted here."""
    convert(folder)
    return load_model(folder), load_tokenizer(folder)
