"""A model of the zoo as a GGUF file, which llama.cpp reads.

GGUF is one file: fields (sizes, constants, the vocabulary) and then tensors, each with its own type. Matrices
are written in F32, F16, Q8_0 or Q4_0; norms and biases, as llama.cpp has it, always in F32.

    Q8_0    32 weights of a row share a scale d:  w = d q,        q in -127 .. 127     8.5 bits a weight
    Q4_0    32 weights of a row share a scale d:  w = d (q - 8),  q in 0 .. 15         4.5 bits a weight

The gguf package knows the names here of tensors that Hugging Face names, and the tables of conversion/ know
Hugging Face's names of ours. Three things are not as in our files. llama.cpp keeps q, k and v of GPT-2 and
GPT-NeoX in one matrix, one block above the other, and the experts of a layer in one tensor. And it rotates
neighbours (2i, 2i + 1) of a Llama's heads where we rotate (i, i + d/2), so that the rows of q_proj and
k_proj, and their biases, change places; those of other models it rotates as we do.

Only speed is of interest here: the vocabulary has the right size, and texts that mean nothing.
Proof: tests/test_gguf_file.py, by the reader of the gguf package and by llama.cpp.
"""

import re
from collections import defaultdict
from dataclasses import replace

import gguf
import numpy as np
import torch

from conversion.tables import LAYOUTS, to_hf_config
from conversion.tensor_table import halves_to_pairs, plan
from models import config_to_dict
from models.llama import rope_frequencies
from models.utils.errors import UserError

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0")}
BLOCK = 32  # weights of a row that share a scale
# What llama.cpp does in its own way, by its own names of the architectures.
ROTATES_NEIGHBOURS = ("llama",)
WANTS_A_TIED_HEAD_TOO = ("gptneox",)  # for others the embedding's matrix serves as the head


def architecture(model_name, config):
    """llama.cpp's name for what Hugging Face calls a model of this config; UserError if it has none."""
    model_type = to_hf_config(model_name, config_to_dict(model_name, config))["model_type"]
    name = model_type.replace("_", "")
    if name not in gguf.MODEL_ARCH_NAMES.values():
        raise UserError(f"llama.cpp has no model like {model_name}")
    if getattr(config, "rope_base", 0) is None:
        raise UserError(f"llama.cpp rotates every {name}, and this one has no RoPE")
    if getattr(config, "dense_layers", ()) or not getattr(config, "normalize_weights", True):
        raise UserError(f"llama.cpp has experts in every layer of a {name}, with weights that add up to 1")
    return name


def write_gguf(path, model_name, model, kind):
    """Write `model`, of class models/`model_name`.py, with its matrices in `kind`, a name of TYPES."""
    arch = architecture(model_name, model.config)
    writer = gguf.GGUFWriter(path, arch)
    write_fields(writer, model_name, model.config)
    write_vocabulary(writer, model.config.vocab_size)
    for name, tensor in their_tensors(arch, model_name, model).items():
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
    return TYPES["F16"] if kind in ("Q8_0", "Q4_0") and array.shape[-1] % BLOCK else TYPES[kind]


def write_fields(writer, model_name, config):
    """The sizes and constants that a model of this kind has."""
    ours = config_to_dict(model_name, config)
    writers = {
        "max_seq_len": writer.add_context_length,
        "d_model": writer.add_embedding_length,
        "num_layers": writer.add_block_count,
        "d_ff": writer.add_feed_forward_length,
        "d_expert": writer.add_expert_feed_forward_length,
        "num_experts": writer.add_expert_count,
        "num_active_experts": writer.add_expert_used_count,
        "num_heads": writer.add_head_count,
        "rope_base": writer.add_rope_freq_base,
        "parallel_residual": writer.add_parallel_residual,
    }
    for field, write in writers.items():
        if field in ours:
            write(ours[field])
    if "rope_base" in ours:
        head_dim = ours.get("head_dim", ours["d_model"] // ours["num_heads"])
        writer.add_head_count_kv(ours.get("num_kv_heads", ours["num_heads"]))
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(ours.get("rotary_dim", head_dim))
    has_rms_norm = "rms_norm_eps" in to_hf_config(model_name, ours)
    (writer.add_layer_norm_rms_eps if has_rms_norm else writer.add_layer_norm_eps)(ours["norm_eps"])


def write_vocabulary(writer, size):
    """As many different texts as there are tokens, the form of which is GPT-2's."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["a", "b", "ab", *(f"<{n}>" for n in range(3, size))])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def their_tensors(arch, model_name, model):
    """{their name: tensor} in their order of rows."""
    config = config_to_dict(model_name, model.config)
    layout, ours = LAYOUTS[model_name], model.state_dict()
    if arch not in WANTS_A_TIED_HEAD_TOO:
        ours = {name: tensor for name, tensor in ours.items() if name not in layout.tied(config)}
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config["num_layers"])
    theirs, experts = {}, defaultdict(list)
    for step in plan(layout, config, list(ours)):
        rows = [ours[name] for name in step.ours]
        if arch in ROTATES_NEIGHBOURS and re.search(r"\.[qk]_proj\.", step.ours[0]):
            rows = [halves_to_pairs(tensor, config) for tensor in rows]
        together = re.sub(r"\.experts\.\d+\.", ".experts.", step.theirs)
        their_name = names.get_name(together, (".weight", ".bias"))
        if their_name is None:
            raise UserError(f"llama.cpp has no place for {step.theirs} of {model_name}")
        if together != step.theirs:
            experts[their_name] += rows
        theirs[their_name] = torch.cat(rows)
    theirs |= {name: torch.stack(matrices) for name, matrices in experts.items()}
    if config.get("rope_scaling"):
        theirs["rope_freqs.weight"] = frequency_divisors(model.config)
    return theirs


def frequency_divisors(config):
    """What llama.cpp divides each pair's frequency by: Llama 3.1's scaling is given to it as numbers."""
    cpu = torch.device("cpu")
    return rope_frequencies(replace(config, rope_scaling=None), cpu) / rope_frequencies(config, cpu)


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
