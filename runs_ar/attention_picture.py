"""A picture of attention: for each token, a row, how much of its attention each token it may look at gets.

Column s is a token that is looked at, row t one that looks, and the darkness of a square the probability that
row t gives to column s; each row sums to one, but where a head's sink takes the rest. The large picture is
the mean over the heads of the last layer, the small ones below it are the same of every layer. Of a
translation the columns are the source, and row t is what was looked at while the target's token t was made:
Bahdanau et al. 2015 (arXiv:1409.0473, figure 3) drew such alignments first. Of a text that a model continues
or reads, rows and columns are its tokens, and row t is what the model looked at when it had read token t.

Shapes: L layers, H heads, T tokens that look, S tokens looked at.
Proof: tests/test_run_transformer.py and tests/test_attention.py, against the attentions of `transformers`.
"""

import math
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from models.utils.errors import UserError
from models.utils.files import one_line, write_atomically
from models.utils.recording import Recording
from runs_ar.attention import heard


def cross_attention(model, source, target):
    """The probabilities (L, H, T, S) of each layer and head; `target` begins with the start token.

    Row t belongs to the token that the model makes after it has read target[t].
    """
    device = model.lm_head.weight.device
    tokens = [torch.tensor([ids], device=device) for ids in (source, target)]
    found = attention(model, len(target), *tokens)
    return torch.stack([each.probs for each in found if each.path.endswith("cross_attn")])


def self_attention(model, tokens, **inputs):
    """The same (L, H, T, T) of a text that a model continues or reads at once; tokens: (1, T)."""
    found = attention(model, tokens.shape[1], tokens, **inputs)
    if not found:
        raise UserError("--attention: no head of this model attends, so that there is nothing to draw")
    return torch.stack([each.probs for each in found])


@torch.inference_mode()
def attention(model, num_tokens, *args, **kwargs):
    with Recording(model) as recording:
        model(*args, **kwargs)
    return heard(recording, num_tokens)


def save(path, probs, looked_at, looking):
    """`draw`, for the person at the keyboard."""
    try:
        draw(Path(path), probs, looked_at, looking)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"--attention {path}: cannot be written ({reason}); give the name of a PNG") from None


# Drawing ----------------------------------------------------------------------------------------------------

INK = "#17324d"
SHADES = LinearSegmentedColormap.from_list("shades", ["#f5f7fa", "#a9c1d9", "#3f76a8", INK])
CELL = 0.32  # inches
LARGEST = 26  # of the large picture: cells of a long text are smaller
THUMBNAIL = 1.5
MOST_NAMES = 90  # more tokens than these are numbered


def draw(path, probs, source, target):
    """Write the picture of probabilities (L, H, T, S) as a PNG; source and target are the tokens' names."""
    means = probs.mean(dim=1)
    num_layers, num_rows, num_columns = means.shape
    source = shortened(source, num_columns)
    cell = min(CELL, LARGEST / max(num_rows, num_columns))
    columns = min(num_layers, max(6, int((cell * num_columns + 2.5) / THUMBNAIL)))
    lines = math.ceil(num_layers / columns)
    width = max(cell * num_columns + 2.5, THUMBNAIL * columns)
    height = cell * num_rows + 1.6

    figure = Figure(figsize=(width, height + THUMBNAIL * lines), layout="constrained", facecolor="white")
    large, small = figure.subfigures(2, 1, height_ratios=[height, THUMBNAIL * lines])
    axes = heat(large.subplots(), means[-1])
    with_names(axes, [*map(spoken, source)], [*map(spoken, target)], cell)
    bar = large.colorbar(axes.images[0], ax=axes, shrink=0.6, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.set_label("probability", fontsize=9, color=INK)
    places = small.subplots(lines, columns, squeeze=False).flat
    for number, axes in enumerate(places, start=1):
        if number > num_layers:
            axes.set_axis_off()
            continue
        heat(axes, means[number - 1]).set(xticks=[], yticks=[], aspect="auto")
        axes.set_title(f"layer {number}", fontsize=8, color=INK)
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def heat(axes, probs):
    """A square for each probability, from light to dark."""
    axes.imshow(probs.numpy(), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    return axes


def with_names(axes, source, target, cell=CELL):
    """The tokens looked at above, those that look on the left, white lines between the squares."""
    size = min(10, 72 * cell * 0.72)
    axes.set_title("mean over the heads of the last layer", fontsize=9, color=INK, pad=10)
    axes.set_xlabel("looked at", fontsize=9, color=INK)
    axes.set_ylabel("looking, a row each", fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=size, labelcolor=INK, top=True, labeltop=True, labelbottom=False)
    if max(len(source), len(target)) > MOST_NAMES:
        axes.tick_params(labelsize=9)
        return
    axes.set_xticks(range(len(source)), source, rotation=60, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(target)), target)
    axes.set_xticks([n + 0.5 for n in range(len(source) - 1)], minor=True)
    axes.set_yticks([n + 0.5 for n in range(len(target) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.5, 4 * cell))
    axes.tick_params(which="minor", length=0)


def shortened(names, count):
    """Names for `count` columns, where the model attends to means of neighbouring tokens."""
    factor = math.ceil(len(names) / count)
    return ["".join(names[start : start + factor]) for start in range(0, len(names), factor)]


def spoken(name):
    """A token as a label; the mark of a word's beginning is left out, and what a font has no sign for."""
    text = name.replace("▁", " ").replace("\n", "↵").replace("\t", "⇥").strip() or "␣"
    return "".join(sign if sign.isprintable() else "�" for sign in text).replace("$", r"\$")
