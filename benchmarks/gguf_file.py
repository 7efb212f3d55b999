"""A model of the zoo as a GGUF file, which llama.cpp reads.

GGUF is one file: fields (sizes, constants, the vocabulary) and then tensors, each with its own type. Matrices
are written in F32, F16, Q8_0 or Q4_0; norms and biases, as llama.cpp has it, always in F32.

    Q8_0    32 weights of a row share a scale d:  w = d q,        q in -127 .. 127     8.5 bits a weight
    Q4_0    32 weights of a row share a scale d:  w = d (q - 8),  q in 0 .. 15         4.5 bits a weight

Two things are not as in our files. llama.cpp keeps q, k and v of GPT-2 and GPT-NeoX in one matrix, one block
above the other. And it rotates neighbours (2i, 2i + 1) of a Llama's heads where we rotate (i, i + d/2), so
that the rows of q_proj and k_proj, and their biases, change places; GPT-NeoX's it rotates as we do.

Only speed is of interest here: the vocabulary has the right size, and texts that mean nothing.
Proof: tests/test_gguf_file.py, by the reader of the gguf package and by llama.cpp.
"""

import re
from dataclasses import replace

import gguf
import numpy as np
import torch

from conversion.tensor_table import halves_to_pairs
from models import config_to_dict
from models.llama import rope_frequencies
from models.utils.errors import UserError

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0")}
ARCHITECTURES = {"llama": "llama", "gpt2": "gpt2", "gpt_neox": "gptneox"}
BLOCK = 32  # weights of a row that share a scale

# Our name of a tensor, without .weight or .bias, and theirs. {q,k,v}: three of ours are one of theirs.
NAMES = {
    "token_embed": "token_embd",
    "pos_embed": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "layers.{n}.attn_norm": "blk.{n}.attn_norm",
    "layers.{n}.ffn_norm": "blk.{n}.ffn_norm",
    "layers.{n}.attn.q_proj": "blk.{n}.attn_q",
    "layers.{n}.attn.k_proj": "blk.{n}.attn_k",
    "layers.{n}.attn.v_proj": "blk.{n}.attn_v",
    "layers.{n}.attn.{q,k,v}_proj": "blk.{n}.attn_qkv",
    "layers.{n}.attn.o_proj": "blk.{n}.attn_output",
    "layers.{n}.ffn.gate_proj": "blk.{n}.ffn_gate",
    "layers.{n}.ffn.up_proj": "blk.{n}.ffn_up",
    "layers.{n}.ffn.down_proj": "blk.{n}.ffn_down",
}


def write_gguf(path, model_name, model, kind):
    """Write `model`, of class models/`model_name`.py, with its matrices in `kind`, a name of TYPES."""
    if model_name not in ARCHITECTURES:
        raise UserError(f"llama.cpp has no model like {model_name}; known: {', '.join(ARCHITECTURES)}")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model_name])
    write_fields(writer, model_name, config_to_dict(model_name, model.config))
    write_vocabulary(writer, model.config.vocab_size)
    for name, tensor in their_tensors(model_name, model).items():
        array = tensor.detach().float().contiguous().numpy()
        array_type = type_of(array, kind)
        writer.add_tensor(name, gguf.quants.quantize(array, array_type), raw_dtype=array_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def type_of(array, kind):
    """The type that an array is written in: rows that are no whole blocks cannot be quantized."""
    if array.ndim == 1:
        return TYPES["F32"]
    return TYPES["F16"] if kind in ("Q8_0", "Q4_0") and array.shape[1] % BLOCK else TYPES[kind]


def write_fields(writer, model_name, config):
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_head_count(config["num_heads"])
    if model_name == "llama":
        writer.add_head_count_kv(config["num_kv_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["norm_eps"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(config["rope_base"])
        return
    writer.add_layer_norm_eps(config["norm_eps"])
    if model_name == "gpt_neox":
        writer.add_rope_dimension_count(config["rotary_dim"])
        writer.add_rope_freq_base(config["rope_base"])
        writer.add_parallel_residual(config["parallel_residual"])


def write_vocabulary(writer, size):
    """As many different texts as there are tokens, the form of which is GPT-2's."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{n}>" for n in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def their_tensors(model_name, model):
    """{their name: tensor} in their order of rows."""
    config = config_to_dict(model_name, model.config)
    ours = model.state_dict()
    if model.lm_head.weight is model.token_embed.weight and model_name != "gpt_neox":
        del ours["lm_head.weight"]  # llama.cpp then takes the embedding's; for GPT-NeoX it wants both
    theirs = {}
    for name, tensor in ours.items():
        layer, _, part = name.rpartition(".")
        rows = [tensor]
        if model_name == "llama" and layer.endswith(("q_proj", "k_proj")):
            rows = [halves_to_pairs(tensor, config)]
        elif model_name != "llama" and re.search(r"[qkv]_proj$", layer):
            rows = [ours[f"{layer[:-6]}{which}_proj.{part}"] for which in "qkv"]
            layer = f"{layer[:-6]}{{q,k,v}}_proj"
        number = re.search(r"\.(\d+)\.", layer)
        pattern = NAMES[re.sub(r"\.\d+\.", ".{n}.", layer)]
        their_name = pattern.replace("{n}", number[1]) if number else pattern
        theirs.setdefault(f"{their_name}.{part}", torch.cat(rows))
    if config.get("rope_scaling"):
        theirs["rope_freqs.weight"] = frequency_divisors(model.config)
    return theirs


def frequency_divisors(config):
    """What llama.cpp divides each pair's frequency by: Llama 3.1's scaling is given to it as numbers."""
    cpu = torch.device("cpu")
    return rope_frequencies(replace(config, rope_scaling=None), cpu) / rope_frequencies(config, cpu)


def matrix_bytes_read(path):
    """Bytes of the tensors of which a decoded token reads every row: all but tables that it looks rows up in.

    Without an output matrix the embedding serves as one, and is read.
    """
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tables = {"position_embd.weight"}
    if "output.weight" in tensors:
        tables.add("token_embd.weight")
    return sum(int(np.int64(t.n_bytes)) for name, t in tensors.items() if name not in tables)
