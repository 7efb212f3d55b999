"""A picture of cross-attention: which source tokens the decoder looked at while it made each target token.

Column s is a token of the source, row t a token of the target, and the darkness of a square the probability
that row t gives to column s; each row sums to one. The large picture is the mean over the heads of the last
layer, the small ones below it are the same of every layer. Bahdanau et al. 2015 (arXiv:1409.0473, figure 3)
drew such alignments first.

The model returns logits, not probabilities. But these are made of q and k alone, and a forward hook sees what
a module returns: hooks on q_proj and k_proj keep both while the model reads source and target once.

Shapes: L layers, H heads, T target tokens, S source tokens, D features.
Proof: tests/test_run_transformer.py, against the cross_attentions of `transformers`.
"""

import math

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from models.utils.files import write_atomically


@torch.inference_mode()
def cross_attention(model, source, target):
    """The probabilities (L, H, T, S) of each layer and head; `target` begins with the start token.

    Row t belongs to the token that the model makes after it has read target[t].
    """
    heard = {}

    def keep(module, inputs, output):
        heard[module] = output

    attentions = [layer.cross_attn for layer in model.decoder_layers]
    hooked = [module for each in attentions for module in (each.q_proj, each.k_proj)]
    handles = [module.register_forward_hook(keep) for module in hooked]
    device = model.lm_head.weight.device
    try:
        model(torch.tensor([source], device=device), torch.tensor([target], device=device))
    finally:
        for handle in handles:
            handle.remove()
    H = model.config.num_heads
    return torch.stack([probabilities(heard[each.q_proj], heard[each.k_proj], H) for each in attentions])


def probabilities(q, k, num_heads):
    """softmax(q k^T / sqrt(d)) of each head, in fp32: (1, T, D) and (1, S, D) to (H, T, S)."""
    q, k = [x[0].float().unflatten(-1, (num_heads, -1)).transpose(0, 1) for x in (q, k)]
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1).cpu()


# Drawing ----------------------------------------------------------------------------------------------------

INK = "#17324d"
SHADES = LinearSegmentedColormap.from_list("shades", ["#f5f7fa", "#a9c1d9", "#3f76a8", INK])
CELL = 0.32  # inches
THUMBNAIL = 1.3


def draw(path, probs, source, target):
    """Write the picture of probabilities (L, H, T, S) as a PNG; source and target are the tokens' names."""
    means = probs.mean(dim=1)
    num_layers, num_rows, num_columns = means.shape
    source = shortened(source, num_columns)
    width = max(CELL * num_columns + 1.5, THUMBNAIL * num_layers)
    height = CELL * num_rows + 1.2

    figure = Figure(figsize=(width, height + THUMBNAIL), layout="constrained", facecolor="white")
    large, small = figure.subfigures(2, 1, height_ratios=[height, THUMBNAIL])
    with_names(heat(large.subplots(), means[-1]), [*map(spoken, source)], [*map(spoken, target)])
    for number, axes in enumerate(small.subplots(1, num_layers, squeeze=False)[0], start=1):
        heat(axes, means[number - 1]).set(xticks=[], yticks=[], aspect="auto")
        axes.set_title(f"layer {number}", fontsize=8, color=INK)
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def heat(axes, probs):
    """A square for each probability, from light to dark."""
    axes.imshow(probs.numpy(), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    return axes


def with_names(axes, source, target):
    """The source's tokens above, the target's on the left, white lines between the squares."""
    axes.set_xticks(range(len(source)), source, rotation=60, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(target)), target)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, top=True, labeltop=True, labelbottom=False)
    axes.set_xticks([n + 0.5 for n in range(len(source) - 1)], minor=True)
    axes.set_yticks([n + 0.5 for n in range(len(target) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def shortened(names, count):
    """Names for `count` columns, where the model attends to means of neighbouring tokens."""
    factor = math.ceil(len(names) / count)
    return ["".join(names[start : start + factor]) for start in range(0, len(names), factor)]


def spoken(name):
    """A token as a label; the mark of a word's beginning is left out."""
    return name.replace("▁", " ").strip() or "␣"
