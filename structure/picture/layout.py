"""Where everything stands on the sheet: the data runs from the bottom to the top.

(As in figure 1 of "Attention Is All You Need".) Two patterns make every diagram, at each level of the tree:

    a stack    what the residual stream runs through, on one vertical axis, the spine; what leaves the spine
               and comes back to it, a branch, stands in a lane beside it
    a grid     all else: rows from the bottom to the top, each box as wide as what it joins (grid.py)

Each part is built around its own axis, then moved into the box around it. A model that reads another one (a
decoder its encoder) is mirrored, so that the two spines stand outside and what joins the models between.
"""

from dataclasses import dataclass, replace

from structure.drawn import is_junction, is_region, is_stack, prepared, side_key, side_name, side_names
from structure.picture.grid import COLUMN_GAP, GAP, build_grid
from structure.picture.sheet import Drawing, Line, Mouth, Port, Tile, Word, straight
from structure.picture.stack import CHANNEL, LANE_GAP, PADDING, RADIUS, RAIL, Stack, extent
from structure.picture.words import (
    DETAIL,
    LABEL,
    NAME,
    SHAPE,
    WORD_GAP,
    details,
    labelled,
    name_of,
    row_of_words,
    shape_lines,
    shape_words,
    stacked,
    tile_height,
    tile_words,
    width_of,
)

FORK = 23.0  # between rows where a line turns
HEADER = 25.0  # the strip at the top of a frame that holds its name
CARDS = 8.0  # how far the frames behind a repeated one look out
TURN = 6.0  # between lines that turn below a frame
MOUTH = 48.0  # what the names of inputs take


@dataclass
class Sheet(Drawing):
    two: bool = False  # two models side by side, the smaller one at the left with room above it


def lay_out(box, width=0.0):
    """The whole model, at least so wide; its lower left corner is (0, 0)."""
    root = prepared(box)
    left, right = extent(root)
    drawing = build(root, left, max(right, width - left - CARDS))
    two = bool(Stack(root).of_kind("wing"))
    drawing = drawing.mirrored() if two else drawing
    sheet = Sheet(0.0, drawing.left + drawing.right + CARDS, two=two)
    _, mouths = sheet.add(drawing, drawing.left, MOUTH)
    sheet.tiles = [tile for tile in sheet.tiles if tile.box is not root]
    for mouth in shared(sheet, mouths):
        sheet.words += mouth_words(mouth, drawing.top + MOUTH)
    for tile in sheet.tiles:
        sheet.words += header_words(tile) if tile.kind == "frame" else []
        sheet.words += tile_words(tile) if tile.kind in ("tile", "idle") else []
    sheet.top = max(tile.top for tile in sheet.tiles) + MOUTH
    centred = [word for word in sheet.words if word.anchor == "center"]
    ends = [word.x + width_of(word.text, word.size, word.bold) / 2 for word in centred]
    sheet.right = max(sheet.right, *ends)
    return sheet


def shared(sheet, mouths):
    """Two neighbours of one name become one, whose line forks."""
    found = []
    for mouth in sorted(mouths, key=lambda mouth: mouth.x):
        near = found[-1] if found and mouth.name == found[-1].name != "out" else None
        if near and mouth.x - near.x < width_of(mouth.name, NAME, True) + 24:
            x, low, turn = (near.x + mouth.x) / 2, MOUTH - 8, MOUTH - 2
            for end in (near.x, mouth.x):
                points = [(x, low), (x, turn), (end, turn), (end, MOUTH)]
                sheet.lines.append(Line("flow", "", "", points, arrow=False))
            found[-1] = replace(near, x=x)
        else:
            found.append(mouth)
    return found


def mouth_words(mouth, top):
    """The name of what comes in and its shape, below the diagram; the shape of what comes out above it."""
    lines = shape_lines(mouth.shape)
    if mouth.name == "out":
        top += GAP + 10 + 11 * (len(lines) - 1)
        return [Word(line, mouth.x, top - 11 * n, SHAPE) for n, line in enumerate(lines)]
    name = Word(mouth.name, mouth.x, MOUTH - 15, NAME, "text", bold=True)
    return [name] + [Word(line, mouth.x, MOUTH - 29 - 11 * n, SHAPE) for n, line in enumerate(lines)]


# ---------------------------------------------------------------------------- boxes


def build(box, left, right, depth=0, flat=True):
    """A Drawing of the box and what is in it, on y = 0, from -left to right."""
    if is_stack(box):
        return StackBuilder(box, left, right, depth).framed()
    if box.children:
        return build_frame(box, left + right, depth)
    if is_junction(box):
        tile = Tile(box, "junction", -RADIUS, 0.0, 2 * RADIUS, 2 * RADIUS, depth)
    else:
        height = tile_height(box, left + right, flat)
        tile = Tile(box, "tile", -left, 0.0, left + right, height, depth, None, flat)
    return Drawing(left, right, tile.h, [tile])


def build_frame(box, width, depth):
    """A frame around a grid."""

    def build_child(child, wide, flat):
        return build(child, wide / 2, wide / 2, depth + 1, flat)

    inner, grid = build_grid(box.children, box.edges, width - 2 * PADDING, build_child)
    firsts = [edge for edge in box.edges if edge.source == "in" and edge.target in grid.row]
    from_below = [e for e in box.edges if e.source.startswith("in:") and grid.row.get(e.target) == 0]
    bottom = PADDING + 9 * (len(firsts) > 1) + 9 * bool(from_below)
    drawing = Drawing(width / 2, width / 2, bottom + inner.top + 9 + HEADER)
    drawing.add(inner, 0.0, bottom)
    frame = Tile(box, "frame", -width / 2, 0.0, width, drawing.top, depth)
    draw_inputs(drawing, frame, [drawing.tile(edge.target) for edge in firsts])
    for edge in box.edges:
        if edge.target == "out" and edge.source in grid.row:
            tile = drawing.tile(edge.source)
            points = [(tile.middle, tile.top), (tile.middle, drawing.top - HEADER)]
            drawing.lines.append(Line("flow", edge.source, box.id, points, arrow=False))
    drawing.ports = [
        port_of(box, drawing, grid, e, width / 2) for e in box.edges if e.source.startswith("in:")
    ]
    drawing.tiles.append(frame)
    return drawing


def draw_inputs(drawing, frame, tiles):
    """From the middle of the frame's bottom, or from below the one box that reads it."""
    xs = sorted(tile.way_in for tile in tiles)
    frame.entry = xs[len(xs) // 2] if len(xs) % 2 else sum(xs) / max(1, len(xs))
    for tile in tiles:
        points = [(frame.entry, 0), (frame.entry, 10), (tile.way_in, 10), (tile.way_in, tile.y)]
        drawing.lines.append(Line("flow", frame.box.id, tile.box.id, straight(points)))


def port_of(box, drawing, grid, edge, right):
    """A side input comes from the right, behind those beside the box that read it too; else from below."""
    tile = drawing.tile(edge.target)
    readers = {other.target for other in box.edges if other.source == edge.source}
    beside = [t.box.id for t in drawing.tiles if t.x > tile.x and t.y < tile.y + tile.h / 2 < t.top]
    y = tile.y + tile.h / 2
    path = [(right, y), (tile.right, y)]
    if grid.row[edge.target] == 0 or set(beside) - readers:
        y = tile.y - 8
        path = [(right, y), (tile.middle, y), (tile.middle, tile.y)]
    return Port(side_key(edge), box.id, edge.target, right, path)


def header_words(tile):
    """A frame's name, beside the spine where one runs through it, and how often it stands in the model."""
    box, y = tile.box, tile.top - HEADER / 2 - 1
    parts = [(name_of(box), NAME, True)] + [(text, DETAIL, False) for text in details(box)]
    if not is_stack(box):
        return row_of_words(parts, tile.x + 12, y)
    parts += [("each", DETAIL, False)] * (box.repeat > 1)
    mirrored = tile.entry > tile.middle
    x = tile.entry + 20
    if mirrored:
        x = tile.entry - 20 - sum(width_of(*part) for part in parts) - WORD_GAP * (len(parts) - 1)
    words = row_of_words(parts, x, y)
    if box.repeat > 1:
        end, anchor = (tile.x + 14, "left") if mirrored else (tile.right - 14, "right")
        words.append(Word(f"× {box.repeat}", end, y - 3, 17.0, "text", True, anchor))
    return words


# ---------------------------------------------------------------------------- the stack


class StackBuilder:
    """Draws a Stack with its spine at x = 0 and its lanes to the right."""

    def __init__(self, box, left, right, depth):
        self.box, self.edges, self.stack = box, box.edges, Stack(box)
        self.region = is_region(box)
        self.depth = depth
        self.padding = 0.0 if self.region else PADDING
        self.left = left - self.padding
        self.right = right - self.padding - sum(CHANNEL + b.width() for b in self.stack.of_kind("wing"))
        self.channel = self.right + CHANNEL / 2
        self.bottom = 0.0 if self.region else PADDING + 2
        self.drawing = Drawing(left, right)
        self.ports = []  # of the frames in it
        self.tops = {-1: 0.0}  # place on the spine -> y where it ends
        self.place_lanes()
        self.place_spine()
        self.place_wings()
        self.place_idle()
        for edge in self.edges:
            self.draw_edge(edge)

    def framed(self):
        kind = "region" if self.region else "frame"
        width = self.left + self.right + 2 * self.padding
        self.drawing.tiles.append(
            Tile(self.box, kind, -self.left - self.padding, 0.0, width, self.drawing.top, self.depth, 0.0)
        )
        return self.drawing

    def build(self, box, left, right):
        return build(box, left, right, self.depth + 1)

    def put(self, part, x, y):
        ports, mouths = self.drawing.add(part, x, y)
        self.ports += ports
        self.drawing.mouths += [mouth for mouth in mouths if mouth.name != "out"]

    # ---- places

    def place_lanes(self):
        """Lanes of frames share what room there is; side inputs run up at the right of each."""
        stack, lanes = self.stack, self.stack.lanes
        widths = [stack.lane_width(lane) for lane in lanes]
        rails = [RAIL * len(stack.rails(lane)) for lane in lanes]
        spare = self.right - stack.half - sum(widths) - sum(rails) - LANE_GAP * len(lanes)
        framed = any(box.children for lane in lanes for branch in lane for box in branch.boxes)
        self.lane_at, x = [], stack.half + LANE_GAP
        for width, rail in zip(widths, rails):
            width += spare / len(lanes) if framed else 0.0
            self.lane_at.append((x, width))
            x += width + rail + LANE_GAP
        self.lane_tops = [0.0] * len(lanes)

    def place_spine(self):
        stack, y = self.stack, self.bottom
        wide = any(is_stack(stack.of[id]) for id in stack.spine)
        for n, id in enumerate(stack.spine):
            box = stack.of[id]
            half = self.left if wide and not is_junction(box) else RADIUS if is_junction(box) else stack.half
            y = max(y, self.place_branches(n, is_junction(box)))
            part = self.build(box, half, self.right if is_stack(box) else half)
            self.put(part, 0.0, y)
            self.tops[n] = y + part.top
            leaving = [edge for edge in self.edges if edge.source == id and edge.target in stack.place]
            label = any(labelled(edge, self.edges) for edge in leaving if edge.target != "out")
            y += part.top + GAP + LABEL * label + CARDS * (box.repeat > 1)
        last = self.tops[len(stack.spine) - 1]
        self.drawing.top = last if self.region else last + GAP + HEADER

    def place_branches(self, n, junction):
        """Draws what the spine's n-th box reads from beside it; returns where this box may begin."""
        floor, x = 0.0, self.right
        for branch in reversed(self.in_order_of_rails(n)):
            x, top = self.place_port(branch, x)
            floor = max(floor, top + FORK + TURN * len(self.stack.of_kind("port")))
        for number, lane in enumerate(self.stack.lanes):
            for branch in lane:
                if branch.end == n:
                    top = self.place_branch(branch, number)
                    floor = max(floor, top + (14 - RADIUS if junction else FORK))
        return floor

    def in_order_of_rails(self, n):
        """The branches that enter the side of the n-th box, from left to right as their lines will stand."""
        frame = self.stack.of[self.stack.spine[n]]
        found = [branch for branch in self.stack.of_kind("port") if branch.end == n]
        xs = {port.key: port.x for port in build(frame, *extent(frame)).ports} if found else {}

        def x(branch):
            keys = [side_key(e) for e in self.edges if e.source in branch and e.target == frame.id]
            return max((xs[key] for key in keys if key in xs), default=0.0)

        return sorted(found, key=x)

    def place_port(self, branch, x):
        width = branch.width()
        part, _ = build_grid(branch.boxes, branch.edges, width, self.build_in_grid, self.edges)
        self.put(part, x - width / 2, self.bottom)
        return x - width - COLUMN_GAP, self.bottom + part.top

    def place_branch(self, branch, number):
        x, width = self.lane_at[number]
        below = self.lane_tops[number]
        reads_spine = any(e.target in branch and e.source in self.stack.place for e in self.edges)
        base = self.tops[branch.start] + FORK if reads_spine else self.bottom
        base = max(base, below + FORK if below else 0.0)
        if not any(box.children for box in branch.boxes):
            width = min(width, max(branch.width(), self.stack.label_width([branch])))
        part, _ = build_grid(branch.boxes, branch.edges, width, self.build_in_grid, self.edges)
        self.put(part, x + width / 2, base)
        leaving = [e for e in self.edges if e.source in branch and e.target in self.stack.place]
        label = LABEL + 4 if any(labelled(edge, self.edges) for edge in leaving) else 0.0
        self.lane_tops[number] = base + part.top + label
        return self.lane_tops[number]

    def build_in_grid(self, box, width, flat):
        return build(box, width / 2, width / 2, self.depth + 1, flat)

    def place_wings(self):
        x = self.right
        for branch in self.stack.of_kind("wing"):
            left, right = extent(branch.boxes[0])
            x += CHANNEL + right
            self.put(self.build(branch.boxes[0], left, right).mirrored(), x, 0.0)
            x += left

    def place_idle(self):
        """What this call does not run stands beside the top of the spine."""
        y = self.tops[len(self.stack.spine) - 1]
        for box in self.stack.idle:
            width = max(map(stacked, self.stack.idle))
            part = self.build(box, width / 2, width / 2)
            part.tiles[0].kind = "idle"
            y -= part.top
            self.put(part, self.right - width / 2, y)
            y -= GAP

    # ---- lines

    def draw_edge(self, edge):
        stack, source, target = self.stack, edge.source, edge.target
        from_branch, to_branch = stack.branch_of(source), stack.branch_of(target)
        if from_branch and from_branch is to_branch:
            return
        reader = stack.of.get(target)
        if reader and reader.children and not edge.residual and side_name(edge) in side_names(reader):
            self.draw_side(edge, from_branch)
        elif target in stack.place and (source in stack.place or edge.residual):
            self.draw_spine(edge)
        elif source in stack.place and not (source == "in" and self.region):
            self.draw_fork(edge)
        elif source.startswith("in"):
            self.draw_input(edge)
        elif target in stack.place:
            self.draw_join(edge)

    def end_of(self, id):
        """A tile, or the frame itself for what comes from outside or goes there."""
        return id if self.drawing.tile(id) else self.box.id

    def draw_spine(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        if not source and self.enter(edge, target):
            return
        if not target and self.region and self.depth:
            return  # what is around goes on from here
        low = source.top if source else 0.0
        high = target.y if target else self.drawing.top + GAP * self.region
        if not target and self.region:
            self.drawing.mouths.append(Mouth("out", 0.0, edge.shape))
        arrow = target.kind in ("tile", "junction") if target else self.region
        points = [(0.0, low), (0.0, high)]
        self.drawing.lines.append(
            Line("spine", self.end_of(edge.source), self.end_of(edge.target), points, arrow)
        )
        if source and target and labelled(edge, self.edges):
            self.drawing.words += shape_words(edge.shape, 0.0, (low + high) / 2)

    def enter(self, edge, target):
        """Gives what comes in its name; True if it needs no line, since a region has drawn it."""
        name = edge.source.removeprefix("in:")
        if target and target.kind == "region":
            inner = name if name in side_names(target.box) else "in"
            for mouth in self.drawing.mouths:
                if mouth.name == inner and target.x <= mouth.x <= target.right:
                    mouth.name, mouth.shape = name, edge.shape
        elif self.region:
            self.drawing.mouths.append(Mouth(name, target.way_in, edge.shape))
        return target.kind == "region"

    def draw_fork(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        low, turn = source.top if source else 0.0, target.y - 12
        points = [(0.0, low), (0.0, turn), (target.way_in, turn), (target.way_in, target.y)]
        self.drawing.lines.append(
            Line("flow", self.end_of(edge.source), edge.target, points, not target.box.children)
        )

    def draw_join(self, edge):
        source, target = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        x = source.middle
        if target.kind == "junction":
            y = target.y + target.h / 2
            points = [(x, source.top), (x, y), (target.right, y)]
        else:
            y, entry = target.y - GAP / 2, min(max(x, target.x + 14), target.right - 14)
            points = [(x, source.top), (x, y), (entry, y), (entry, target.y)]
        self.drawing.lines.append(Line("flow", edge.source, edge.target, straight(points)))
        if labelled(edge, self.edges):
            self.drawing.words += shape_words(edge.shape, x, source.top + LABEL / 2 + 4)

    def draw_input(self, edge):
        target = self.drawing.tile(edge.target)
        if not self.enter(edge, target):
            points = [(target.way_in, 0.0), (target.way_in, target.y)]
            self.drawing.lines.append(Line("flow", self.box.id, edge.target, points))

    def draw_side(self, edge, branch):
        if edge.source.startswith("in:") and self.drawing.tile(edge.target).kind == "region":
            self.enter(edge, self.drawing.tile(edge.target))
        for port in [port for port in self.ports if port.frame == edge.target and port.key == side_key(edge)]:
            port = self.on_rail(port, edge)
            if edge.source.startswith("in:") and self.region and not self.depth:
                self.draw_from_outside(edge, port)
            elif edge.source.startswith("in:"):
                self.drawing.ports.append(replace(port, key=side_key(edge), frame=self.box.id))
            elif branch.kind == "wing":
                self.draw_from_wing(edge, port)
            else:
                self.draw_from_below(edge, port)

    def draw_from_outside(self, edge, port):
        if not any(mouth.x == port.x for mouth in self.drawing.mouths):
            self.drawing.mouths.append(Mouth(edge.source.removeprefix("in:"), port.x, edge.shape))
        role = "mask" if "mask" in edge.source else "operation"
        points = straight([(port.x, 0.0), *port.path])
        self.drawing.lines.append(Line("side", self.box.id, port.tile, points, True, role))

    def on_rail(self, port, edge):
        for (x, width), lane in zip(self.lane_at, self.stack.lanes):
            if any(edge.target in branch for branch in lane):
                x += width + RAIL * (self.stack.rails(lane).index(side_key(edge)) + 0.8)
                return replace(port, x=x, path=[(x, port.path[0][1]), *port.path])
        return port

    def draw_from_below(self, edge, port):
        tile, frame = self.drawing.tile(edge.source), self.drawing.tile(edge.target)
        x = min(max(port.x, tile.x + 10), tile.right - 10)
        turn = frame.y - 9 - TURN * self.level(tile, port.x < x)
        points = [(x, tile.top), (x, turn), (port.x, turn), *port.path]
        self.drawing.lines.append(Line("side", edge.source, port.tile, straight(points), True, tile.box.role))

    def level(self, tile, to_the_left):
        """How many lines turn above this one: of those that go left, the last turns highest."""
        beside = [self.drawing.tile(box.id) for branch in self.stack.of_kind("port") for box in branch.boxes]
        return sum(
            other.x > tile.x if to_the_left else other.x < tile.x for other in beside if other.y == tile.y
        )

    def draw_from_wing(self, edge, port):
        tile, y = self.drawing.tile(edge.source), port.path[0][1]
        over, x = tile.top + GAP + CARDS + 8, self.channel
        points = [(tile.entry, tile.top), (tile.entry, over), (x, over), (x, y), *port.path]
        if not any(line.kind == "memory" for line in self.drawing.lines):
            self.drawing.words += shape_words(edge.shape, (tile.entry + x) / 2, over)
        self.drawing.lines.append(Line("memory", edge.source, port.tile, straight(points)))
