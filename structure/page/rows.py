"""Where the boxes of one group stand on the page: in rows, from the top down, beside the residual stream.

A layer has a gutter at its left edge: the residual stream runs down there, its additions sit on it, and what
they add branches off to the right. Other groups are rows alone: a box stands one row below the last of its
inputs. Where an edge passes a row on its way down, a lane keeps a place free for it. Masks, positions, caches
and the like come into a box by name, without a line, as on a circuit's plan, unless they are right above it.
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


def arrange(box):
    """The Rows of the children of `box`."""
    edges = [edge for edge in merged(box.edges) if has_line(edge)]
    linked = {end for edge in box.edges for end in (edge.source, edge.target)}
    children = after_inputs([child for child in box.children if child.id in linked], edges)
    spine = {edge.source for edge in edges if edge.residual}
    adds = {child.id for child in children if child.role == "add"}
    has_gutter = any(edge.source == "in" and edge.residual and edge.target in adds for edge in edges)

    rows = [[Item("port", name) for name in ports(edges)]]
    for rank in [[child] for child in children] if has_gutter else ranked(children, edges):
        places = [place_of(child, spine) if has_gutter else "column" for child in rank]
        rows.append([Item("box", child.id, place, is_alone(child)) for child, place in zip(rank, places)])
    far = {edge for edge in edges if comes_from_far(edge, children, rows)}
    named = [edge for edge in box.edges if edge in far or not has_line(edge)]
    edges = [edge for edge in edges if edge not in far]

    slots = {}  # source -> the slot of its lane
    wires = [(wire(edge, rows, spine if has_gutter else set(), slots), edge) for edge in edges]
    for n, row in enumerate(rows):
        rows[n] = centred(ordered(row, rows[n - 1] if n else [], edges, slots), spine)
    idle = [child.id for child in box.children if child.id not in linked]
    return Rows(rows, wires, idle, names_taken(named), has_gutter, len(slots))


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
    """Rows of children: each below its inputs, and what has none right above what it is for.

    A child that opens, or a circle, has its row to itself.
    """
    sources = {child.id: [edge.source for edge in edges if edge.target == child.id] for child in children}
    targets = {child.id: [edge.target for edge in edges if edge.source == child.id] for child in children}
    rank = {}
    for child in children:
        above = [rank.get(source, 0) for source in sources[child.id] if source in rank or is_port(source)]
        if above:
            rank[child.id] = 1 + max(above)
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


def wire(edge, rows, spine, slots):
    """The anchors that an edge passes; lanes are added to the rows between its ends.

    What leaves the stream while the stream still holds it branches off right above its target. What passes
    small boxes goes between them, anything else in a slot at their right.
    """
    stands = {item.key: (n, item) for n, row in enumerate(rows) for item in row if item.kind != "lane"}
    first, source = stands[edge.source]
    last, target = stands.get(edge.target, (len(rows), Item("port", "out")))
    along = edge.source in spine or (edge.source == "in" and spine)
    if along and not any(first < n < last for n, item in stands.values() if item.key in spine):
        return [source.anchor, target.anchor]
    lanes = []
    for n in range(first + 1, last):
        lane = next((item for item in rows[n] if item.kind == "lane" and item.key == edge.source), None)
        if lane is None:
            beside = source.alone or source.kind == "port" or any(item.alone for item in rows[n])
            slot = slots.setdefault(edge.source, len(slots) + 1) if beside else 0
            lane = Item("lane", edge.source, row=n, slot=slot)
            rows[n].append(lane)
        lanes.append(lane.anchor)
    return [source.anchor, *lanes, target.anchor]


def ordered(row, above, edges, slots):
    """The row sorted by where its inputs stand in the row above, so that few lines cross."""
    stands = {item.key: n / max(len(above) - 1, 1) for n, item in enumerate(above)}

    def place(item):
        sources = [item.key, *(edge.source for edge in edges if edge.target == item.key)]
        places = [stands[source] for source in sources if source in stands]
        return item.slot, item.key in slots, sum(places) / len(places) if places else 0.5

    return sorted(row, key=place)


def centred(row, spine):
    """The row with the box of the residual stream in its middle, so that the stream runs straight down."""
    beside = [item for item in row if item.slot or item.key not in spine]
    stream = [item for item in row if item not in beside]
    among = [item for item in beside if not item.slot]
    if len(stream) != 1 or len(among) % 2:
        return row
    middle = len(among) // 2
    return among[:middle] + stream + among[middle:] + [item for item in beside if item.slot]
