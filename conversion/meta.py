"""How Meta's own downloads of Llama look: original/params.json and original/consolidated.NN.pth.

Three things differ from Hugging Face's layout. The rows of wq and wk are in the order of a RoPE that turns
neighbours (pairs_to_halves in tensor_table.py). Each consolidated.NN.pth holds a slice of every tensor, cut
for one of several GPUs. And params.json leaves out what Meta's code has as constants: the context and RoPE's
scaling.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from conversion.config_fields import checked_value
from conversion.tensor_table import Computed, Layout, rope_frequencies, table
from conversion.weight_files import TorchFile
from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.safetensors_files import Entry

META_LLAMA = Layout(
    rows=table("""
        token_embed.weight                tok_embeddings.weight
        layers.{n}.attn_norm.weight       layers.{n}.attention_norm.weight
        layers.{n}.attn.q_proj.weight     layers.{n}.attention.wq.weight      pairs_to_halves
        layers.{n}.attn.k_proj.weight     layers.{n}.attention.wk.weight      pairs_to_halves
        layers.{n}.attn.v_proj.weight     layers.{n}.attention.wv.weight
        layers.{n}.attn.o_proj.weight     layers.{n}.attention.wo.weight
        layers.{n}.ffn_norm.weight        layers.{n}.ffn_norm.weight
        layers.{n}.ffn.gate_proj.weight   layers.{n}.feed_forward.w1.weight
        layers.{n}.ffn.up_proj.weight     layers.{n}.feed_forward.w3.weight
        layers.{n}.ffn.down_proj.weight   layers.{n}.feed_forward.w2.weight
        final_norm.weight                 norm.weight
        lm_head.weight                    output.weight
    """),
    tied=lambda config: {"lm_head.weight": "token_embed.weight"} if config["tied_head"] else {},
    computed={
        "rope.freqs": Computed(
            "RoPE's frequencies, computed from rope_base",
            lambda config: rope_frequencies(config["rope_base"], config["head_dim"]),
        )
    },
)

# The dimension along which a weight was cut. A Linear cut by its outputs has fewer rows (0), and the one that
# reads them is cut by its inputs (1), so that nothing travels between the two. Norms are whole on each GPU.
CUT = {
    "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0,
}  # fmt: skip


class MetaWeights:
    """The files consolidated.00.pth, consolidated.01.pth, ... as whole tensors, joined when read."""

    def __init__(self, folder, d_model):
        paths = sorted(folder.glob("consolidated.*.pth"))
        expected = [folder / f"consolidated.{i:02}.pth" for i in range(len(paths))]
        if not paths or paths != expected:
            there = ", ".join(path.name for path in paths) or "none"
            raise UserError(
                f"{folder}: consolidated.00.pth, consolidated.01.pth, ... are expected, there: {there}"
            )
        self.files = [TorchFile(path) for path in paths]
        self.d_model = d_model
        for file in self.files[1:]:
            self.check(file)
        self.entries = {name: self.entry(name) for name in self.files[0].entries}

    def check(self, file):
        """Every file holds the same tensors, and their slices fit beside each other."""
        first = self.files[0].entries
        differing = sorted(set(file.entries) ^ set(first))
        if differing:
            raise UserError(
                f"{file.path}: {differing[0]} is not in every consolidated.NN.pth; fetch them again"
            )
        for name, entry in file.entries.items():
            here, there, dim = list(entry.shape), list(first[name].shape), self.cut(name)
            if dim is not None:
                del here[dim : dim + 1], there[dim : dim + 1]
            if here != there or entry.dtype != first[name].dtype:
                raise UserError(f"{file.path}: {name} does not fit beside its other slices; fetch them again")

    def cut(self, name):
        """The dimension along which the slices of a tensor are joined, None where each file has the whole."""
        if name == "tok_embeddings.weight":
            # Llama 2 cut the embedding by its features, Llama 3 by its vocabulary.
            return 0 if self.files[0].entries[name].shape[1:] == (self.d_model,) else 1
        return CUT.get(name.removesuffix(".weight").split(".")[-1])

    def entry(self, name):
        first = self.files[0].entries[name]
        dim = self.cut(name)
        shape = list(first.shape)
        if dim is not None and dim < len(shape):
            shape[dim] = sum(file.entries[name].shape[dim] for file in self.files)
        return Entry(tuple(shape), first.dtype, first.file)

    def read(self, name):
        dim = self.cut(name)
        if dim is None or len(self.files) == 1:
            return self.files[0].read(name)
        return torch.cat([file.read(name) for file in self.files], dim)


@dataclass(frozen=True)
class MetaOptions:
    """What params.json does not say; the defaults are those of Llama 3.1 and 3.2, whose factors differ."""

    max_seq_len: int | None = None
    rope_factor: float | None = None
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_seq_len: int = 8192


REQUIRED = {"dim", "n_layers", "n_heads"}
DEFAULTS = {
    "n_kv_heads": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_scaled_rope": False,
    "vocab_size": -1,
}
# The first two give d_ff by a formula, which w1 shows directly; the last two size Meta's own cache.
INERT = {"multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len"}


def open_meta(folder, options, allow=()):
    """Our flat config and the weights of a folder with params.json."""
    path = Path(folder) / "params.json"
    params = read_json(path)
    strange = set(params) - REQUIRED - set(DEFAULTS) - INERT - set(allow)
    missing = REQUIRED - set(params)
    if strange or missing:
        unknown = [f"unknown field {name} (if it is harmless: --allow {name})" for name in sorted(strange)]
        raise UserError(f"{path}: " + "; ".join([f"no field {name}" for name in sorted(missing)] + unknown))
    require_options(path, params, options)

    try:
        params = {**params, **{name: checked_value(name, params[name], 1) for name in REQUIRED}}
    except UserError as error:
        raise UserError(str(error).replace("config.json", str(path))) from None
    weights = MetaWeights(Path(folder), params["dim"])
    return meta_config(path, {**DEFAULTS, **params}, options, weights), weights


def require_options(path, params, options):
    """params.json names neither the context nor the strength of the RoPE scaling; ask for both at once."""
    lacking = []
    if options.max_seq_len is None:
        lacking.append("--max-seq-len N (4096 for Llama 2, 8192 for Llama 3, 131072 from 3.1 on)")
    if params.get("use_scaled_rope") and options.rope_factor is None:
        lacking.append("--rope-factor X (8 for Llama 3.1, 32 for Llama 3.2)")
    if options.rope_factor is not None and not params.get("use_scaled_rope"):
        raise UserError(f"{path}: does not say use_scaled_rope; leave --rope-factor out")
    if lacking:
        raise UserError(
            f"{path}: does not say the model's context or RoPE scaling; add {' and '.join(lacking)}"
        )


def meta_config(path, params, options, weights):
    shapes = {name: entry.shape for name, entry in weights.entries.items()}
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if len(shapes.get(name, ())) != 2:
            raise UserError(f"{path.parent}: no matrix {name}, which has a size that params.json leaves out")
    # Llama 2 says -1 for what its tokenizer decides: the embedding has a row for each of its tokens.
    vocab_size = params["vocab_size"]
    vocab_size = shapes["tok_embeddings.weight"][0] if vocab_size == -1 else vocab_size
    scaling = {
        "factor": options.rope_factor,
        "low_freq_factor": options.rope_low_freq_factor,
        "high_freq_factor": options.rope_high_freq_factor,
        "original_max_seq_len": options.rope_original_seq_len,
    }
    return {
        "model": "llama",
        "vocab_size": vocab_size,
        "max_seq_len": options.max_seq_len,
        "d_model": params["dim"],
        "num_layers": params["n_layers"],
        "num_heads": params["n_heads"],
        "num_kv_heads": params["n_kv_heads"] or params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "d_ff": shapes["layers.0.feed_forward.w1.weight"][0],
        "norm_eps": params["norm_eps"],
        "rope_base": params["rope_theta"],
        "rope_scaling": scaling if params["use_scaled_rope"] else None,
        "qkv_bias": False,
        "o_bias": False,
        "ffn_bias": False,
        "tied_head": is_tied(weights),
    }


def is_tied(weights):
    """Whether the head is the embedding: left out, or stored a second time."""
    if "output.weight" not in weights.entries:
        return True
    same_shape = weights.entries["output.weight"].shape == weights.entries["tok_embeddings.weight"].shape
    return same_shape and torch.equal(weights.read("output.weight"), weights.read("tok_embeddings.weight"))
