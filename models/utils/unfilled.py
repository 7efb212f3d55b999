"""Modules without the random weights that torch fills them with, where a checkpoint will fill them.

On the meta device there is nothing to fill, but torch imports its compiler to find that out: most of a
second, and an empty folder in TMPDIR. Proof: tests/test_models.py.
"""

from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """While modules are made: what torch.nn.init would fill stays as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
