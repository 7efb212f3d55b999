"""How llama.cpp describes a model: what GGUF in the tables is made of, for reading such files and writing.

Most is alike in all of llama.cpp's architectures: sizes and constants have the same names behind the
architecture's ("llama.block_count", "gpt2.block_count"), and tensors the same short ones, which the gguf
package knows beside Hugging Face's ("blk.0.attn_q.weight"). A GGUFType says what is not, once for both ways.

Always changed are three things: a matrix is (outputs, inputs), also GPT-2's; q, k and v in one matrix stand
one block above the other, also GPT-NeoX's; and the experts of a layer lie in one tensor, one after the other.
Proof: tests/test_gguf.py, tests/test_gguf_write.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from models.utils.errors import UserError

# Our field -> theirs, behind the architecture's name.
FIELDS = {
    "max_seq_len": "context_length",
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "d_ff": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rotary_dim": "rope.dimension_count",
    "rope_base": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
LAYER_NORM = {"norm_eps": "attention.layer_norm_epsilon"}
EXPERTS = {
    "d_expert": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_active_experts": "expert_used_count",
}
# What fields that no GGUFType reads must say: more than that is not implemented.
MUST_EQUAL = {
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}


@dataclass(frozen=True)
class GGUFType:
    """What is special in one of llama.cpp's architectures, beside FIELDS and Hugging Face's table."""

    model_types: tuple  # Hugging Face's; the first says what holds where a file is silent
    fields: dict = field(default_factory=dict)  # our field -> theirs
    # The end of a name of ours -> how its tensor becomes ours, where that is special.
    transforms: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)  # of tensors that have no name at Hugging Face for themselves
    codes: list = field(default_factory=list)  # rows that take their place where the file is in MXFP4
    known: set = field(default_factory=set)  # fields of theirs that `read` reads
    read: Callable = lambda fields, config: {}  # (their fields, our config so far) -> fields of ours
    write: Callable = lambda config: {}  # our config -> their fields; UserError for what they do not have
    # Two tensors of theirs that are one of ours, and back: (file) -> file, (name, tensor, config) -> tensors.
    join: Callable = lambda file: file
    split: Callable = lambda name, tensor, config: {name: tensor}
    wants_head: bool = False  # whether a head that is tied stands in the file too
    left_out: dict = field(default_factory=dict)  # how names of ours begin that have no place -> what they do


# YaRN -------------------------------------------------------------------------------------------------------

YARN = {
    "factor": "rope.scaling.factor",
    "original_max_seq_len": "rope.scaling.original_context_length",
    "fast_turns": "rope.scaling.yarn_beta_fast",
    "slow_turns": "rope.scaling.yarn_beta_slow",
}
YARN_FIELDS = {
    *YARN.values(),
    "rope.scaling.type",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.finetuned",
}


def read_yarn(fields):
    """The fields of a page's RopeScaling for YaRN; None where a file has none."""
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise ValueError(f"rope.scaling.type is {kind!r}, where none and yarn are known")
    silence = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
    missing = [name for name in YARN.values() if name not in silence | fields]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    scaling = {ours: plainly((silence | fields)[theirs]) for ours, theirs in YARN.items()}
    # Of two spellings the one that llama.cpp heeds is a multiple of what is natural; the other is the number.
    natural = natural_scale(scaling["factor"])
    scale = fields.get("rope.scaling.yarn_attn_factor", natural)
    if "rope.scaling.attn_factor" in fields:
        scale = plainly(natural * fields["rope.scaling.attn_factor"])
    return {**scaling, "rotation_scale": scale}


def write_yarn(scaling):
    """The same as their fields; scaling: of our config, or None."""
    if not scaling:
        return {}
    if (scaling["fast_turns"], scaling["slow_turns"]) != (32, 1):
        raise UserError(
            f"YaRN goes from {scaling['fast_turns']} to {scaling['slow_turns']} turns here, in llama.cpp "
            "always from 32 to 1; this model is not written as GGUF"
        )
    fields = {theirs: scaling[ours] for ours, theirs in YARN.items()}
    ratio = scaling["rotation_scale"] / natural_scale(scaling["factor"])
    if not math.isclose(ratio, 1, rel_tol=1e-6):
        fields["rope.scaling.attn_factor"] = ratio
    return {"rope.scaling.type": "yarn", **fields}


def natural_scale(factor):
    """rotation_scale, what YaRN multiplies q and k by, where a file does not say it (YaRN, eq. 15)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def plainly(value):
    """A float of 32 bits as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
