"""The tensor of each box of the diagram, as a run computed it: what was captured, found again in a recording.

A module's box has what the module returned. An operation's box was made from an operation of the trace, and
that ran again: in the same module, by the same lines of the page, the same function, the same turn.

Shapes: T rows, one for each token (or slot, or source token), n numbers of each.
Proof: tests/test_watch.py.
"""

from collections import defaultdict

import torch

from structure.capture.source import page_of_class

ROWS = {"T": "token", "t": "token", "B*T": "token", "S": "slot", "N": "source token", "P": "patch"}


def values_of(box, recording, found=None):
    """{id of a box: [(path of the module, (T, n))]} of the box and of all in it, one entry for each layer."""
    if found is None:
        recording = Index(recording)
        found = {}
    axis = rows_of(box.output)
    if axis is not None:
        tensors = (
            recording.returned(box.members) if box.members else recording.made(*box.call or ((), 0, 0, 0))
        )
        matrices = [(path, matrix(tensor, axis)) for path, tensor in tensors]
        found[box.id] = [(path, each) for path, each in matrices if each is not None]
    for child in box.children:
        values_of(child, recording, found)
    return {id: values for id, values in found.items() if values}


def rows_of(shape):
    """Which axis of a Shape has a row for each token."""
    if shape is None:
        return None
    letters = shape.letters.strip("()").split(", ") if shape.letters else []
    for dims in (letters, shape.numbers):
        axis = next((n for n, dim in enumerate(dims) if dim in ROWS), None)
        if axis is not None:
            return axis, len(dims)
    return None


def row_kind(shape):
    """What a row stands for, in a word."""
    axis, _ = rows_of(shape)
    letters = shape.letters.strip("()").split(", ") if shape.letters else shape.numbers
    return ROWS.get(letters[axis]) or ROWS[shape.numbers[axis]]


def matrix(tensor, axis):
    """A tensor with a batch of one as (T, n); None where it is another than was captured."""
    place, num_dims = axis
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != num_dims:
        return None
    return tensor.detach().movedim(place, 0).flatten(1).float()


class Index:
    """A Recording's results by where they were made."""

    def __init__(self, recording):
        self.outputs, self.calls = recording.outputs, defaultdict(list)
        page = page_of_class(type(recording.model))
        for call in recording.calls:
            lines = tuple(page.statement(line)[0] for line in call.lines if page.scope(line))
            self.calls[call.path, lines].append(call)

    def returned(self, paths):
        return [(path, first_tensor(self.outputs[path][0][1])) for path in paths if path in self.outputs]

    def made(self, paths, lines, target, place):
        found = []
        for path in paths:
            calls = self.calls.get((path, lines), [])
            same = [call for call in calls if call.name == target]
            if place < len(same):
                found.append((path, first_tensor(same[place].out)))
        return found


def first_tensor(out):
    return (
        next((each for each in out if isinstance(each, torch.Tensor)), None)
        if isinstance(out, tuple)
        else out
    )
