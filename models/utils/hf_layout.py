"""How Hugging Face names tensors: the tables that turn its checkpoints into ours, and ours into its.

A table has a line per kind of tensor,

    ours                        theirs                        transform

where {n} is the layer's number, {p} is `weight` or `bias`, and {q,k,v} stands for three tensors of ours that
theirs holds as one. A transform, defined below and named in the third column, says what changes on the way;
without one the tensor stays as it is. Rows for biases that a config switches off fall away. The script
convert_hf_checkpoint.py walks a table forward, and with --reverse backward.

To add a model: write its table (`convert_hf_checkpoint.py --inspect` shows what it leaves out),
then its lists of config fields in hf_config.py. The proof of both is tests/test_convert_hf_checkpoint.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from models.utils.errors import UserError

# Transforms -------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    forward: Callable  # (their tensor, our config) -> our tensors
    inverse: Callable  # (our tensors, our config) -> their tensor


def pairs_to_halves(weight, config):
    """Reorder the rows of each head, so that RoPE may rotate halves where Meta's code rotates neighbours.

    Meta turns rows 2i and 2i + 1 of a head by the i-th angle, we turn rows i and i + d/2 (d: head_dim). It is
    the same rotation if row 2i moves to i and row 2i + 1 to i + d/2. Hugging Face's checkpoints are in our
    order already, so that only Meta's own files need this (meta_layout.py).
    """
    pairs = weight.unflatten(0, (-1, config["head_dim"] // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight, config):
    halves = weight.unflatten(0, (-1, 2, config["head_dim"] // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


TRANSFORMS = {
    "copy": Transform(lambda theirs, config: [theirs], lambda ours, config: ours[0]),
    # GPT-2's Conv1D computes x @ weight where a Linear computes x @ weight.T.
    "transpose": Transform(lambda theirs, config: [theirs.T], lambda ours, config: ours[0].T),
    # One map computes q, k and v: one above the other in a Linear or a bias, side by side in a Conv1D.
    "split": Transform(lambda theirs, config: theirs.chunk(3), lambda ours, config: torch.cat(ours)),
    "transpose+split": Transform(
        lambda theirs, config: theirs.T.chunk(3), lambda ours, config: torch.cat(ours).T
    ),
    "pairs_to_halves": Transform(
        lambda theirs, config: [pairs_to_halves(theirs, config)],
        lambda ours, config: halves_to_pairs(ours[0], config),
    ),
}


# Tables of tensors ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    ours: str
    theirs: str
    transform: str


def table(text):
    """The rows of a table written as text, in two or three columns."""
    lines = [line.split() for line in text.strip().splitlines()]
    return [Row(ours, theirs, transform[0] if transform else "copy") for ours, theirs, *transform in lines]


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one of our models stand in somebody's checkpoints."""

    rows: list
    prefix: str = ""  # left out where a checkpoint holds the model without its head
    skipped: dict = field(default_factory=dict)  # what a file may hold that is no parameter, and why

    def their_name(self, ours):
        return next(row.theirs for row in self.rows if row.ours == ours)

    def skipped_names(self, num_layers):
        return {
            name.replace("{n}", str(n)): why for name, why in self.skipped.items() for n in range(num_layers)
        }


# wte, wpe: token and position embeddings; h: layers; ln: norms; c_attn: q, k, v in one; c_fc: the map up.
GPT2 = Layout(
    prefix="transformer.",
    skipped={
        "transformer.h.{n}.attn.bias": "the causal mask, a triangle of ones",
        "transformer.h.{n}.attn.masked_bias": "what old versions put where the mask is 0",
    },
    rows=table("""
        token_embed.weight                   transformer.wte.weight
        pos_embed.weight                     transformer.wpe.weight
        layers.{n}.attn_norm.{p}             transformer.h.{n}.ln_1.{p}
        layers.{n}.attn.{q,k,v}_proj.weight  transformer.h.{n}.attn.c_attn.weight  transpose+split
        layers.{n}.attn.{q,k,v}_proj.bias    transformer.h.{n}.attn.c_attn.bias    split
        layers.{n}.attn.o_proj.weight        transformer.h.{n}.attn.c_proj.weight  transpose
        layers.{n}.attn.o_proj.bias          transformer.h.{n}.attn.c_proj.bias
        layers.{n}.ffn_norm.{p}              transformer.h.{n}.ln_2.{p}
        layers.{n}.ffn.up_proj.weight        transformer.h.{n}.mlp.c_fc.weight     transpose
        layers.{n}.ffn.up_proj.bias          transformer.h.{n}.mlp.c_fc.bias
        layers.{n}.ffn.down_proj.weight      transformer.h.{n}.mlp.c_proj.weight   transpose
        layers.{n}.ffn.down_proj.bias        transformer.h.{n}.mlp.c_proj.bias
        final_norm.{p}                       transformer.ln_f.{p}
        lm_head.weight                       lm_head.weight
    """),
)

# post_attention_layernorm is the norm before the feed-forward: its name says what comes before it.
LLAMA = Layout(
    prefix="model.",
    skipped={
        "model.layers.{n}.self_attn.rotary_emb.inv_freq": "RoPE's frequencies, computed from rope_base",
        "model.rotary_emb.inv_freq": "RoPE's frequencies, computed from rope_base",
    },
    rows=table("""
        token_embed.weight                   model.embed_tokens.weight
        layers.{n}.attn_norm.weight          model.layers.{n}.input_layernorm.weight
        layers.{n}.attn.q_proj.{p}           model.layers.{n}.self_attn.q_proj.{p}
        layers.{n}.attn.k_proj.{p}           model.layers.{n}.self_attn.k_proj.{p}
        layers.{n}.attn.v_proj.{p}           model.layers.{n}.self_attn.v_proj.{p}
        layers.{n}.attn.o_proj.{p}           model.layers.{n}.self_attn.o_proj.{p}
        layers.{n}.ffn_norm.weight           model.layers.{n}.post_attention_layernorm.weight
        layers.{n}.ffn.gate_proj.{p}         model.layers.{n}.mlp.gate_proj.{p}
        layers.{n}.ffn.up_proj.{p}           model.layers.{n}.mlp.up_proj.{p}
        layers.{n}.ffn.down_proj.{p}         model.layers.{n}.mlp.down_proj.{p}
        final_norm.weight                    model.norm.weight
        lm_head.weight                       lm_head.weight
    """),
)

LAYOUTS = {"gpt2": GPT2, "llama": LLAMA}


class Step(NamedTuple):
    """One tensor of theirs and the one or three of ours that it becomes."""

    ours: tuple
    theirs: str
    transform: Transform
    row: Row


def plan(layout, num_layers, names):
    """The steps that fill our tensors called `names`, in their order; a row needs all of its tensors."""
    steps = []
    for row in layout.rows:
        for values in marks(row.ours, num_layers):
            ours = choices(fill(row.ours, values))
            if all(name in names for name in ours):
                steps.append(Step(ours, fill(row.theirs, values), TRANSFORMS[row.transform], row))
    place = {name: i for i, name in enumerate(names)}
    return sorted(steps, key=lambda step: place[step.ours[0]])


def marks(template, num_layers):
    """Everything that {n} and {p} of a template stand for, a dict per tensor."""
    layers = range(num_layers) if "{n}" in template else [0]
    parts = ["weight", "bias"] if "{p}" in template else [""]
    return [{"{n}": str(n), "{p}": part} for n in layers for part in parts]


def fill(template, values):
    for mark, value in values.items():
        template = template.replace(mark, value)
    return template


def choices(name):
    """The three names behind one that says {q,k,v}; any other stands for itself."""
    braces = re.search(r"\{(.*)\}", name)
    return tuple(name.replace(braces[0], choice) for choice in braces[1].split(",")) if braces else (name,)


def tied_head(model_name, config):
    """Whether lm_head.weight is token_embed.weight, which checkpoints hold once: GPT-2's always is."""
    return config.get("tied_head", model_name == "gpt2")


def to_hf_state(model_name, config, state):
    """Tensors under our names as tensors under the names that transformers saves, a tied head left out."""
    names = [name for name in state if not (name == "lm_head.weight" and tied_head(model_name, config))]
    steps = plan(LAYOUTS[model_name], config["num_layers"], names)
    strange = set(names).difference(*(step.ours for step in steps))
    if strange:
        raise UserError(f"Hugging Face's layout has no place for {', '.join(sorted(strange))}")
    # safetensors writes no views, which a transposed tensor is.
    return {
        step.theirs: step.transform.inverse([state[name] for name in step.ours], config).contiguous()
        for step in steps
    }
