"""Where the boxes of one group stand on the page: in rows, from the bottom up, beside the residual stream.

A layer has a gutter at its left edge: the residual stream runs up there, its additions sit on it, and what
they add branches off to the right. Other groups are rows alone: a box stands one row above the last of its
inputs. Where an edge passes a row on its way up, a lane keeps a place free for it. Masks, positions, caches
and the like come into a box by name, without a line, as on a circuit's plan, unless they are right below it.
"""

from dataclasses import dataclass

MAX_BOXES = 4  # side by side; more are hard to read on the narrow side of a page
DATA = {"in", "in:source", "in:encoder"}  # inputs that have a line of their own
ASIDE = {"mask", "position", "cache"}  # roles of what may come by name


@dataclass
class Item:
    kind: str  # "box", "lane", "port": where a tensor comes in
    key: str  # the box's id, the port's name, for a lane its source
    place: str = "column"  # "column" beside its neighbours; with a gutter also "spine", or "wide" across it
    alone: bool = False  # a box that has its row to itself: it holds others, or is a circle
    row: int = 0  # of a lane, which has one in each row that it passes
    slot: int = 0  # of a lane beside the boxes: 1 is next to them; 0 stands among them

    @property
    def anchor(self):
        return f"lane:{self.key}:{self.row}" if self.kind == "lane" else f"{self.kind}:{self.key}"


@dataclass
class Rows:
    rows: list  # lists of Item; the first holds the ports
    wires: list  # (anchors from source to target, Edge)
    idle: list  # ids of boxes that nothing leads to or from
    takes: dict  # id of a box -> what comes in by name
    has_gutter: bool
    num_slots: int  # lanes beside the boxes


OUT = Item("port", "out")


def arrange(box):
    """The Rows of the children of `box`."""
    linked = {end for edge in box.edges for end in (edge.source, edge.target)}
    idle = [child.id for child in box.children if child.id not in linked]
    lines = [edge for edge in merged(box.edges) if has_line(edge)]
    children = after_inputs([child for child in box.children if child.id in linked], lines)
    has_gutter = branches_off(children, lines)
    stream = {edge.source for edge in lines if edge.residual}

    rows = [[Item("port", name) for name in ports(lines)]]
    if has_gutter:
        rows += [[Item("box", child.id, place_of(child, stream), is_alone(child))] for child in children]
    else:
        rows += [
            [Item("box", child.id, alone=is_alone(child)) for child in row] for row in ranked(children, lines)
        ]

    far = {edge for edge in lines if comes_from_far(edge, children, rows)}
    named = [edge for edge in box.edges if edge in far or not has_line(edge)]
    lines = [edge for edge in lines if edge not in far]

    lanes = Lanes(rows, stream if has_gutter else set())
    wires = [(lanes.way(edge), edge) for edge in lines]
    rows = sorted_rows(lanes.filled_rows(), lines, lanes.slots, stream)
    return Rows(rows, wires, idle, names_taken(named), has_gutter, len(lanes.slots))


def branches_off(children, lines):
    """Whether the residual stream runs from the foot of a box to an addition: then it has a gutter."""
    adds = {child.id for child in children if child.role == "add"}
    return any(edge.source == "in" and edge.residual and edge.target in adds for edge in lines)


def is_circle(box):
    """Whether a box is drawn as a sign in a circle: an operation, no module."""
    return ":" in box.id and box.role in ("add", "multiply") and not box.children


def is_alone(box):
    return bool(box.children) or is_circle(box)


def has_line(edge):
    return not is_port(edge.source) or edge.source in DATA or edge.residual


def is_port(name):
    return name == "in" or name.startswith("in:")


def comes_from_far(edge, children, rows):
    """Whether an edge goes from a mask, positions or a cache to a box that opens, and not to the next row."""
    roles = {child.id: child.role for child in children}
    row = {item.key: n for n, row in enumerate(rows) for item in row}
    opens = any(child.id == edge.target and child.children for child in children)
    return opens and roles.get(edge.source) in ASIDE and row[edge.target] - row[edge.source] > 1


def names_taken(edges):
    """{id of a box: the names of what comes into it without a line}."""
    found = {}
    for edge in edges:
        name = edge.source.rpartition(":")[2].partition("#")[0]
        found.setdefault(edge.target, {})[name] = None
    return {target: list(names) for target, names in found.items()}


def after_inputs(children, edges):
    """The children, each after those that it reads, and otherwise in the order in which they are."""
    waiting, placed = list(children), []
    while waiting:
        missing = [edge.target for edge in edges if edge.source in {child.id for child in waiting}]
        placed.append(min(waiting, key=lambda child: missing.count(child.id)))
        waiting.remove(placed[-1])
    return placed


def merged(edges):
    """One edge per source and target: `x * x` is drawn once, as part of the stream if one of its edges is."""
    found = {}
    for edge in sorted(edges, key=lambda edge: not edge.residual):
        found.setdefault((edge.source, edge.target), edge)
    return list(found.values())


def ports(edges):
    """The names of what comes in by a line, the main tensor ("in") first."""
    names = {edge.source: None for edge in edges if is_port(edge.source)}
    return sorted(names, key=lambda name: name != "in")


def place_of(child, spine):
    if child.id not in spine:
        return "column"
    return "spine" if child.role == "add" else "wide"


def ranked(children, edges):
    """Rows of children: each above its inputs, and what has none right below what it is for.

    A child that opens, or a circle, has its row to itself.
    """
    sources = {child.id: [edge.source for edge in edges if edge.target == child.id] for child in children}
    targets = {child.id: [edge.target for edge in edges if edge.source == child.id] for child in children}
    rank = {}
    for child in children:
        below = [rank.get(source, 0) for source in sources[child.id] if source in rank or is_port(source)]
        if below:
            rank[child.id] = 1 + max(below)
    taken = {rank[child.id] for child in children if child.id in rank and is_circle(child)}
    for child in reversed(children):
        if child.id not in rank:
            rank[child.id] = (
                min((rank[target] for target in targets[child.id] if target in rank), default=1) - 1
            )
            while rank[child.id] in taken:
                rank[child.id] -= 1
    rows = []
    for step in sorted(set(rank.values())):
        row = [child for child in children if rank[child.id] == step]
        small = [child for child in row if not is_alone(child)]
        rows += [small[n : n + MAX_BOXES] for n in range(0, len(small), MAX_BOXES)]
        rows += [[child] for child in row if is_alone(child)]
    return rows


class Lanes:
    """The lanes of wires in the rows that they pass on their way up.

    What passes small boxes goes between them, anything else in a slot at their right. A wire that comes from
    where another did takes its lane.
    """

    def __init__(self, rows, stream):
        """stream: ids of the boxes on the residual stream, if it has a gutter."""
        self.rows, self.stream = rows, stream
        self.stands = {item.key: (n, item) for n, row in enumerate(rows) for item in row}
        self.lanes = {}  # (source, row): Item
        self.slots = {}  # source: the slot of its lanes

    def way(self, edge):
        """The anchors that an edge passes, from its source to its target."""
        first, source = self.stands[edge.source]
        last, target = self.stands.get(edge.target, (len(self.rows), OUT))
        if self.leaves_late(edge, first, last):
            return [source.anchor, target.anchor]
        passed = [self.lane(source, n).anchor for n in range(first + 1, last)]
        return [source.anchor, *passed, target.anchor]

    def leaves_late(self, edge, first, last):
        """What leaves the stream while the stream still holds it branches off right below its target."""
        if edge.source not in self.stream and not (edge.source == "in" and self.stream):
            return False
        return not any(first < n < last for n, item in self.stands.values() if item.key in self.stream)

    def lane(self, source, n):
        """The lane in the n-th row of what comes from an Item."""
        if (source.key, n) not in self.lanes:
            beside = source.alone or source.kind == "port" or any(item.alone for item in self.rows[n])
            slot = self.slots.setdefault(source.key, len(self.slots) + 1) if beside else 0
            self.lanes[source.key, n] = Item("lane", source.key, row=n, slot=slot)
        return self.lanes[source.key, n]

    def filled_rows(self):
        """The rows, each with the lanes in it."""
        return [
            row + [lane for (_, passed), lane in self.lanes.items() if passed == n]
            for n, row in enumerate(self.rows)
        ]


def sorted_rows(rows, lines, slots, stream):
    """The rows with their items in order, each row by the one below it."""
    done = []
    for row in rows:
        done.append(centred(ordered(row, done[-1] if done else [], lines, slots), stream))
    return done


def ordered(row, below, edges, slots):
    """The row sorted by where its inputs stand in the row below, so that few lines cross."""
    stands = {item.key: n / max(len(below) - 1, 1) for n, item in enumerate(below)}

    def place(item):
        sources = [item.key, *(edge.source for edge in edges if edge.target == item.key)]
        places = [stands[source] for source in sources if source in stands]
        return item.slot, item.key in slots, sum(places) / len(places) if places else 0.5

    return sorted(row, key=place)


def centred(row, spine):
    """The row with the box of the residual stream in its middle, so that the stream runs straight up."""
    beside = [item for item in row if item.slot or item.key not in spine]
    stream = [item for item in row if item not in beside]
    among = [item for item in beside if not item.slot]
    if len(stream) != 1 or len(among) % 2:
        return row
    middle = len(among) // 2
    return among[:middle] + stream + among[middle:] + [item for item in beside if item.slot]
