"""What a model computes while it runs: every call of torch, with its module, its lines and its tensors.

    with Recording(model) as recording:
        logits = model(tokens)
    recording.calls            in the order in which they ran
    recording.maker(logits)    the Call that made a tensor

Nothing is asked of a page: torch tells each of its functions to whoever listens (TorchFunctionMode), and
hooks say which module runs. All tensors are kept until the Recording is dropped, so it is for short texts.
"""

import inspect
import sys
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

# What changes the looks of a tensor and not its numbers, or not when the model is in use.
BENDS = """
    view reshape transpose permute mT T expand unsqueeze squeeze flatten unflatten getitem select narrow
    to type_as contiguous clone detach dropout float expand_as view_as repeat_interleave chunk split
"""
BENDS = frozenset(BENDS.split())
# Python's sign for a function, where torch calls it otherwise.
SIGNS = {"truediv": "div", "rtruediv": "div", "radd": "add", "rmul": "mul", "rsub": "sub", "iadd": "add"}
SIGNS |= {"setitem": "index_put", "invert": "bitwise_not", "and": "bitwise_and", "imul": "mul"}


@dataclass(eq=False)
class Call:
    number: int  # its place in the order
    name: str  # as in a recorded graph: "add", "linear", "scaled_dot_product_attention"
    args: tuple
    kwargs: dict
    out: object  # a tensor or several; of what writes in place, what it writes into
    path: str  # of the module whose forward runs; "" the model's own
    lines: tuple  # of the model's file, the outermost first

    @property
    def tensors(self):
        """What it reads, in order."""
        return tensors_in((*self.args, *self.kwargs.values()))


class Recording(TorchFunctionMode):
    def __init__(self, model):
        super().__init__()
        self.model, self.file = model, inspect.getfile(type(model))
        self.calls, self.running = [], [""]
        self.outputs = {}  # path: [(inputs, output)] of each time that the module ran
        self.makers = {}  # id of a tensor: the calls that made it or wrote into it
        self.modules = {}  # id of a tensor: (path, inputs) of the innermost module that returned it

    def __enter__(self):
        self.handles = []
        for path, module in self.model.named_modules():
            if path:
                self.handles.append(module.register_forward_pre_hook(lambda *_, path=path: self.enter(path)))
                self.handles.append(
                    module.register_forward_hook(lambda *run, path=path: self.leave(path, *run))
                )
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def enter(self, path):
        self.running.append(path)

    def leave(self, path, module, inputs, output):
        self.running.pop()
        self.outputs.setdefault(path, []).append((inputs, output))
        if isinstance(output, torch.Tensor):
            self.modules.setdefault(id(output), (path, inputs))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.__name__.strip("_")
        name = SIGNS.get(name, name)
        made = args[0] if name == "index_put" else out
        if name != "get" and tensors_in((made,)):  # "get": x.shape
            call = Call(len(self.calls), name, args, kwargs, made, self.running[-1], self.lines())
            self.calls.append(call)
            for tensor in tensors_in((made,)):
                self.makers.setdefault(id(tensor), []).append(call)
        return out

    def lines(self):
        """Of the model's file, those that are running, the outermost first."""
        frame, found = sys._getframe(2), []
        while frame:
            if frame.f_code.co_filename == self.file:
                found.insert(0, frame.f_lineno)
            frame = frame.f_back
        return tuple(found)

    # Back through what was recorded -------------------------------------------------------------------------

    def maker(self, tensor, before=None):
        """The last call that made a tensor, before a call's number where one is given; None of an input."""
        calls = self.makers.get(id(tensor), ())
        return next((call for call in reversed(calls) if before is None or call.number < before), None)

    def views(self, tensor, before=None):
        """(the tensor and what it is a view of, back to what computed it; that Call or None)."""
        found = [tensor]
        call = self.maker(tensor, before)
        while call is not None and call.name in BENDS and call.tensors:
            tensor = call.tensors[0]
            found.append(tensor)
            call = self.maker(tensor, call.number)
        return found, call

    def depends(self, late, early):
        """Whether a tensor was made from another one."""
        start = self.maker(early)
        waiting, seen = [(late, None)], set()
        while waiting:
            tensor, before = waiting.pop()
            if tensor is early:
                return True
            call = self.maker(tensor, before)
            if call is None or call.number in seen or (start and call.number <= start.number):
                continue
            seen.add(call.number)
            waiting += [(each, call.number) for each in call.tensors]
        return False


def tensors_in(values):
    """The tensors in lists, tuples and records, as deep as a page nests them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found
