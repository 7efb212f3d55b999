"""What a diagram is made of: tiles, lines and words, in units of a hundredth of an inch, y upwards."""

from dataclasses import dataclass, field, replace

from structure.capture.blocks import Box, Shape


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
