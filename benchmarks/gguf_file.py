"""A model with random weights as a GGUF file for llama.cpp, and what it reads of that file for a token.

conversion/gguf_write.py writes the model. Only speed is of interest here: the vocabulary has the right size,
and texts that mean nothing.
Proof: tests/test_gguf_write.py, by the reader of the gguf package and by llama.cpp.
"""

import gguf
import numpy as np

from conversion.gguf_write import described
from conversion.gguf_write import write_gguf as write_file
from models import config_to_dict


def architecture(model_name, config):
    """llama.cpp's name for what Hugging Face calls a model of this config; UserError if it has none."""
    return described(model_name, config_to_dict(model_name, config)).architecture


def write_gguf(path, model_name, model, kind):
    """Write `model`, of class models/`model_name`.py, with its matrices in `kind`, as F16."""
    config, state = config_to_dict(model_name, model.config), model.state_dict()
    write_file(path, model_name, config, state.__getitem__, vocabulary(model.config.vocab_size), kind)


def vocabulary(size):
    """As many different texts as there are tokens, the form of which is GPT-2's."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"<{n}>" for n in range(3, size))],
        "tokenizer.ggml.token_type": [int(gguf.TokenType.NORMAL)] * size,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def matrix_bytes_read(path):
    """Bytes of the tensors of which a decoded token reads every row: all but tables that it looks rows up in.

    Without an output matrix the embedding serves as one, and is read; of experts the active ones are.
    """
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    counts = {
        name.rpartition(".")[2]: field.contents()
        for name, field in reader.fields.items()
        if "expert_" in name
    }
    active, experts = counts.get("expert_used_count", 1), counts.get("expert_count", 1)
    tables = {"position_embd.weight"}
    if "output.weight" in tensors:
        tables.add("token_embd.weight")
    read = {name: int(np.int64(t.n_bytes)) for name, t in tensors.items() if name not in tables}
    return sum(n * active // experts if "_exps." in name else n for name, n in read.items())
