"""How Hugging Face names tensors: what the tables beside this page are made of, and how they are read.

A table has a line per kind of tensor,

    ours                        theirs                        transform

where {n} is the layer's number, {end} the one after the last, {e} an expert's, {p} is `weight` or `bias`, and
{q,k,v} stands for three tensors of ours that theirs holds as one; so does {e} where it stands on our side
alone. A transform, defined below and named in the third column, says what changes on the way; without one the
tensor stays as it is. Rows for biases that a config switches off fall away. The script
convert_hf_checkpoint.py walks a table forward, and with --reverse backward.

Each model has a page of its own here (gpt2.py, llama.py, ...) with its table and its lists of config fields.
The proof is tests/test_convert_hf_checkpoint.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import torch

# Transforms -------------------------------------------------------------------------------------------------


class Transform(NamedTuple):
    forward: Callable  # (their tensor, our config) -> our tensors
    inverse: Callable  # (our tensors, our config) -> their tensor


def pairs_to_halves(weight, config):
    """Reorder the rows of each head, so that RoPE may rotate halves where Meta's code rotates neighbours.

    Meta turns rows 2i and 2i + 1 of a head by the i-th angle, we turn rows i and i + d/2 (d: head_dim). It is
    the same rotation if row 2i moves to i and row 2i + 1 to i + d/2. Hugging Face's checkpoints are in our
    order already, so that only Meta's own files need this (meta.py).
    """
    pairs = weight.unflatten(0, (-1, config["head_dim"] // 2, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight, config):
    halves = weight.unflatten(0, (-1, 2, config["head_dim"] // 2))
    return halves.transpose(1, 2).reshape(weight.shape)


def heads_to_blocks(qkv, config):
    """q, k and v from rows that stand head by head: d of q of head 0, d of its k, d of its v, then head 1."""
    heads = qkv.unflatten(0, (config["num_heads"], 3, -1))
    return [heads[:, i].flatten(0, 1) for i in range(3)]


def blocks_to_heads(blocks, config):
    heads = [block.unflatten(0, (config["num_heads"], -1)) for block in blocks]
    return torch.stack(heads, dim=1).flatten(0, 2)


def rotary_to_halves(weight, config, before):
    """pairs_to_halves for the last rotary_dim rows of each head, which `before` others stand above."""
    heads = weight.unflatten(0, (-1, before + config["rotary_dim"]))
    pairs = heads[:, before:].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([heads[:, :before], pairs], dim=1).flatten(0, 1)


def rotary_to_pairs(weight, config, before):
    heads = weight.unflatten(0, (-1, before + config["rotary_dim"]))
    halves = heads[:, before:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([heads[:, :before], halves], dim=1).flatten(0, 1)


def experts(take_turns=1, there=lambda tensor: tensor, back=lambda tensor: tensor):
    """Each expert's tensor from all of them in one, (E, rows, ...), where `there` has brought it to that.

    take_turns: 2 where row 0 is the first of gate's, row 1 the first of up's, row 2 the second of gate's.
    """

    def inverse(ours, config):
        rows = torch.stack(ours).unflatten(0, (-1, take_turns)).transpose(1, 2)
        return back(rows.flatten(1, 2))

    return Transform(
        lambda theirs, config: [rows[i::take_turns] for rows in there(theirs) for i in range(take_turns)],
        inverse,
    )


def without_nan(scales):
    """The scales of MXFP4, exponents in a byte; 255 is no number."""
    if not scales.is_meta and (scales == 255).any():
        raise ValueError("a scale is 255, which means NaN; the file is damaged, fetch it again")
    return scales


# Of Linear layers in their files: (E, in, out), and in MXFP4 (E, out, in / 32, 16), two inputs in a byte.
LIES = {"there": lambda theirs: theirs.mT, "back": lambda ours: ours.mT}
IN_BLOCKS = {"there": lambda theirs: theirs.flatten(2), "back": lambda ours: ours.unflatten(2, (-1, 16))}

TRANSFORMS = {
    "copy": Transform(lambda theirs, config: [theirs], lambda ours, config: ours[0]),
    # GPT-2's Conv1D computes x @ weight where a Linear computes x @ weight.T.
    "transpose": Transform(lambda theirs, config: [theirs.T], lambda ours, config: ours[0].T),
    # One map computes q, k and v: one above the other in a Linear or a bias, side by side in a Conv1D.
    "split": Transform(lambda theirs, config: theirs.chunk(3), lambda ours, config: torch.cat(ours)),
    "transpose+split": Transform(
        lambda theirs, config: theirs.T.chunk(3), lambda ours, config: torch.cat(ours).T
    ),
    # A convolution over squares that do not overlap is a linear map of each square's numbers in a row.
    "squares_to_rows": Transform(
        lambda theirs, config: [theirs.flatten(1)],
        lambda ours, config: ours[0].unflatten(1, (-1, config["patch_size"], config["patch_size"])),
    ),
    # Gemma's norms multiply by 1 + weight, and llama.cpp stores the sum.
    "less_one": Transform(
        lambda theirs, config: [theirs.float() - 1], lambda ours, config: ours[0].float() + 1
    ),
    "row_to_vector": Transform(lambda theirs, config: [theirs[0]], lambda ours, config: ours[0][None]),
    "per_expert": experts(),
    "per_expert+scales": experts(there=without_nan),
    "per_expert+transpose": experts(**LIES),
    "per_expert+blocks": experts(**IN_BLOCKS),
    "gate_and_up": experts(take_turns=2),
    "gate_and_up+scales": experts(take_turns=2, there=without_nan),
    "gate_and_up+transpose": experts(take_turns=2, **LIES),
    "gate_and_up+blocks": experts(take_turns=2, **IN_BLOCKS),
    "split_per_head": Transform(heads_to_blocks, blocks_to_heads),
    "pairs_to_halves": Transform(
        lambda theirs, config: [pairs_to_halves(theirs, config)],
        lambda ours, config: halves_to_pairs(ours[0], config),
    ),
    # Latent attention: RoPE turns the last rows of each head's query, and of the one key beside the latent.
    "rope_head": Transform(
        lambda theirs, config: [rotary_to_halves(theirs, config, config["head_dim"])],
        lambda ours, config: rotary_to_pairs(ours[0], config, config["head_dim"]),
    ),
    "rope_end": Transform(
        lambda theirs, config: [rotary_to_halves(theirs, config, config["d_latent"])],
        lambda ours, config: rotary_to_pairs(ours[0], config, config["d_latent"]),
    ),
    "to_heads": Transform(
        lambda theirs, config: [theirs.unflatten(0, (config["num_heads"], -1))],
        lambda ours, config: ours[0].flatten(0, 1),
    ),
}


def rope_frequencies(base, width):
    """RoPE's frequencies (w // 2,) for `width` features: base^(-2i / w), without any scaling."""
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


# Tables of tensors ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    ours: str
    theirs: str
    transform: str


def table(text):
    """The rows of a table written as text, in two or three columns."""
    lines = [line.split() for line in text.strip().splitlines()]
    return [Row(ours, theirs, transform[0] if transform else "copy") for ours, theirs, *transform in lines]


class Computed(NamedTuple):
    """What a file may hold though it follows from the config: checked to be that, and not kept."""

    what: str
    values: Callable  # our config -> the tensor, or None where nothing is known of it
    atol: float = 1e-7

    def holds(self, stored, config):
        """Whether the stored tensor is the computed one, but for the rounding of its dtype."""
        values = self.values(config)
        if values is None or not stored.is_floating_point():
            return values is None or torch.equal(stored, values)
        rtol = max(1e-3, 2 * torch.finfo(stored.dtype).eps)
        same_shape = stored.shape == values.shape
        return same_shape and torch.allclose(stored.float(), values.float(), rtol, self.atol)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one of our models stand in somebody's checkpoints."""

    rows: list
    prefix: str = ""  # left out where a checkpoint holds the model without its head
    without_prefix: Callable = lambda config: False  # our config -> whether transformers leaves it out
    old_endings: dict = field(default_factory=dict)  # how names ended in old files -> how they end today
    inside: dict = field(default_factory=dict)  # how names begin where ours is a part of more -> how else
    left_out: dict = field(default_factory=dict)  # how those of other parts begin -> what these do
    skipped: dict = field(default_factory=dict)  # what a file may hold that is no parameter, and why
    computed: dict = field(default_factory=dict)  # the same, with a Computed to which it must be equal
    tied: Callable = lambda config: {}  # our config -> {tensor of ours: the one of ours that it shares}
    copies: dict = field(default_factory=dict)  # their tensor -> the one of theirs that it repeats
    # kind of a Quantization -> rows that take the place of those with the same tensors of ours
    in_codes: dict = field(default_factory=dict)
    codes: list = field(default_factory=list)  # those that did: their tensors are bytes

    def stored_in(self, quantization):
        """This layout where the files hold codes, as a Quantization says; None: plain numbers."""
        if quantization is None:
            return self
        codes = self.in_codes[quantization.kind]
        replaced = {row.ours for row in codes}
        return replace(self, rows=[row for row in self.rows if row.ours not in replaced] + codes, codes=codes)

    def their_name(self, ours):
        return next(row.theirs for row in self.rows if row.ours == ours)

    def full_name(self, stored, known):
        """The name in our table of a tensor that a file may store under an old one, or without the prefix."""
        ending = next((old for old in self.old_endings if stored.endswith(old)), "")
        name = stored.removesuffix(ending) + self.old_endings.get(ending, "")
        beginning = next((part for part in self.inside if name.startswith(part)), "")
        name = self.inside.get(beginning, "") + name.removeprefix(beginning)
        return self.prefix + name if name not in known and self.prefix + name in known else name

    def saved_name(self, theirs, config):
        """The name in our table as transformers saves it."""
        return theirs.removeprefix(self.prefix) if self.without_prefix(config) else theirs

    def repeats(self, config):
        """{their tensor: theirs that it repeats}: a file may hold both, and they must then be equal."""
        tied = {self.their_name(ours): self.their_name(same) for ours, same in self.tied(config).items()}
        copies = {fill(name, after_the_last(config)): same for name, same in self.copies.items()}
        return {**tied, **copies}

    def skipped_names(self, num_layers):
        computed = {name: computed.what for name, computed in self.computed.items()}
        return per_layer({**self.skipped, **computed}, num_layers)

    def computed_tensors(self, num_layers):
        return per_layer(self.computed, num_layers)


def per_layer(names, num_layers):
    """The dict with a name for each layer in place of one with {n}."""
    return {name.replace("{n}", str(n)): value for name, value in names.items() for n in range(num_layers)}


class Step(NamedTuple):
    """One tensor of theirs and the one or three of ours that it becomes."""

    ours: tuple
    theirs: str
    transform: Transform
    row: Row


def layer_count(config):
    """What {n} runs up to: the layers of the model, or of the deeper of its two halves."""
    return max(config[name] for name in config if re.fullmatch(r"num_(\w+_)?layers", name))


def expert_count(config):
    """What {e} runs up to; a section of the config may say it, and none of a model without experts."""
    groups = [config, *(value for value in config.values() if isinstance(value, dict))]
    return max(group.get("num_experts") or 0 for group in groups)


def plan(layout, config, names):
    """The steps that fill our tensors called `names`, in their order; a row needs all of its tensors."""
    steps = []
    for row in layout.rows:
        for values in marks(row.theirs, config):
            ours = choices(fill(row.ours, values), config)
            if all(name in names for name in ours):
                steps.append(Step(ours, fill(row.theirs, values), TRANSFORMS[row.transform], row))
    place = {name: i for i, name in enumerate(names)}
    return sorted(steps, key=lambda step: place[step.ours[0]])


def marks(template, config):
    """Everything that {n}, {e} and {p} of a template stand for, a dict per tensor."""
    values = {
        "{n}": range(layer_count(config)),
        "{e}": range(expert_count(config)),
        "{p}": ("weight", "bias"),
    }
    found = [mark for mark in values if mark in template]
    chosen = product(*(values[mark] for mark in found))
    return [dict(zip(found, map(str, each))) | after_the_last(config) for each in chosen]


def after_the_last(config):
    return {"{end}": str(layer_count(config))}


def fill(template, values):
    for mark, value in values.items():
        template = template.replace(mark, value)
    return template


def choices(name, config):
    """The names behind one that says {q,k,v}, and {e} where theirs has all experts in one; else itself."""
    if "{e}" in name:
        experts = [fill(name, {"{e}": str(e)}) for e in range(expert_count(config))]
        return tuple(each for expert in experts for each in choices(expert, config))
    braces = re.search(r"\{(.*)\}", name)
    return tuple(name.replace(braces[0], choice) for choice in braces[1].split(",")) if braces else (name,)
