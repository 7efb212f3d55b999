"""What a diagram knows: boxes within boxes, the tensors between them, and what of it is drawn.

capture.py fills these in from a model that runs; pictures, pages and tables only read them.
"""

from dataclasses import dataclass, field, replace

ROLES = (
    "embedding",  # tokens, patches, segments to vectors
    "position",  # learned or sinusoidal positions, RoPE's angles, a rotation
    "norm",
    "attention",  # the module, and the operations softmax(q k^T) v inside
    "recurrence",  # a loop over time, and the module that has it in attention's place
    "feed_forward",
    "linear",
    "activation",
    "add",  # above all the residual stream's
    "multiply",
    "cache",
    "mask",
    "head",  # from the last hidden state to the answer
    "group",  # a layer, an encoder, a decoder, the model
    "operation",  # anything else that computes
)


LOOP = "loop over time"  # the label of a box for one round of it


@dataclass(frozen=True)
class Shape:
    letters: str  # "(B, T, D)", from the checked shape comment of the line that made the tensor; "" if none
    numbers: tuple  # ("B", "T", 4096): what depends on the call stays a letter, or is "7*B", "N/3", "S+1"


@dataclass(frozen=True)
class Edge:
    source: str  # id of a box, or "in" / "in:NAME" of the box around
    target: str  # id of a box, or "out"
    shape: Shape
    residual: bool = False  # belongs to the residual stream: the spine


@dataclass(frozen=True)
class Source:
    file: str  # "models/llama.py"
    first: int  # lines, counted from 1, both included
    last: int


@dataclass
class Box:
    id: str  # unique in the drawing: "layers.0.attn.q_proj", for an operation "layers.0.attn:softmax"
    role: str
    label: str  # "q_proj", "softmax", "x 32" never: that is repeat
    title: str = ""  # what it is in a few words: "Linear 4096 -> 1024", "32 query heads, 8 key/value heads"
    repeat: int = 1  # how many equal boxes are folded into this one
    active: int = 0  # how many of them work for a token, where not all do: experts
    times: str = ""  # "T" in a loop over time: how often it runs in a call, which its flops include
    members: tuple = ()  # ids of the modules that it stands for: ("layers.0", ..., "layers.31")
    sources: tuple = ()  # the lines that run it, most telling first
    definition: Source | None = None  # the class or function
    doc: str = ""  # the paper's equation, from the docstring of the class
    parameters: int = 0  # of one member, with what lies inside; a tensor used twice counts in its first box
    used: int = 0  # how many of them work for a token: all, but for experts that are not chosen
    tied_to: str = ""  # id of the box that holds the same matrix
    weights: tuple = ()  # ((name, shape, Hugging Face's names), ...) of one member's own tensors
    output: Shape | None = None
    call: tuple = ()  # where it is made: (paths of the modules, lines, torch's name, which of these calls)
    attends: tuple = ()  # of a mask: rows of "110000" for a short prompt, and for one more token
    flops: tuple = ()  # ((coefficient, "B*T"), ...), summed, of its own operations; see facts.py
    kept: tuple = ()  # the same for the numbers that a cache keeps
    once: bool = False  # runs for a source, and not again for each token of its target
    bytes: dict = field(default_factory=dict)  # of its own tensors, by what they are kept in: fp32 to int4
    children: list["Box"] = field(default_factory=list)  # in the order in which they run
    edges: list[Edge] = field(default_factory=list)  # between the children, and to "in" and "out"


def repeats(box):
    """ "× 32" of a box that is folded, "× T" of a loop over the tokens, or ""."""
    if box.repeat > 1:
        return f"× {box.repeat}"
    return f"× {box.times}" if box.label == LOOP else ""


# What is drawn ----------------------------------------------------------------------------------------------


OPENED = ("attention", "recurrence", "feed_forward", "head")


def prepared(box, depth=0):
    """The box with only what is drawn of it: attention and the like are opened one level."""
    opened = box.role == "group" or box.repeat > 1 or box.times or (depth < 1 and box.role in OPENED)
    inside = depth + (box.role != "group")
    children = [prepared(child, inside) for child in box.children] if opened else []
    caches = {child.id for child in box.children if holds_cache(child)}
    names = {child.id: side_names(child) for child in children}
    edges = [
        edge for edge in box.edges if children and not (is_of_cache(edge, box) and edge.target in caches)
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


def holds_cache(box):
    return box.role == "cache" or any(map(holds_cache, box.children))


def is_of_cache(edge, box):
    """Whether what comes from outside is the cache, or is read by one: its box stands for it."""
    reads = any(child.id == edge.target and child.role == "cache" for child in box.children)
    return edge.source == "in:cache" or edge.source.startswith("in:") and reads


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


# Colours ----------------------------------------------------------------------------------------------------

# The same in picture and page: (fill, line) on a light ground, (fill, line) on a dark one.
ROSE = ("#fae4e6", "#c4707b"), ("#43272d", "#d98c96")
YELLOW = ("#faf2cf", "#b39a34"), ("#3b3519", "#cfb95c")
ORANGE = ("#fde7d2", "#cc8440"), ("#432e1b", "#dd9c5d")
BROWN = ("#eee4dc", "#8f6b50"), ("#362a21", "#bf987a")
OLIVE = ("#ebf0d3", "#7f9233"), ("#2c331a", "#aebf66")
BLUE = ("#ddebf8", "#5289bd"), ("#1d3247", "#76a9da")
LAVENDER = ("#e9e6f7", "#8279c0"), ("#2d2a46", "#a49ce0")
PLUM = ("#f5e4f1", "#ad6a9b"), ("#3d2838", "#cd8fbd")
GREEN = ("#e0f1e3", "#599a6b"), ("#1e3827", "#7fbd90")
TEAL = ("#daf0ef", "#41928f"), ("#173736", "#66b5b1")
GREY = ("#f1f2f4", "#8a929c"), ("#272b31", "#8d96a1")
PAPER = ("#ffffff", "#5b6470"), ("#1b1f24", "#aab3be")

COLOURS = {
    "embedding": ROSE,
    "head": BROWN,
    "position": OLIVE,
    "norm": YELLOW,
    "attention": ORANGE,
    "recurrence": PLUM,
    "feed_forward": BLUE,
    "linear": LAVENDER,
    "activation": GREEN,
    "add": PAPER,
    "multiply": PAPER,
    "cache": TEAL,
    "mask": GREY,
    "group": GREY,
    "operation": GREY,
}

# What is not a box: (light, dark).
GROUND = "#ffffff", "#14171b"
TEXT = "#1f2429", "#e6e9ed"
MUTED = "#5c6570", "#98a2ae"
SPINE = "#3b4450", "#c3cbd5"  # the residual stream
