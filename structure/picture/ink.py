"""Sheets in ink: tiles, lines and words drawn with matplotlib on one figure."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from structure.capture import blocks
from structure.picture.arrange import CARDS, RADIUS
from structure.picture.sheet import Word

UNIT = 72 / 100  # points in a unit of the sheet
MARGIN = 24
CORNER = 7  # where a line turns
FADED = 0.35  # what is left of a colour


class Ink:
    """Draws on one figure; `dark` picks the second of each pair of blocks."""

    def __init__(self, width, height, dark):
        self.dark, self.faded = int(dark), False
        self.ground = blocks.GROUND[self.dark]
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=self.ground)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(-MARGIN, width - MARGIN), ylim=(-MARGIN, height - MARGIN))
        self.axes.axis("off")

    def fill(self, role):
        return self.tone(blocks.COLOURS[role][self.dark][0])

    def edge(self, role):
        return self.tone(blocks.COLOURS[role][self.dark][1])

    def tone(self, colour):
        """The colour, or a shade of the ground that only hints at it."""
        if not self.faded:
            return colour
        ours, ground = to_rgb(colour), to_rgb(self.ground)
        return tuple(FADED * one + (1 - FADED) * other for one, other in zip(ours, ground))

    def box(self, x, y, w, h, fill, edge, radius=5.0, width=1.0, order=1.0, style="-"):
        shape = FancyBboxPatch(
            (x, y), w, h, boxstyle=f"round,pad=0,rounding_size={radius}", mutation_aspect=1
        )
        shape.set(facecolor=fill, edgecolor=edge, linewidth=width * UNIT, zorder=order, linestyle=style)
        self.axes.add_patch(shape)

    def word(self, word, ground=None):
        tone = {"text": blocks.TEXT, "muted": blocks.MUTED, "ground": blocks.GROUND}[word.tone][self.dark]
        text = self.axes.text(
            word.x,
            word.y - 0.36 * word.size,
            word.text,
            size=word.size * UNIT,
            color=self.tone(tone),
            ha=word.anchor,
            va="baseline",
            family="DejaVu Sans",
            weight="bold" if word.bold else "normal",
            zorder=8,
        )
        if ground:
            text.set_bbox({"facecolor": ground, "edgecolor": "none", "pad": 1.2})

    def line(self, points, colour, width, order, arrow=False):
        path = rounded(points)
        patch = PathPatch(
            path, facecolor="none", edgecolor=colour, linewidth=width * UNIT, zorder=order, capstyle="butt"
        )
        self.axes.add_patch(patch)
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            self.head(x, y, (x > x0) - (x < x0), (y > y0) - (y < y0), colour, order)

    def head(self, x, y, dx, dy, colour, order):
        long, wide = 6.0, 3.0
        back = (x - dx * long, y - dy * long)
        corners = [
            (x, y),
            (back[0] - dy * wide, back[1] + dx * wide),
            (back[0] + dy * wide, back[1] - dx * wide),
            (x, y),
        ]
        self.axes.add_patch(PathPatch(Curve(corners), facecolor=colour, edgecolor="none", zorder=order))


def rounded(points):
    """A path through the points with round corners."""
    vertices, codes = [points[0]], [Curve.MOVETO]
    for before, here, after in zip(points, points[1:], points[2:]):
        a, b = toward(here, before), toward(here, after)
        vertices += [a, here, b]
        codes += [Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
    return Curve([*vertices, points[-1]], [*codes, Curve.LINETO])


def toward(here, there):
    """A point near `here` on the way to `there`."""
    length = abs(there[0] - here[0]) + abs(there[1] - here[1])
    share = min(CORNER, length / 2) / length if length else 0.0
    return here[0] + (there[0] - here[0]) * share, here[1] + (there[1] - here[1]) * share


# ---------------------------------------------------------------------------- a sheet


def draw_sheet(ink, sheet, marks=None):
    """marks: id -> numbers; all other tiles are faded."""
    frames = sorted((tile for tile in sheet.tiles if tile.kind == "frame"), key=lambda tile: tile.depth)

    def faded(tile):
        return marks is not None and tile.box.id not in marks

    for tile in frames:
        ink.faded = faded(tile)
        draw_frame(ink, tile)
    for tile in sheet.tiles:
        ink.faded = faded(tile)
        draw_tile(ink, tile)
        if not ink.faded and marks and tile.kind in ("tile", "frame", "idle"):
            for n, number in enumerate(marks[tile.box.id]):
                draw_badge(ink, tile.right - 8 - 17 * n, tile.top, number)
    for line in sheet.lines:
        ink.faded = marks is not None and line.kind != "spine"
        draw_line(ink, line)
    for word in sheet.words:
        around = [
            tile
            for tile in sheet.tiles
            if tile.kind in TILES and tile.x < word.x < tile.right and tile.y < word.y < tile.top
        ]
        inner = max(around, key=lambda tile: tile.depth, default=None)
        ink.faded = bool(inner) and faded(inner)
        on = [tile for tile in around if tile.kind == "frame"]
        ground = ink.fill(max(on, key=lambda tile: tile.depth).box.role) if on else ink.ground
        ink.word(word, ground if word.on_line else None)
    ink.faded = False


TILES = ("tile", "frame", "idle")


def draw_tile(ink, tile):
    fill, edge = ink.fill(tile.box.role), ink.edge(tile.box.role)
    if tile.kind == "tile":
        ink.box(tile.x, tile.y, tile.w, tile.h, fill, edge, 5, 1, 4)
    elif tile.kind == "idle":
        ink.box(tile.x, tile.y, tile.w, tile.h, ink.ground, edge, 5, 1, 4, "--")
    elif tile.kind == "swatch":
        ink.box(tile.x, tile.y, tile.w, tile.h, fill, edge, min(2, tile.w / 5), 1, 4)
    elif tile.kind == "junction":
        draw_junction(ink, tile)


def draw_frame(ink, tile):
    fill, edge, order = ink.fill(tile.box.role), ink.edge(tile.box.role), 1 + tile.depth / 10
    for n in (2, 1) if tile.box.repeat > 1 else ():
        shift = CARDS / 2 * n
        ink.box(tile.x + shift, tile.y + shift, tile.w, tile.h, fill, edge, 8, 0.8, order - 0.01 * n)
    ink.box(tile.x, tile.y, tile.w, tile.h, fill, edge, 8, 1, order)


def draw_junction(ink, tile):
    x, y = tile.middle, tile.y + tile.h / 2
    colour = blocks.SPINE[ink.dark]
    ink.axes.add_patch(
        Circle((x, y), RADIUS, facecolor=ink.fill("add"), edgecolor=colour, linewidth=1.4 * UNIT, zorder=4)
    )
    for dx, dy in ((5, 0), (0, 5)):
        ink.axes.plot(
            [x - dx, x + dx],
            [y - dy, y + dy],
            color=colour,
            linewidth=1.6 * UNIT,
            zorder=5,
            solid_capstyle="round",
        )


def draw_line(ink, line):
    if line.kind == "spine":
        ink.line(line.points, ink.tone(blocks.SPINE[ink.dark]), 2.6, 3, line.arrow)
    elif line.kind == "memory":
        ink.line(line.points, ink.tone(blocks.SPINE[ink.dark]), 1.6, 2.6, line.arrow)
    elif line.kind == "side":
        ink.line(line.points, ink.edge(line.role), 1.1, 2.5, line.arrow)
    else:
        ink.line(line.points, ink.tone(blocks.MUTED[ink.dark]), 1.2, 2.8, line.arrow)


def draw_badge(ink, x, y, number):
    colour = blocks.SPINE[ink.dark]
    ink.axes.add_patch(Circle((x, y), 7.5, facecolor=colour, edgecolor=ink.ground, linewidth=UNIT, zorder=7))
    ink.word(Word(str(number), x, y, 9.0, "ground", True))
