"""What a diagram knows: boxes within boxes, and the tensors that go from one to the next.

capture.py fills these in from a model that runs; picture.py, page.py, and the table only read them.
"""

from dataclasses import dataclass, field

ROLES = (
    "embedding",  # tokens, patches, segments to vectors
    "position",  # learned or sinusoidal positions, RoPE's angles, a rotation
    "norm",
    "attention",  # the module, and the operations softmax(q k^T) v inside
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


@dataclass(frozen=True)
class Shape:
    letters: str  # "(B, T, D)", from the checked shape comment of the line that made the tensor; "" if none
    numbers: tuple  # ("B", "T", 4096): what depends on the call stays a letter, or is "7*B" or "N/3" of one


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
    members: tuple = ()  # ids of the modules that it stands for: ("layers.0", ..., "layers.31")
    sources: tuple = ()  # the lines that run it, most telling first
    definition: Source | None = None  # the class or function
    doc: str = ""  # the paper's equation, from the docstring of the class
    parameters: int = 0  # of one member, with what lies inside; a tensor used twice counts in its first box
    tied_to: str = ""  # id of the box that holds the same matrix
    weights: tuple = ()  # ((name, shape, Hugging Face's names), ...) of one member's own tensors
    output: Shape | None = None
    flops: tuple = ()  # ((coefficient, "B*T"), ...), summed, of its own operations; see flops.py
    kept: tuple = ()  # the same for the numbers that a cache keeps
    once: bool = False  # runs for a source, and not again for each token of its target
    bytes: dict = field(default_factory=dict)  # of its own tensors, by what they are kept in: fp32 to int4
    children: list["Box"] = field(default_factory=list)  # in the order in which they run
    edges: list[Edge] = field(default_factory=list)  # between the children, and to "in" and "out"
