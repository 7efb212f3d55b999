"""What masks say: who attends to whom, for a short prompt and for the token after it.

The meta device has no numbers. But a mask is made from positions and slots alone, so that a second, small
tensor can go along with each of the model's that holds such numbers: a shadow, on the CPU.
"""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PROMPT = 6  # tokens
SLOTS = 10  # of a cache, of which a prompt fills the first
MOST = 16  # rows and columns that are shown


def masks_of(page, call):
    """{lines of the page: (rows for a prompt, rows for one more token)}, rows as "110000": 1 = attends.

    call(few): (module, inputs) for few = {"B": 1, "T": ...}; the lines are those that lead to a mask, in
    the order in which they call each other, each the first of its statement.
    """
    prompt = recorded(page, *call(sizes(PROMPT)), first=0)
    step = recorded(page, *call(sizes(1)), first=PROMPT)
    both = [lines for lines in prompt if rows_of(prompt[lines]) and rows_of(step.get(lines))]
    return {lines: (rows_of(prompt[lines]), rows_of(step[lines])) for lines in both}


def sizes(num_tokens):
    return {"B": 1, "T": num_tokens, "S": SLOTS, "N": PROMPT}


def recorded(page, root, inputs, first):
    """{lines: the shadow of what they made last}."""
    shadows = Shadows(page)
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            shadows.add(tensor, value_of(name, tensor, first))
    with shadows, torch.no_grad():
        try:
            root(**inputs)
        except Exception:
            return {}  # a model that asks for numbers which only its weights have
    return shadows.made


def value_of(name, tensor, first):
    """Positions from `first` on; of anything else ones, which are no pads."""
    value = torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.arange(first, first + tensor.shape[1]).expand(tensor.shape) if name == "positions" else value


def rows_of(value):
    """A mask as rows of text; () of what is none or is too large to be shown."""
    if value is None or value.dim() < 2:
        return ()
    value = value[(0,) * (value.dim() - 2)]
    if value.is_floating_point():
        value = value > torch.finfo(value.dtype).min / 2  # a mask that is added: minus infinity, or nearly
    if value.dtype != torch.bool or max(value.shape) > MOST:
        return ()
    return tuple("".join("01"[bit] for bit in row) for row in value.tolist())


class Shadows(TorchDispatchMode):
    """Runs each operation on the shadows too, where all that it reads has one."""

    def __init__(self, page):
        super().__init__()
        self.page = page
        self.shadow = {}  # id of a tensor: the tensor, which keeps the id its own, and its shadow
        self.made = {}  # lines: the shadow of their last result

    def add(self, tensor, value):
        self.shadow[id(tensor)] = tensor, value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        known = all(id(each) in self.shadow for each in read)

        def shadowed(each):
            if isinstance(each, torch.device):
                return torch.device("cpu")
            return self.shadow[id(each)][1] if isinstance(each, torch.Tensor) else each

        value = function(*tree_map(shadowed, args), **tree_map(shadowed, kwargs)) if known else None
        if function is torch.ops.aten._local_scalar_dense.default:
            return value if known else 1
        result = function(*args, **kwargs)
        for tensor, each in zip(tree_leaves(result), tree_leaves(value)) if known else ():
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, each)
                value = each
        self.made[self.lines()] = value  # None for scores that a mask is laid over
        return result

    def lines(self):
        """Of the page's statements that are running, from the outermost in."""
        frame, lines = sys._getframe(2), []
        while frame:
            if frame.f_code.co_filename.endswith(self.page.name) and self.page.scope(frame.f_lineno):
                lines.insert(0, self.page.statement(frame.f_lineno)[0])
            frame = frame.f_back
        return tuple(lines)
