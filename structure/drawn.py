"""What a diagram shows of a model's tree: attention and the like are opened one level."""

from dataclasses import replace


def prepared(box, depth=0):
    """The box with only what is drawn of it: attention and the like are opened one level."""
    opened = box.role == "group" or (depth < 1 and box.role in ("attention", "feed_forward", "head"))
    inside = depth + (box.role != "group")
    children = [prepared(child, inside) for child in box.children] if opened else []
    roles = {child.id: child.role for child in children}
    names = {child.id: side_names(child) for child in children}
    edges = [
        edge
        for edge in box.edges
        if children and not (edge.source.startswith("in:") and roles.get(edge.target) == "cache")
    ]
    if any(edge.residual for edge in edges):  # what else a part of the model answers is its own affair
        edges = [edge for edge in edges if edge.residual or edge.target != "out"]
    children, edges = without_chains(children, edges)
    mains = {edge.target for edge in edges if main(edge, names)}
    edges = [
        edge
        for edge in edges
        if main(edge, names) or side_name(edge) in names.get(edge.target, ()) or edge.target not in mains
    ]
    return replace(box, children=children, edges=edges)


def without_chains(children, edges):
    """A mask made of another one, which nothing else here reads, is one box with it."""
    for first in children:
        readers = {edge.target for edge in edges if edge.source == first.id}
        last = next((box for box in children if readers == {box.id}), None)
        if last and first.role == last.role == "mask":
            kept = [edge for edge in edges if edge.source != first.id]
            edges = [replace(edge, target=last.id) if edge.target == first.id else edge for edge in kept]
            return without_chains([box for box in children if box is not first], edges)
    return children, edges


def main(edge, names):
    """Whether it brings a box what it works on."""
    return (
        edge.residual
        or not names.get(edge.target)
        or not (edge.source.startswith("in:") or side_name(edge) in names[edge.target])
    )


def side_name(edge):
    """What the box that reads it calls an input: "rope", of "in:rope" and of ":rope"."""
    return edge.source.split(":")[-1].split("#")[0]


def side_key(edge):
    """Tells two masks apart."""
    return side_name(edge), edge.shape.numbers


def side_names(box):
    return {edge.source[3:] for edge in box.edges if edge.source.startswith("in:")}


def is_stack(box):
    """Whether a residual stream runs through what is in the box."""
    return any(edge.residual for edge in box.edges) or any(map(is_stack, box.children))


def is_region(box):
    """A part of the model that needs no frame, such as an encoder: its layers have theirs."""
    return box.repeat == 1 and any(map(is_stack, box.children))


def is_junction(box):
    return box.role == "add" and not box.parameters
