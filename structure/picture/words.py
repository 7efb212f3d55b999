"""What stands in boxes and on lines, and how much room it takes."""

from functools import cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from structure.picture.sheet import Word

NAME, DETAIL, SHAPE = 11.5, 9.5, 9.0  # sizes of type
WORD_GAP = 12.0  # between a name and what stands beside it
LEADING = 13.0  # from line to line
LABEL = 22.0  # what a shape on a line takes


@cache
def width_of(text, size, bold=False):
    """Of a text in DejaVu Sans, the font that matplotlib brings along."""
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=size)
    return text_to_path.get_text_width_height_descent(text, font, False)[0]


def wrapped(text, width, size):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if width_of(longer, size) <= width or not lines[-1] else [*lines, word]
    return lines


def count(number):
    """4,096 or 41.9 M: short enough for a box."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= max(size, 1e4):
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:,.0f} {unit}"
    return f"{number:,}"


# ---------------------------------------------------------------------------- shapes


def shape_lines(shape):
    """A shape in letters, then in numbers, where each is known and the second says more."""
    numbers = [f"{number:,}" if isinstance(number, int) else number for number in shape.numbers]
    numbers = f"({', '.join(numbers)})" if numbers else ""
    letters = (
        shape.letters
        if shape.letters.count(",") == numbers.count(", ") and "..." not in shape.letters
        else ""
    )
    return [text for text in dict.fromkeys((letters, numbers)) if text]


def shape_width(shape):
    return max((width_of(text, SHAPE) for text in shape_lines(shape)), default=0.0) + 8


def shape_words(shape, x, y, on_line=True):
    """Around the height y."""
    lines = shape_lines(shape)
    top = y + 11 * (len(lines) - 1) / 2
    return [Word(text, x, top - 11 * n, SHAPE, on_line=on_line) for n, text in enumerate(lines)]


def labelled(edge, edges):
    """Whether a line carries its shape: where that is another than what its source reads."""
    if not shape_lines(edge.shape):
        return False
    return all(each.shape.numbers != edge.shape.numbers for each in edges if each.target == edge.source)


# ---------------------------------------------------------------------------- boxes


def details(box):
    """What stands in a box beside its name; code only if it is short, and of attention and masks alone."""
    found = []
    if box.title and (box.parameters or box.tied_to or box.children or box.role in TITLED):
        found.append(short(box.title))
    if box.tied_to:
        found.append(f"tied to {box.tied_to.split('.')[-1].split('#')[0]}")
    elif box.parameters and box.role != "norm":  # a norm's would read like its width
        found.append(count(box.parameters))
    return found


TITLED = ("attention", "mask", "multiply", "cache", "position")  # roles of operations that show their code


def short(title):
    title = (
        title.split(", eps")[0]
        .replace("->", "→")
        .replace(" x ", " × ")
        .replace("self.config.", "")
        .replace("self.", "")
        .replace("math.", "")
    )
    return (
        title if len(title) < 44 else title.split("(")[0] + "(…)" if "(" in title[:44] else title[:40] + "…"
    )


def name_of(box):
    return {"multiply": "×"}.get(box.role, box.label) if not box.parameters else box.label


def one_line(box):
    return (
        width_of(name_of(box), NAME, True)
        + sum(WORD_GAP + width_of(text, DETAIL) for text in details(box))
        + 20
    )


def stacked(box):
    """The least width of a closed box; what an operation computes is left out where it does not fit."""
    must = details(box) if box.parameters or box.tied_to else []
    return max([width_of(name_of(box), NAME, True)] + [width_of(text, DETAIL) for text in must]) + 16


def tile_lines(box, width, flat=True):
    """Rows of (text, size, bold) in a closed box: one, if all fits in it and `flat` allows it."""
    name, rest = (name_of(box), NAME, True), [(text, DETAIL, False) for text in details(box)]
    if flat and one_line(box) <= width:
        return [[name, *rest]]
    return [[name]] + [[part] for part in rest if width_of(*part) + 12 <= width]


def tile_height(box, width, flat=True):
    return 11 + LEADING * len(tile_lines(box, width, flat))


def tile_words(tile):
    lines, words = tile_lines(tile.box, tile.w, tile.flat), []
    for n, line in enumerate(lines):
        y = tile.y + tile.h / 2 + LEADING * ((len(lines) - 1) / 2 - n)
        x = tile.middle - (sum(width_of(*part) for part in line) + WORD_GAP * (len(line) - 1)) / 2
        words += row_of_words(line, x, y)
    return words


def row_of_words(parts, x, y):
    words = []
    for text, size, bold in parts:
        words.append(Word(text, x, y, size, "text" if bold else "muted", bold, "left"))
        x += width_of(text, size, bold) + WORD_GAP
    return words
