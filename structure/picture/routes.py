"""The lines of a grid: each runs up through columns that are free, and turns in the gaps between the rows.

A line that passes by rows has a column of its own in each of them (arrange.py). Where the next one is
another, it turns in the gap between, at a height of its own if some other line turns there too.
"""

from structure.picture.arrange import GAP, RADIUS, TURN
from structure.picture.sheet import LABEL, Line, labelled, shape_words, straight

ASIDE = 8.0  # from the middle of a column, where lines begin and end, to one that passes by
APART = 6.0  # between two lines that turn at one height


class Routes:
    """The lines of a Grid, first from left to right, then, as soon as its rows are placed, upwards.

    at: key of the grid -> (left, right). tiles: id -> Tile, of which y is not known yet.
    """

    def __init__(self, grid, at, tiles):
        self.grid = grid
        self.xs = [columns(grid, edge, at, tiles) for edge in grid.edges]
        self.heights = [self.heights_in(gap) for gap in range(grid.num_rows)]  # {edge's number: which turn}
        self.floors = []  # of each row: its y

    def first_row(self, edge):
        """Of the rows in which the line has an x: its source's, or for an input the lowest."""
        return self.grid.row.get(edge.source, 0)

    def turns_in(self, gap):
        """(from x, to x, the edge's number) of the lines that turn above the row `gap`."""
        for n, (edge, xs) in enumerate(zip(self.grid.edges, self.xs)):
            i = gap - self.first_row(edge)
            if 0 <= i < len(xs) - 1 and abs(xs[i] - xs[i + 1]) > 0.01:
                yield xs[i], xs[i + 1], n

    def heights_in(self, gap):
        """Which of the heights in a gap each line turns at, 0 the lowest. Of two lines that go to the right
        the right one turns first, of two that go to the left the left one, so that they do not cross; and
        before all, a line turns above one that begins where it goes.
        """
        found = sorted(self.turns_in(gap), key=lambda turn: -turn[0] if turn[1] > turn[0] else turn[0])
        turns, heights = {n: (x0, x1) for x0, x1, n in found}, {}
        order = list(turns)

        def is_above(n, m):
            (x0, x1), (u0, u1) = turns[n], turns[m]
            if abs(x1 - u0) < APART or abs(u1 - x0) < APART:
                return abs(x1 - u0) < APART
            return order.index(n) > order.index(m)

        def height(n, path=()):
            if n not in heights:
                others = [m for m in order if m not in (n, *path) and self.meet(n, m, *turns[n], *turns[m])]
                below = [height(m, (*path, n)) for m in others if is_above(n, m)]
                heights[n] = 1 + max(below, default=-1)
            return heights[n]

        return {n: height(n) for n in order}

    def meet(self, n, m, x0, x1, u0, u1):
        one, other = self.grid.edges[n], self.grid.edges[m]
        if one.source == other.source or one.target == other.target:
            return False
        return min(x0, x1) - APART < max(u0, u1) and min(u0, u1) - APART < max(x0, x1)

    def room(self, row):
        """What the gap above a row needs besides the usual, so that side inputs fit above the turns."""
        return TURN * (1 + max(self.heights[row].values(), default=-1))

    def points(self, n):
        """From the top of the row where it begins (an input: from the bottom) to the row of its target."""
        first, xs = self.first_row(self.grid.edges[n]), self.xs[n]
        points = []
        for i, (x, after) in enumerate(zip(xs, xs[1:])):
            gap = first + i
            missing = max(self.heights[gap].values(), default=0) - self.heights[gap].get(n, 0)
            y = self.floors[gap + 1] - GAP / 2 - TURN * (1 + missing)
            points += [(x, y), (after, y)]
        return points or [(xs[0], 0.0)]

    def draw(self, drawing):
        for n, edge in enumerate(self.grid.edges):
            if edge.source != "in":
                self.draw_line(drawing, n, edge)

    def draw_line(self, drawing, n, edge):
        source, target = drawing.tile(edge.source), drawing.tile(edge.target)
        x, points = self.xs[n][0], self.points(n)
        end = [(points[-1][0], target.y)]
        if target.kind == "junction" and abs(points[-2][0] - target.middle) > RADIUS:
            aside, y = points[-2][0], target.y + target.h / 2
            points, end = points[:-2], [(aside, y), (target.x if aside < target.x else target.right, y)]
        points = straight([(x, source.top), *points, *end])
        drawing.lines.append(Line("flow", edge.source, edge.target, points, target.kind != "frame"))
        twins = [each for each in self.grid.edges if each.source == edge.source and each.shape == edge.shape]
        if labelled(edge, self.grid.context) and twins[0] is edge:
            drawing.words += shape_words(edge.shape, x, source.top + LABEL / 2 + 4)

    def inputs(self, drawing):
        """{id of a tile: the points of the line to it from the grid's bottom}."""
        edges = enumerate(self.grid.edges)
        return {
            edge.target: [*self.points(n), (self.xs[n][-1], drawing.tile(edge.target).y)]
            for n, edge in edges
            if edge.source == "in"
        }


def columns(grid, edge, at, tiles):
    """x of a line in its source's row, those that it passes, and its target's; an input has no first one."""
    source, target, high = tiles.get(edge.source), tiles[edge.target], at[edge.target]
    rows = range(grid.row.get(edge.source, -1) + 1, grid.row[edge.target])
    xs = [sum(at[edge.source, edge.target, row]) / 2 + ASIDE for row in rows]
    if source and source.kind == "junction":
        xs = [source.middle, *xs]
    elif source:
        low = at[edge.source]
        xs = [within(low, xs[0] if xs else common(low, high)), *xs]
    end = within(high, xs[-1]) if xs else target.way_in
    if target.kind == "junction" or target.entry is not None:
        end = target.way_in
    return [*xs, end]


def common(low, high):
    """The middle of what two boxes share, or of the lower one, from whose middle the line then turns."""
    if low[0] < high[1] and high[0] < low[1]:
        return (max(low[0], high[0]) + min(low[1], high[1])) / 2
    return sum(low) / 2


def within(span, x):
    """x, or the middle of the span where x is beside it."""
    return x if span[0] <= x <= span[1] else sum(span) / 2
