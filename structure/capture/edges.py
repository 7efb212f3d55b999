"""The lines between boxes: which tensor goes from which to which, and which of them are the residual stream.

A Link is a tensor that one box makes and another reads. Seen from inside of a box it is a Wire between two
Ends: boxes right inside, or the border. The main way through a box leads from its x, along the residual
stream and its additions, to its result.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from structure.capture.blocks import Edge
from structure.capture.places import origins
from structure.capture.trace import Op

ASIDE = ("mask", "position", "cache")  # roles that never lead from tokens to logits
CONTENT = ("tokens", "source", "images", "features")


class Link(NamedTuple):
    origin: Op  # that computed the tensor, or an input of the model
    bends: list  # ops that changed its looks on the way, first to last
    reader: Op
    made: tuple  # the place of the origin, () outside of the model
    read: tuple  # the place of the reader, () for the model's answer


@dataclass(frozen=True)
class End:
    """Where a wire in a box begins or ends: at a box right inside, or at the border."""

    key: str = ""  # of the box right inside
    origin: Op | None = None  # of what comes in; with neither it is what goes out


OUT = End()


class Wire(NamedTuple):
    source: End
    target: End
    origin: Op
    tensor: Op  # the origin, or the last bend that is to be seen at this place


def links_of(places):
    """Every Link, in the order in which the readers run."""
    links = []
    for op in places.ops:
        read = places.home.get(op.name, () if op.target == "output" else None)
        if read is None:
            continue
        for origin, bends in origins(op):
            made = places.home.get(origin.name, ())
            if made != read and (made or origin.target == "input"):
                links.append(Link(origin, bends, op, made, read))
    return links


def connect(root, places, shapes, links):
    """Add the edges to the box of a whole model, and to all boxes in it."""
    Wiring(places, shapes, links).connect(root, ())


class Wiring:
    def __init__(self, places, shapes, links):
        self.places, self.shapes, self.links = places, shapes, links

    def connect(self, box, keys):
        """Add the edges in a box, after those in the boxes inside; returns the origin of its x."""
        children = dict(zip(self.places.inside.get(keys, []), box.children))
        if not children:
            return None
        starts = {key: self.connect(child, (*keys, key)) for key, child in children.items()}
        wires = self.wires(keys)
        way = Way(into(wires, starts), self.is_add, self.is_aside)
        inner = any(edge.residual for child in box.children for edge in child.edges)
        has_stream = way.has_residual or inner
        for wire in wires:
            leads, shape = (wire.source, wire.target) in way.edges, self.shapes.shape(wire.tensor)
            source = wire.source.key and children[wire.source.key].id
            target = wire.target.key and children[wire.target.key].id
            source = source or self.gate(wire.source.origin, keys, way.start.origin)
            box.edges.append(Edge(source, target or "out", shape, has_stream and leads))
            if wire.target == OUT and leads:
                box.output = shape
        box.edges = list(dict.fromkeys(box.edges))
        return way.start.origin

    # Wires --------------------------------------------------------------------------------------------------

    def wires(self, keys):
        """The wires in a box, one for each pair of ends."""
        found = {}
        for link in self.links:
            source, target = child_of(link.made, keys), child_of(link.read, keys)
            if source == target:
                continue  # inside of one box, or neither end in this one
            source = End(source) if source else End(origin=link.origin)
            target = End(target) if target else OUT
            if (source, target) not in found:
                tensor = self.at_border(link, keys, target)
                found[source, target] = Wire(source, target, link.origin, tensor)
        return list(found.values())

    def at_border(self, link, keys, target):
        """The tensor as it crosses into a box, or out of the one around: what bends it inside is not seen."""
        for op in reversed(link.bends):
            place = self.places.home.get(op.name) or self.places.around.get(op.name, ())
            if target == OUT and keys:
                outside = place[: len(keys)] == keys
            else:
                within = place[: len(keys) + 1] == (*keys, target.key)
                outside = not within and not self.same_statement(op, link.reader)
            if outside:
                return op
        return link.origin

    def same_statement(self, op, reader):
        """Whether an op stands in the statement of a box that is one operation."""
        home = self.places.home.get(reader.name)
        if not home or self.places.spots[home[-1]].kind != "operation":
            return False
        source = self.places.page.source
        line, other = op.frames[-1].line, reader.frames[-1].line
        return op.frames[:-1] == reader.frames[:-1] and source(line) == source(other)

    # What comes from outside --------------------------------------------------------------------------------

    def gate(self, origin, keys, start):
        """ "in" for a box's x; for the rest, and for all that enters the model, "in:" and what it is."""
        if origin is start and keys:
            return "in"
        if origin.target == "input":
            return "in:" + re.sub(r"_\d.*", "", origin.path)
        home = self.places.home[origin.name]
        depth = next(n for n, key in enumerate(home) if keys[n : n + 1] != (key,))
        spot = self.places.spots[home[depth]]
        names = [part for part in spot.name.split(".") if not part.isdigit()]
        number = re.search(r"(#\d+)?$", home[depth])[0]  # of the second rope, where a model has two
        return f"in:{names[-1] if spot.kind == 'module' else spot.label + number}"

    # What the way asks of an end ----------------------------------------------------------------------------

    def is_add(self, end):
        spot = self.places.spots.get(end.key)
        return spot is not None and spot.kind == "operation" and spot.role == "add"

    def is_aside(self, end):
        """Whether a box, or what comes from outside, tells of positions and masks rather than of tokens."""
        if end.origin and end.origin.target == "input":
            return end.origin.path not in CONTENT
        spot = self.places.spots[end.key or self.places.home[end.origin.name][-1]]
        if spot.kind == "function" and spot.role == "position":
            read = [link.origin for link in self.links if link.reader in spot.ops]
            return all(origin.target == "input" for origin in read)
        return spot.kind == "parameter" or spot.kind != "module" and spot.role in ASIDE


def child_of(place, keys):
    """The key of the box right inside of a box in which a place is; "" outside."""
    inside = place[: len(keys)] == keys and len(place) > len(keys)
    return place[len(keys)] if inside else ""


def into(wires, starts):
    """{end: the ends that it reads}, in the order in which it reads them, but its x first.

    starts: {key of a box right inside: the origin of its x}.
    """
    found = defaultdict(list)
    for wire in wires:
        is_x = starts.get(wire.target.key) is wire.origin
        found[wire.target].insert(0 if is_x else len(found[wire.target]), wire.source)
    return found


# The main way -----------------------------------------------------------------------------------------------


class Way:
    """The main way through a box, found backward, from the result.

    Before an addition stands the operand that another operand was made from (x in x + attn(norm(x))), before
    anything else the first tensor that it reads and that carries content.

    into: {end: what it reads, in order}; what is no key of it comes from outside.
    is_add, is_aside: of an end: adds two tensors; tells of positions or masks only.
    """

    def __init__(self, into, is_add, is_aside):
        self.into, self.is_add, self.is_aside = into, is_add, is_aside
        self.edges, at = set(), OUT
        while at in into and not any(target == at for _, target in self.edges):
            before = self.leading(at)
            self.edges.add((before, at))
            at = before
        self.start = at
        self.has_residual = any(self.is_add(at) and self.stream(at) is not None for at in into)

    def leading(self, at):
        """Of what an end reads, what leads on."""
        stream = self.stream(at) if self.is_add(at) else None
        if stream is not None:
            return stream
        content = [source for source in self.into[at] if not self.is_aside(source)]
        return (content or self.into[at])[0]

    def stream(self, at):
        """Of the operands of an addition, the one with what the others were made from; None if there is none.

        In (x + attention) + feed_forward that is the first sum, since both were made from the x in it.
        """
        terms = {operand: self.terms(operand) for operand in self.into[at]}
        everything = [term for several in terms.values() for term in several]
        # What depends on no other term; what was added to it, in another operand, depends on it.
        roots = [term for term in everything if not any(self.depends(term, other) for other in everything)]
        for operand, inner in terms.items():
            outer = [term for term in everything if term not in inner]
            if any(self.depends(term, root) for root in roots if root in inner for term in outer):
                return operand
        return None

    def terms(self, operand):
        """What a sum adds, sums in it opened; anything else is a term of its own."""
        if not self.is_add(operand):
            return [operand]
        return [term for inner in self.into[operand] for term in self.terms(inner)]

    def depends(self, late, early):
        waiting, seen = [late], set()
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if early in self.into.get(at, []):
                return True
            waiting += self.into.get(at, [])
        return False
