"""A picture of what the class token of a Vision Transformer attends to.

The classifier reads the class token alone, so what it attends to is what the answer is made of. Every layer
mixes the patches anew, and the probabilities of one layer say little about the image itself; attention
rollout (Abnar and Zuidema 2020, section 3) follows them through all layers:

    A_l = 1/2 (mean over the heads of layer l's probabilities) + 1/2 I      I: what the residual passes on
    rollout = A_L ... A_2 A_1, of which the class token's row is drawn (Dosovitskiy et al. 2021, figure 6)

The small pictures are the heads of the last layer, each by itself.

The model returns no probabilities. But a forward hook sees what a module returns: here the dropout after the
softmax, which in eval mode returns what it is given.

Shapes: L layers, B images, H heads, T tokens, h rows of patches, w columns of patches.
Proof: tests/test_run_vision_transformer.py, against the attentions of `transformers`.
"""

import math

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from models.utils.files import write_atomically
from runs_ar.attention_picture import INK

LIGHT = LinearSegmentedColormap.from_list("light", [(0.91, 0.55, 0.17, alpha) for alpha in (0.0, 0.85)])
BAR = "#a9c1d9"
WIDTH = 9.6  # inches
HEADS_PER_ROW = 8
LONGEST_LABEL = 24


@torch.inference_mode()
def attention(model, images):
    """(what the model returns, the probabilities (L, B, H, T, T) of every layer in fp32)."""
    heard = []
    handles = [
        layer.attn.dropout.register_forward_hook(lambda module, inputs, probs: heard.append(probs))
        for layer in model.layers
    ]
    try:
        out = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return out, torch.stack(heard).float().cpu()


def rollout(probs):
    """(L, H, T, T), one image's probabilities, to (T, T): how much of each token went into each."""
    mixed = torch.eye(probs.shape[-1])
    for layer in probs.mean(dim=1):
        mixed = (0.5 * layer + 0.5 * torch.eye(len(layer))) @ mixed
    return mixed


def patches_seen(row, grid):
    """The class token's row (T,) without itself, as a picture (h, w): 0 where it is least, 1 where most."""
    seen = row[1:].view(grid)
    span = (seen.max() - seen.min()).clamp(min=1e-9)
    return ((seen - seen.min()) / span).numpy()


# Drawing ----------------------------------------------------------------------------------------------------


def draw(path, image, probs, grid, guesses):
    """Write the picture as a PNG.

    image: the Pillow image. probs: (L, H, T, T). grid: (h, w), the rows and columns of patches.
    guesses: [(label, probability), ...], the most probable first; may be empty.
    """
    heads = probs[-1, :, 0]
    num_rows = math.ceil(len(heads) / HEADS_PER_ROW)
    num_columns = max(4, math.ceil(len(heads) / num_rows))
    proportion = min(max(image.height / image.width, 0.4), 2.5)
    tops = WIDTH * 0.35 * proportion + 0.7
    bottoms = num_rows * (WIDTH / num_columns * proportion + 0.3)

    figure = Figure(figsize=(WIDTH, tops + bottoms), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    above, below = figure.subfigures(2, 1, height_ratios=[tops, bottoms])
    plain, seen, labels = above.subplots(1, 3, width_ratios=[1, 1, 0.8])
    show(plain, image, "the image")
    show(seen, image, "seen by the class token, all layers", patches_seen(rollout(probs)[0], grid))
    scale = above.colorbar(seen.images[-1], ax=seen, location="bottom", shrink=0.7, pad=0.02, aspect=30)
    scale.set_ticks([0, 1], labels=["least", "most"])
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    scale.outline.set_visible(False)
    list_guesses(labels, guesses)

    places = below.subplots(num_rows, num_columns, squeeze=False).flat
    for number, axes in enumerate(places, start=1):
        axes.set_axis_off()
        if number <= len(heads):
            show(axes, image, f"last layer, head {number}", patches_seen(heads[number - 1], grid), size=8)
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def show(axes, image, title, seen=None, size=10):
    """The image, or, where `seen` is given, a pale grey one with light on the patches that were seen."""
    corners = (0, image.width, image.height, 0)
    if seen is None:
        axes.imshow(image, extent=corners, interpolation="nearest")
    else:
        # Half as dark, so that the light shows on black as well.
        axes.imshow(
            image.convert("L"), cmap="gray", vmin=-255, vmax=255, extent=corners, interpolation="nearest"
        )
        axes.imshow(seen, cmap=LIGHT, vmin=0, vmax=1, extent=corners, interpolation="nearest")
    axes.set_title(title, fontsize=size, color=INK)
    axes.set_axis_off()


def list_guesses(axes, guesses):
    """A bar for each label, the most probable above."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(5, 0))
    for n, (label, probability) in enumerate(guesses):
        name = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 3]}..."
        axes.text(0, n + 0.5, name, fontsize=10, color=INK)
        axes.text(1, n + 0.5, f"{probability:.1%}", fontsize=10, color=INK, ha="right")
        axes.barh(n + 0.68, probability, height=0.12, color=BAR)
