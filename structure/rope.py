"""How far each pair of a head reaches: the tokens of a full turn by RoPE, and what scaling makes of them.

Pair i turns by theta_i radians from one token to the next, and so once in 2 pi / theta_i tokens. The angles
are those of the page's own `rope`, called as its model calls it, with the position 1 in the place of all. So
a page draws whatever its formula is, and a page that calls rope twice shows two lines.

Without scaling the theta are a geometric series from theta_0 = 1 on (Su et al. 2021, section 3.2.2). Scaling
of any kind (linear, Llama 3.1's, YaRN) leaves the ratio of the first two pairs as it was, and with it the
series can be drawn beside what became of it.
"""

import importlib
import math
from dataclasses import dataclass, fields, is_dataclass
from unittest.mock import patch

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models import build_model
from models.utils.errors import UserError
from structure.capture import blocks

ROLES = ("position", "attention", "feed_forward", "norm")  # whose colours the lines take
LEFT, RIGHT = 0.085, 0.975  # of the figure's width
LINE = 0.24  # inches of a sentence in the head
SMALL = 8.5
SAME = 0.01  # of a ratio: a pair whose turn takes this much longer counts as slowed


@dataclass(frozen=True)
class Turns:
    """One way in which a model turns its heads."""

    tokens: tuple  # that each pair takes for a full turn, (R // 2) numbers
    plain: tuple  # the same without scaling
    scale: float  # by which the turned pairs grow: YaRN's rotation_scale

    @property
    def slowed(self):
        """How many times longer a turn takes, pair by pair."""
        return [ours / plain for ours, plain in zip(self.tokens, self.plain)]


def turns_of(model_name, config):
    """The Turns of each different call of `rope`, in the order of the calls; UserError without any."""
    page = importlib.import_module(f"models.{model_name}")
    calls = []

    def note(positions, *args, **kwargs):
        calls.append((args, kwargs))
        return rope(positions, *args, **kwargs)

    if rope := getattr(page, "rope", None):
        model = build_model(model_name, config)
        with patch.object(page, "rope", note):
            try:
                model(torch.zeros(1, 1, dtype=torch.long, device="meta"))
            except NotImplementedError:
                # Experts ask how many tokens chose them, which the meta device cannot say; rope ran before.
                if not calls:
                    raise
    if not calls:
        raise UserError(f"models/{model_name}.py has no RoPE here; --rope draws models that turn q and k")
    position = torch.ones(1, 1, dtype=torch.long)
    return list(dict.fromkeys(turns(*rope(position, *args, **kwargs)) for args, kwargs in calls))


def turns(cos, sin):
    cos, sin = cos.double().flatten(), sin.double().flatten()
    angles = torch.atan2(sin, cos).tolist()  # theta itself, as long as no pair turns by more than pi
    ratio = angles[1] / angles[0] if len(angles) > 1 else 1.0
    return Turns(
        tokens=tuple(2 * math.pi / theta for theta in angles),
        plain=tuple(2 * math.pi / ratio**i for i in range(len(angles))),
        scale=round(torch.hypot(sin, cos)[0].item(), 4),
    )


def lengths_of(config):
    """{tokens: "max_seq_len"} of all lengths of a text that a config and its groups name."""
    found = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            found |= lengths_of(value)
        elif each.name.endswith("max_seq_len") and value:
            found[value] = each.name
    return found


def in_words(one):
    """What was done to the pairs, in a sentence or two."""
    far = f"the slowest pair turns once in {one.tokens[-1]:,.0f} tokens"
    most = max(one.slowed)
    if most < 1 + SAME:
        return f"not scaled: {far}"
    fast = sum(slowed < 1 + SAME for slowed in one.slowed)
    slow = sum(slowed > most * (1 - SAME) for slowed in one.slowed)
    parts = [
        f"{fast} pairs as they were" * bool(fast),
        f"{len(one.tokens) - fast - slow} in between" * (fast + slow < len(one.tokens)),
        f"{slow} turn {most:.3g} times slower",
    ]
    larger = f"; q and k grow by {one.scale:.3f}" if abs(one.scale - 1) > 1e-3 else ""
    return f"{', '.join(filter(None, parts))}: {far}{larger}"


# The picture ------------------------------------------------------------------------------------------------


def draw(name, model_name, config, dark=False):
    """A Figure: the pairs from left to right, the tokens of a full turn from bottom to top."""
    found, tone = turns_of(model_name, config), int(dark)
    high = 5.6 + LINE * len(found)
    figure = Figure(figsize=(9.2, high), dpi=100, facecolor=blocks.GROUND[tone])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((LEFT, 0.1, RIGHT - LEFT, 1 - (1.25 + LINE * len(found)) / high))
    style(axes, found, tone)
    write_head(figure, name, model_name, found, tone)
    draw_turns(axes, found, tone)
    draw_lengths(axes, lengths_of(config), tone)
    figure.facts = facts(found, config)
    return figure


def style(axes, found, tone):
    text, muted = blocks.TEXT[tone], blocks.MUTED[tone]
    last = max(len(one.tokens) for one in found) - 1
    scaled = any(max(one.slowed) > 1 + SAME for one in found)
    axes.set(yscale="log", xlim=(-0.02 * last - 0.02, 1.02 * last + 0.02), facecolor=blocks.GROUND[tone])
    axes.set_xlabel("pair of a head" + "; dashed: without scaling" * scaled, color=text, size=9.5)
    axes.set_ylabel("tokens for a full turn", color=text, size=9.5)
    axes.grid(color=muted, alpha=0.25, linewidth=0.6)
    axes.tick_params(colors=text, labelsize=SMALL)
    for side in axes.spines.values():
        side.set(color=muted, linewidth=0.8)


def write_head(figure, name, model_name, found, tone):
    """The model's name, with --set's changes in small, and a sentence for each line below."""
    high = figure.get_figheight()
    name, *changes = name.split(" ", 1)
    said = f"RoPE in models/{model_name}.py" + "".join(f" with {change}" for change in changes)
    figure.text(LEFT, 1 - 0.42 / high, name, size=14, weight="bold", color=blocks.TEXT[tone])
    said = said if len(said) <= 90 else f"{said[:87]}..."
    figure.text(RIGHT, 1 - 0.42 / high, said, size=SMALL, color=blocks.MUTED[tone], ha="right")
    for n, (one, colour) in enumerate(zip(found, colours(tone))):
        figure.text(LEFT, 1 - (0.75 + LINE * n) / high, f"● {in_words(one)}", size=SMALL, color=colour)


def draw_turns(axes, found, tone):
    for one, colour in zip(found, colours(tone)):
        axes.plot(one.plain, color=blocks.MUTED[tone], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(one.tokens, color=colour, linewidth=2, marker="o", markersize=3.6)
        pairs = range(len(one.tokens))
        axes.fill_between(pairs, one.plain, one.tokens, color=colour, alpha=0.18, linewidth=0)


def draw_lengths(axes, lengths, tone):
    """A line for each length of a text, and its name at the left, above the curves; the shortest's below."""
    for n, (tokens, what) in enumerate(sorted(lengths.items())):
        axes.axhline(tokens, color=blocks.TEXT[tone], linewidth=0.9)
        y, side = (tokens * 1.12, "bottom") if n else (tokens * 0.88, "top")
        said = f"{what} {tokens:,}"
        axes.text(0, y, said, color=blocks.TEXT[tone], size=SMALL, va=side)


def colours(tone):
    return [blocks.COLOURS[role][tone][1] for role in ROLES]


def facts(found, config):
    """What the picture says, a line for each pair: see picture.shown."""
    lines = [f"{what} {tokens}" for tokens, what in lengths_of(config).items()]
    for one in found:
        lines.append(in_words(one))
        lines += [
            f"pair {i}: {tokens:,.2f}, without scaling {plain:,.2f}"
            for i, (tokens, plain) in enumerate(zip(one.tokens, one.plain))
        ]
    return lines
