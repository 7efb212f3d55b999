"""Ctrl-C in a long computation: answered at once, but for moments that would leave something half done.

Proof: tests/test_train_loops.py.
"""

import signal
from contextlib import contextmanager


class Interrupts:
    """Ctrl-C, or SIGTERM, raises KeyboardInterrupt at once; after the block, where that is `held`."""

    def __init__(self):
        self.pressed = self.is_held = False

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.press) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def press(self, *_):
        self.pressed = True
        if not self.is_held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self):
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.pressed:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
