"""What a diagram is made of: tiles, lines and words, in units of a hundredth of an inch, y upwards.

At the end: which words stand in boxes and on lines, and how much room they take.
"""

from dataclasses import dataclass, field, replace
from functools import cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from structure.capture.blocks import Box, Shape, repeats

NAME, DETAIL, SHAPE, REPEAT = 11.5, 9.5, 9.0, 17.0  # sizes of type
WORD_GAP = 12.0  # between a name and what stands beside it
LEADING = 13.0  # from line to line
LABEL = 22.0  # what a shape on a line takes


@dataclass
class Word:
    text: str
    x: float
    y: float  # the middle of its letters
    size: float = 9.5
    tone: str = "muted"  # or "text"
    bold: bool = False
    anchor: str = "center"  # or "left", "right"
    on_line: bool = False  # stands on a line, which stops for it


@dataclass
class Tile:
    """A box on the sheet.

    kind: "tile" (closed), "frame" (with what is in it), "junction" (a circle on the spine), "region" (a frame
        that is not drawn), or "swatch" (a colour of the legend).
    """

    box: Box
    kind: str
    x: float  # left
    y: float  # bottom
    w: float
    h: float
    depth: int = 0  # frames around it
    entry: float | None = None  # x where its main input arrives, if not in the middle
    flat: bool = True  # its words may stand in one line

    @property
    def middle(self):
        return self.x + self.w / 2

    @property
    def right(self):
        return self.x + self.w

    @property
    def top(self):
        return self.y + self.h

    @property
    def way_in(self):
        return self.middle if self.entry is None else self.entry


@dataclass
class Line:
    kind: str  # "spine": the residual stream; "flow"; "side": positions, masks, another model's states
    source: str  # id of a tile; for what comes from outside, of the frame around
    target: str
    points: list
    arrow: bool = True
    role: str = ""  # of the box that a side line comes from


@dataclass
class Port:
    """The last piece of a side line, inside a frame; its source is outside.

    path: from the frame's side to the tile. x: of the rail on which it comes up beside the frame's lanes.
    """

    key: tuple  # ("rope", numbers of its shape)
    frame: str  # id of the frame on whose side it stands
    tile: str
    x: float
    path: list


@dataclass
class Mouth:
    """Where a line enters or leaves the drawing: at its bottom or its top."""

    name: str  # "tokens", of "in:tokens"
    x: float
    shape: Shape | None


@dataclass
class Drawing:
    """A part of the sheet around its own axis x = 0, standing on y = 0."""

    left: float = 0.0  # how far it reaches
    right: float = 0.0
    top: float = 0.0
    tiles: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    words: list = field(default_factory=list)
    ports: list = field(default_factory=list)
    mouths: list = field(default_factory=list)

    def add(self, other, dx=0.0, dy=0.0):
        """Draw `other` here; its ports and mouths, moved like the rest, are returned."""

        def move(points):
            return [(x + dx, y + dy) for x, y in points]

        for tile in other.tiles:
            entry = None if tile.entry is None else tile.entry + dx
            self.tiles.append(replace(tile, x=tile.x + dx, y=tile.y + dy, entry=entry))
        self.lines += [replace(line, points=move(line.points)) for line in other.lines]
        self.words += [replace(word, x=word.x + dx, y=word.y + dy) for word in other.words]
        ports = [replace(port, x=port.x + dx, path=move(port.path)) for port in other.ports]
        return ports, [replace(mouth, x=mouth.x + dx) for mouth in other.mouths]

    def mirrored(self):
        """As in a mirror that stands on the axis."""

        def turn(points):
            return [(-x, y) for x, y in points]

        def tile(t):
            return replace(t, x=-t.right, entry=None if t.entry is None else -t.entry)

        other = Drawing(self.right, self.left, self.top)
        other.tiles = [tile(t) for t in self.tiles]
        other.lines = [replace(line, points=turn(line.points)) for line in self.lines]
        other.words = [replace(word, x=-word.x) for word in self.words]
        other.ports = [replace(port, x=-port.x, path=turn(port.path)) for port in self.ports]
        other.mouths = [replace(mouth, x=-mouth.x) for mouth in self.mouths]
        return other

    def tile(self, id):
        return next((tile for tile in self.tiles if tile.box.id == id), None)


def straight(points):
    """Without the points that lie between their neighbours on a straight line, or on one of them."""
    kept = []
    for n, (x, y) in enumerate(points):
        if kept and abs(kept[-1][0] - x) + abs(kept[-1][1] - y) < 0.01:
            continue
        if kept and n + 1 < len(points):
            (x0, y0), (x1, y1) = kept[-1], points[n + 1]
            if abs(x0 - x) + abs(x1 - x) < 0.01 or abs(y0 - y) + abs(y1 - y) < 0.01:
                continue
        kept.append((x, y))
    return kept


# ---------------------------------------------------------------------------- words


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
    if box.repeat > 1 and not box.children:
        found.append(f"× {box.repeat}")
    if box.active:
        found.append(f"{box.active} of {box.repeat} active")
    return found


TITLED = (
    "attention",
    "recurrence",
    "mask",
    "multiply",
    "cache",
    "position",
)  # roles of operations that show their code


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
    """The width of its words in one line, with room for how often it is there."""
    return (
        50 * bool(repeats(box))
        + width_of(name_of(box), NAME, True)
        + sum(WORD_GAP + width_of(text, DETAIL) for text in details(box))
        + 20
    )


def stacked(box):
    """The least width of a closed box.

    What an operation computes is left out where it does not fit, but for a loop's, whose inputs it names.
    """
    must = details(box) if box.parameters or box.tied_to or box.times else []
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
