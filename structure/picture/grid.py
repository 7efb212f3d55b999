"""Rows and columns for boxes that no residual stream joins: each as wide as the columns that it joins."""

from structure.picture.sheet import Drawing, Line, straight
from structure.picture.words import LABEL, labelled, one_line, shape_width, shape_words

GAP = 15.0  # between rows
COLUMN_GAP = 10.0


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


def build_grid(boxes, edges, width, build, context=None):
    """The boxes and the lines between them, from -width / 2 to width / 2, and the Grid.

    build: makes the Drawing of a box of a given width; `flat`, if its words may stand in one line.
    """
    grid, drawing = Grid(boxes, edges, context), Drawing(width / 2, width / 2)
    column = (width + COLUMN_GAP) / grid.num_columns
    at = {
        key: (first * column - width / 2, (last + 1) * column - COLUMN_GAP - width / 2)
        for key, (first, last) in grid.spans.items()
    }
    y = 0.0
    for row in range(grid.num_rows):
        here = [box for box in grid.boxes if grid.row[box.id] == row]
        wide = {box.id: at[box.id][1] - at[box.id][0] for box in here}
        flat = all(one_line(box) <= wide[box.id] for box in here if box.parameters and not box.children)
        parts = [(build(box, wide[box.id], flat), sum(at[box.id]) / 2) for box in here]
        height = max(part.top for part, _ in parts)
        for part, x in parts:
            drawing.ports += drawing.add(part, x, y + (height - part.top) / 2)[0]
        drawing.top = y + height
        leaving = [edge for edge in grid.edges if grid.row.get(edge.source, -1) == row]
        y += height + GAP + LABEL * any(labelled(edge, grid.context) for edge in leaving)
    for edge in grid.edges:
        if edge.source != "in":
            route(drawing, grid, edge, *line_ends(grid, edge, at))
    return drawing, grid


def line_ends(grid, edge, at):
    """x of its lower and of its upper end: the middle of what the two boxes that it joins have in common."""
    low, high = at[grid.below(edge, grid.row[edge.target])], at[edge.target]
    if low[0] < high[1] and high[0] < low[1]:
        x = (max(low[0], high[0]) + min(low[1], high[1])) / 2
        return x, x
    return sum(low) / 2, sum(high) / 2


def route(drawing, grid, edge, x, entry):
    source, target = drawing.tile(edge.source), drawing.tile(edge.target)
    entry = entry if target.entry is None else target.entry
    turn = target.y - GAP / 2
    points = straight([(x, source.top), (x, turn), (entry, turn), (entry, target.y)])
    drawing.lines.append(Line("flow", edge.source, edge.target, points, target.kind != "frame"))
    twins = [each for each in grid.edges if each.source == edge.source and each.shape == edge.shape]
    if labelled(edge, grid.context) and twins[0] is edge:
        drawing.words += shape_words(edge.shape, x, source.top + LABEL / 2 + 4)
