"""Latent attention in GGUF: llama.cpp's deepseek2, which is DeepSeek-V3, V2-Lite and Youtu.

There it is attention with a single key of r + R numbers (the vector c, and what RoPE turns), which all
heads share, and a file has the sizes of this one: attention.key_length is r + R, the head's own size stands
as key_length_mla. For this the map from c to keys is stored apart from the one to values, and turned over:

    ours, at Hugging Face too    kv_up, kv_b    H (d + v) rows of r: d for keys of head 0, v for values, ...
    llama.cpp's files            attn_k_b       (H, r, d)
                                 attn_v_b       (H, v, r)
    its older files              attn_kv_b      as ours, and sizes those of H keys and H values

Both are read, the new one is written. The layer that looks ahead is left out, as by llama.cpp's converter.
Letters: H heads, d and R features of a head without and with RoPE, v of its value, r the width of c.
Proof: tests/test_gguf_write.py, by llama.cpp.
"""

import math

import torch

from conversion.gguf_table import EXPERTS, YARN_FIELDS, GGUFType, plainly, read_yarn, write_yarn
from conversion.tensor_table import table
from models.utils.errors import UserError
from models.utils.safetensors_files import Entry

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
MLA = ("attention.key_length_mla", "attention.value_length_mla")
LEGACY = ("attention.key_length", "attention.value_length")
# Of a model without experts, whose sizes say nothing.
NO_EXPERTS = {
    **dict.fromkeys(("d_expert", "num_experts", "num_active_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("num_groups", "num_active_groups"), 1),
    "sigmoid_scores": True,
    "normalize_weights": True,
    "weight_scale": 1.0,
}


def read(fields, config):
    key, value = (fields[name] for name in (MLA if MLA[0] in fields else LEGACY))
    num_dense = min(fields.get("leading_dense_block_count", 0), config["num_layers"])
    found = {
        "head_dim": key - config["rotary_dim"],
        "value_dim": value,
        "d_query": fields.get("attention.q_lora_rank") or None,
        "dense_layers": list(range(num_dense)),
        "multi_token": False,
        "rope_scaling": read_scaling(fields),
    }
    if num_dense == config["num_layers"]:
        return found | NO_EXPERTS
    gating = fields.get("expert_gating_func", SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise ValueError(f"expert_gating_func is {gating!r}, where 1 (softmax) and 2 (sigmoid) are known")
    return found | {
        "num_shared_experts": fields["expert_shared_count"],
        "num_groups": fields.get("expert_group_count") or 1,
        "num_active_groups": fields.get("expert_group_used_count") or 1,
        "sigmoid_scores": gating == SIGMOID,
        "normalize_weights": fields.get("expert_weights_norm", False),
        "weight_scale": plainly(fields.get("expert_weights_scale") or 1.0),
    }


def read_scaling(fields):
    """YaRN; yarn_log_multiplier is a tenth of score_mscale, and turns nothing larger that RoPE turns."""
    scaling = read_yarn(fields)
    if scaling is None:
        return None
    if "rope.scaling.yarn_log_multiplier" not in fields:
        raise ValueError("has YaRN without yarn_log_multiplier, which models/deepseek_v3.py does not")
    mscale = round(10 * plainly(fields["rope.scaling.yarn_log_multiplier"]), 7)
    return {**scaling, "rotation_scale": 1.0, "score_mscale": mscale}


def write(config):
    r, R, d, v = (config[name] for name in ("d_latent", "rotary_dim", "head_dim", "value_dim"))
    num_dense, scaling = len(config["dense_layers"]), config["rope_scaling"]
    if list(config["dense_layers"]) != list(range(num_dense)):
        raise UserError("layers without experts are the first ones in llama.cpp; not written as GGUF")
    fields = {
        "attention.head_count_kv": 1,
        "attention.key_length": r + R,
        "attention.value_length": r,
        "attention.key_length_mla": d + R,
        "attention.value_length_mla": v,
        "leading_dense_block_count": num_dense,
        "expert_shared_count": config["num_shared_experts"],
        "expert_gating_func": SIGMOID if config["sigmoid_scores"] else SOFTMAX,
        "expert_weights_norm": config["normalize_weights"],
        "expert_weights_scale": config["weight_scale"],
        "attention.q_lora_rank": config["d_query"] or 0,
    }
    if config["num_active_groups"] < config["num_groups"]:
        fields["expert_group_count"] = config["num_groups"]
        fields["expert_group_used_count"] = config["num_active_groups"]
    if num_dense == config["num_layers"]:
        none = {**dict.fromkeys(EXPERTS.values(), 0), "expert_shared_count": 0}
        fields |= {**none, "expert_feed_forward_length": config["d_ff"]}
    if scaling:
        if not scaling["score_mscale"] or not math.isclose(scaling["rotation_scale"], 1, rel_tol=1e-6):
            raise UserError(
                "YaRN of a deepseek2 makes scores larger as a whole in llama.cpp (score_mscale), and not "
                "what RoPE turns (rotation_scale 1); this model is not written as GGUF"
            )
        yarn = write_yarn({**scaling, "rotation_scale": 1.0})
        yarn.pop("rope.scaling.attn_factor", None)
        fields |= {**yarn, "rope.scaling.yarn_log_multiplier": scaling["score_mscale"] / 10}
    return fields


# The map from c ---------------------------------------------------------------------------------------------

WHOLE, KEYS, VALUES = "attn_kv_b.weight", "attn_k_b.weight", "attn_v_b.weight"


class Joined:
    """A GGUFFile in which attn_k_b and attn_v_b are one tensor, attn_kv_b."""

    def __init__(self, file):
        self.file, self.path, self.fields, self.tensors = file, file.path, file.fields, file.tensors
        self.forget = file.forget
        self.entries = {name: e for name, e in file.entries.items() if not name.endswith((KEYS, VALUES))}
        for name, keys in file.entries.items():
            values = file.entries.get(name.replace(KEYS, VALUES))
            if name.endswith(KEYS) and values and len(keys.shape) == len(values.shape) == 3:
                (H, r, d), v = keys.shape, values.shape[1]
                self.entries[name.replace(KEYS, WHOLE)] = Entry((H * (d + v), r), keys.dtype, keys.file)

    def read(self, name):
        if name in self.file.entries:
            return self.file.read(name)
        keys, values = (self.file.read(name.replace(WHOLE, part)) for part in (KEYS, VALUES))
        return torch.cat([keys.mT, values], dim=1).flatten(0, 1)

    def read_int4(self, name):
        return self.file.read_int4(name) if name in self.file.entries else None


def split(name, tensor, config):
    """{name: tensor} of what a file holds for one of Hugging Face's layout."""
    if not name.endswith(WHOLE):
        return {name: tensor}
    heads = tensor.unflatten(0, (config["num_heads"], -1))
    keys, values = heads.split([config["head_dim"], config["value_dim"]], dim=1)
    return {name.replace(WHOLE, KEYS): keys.mT.contiguous(), name.replace(WHOLE, VALUES): values.contiguous()}


GGUF = {
    "deepseek2": GGUFType(
        ("deepseek_v3", "deepseek_v2", "youtu"),
        fields={**EXPERTS, "d_latent": "attention.kv_lora_rank"},
        rows=table("""
            layers.{n}.ffn.router_bias                blk.{n}.exp_probs_b.bias
        """),
        known={
            *YARN_FIELDS,
            *MLA,
            "attention.q_lora_rank",
            "attention.value_length",
            "leading_dense_block_count",
            "expert_shared_count",
            "expert_gating_func",
            "expert_weights_norm",
            "expert_weights_scale",
            "expert_group_count",
            "expert_group_used_count",
            "rope.scaling.yarn_log_multiplier",
        },
        read=read,
        write=write,
        join=Joined,
        split=split,
        left_out={"ahead.": "looks one token further ahead"},
    )
}
