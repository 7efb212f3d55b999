"""What stands beside what and above what, before anything has a place: the two patterns of a diagram.

    a stack    what the residual stream runs through, on one vertical axis, the spine; what leaves the spine
               and comes back to it, a branch, stands in a lane beside it
    a grid     all else: rows from the bottom to the top, each box as wide as the columns that it joins

place.py says where, lines.py draws what joins them.
"""

from dataclasses import dataclass

from structure.capture.blocks import is_junction, is_region, is_stack, side_key, side_name, side_names
from structure.picture.sheet import labelled, one_line, shape_width, stacked

GAP = 15.0  # between rows
COLUMN_GAP = 10.0
PADDING = 12.0  # between a frame and what is in it
LANE_GAP = 24.0
RAIL = 12.0  # between the lines that run up beside a lane
RADIUS = 10.0  # of a junction
CHANNEL = 34.0  # between two models
PORT = 62.0  # the least width of what stands below a frame and enters its side
FORK = 23.0  # between rows where a line turns
HEADER = 25.0  # the strip at the top of a frame that holds its name
CARDS = 8.0  # how far the frames behind a repeated one look out
TURN = 6.0  # between lines that turn below a frame
MOUTH = 48.0  # what the names of inputs take


# ---------------------------------------------------------------------------- the grid


class Grid:
    """Which row and which columns each box has.

    A line that passes by a row has a column of its own there, under the key (source, target, row).
    context: all edges around, which say what the boxes read.
    """

    def __init__(self, boxes, edges, context=None):
        ids = {box.id for box in boxes}
        self.context = edges if context is None else context
        self.edges = [edge for edge in edges if edge.source in ids | {"in"} and edge.target in ids]
        self.row = rows_of(boxes, self.edges)
        self.boxes = sorted(boxes, key=lambda box: order_of(boxes, self.edges).index(box.id))
        self.num_rows = 1 + max(self.row.values())
        self.num_columns = 0
        self.spans = {}  # key -> [first column, last column]
        for row in range(self.num_rows):
            self.fill(row)

    def fill(self, row):
        taken = set()
        for box in self.boxes:
            if self.row[box.id] == row:
                self.claim(box.id, self.wanted(box.id, row), row, taken)
        for edge in self.edges:
            if self.row.get(edge.source, -1) < row < self.row[edge.target]:
                below = self.spans.get(self.below(edge, row))
                free = [c for c in range(below[0], below[1] + 1) if c not in taken] if below else []
                wanted = [free[-1], free[-1]] if free else below
                self.claim((edge.source, edge.target, row), wanted, row, taken)

    def below(self, edge, row):
        """The key of what the edge comes from in the row below."""
        passing = (edge.source, edge.target, row - 1)
        return passing if passing in self.spans else edge.source

    def wanted(self, id, row):
        """The columns of all that the box reads, or as few as touch them, if one is read again above."""
        edges = [edge for edge in self.edges if edge.target == id and self.below(edge, row) in self.spans]
        spans = [self.spans[self.below(edge, row)] for edge in edges]
        if not spans:
            return None
        sources = {edge.source for edge in edges}
        if any(edge.source in sources and self.row[edge.target] > row for edge in self.edges):
            first, last = min(span[1] for span in spans), max(span[0] for span in spans)
            if first <= last:
                return [first, last]
        return [min(span[0] for span in spans), max(span[1] for span in spans)]

    def claim(self, key, wanted, row, taken):
        """Give `key` the wanted columns, or a new one to their right where they are taken."""
        if wanted is None:
            wanted = [self.num_columns, self.num_columns]
            self.num_columns += 1
        elif taken & set(range(wanted[0], wanted[1] + 1)):
            column = wanted[1] + 1
            while column in taken:  # a box of this row that reaches further is not cut in two
                column += 1
            self.insert(column, row, taken)
            wanted = [column, column]
        self.spans[key] = list(wanted)
        taken |= set(range(wanted[0], wanted[1] + 1))

    def insert(self, column, row, taken):
        """A new column, into which what ends before it in the rows below grows."""
        for key, span in self.spans.items():
            key_row = self.row[key] if isinstance(key, str) else key[2]
            span[1] += span[1] >= column or (span[1] == column - 1 and key_row < row)
            span[0] += span[0] >= column
        shifted = {each + (each >= column) for each in taken}
        taken.clear()
        taken |= shifted
        self.num_columns += 1

    def width(self, width_of_box):
        """The least; all columns are equally wide."""
        widest = 30.0
        for box in self.boxes:
            first, last = self.spans[box.id]
            columns = last - first + 1
            widest = max(widest, (width_of_box(box) - COLUMN_GAP * (columns - 1)) / columns)
        inner = [edge for edge in self.edges if edge.source != "in" and labelled(edge, self.context)]
        widest = max([widest] + [shape_width(edge.shape) for edge in inner])
        return self.num_columns * (widest + COLUMN_GAP) - COLUMN_GAP


def rows_of(boxes, edges):
    """Each box stands above all that it reads."""
    row = {}

    def visit(id, path=()):
        if id not in row:
            below = [e.source for e in edges if e.target == id and e.source not in ("in", *path)]
            row[id] = 1 + max((visit(source, (*path, id)) for source in below), default=-1)
        return row[id]

    for box in boxes:
        visit(box.id)
    return row


def order_of(boxes, edges):
    """Ids from left to right, as the arguments stand in the calls: q before k before v."""
    order = []

    def visit(id):
        if id not in order and id != "in":
            order.append(id)
            for edge in edges:
                if edge.target == id:
                    visit(edge.source)

    read = {edge.source for edge in edges}
    for box in [box for box in boxes if box.id not in read] + boxes:
        visit(box.id)
    return order


# ---------------------------------------------------------------------------- the stack


@dataclass
class Branch:
    """Boxes beside the spine: they read it, or an input, and one place of the spine reads them.

    kind: "lane": beside the spine; "port": below a frame, whose side it enters; "wing": a model of its own.
    start, end: places on the spine, -1 for what comes in.
    """

    boxes: list
    edges: list
    kind: str
    start: int
    end: int

    def __contains__(self, id):
        return any(box.id == id for box in self.boxes)

    def width(self):
        if self.kind == "wing":
            return sum(extent(self.boxes[0]))
        width = Grid(self.boxes, self.edges).width(least_width)
        return max(width, PORT) if self.kind == "port" else width


class Stack:
    """What is in a box, sorted: the spine from the bottom to the top, branches, and their lanes."""

    def __init__(self, box):
        self.box = box
        self.of = {child.id: child for child in box.children}
        self.spine = self.find_spine()
        self.place = {id: n for n, id in enumerate(self.spine)} | {"in": -1, "out": len(self.spine)}
        joined = {id for edge in box.edges for id in (edge.source, edge.target)}
        self.idle = [child for child in box.children if child.id not in joined]
        self.branches = [self.branch(part) for part in self.parts(joined)]
        self.lanes = self.find_lanes()
        closed = [extent(self.of[id])[0] for id in self.spine if not is_stack(self.of[id])]
        self.half = max(closed, default=RADIUS)

    def find_spine(self):
        stream = {id for edge in self.box.edges if edge.residual for id in (edge.source, edge.target)}
        spine = [child.id for child in self.box.children if child.id in stream]
        row = {id: n for n, id in enumerate(spine)}
        for _ in spine:  # the order in which they are read, which is not always that of the children
            for edge in self.box.edges:
                if edge.residual and edge.source in row and edge.target in row:
                    row[edge.target] = max(row[edge.target], row[edge.source] + 1)
        return sorted(spine, key=lambda id: row[id])

    def parts(self, joined):
        """Groups of boxes that are joined to each other and not through the spine."""
        parts = []
        for child in self.box.children:
            if child.id in self.spine or child.id not in joined:
                continue
            near = {e.source for e in self.box.edges if e.target == child.id}
            near |= {e.target for e in self.box.edges if e.source == child.id}
            touching = [part for part in parts if near & {box.id for box in part}]
            parts = [part for part in parts if part not in touching] + [sum(touching, []) + [child]]
        return parts

    def branch(self, boxes):
        ids = {box.id for box in boxes}
        edges = [e for e in self.box.edges if e.source in ids and e.target in ids]
        start = max(
            [self.place[e.source] for e in self.box.edges if e.target in ids and e.source in self.place],
            default=-1,
        )
        ends = [e.target for e in self.box.edges if e.source in ids and e.target not in ids]
        end = min((self.place[id] for id in ends), default=len(self.spine))
        reader = self.of.get(self.spine[end]) if end < len(self.spine) else None
        kind = "wing" if any(map(is_stack, boxes)) else "port" if reader and is_stack(reader) else "lane"
        return Branch(boxes, edges, kind, start, end)

    def find_lanes(self):
        """Branches beside the same stretch of the spine stand side by side, others one above the other."""
        lanes = []
        for branch in sorted(self.of_kind("lane"), key=lambda branch: branch.end):
            free = [
                lane
                for lane in lanes
                if all(not (branch.start < other.end and other.start < branch.end) for other in lane)
            ]
            if free:
                free[0].append(branch)
            else:
                lanes.append([branch])
        return lanes

    def of_kind(self, kind):
        return [branch for branch in self.branches if branch.kind == kind]

    def frames(self):
        """Ids of what a residual stream runs through inside, from the bottom up."""
        return [id for id in self.spine if is_stack(self.of[id])]

    def senders(self):
        """The boxes below a frame from which lines lead to the sides of frames."""
        boxes = [box for branch in self.of_kind("port") for box in branch.boxes]
        read = {edge.source for edge in self.box.edges if edge.target in self.place}
        return [box for box in boxes if box.id in read]

    def branch_of(self, id):
        return next((branch for branch in self.branches if id in branch), None)

    def rails(self, lane):
        """What comes from outside into the frames of a lane, as side_key; it runs up beside the lane."""
        frames = {box.id for branch in lane for box in branch.boxes if box.children}
        sides = [
            e for e in self.box.edges if e.target in frames and side_name(e) in side_names(self.of[e.target])
        ]
        return list(dict.fromkeys(map(side_key, sides)))

    def detours(self):
        """What enters the sides of frames above the first one, (frame's id, side_key), from the bottom up.

        It runs up beside all frames, so as not to run through those below its own.
        """
        sides = [
            e
            for id in self.frames()[1:]
            for e in self.box.edges
            if e.target == id and not e.residual and side_name(e) in side_names(self.of[id])
        ]
        return list(dict.fromkeys((edge.target, side_key(edge)) for edge in sides))

    def detour_room(self):
        return CARDS + RAIL * len(self.detours()) if self.detours() else 0.0

    def lane_width(self, lane):
        return max(max(branch.width() for branch in lane), self.label_width(lane))

    def label_width(self, lane):
        inside = [
            e for e in self.box.edges for branch in lane if e.source in branch and labelled(e, self.box.edges)
        ]
        return max((shape_width(edge.shape) for edge in inside), default=0.0)

    def extent(self):
        """Of all but the wings' rails: to the left, and to the right."""
        frames = [extent(self.of[id]) for id in self.spine if is_stack(self.of[id])]
        lanes = sum(LANE_GAP + self.lane_width(lane) + RAIL * len(self.rails(lane)) for lane in self.lanes)
        ports = sum(LANE_GAP + branch.width() for branch in self.of_kind("port"))
        idle = LANE_GAP + max(map(stacked, self.idle)) if self.idle else 0.0
        left = max([self.half] + [frame[0] for frame in frames])
        right = max([self.half + max(lanes + ports, idle)] + [frame[1] for frame in frames])
        wings = sum(CHANNEL + branch.width() for branch in self.of_kind("wing"))
        return left, right + self.detour_room() + wings


# ---------------------------------------------------------------------------- room


def extent(box):
    """The least room to the left and to the right of the box's axis."""
    if is_stack(box):
        left, right = Stack(box).extent()
        padding = 0 if is_region(box) else PADDING
        return left + padding, right + padding
    if box.children:
        width = max(Grid(box.children, box.edges).width(least_width) + 2 * PADDING, one_line(box) + 20)
    else:
        width = 2 * RADIUS if is_junction(box) else stacked(box)
    return width / 2, width / 2


def least_width(box):
    return sum(extent(box))
