"""Where everything stands on the sheet: the data runs from the bottom to the top.

(As in figure 1 of "Attention Is All You Need".) Each part of a diagram, a stack or a grid (arrange.py), is
built around its own axis, then moved into the box around it. A model that reads another one (a decoder its
encoder) is mirrored, so that the two spines stand outside and what joins the models between.
"""

from dataclasses import dataclass, replace

from structure.capture.blocks import (
    is_junction,
    is_region,
    is_stack,
    prepared,
    repeats,
    side_key,
)
from structure.picture.arrange import (
    CARDS,
    CHANNEL,
    COLUMN_GAP,
    FORK,
    GAP,
    HEADER,
    LANE_GAP,
    MOUTH,
    PADDING,
    RADIUS,
    RAIL,
    TURN,
    Grid,
    Stack,
    extent,
)
from structure.picture.lines import draw_stack_lines
from structure.picture.routes import Routes
from structure.picture.sheet import (
    DETAIL,
    LABEL,
    NAME,
    REPEAT,
    SHAPE,
    WORD_GAP,
    Drawing,
    Line,
    Port,
    Tile,
    Word,
    details,
    labelled,
    name_of,
    one_line,
    row_of_words,
    shape_lines,
    stacked,
    straight,
    tile_height,
    tile_words,
    width_of,
)


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
    """Neighbours of one name become one, whose line forks; two of other names move apart."""
    groups = []
    for mouth in sorted(mouths, key=lambda mouth: mouth.x):
        near = groups[-1][-1] if groups else None
        close = near and mouth.x - near.x < width_of(mouth.name, NAME, True) + 24
        if close and near.name == mouth.name != "out":
            groups[-1].append(mouth)
        else:
            groups.append([mouth])
    found = []
    for group in groups:
        x, near = (group[0].x + group[-1].x) / 2, found[-1] if found else None
        if near and "out" not in (near.name, group[0].name):
            x = max(x, near.x + 12 + (mouth_width(near) + mouth_width(group[0])) / 2)
        sheet.lines += [to_mouth(x, mouth.x) for mouth in group if abs(mouth.x - x) > 0.01]
        found.append(replace(group[0], x=x))
    return found


def to_mouth(x, end):
    """From the name of an input up to where it enters the diagram, at another x."""
    low, turn = MOUTH - 8, MOUTH - 2
    return Line("flow", "", "", straight([(x, low), (x, turn), (end, turn), (end, MOUTH)]), arrow=False)


def mouth_width(mouth):
    """Of its name and its shape."""
    lines = [width_of(line, SHAPE) for line in shape_lines(mouth.shape)] if mouth.shape else []
    return max([width_of(mouth.name, NAME, True), *lines])


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
        return build_stack(box, left, right, depth)
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

    inner, routes = build_grid(box.children, box.edges, width - 2 * PADDING, build_child)
    grid = routes.grid
    firsts = [edge for edge in box.edges if edge.source == "in" and edge.target in grid.row]
    from_below = [e for e in box.edges if e.source.startswith("in:") and grid.row.get(e.target) == 0]
    bottom = PADDING + 9 * (len(firsts) > 1) + 9 * bool(from_below)
    drawing = Drawing(width / 2, width / 2, bottom + inner.top + 9 + HEADER)
    drawing.add(inner, 0.0, bottom)
    frame = Tile(box, "frame", -width / 2, 0.0, width, drawing.top, depth)
    draw_inputs(drawing, frame, routes.inputs(inner), bottom)
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


def draw_inputs(drawing, frame, paths, bottom):
    """From the middle of the frame's bottom, or from below the one box that reads it."""
    xs = sorted(points[0][0] for points in paths.values())
    frame.entry = xs[len(xs) // 2] if len(xs) % 2 else sum(xs) / max(1, len(xs))
    for id, points in paths.items():
        points = [(x, y + bottom) for x, y in points]
        points = [(frame.entry, 0), (frame.entry, 10), (points[0][0], 10), *points]
        drawing.lines.append(Line("flow", frame.box.id, id, straight(points)))


def port_of(box, drawing, grid, edge, right):
    """A side input comes from the right, behind those beside the box that read it too; else from below."""
    tile = drawing.tile(edge.target)
    readers = {other.target for other in box.edges if other.source == edge.source}
    beside = [t.box.id for t in drawing.tiles if t.x >= tile.right and t.y < tile.y + tile.h / 2 < t.top]
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
        return row_of_words(parts, tile.x + 12, y) + repeat_words(box, tile.right - 14, y, "right")
    parts += [("each", DETAIL, False)] * (box.repeat > 1)
    mirrored = tile.entry > tile.middle
    x = tile.entry + 20
    if mirrored:
        x = tile.entry - 20 - sum(width_of(*part) for part in parts) - WORD_GAP * (len(parts) - 1)
    end = (tile.x + 14, y, "left") if mirrored else (tile.right - 14, y, "right")
    return row_of_words(parts, x, y) + repeat_words(box, *end)


def repeat_words(box, x, y, anchor):
    return [Word(repeats(box), x, y - 3, REPEAT, "text", True, anchor)] if repeats(box) else []


# ---------------------------------------------------------------------------- the grid


def build_grid(boxes, edges, width, build, context=None):
    """The boxes and the lines between them, from -width / 2 to width / 2, and their Routes.

    build: makes the Drawing of a box of a given width; `flat`, if its words may stand in one line.
    """
    grid, drawing = Grid(boxes, edges, context), Drawing(width / 2, width / 2)
    column = (width + COLUMN_GAP) / grid.num_columns
    at = {
        key: (first * column - width / 2, (last + 1) * column - COLUMN_GAP - width / 2)
        for key, (first, last) in grid.spans.items()
    }
    rows, tiles = [], {}
    for row in range(grid.num_rows):
        here = [box for box in grid.boxes if grid.row[box.id] == row]
        wide = {box.id: at[box.id][1] - at[box.id][0] for box in here}
        flat = all(one_line(box) <= wide[box.id] for box in here if box.parameters and not box.children)
        rows.append([(build(box, wide[box.id], flat), sum(at[box.id]) / 2) for box in here])
        for part, x in rows[-1]:
            moved = Drawing()
            moved.add(part, x)
            tiles |= {tile.box.id: tile for tile in moved.tiles}
    routes, y = Routes(grid, at, tiles), 0.0
    for row, parts in enumerate(rows):
        height = max(part.top for part, _ in parts)
        for part, x in parts:
            drawing.ports += drawing.add(part, x, y + (height - part.top) / 2)[0]
        drawing.top = y + height
        routes.floors.append(y)
        leaving = [edge for edge in grid.edges if grid.row.get(edge.source, -1) == row]
        y += height + GAP + LABEL * any(labelled(edge, grid.context) for edge in leaving) + routes.room(row)
    routes.draw(drawing)
    return drawing, routes


# ---------------------------------------------------------------------------- the stack


def build_stack(box, left, right, depth):
    """A Drawing of a Stack with its spine at x = 0 and its lanes to the right."""
    placed = PlacedStack(box, left, right, depth)
    placed.place_lanes()
    placed.place_spine()
    placed.place_wings()
    placed.place_idle()
    draw_stack_lines(placed)
    placed.add_frame()
    return placed.drawing


class PlacedStack:
    """A Stack and where its boxes stand. The spine is placed after the lanes, all else after the spine."""

    def __init__(self, box, left, right, depth):
        self.box, self.edges, self.stack = box, box.edges, Stack(box)
        self.region, self.depth = is_region(box), depth
        self.padding = 0.0 if self.region else PADDING
        self.left = left - self.padding
        wings = sum(CHANNEL + branch.width() for branch in self.stack.of_kind("wing"))
        self.right = right - self.padding - wings - self.stack.detour_room()
        self.bottom = 0.0 if self.region else PADDING + 2
        self.drawing = Drawing(left, right)
        self.ports = []  # of the frames in it
        self.tops = {-1: 0.0}  # place on the spine -> y where it ends
        self.lane_at, self.lane_tops = [], []  # of each lane: (left, width), and y where it ends

    @property
    def channel(self):
        """x of the line that comes from a model beside this one."""
        return self.right + self.stack.detour_room() + CHANNEL / 2

    def add_frame(self):
        kind = "region" if self.region else "frame"
        width = self.left + self.right + self.stack.detour_room() + 2 * self.padding
        self.drawing.tiles.append(
            Tile(self.box, kind, -self.left - self.padding, 0.0, width, self.drawing.top, self.depth, 0.0)
        )

    def build(self, box, left, right):
        return build(box, left, right, self.depth + 1)

    def put(self, part, x, y):
        ports, mouths = self.drawing.add(part, x, y)
        self.ports += ports
        self.drawing.mouths += [mouth for mouth in mouths if mouth.name != "out"]

    def place_lanes(self):
        """Lanes of frames share what room there is; side inputs run up at the right of each."""
        stack, lanes = self.stack, self.stack.lanes
        widths = [stack.lane_width(lane) for lane in lanes]
        rails = [RAIL * len(stack.rails(lane)) for lane in lanes]
        spare = self.right - stack.half - sum(widths) - sum(rails) - LANE_GAP * len(lanes)
        framed = any(box.children for lane in lanes for branch in lane for box in branch.boxes)
        x = stack.half + LANE_GAP
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
            turns = sum(frame == id for frame, _ in stack.detours())
            y = max(y + TURN * turns, self.place_branches(n, is_junction(box)))
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
        floor, x = 0.0, self.left_of_inputs(n)
        turns = len(self.stack.senders()) + len(self.stack.detours())
        for branch in reversed(self.in_order_of_rails(n)):
            x, top = self.place_port(branch, x)
            floor = max(floor, top + FORK + TURN * turns)
        for number, lane in enumerate(self.stack.lanes):
            for branch in lane:
                if branch.end == n:
                    top = self.place_branch(branch, number)
                    floor = max(floor, top + (14 - RADIUS if junction else FORK))
        return floor

    def left_of_inputs(self, n):
        """x where the boxes below the n-th one end; what frames read from outside passes beside them."""
        frame = self.stack.of[self.stack.spine[n]]
        sides = [e for e in self.edges if e.source.startswith("in:") and not e.residual]
        keys = {side_key(edge) for edge in sides if edge.target == frame.id}
        ports = self.build(frame, self.left, self.right).ports if keys else []
        xs = [port.x - COLUMN_GAP for port in ports if port.key in keys]
        above = any((edge.target, side_key(edge)) in self.stack.detours() for edge in sides)
        return min([self.right if above else self.right + self.stack.detour_room(), *xs])

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
        x = self.right + self.stack.detour_room()
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
