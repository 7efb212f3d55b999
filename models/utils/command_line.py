"""What all commands share; it imports nothing slow, so that --help and a typo answer at once."""

import argparse
import os
import sys
from pathlib import Path

from models.utils.errors import UserError

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
DTYPES = ("float32", "bfloat16", "float16")  # names in torch
QUANTIZED = ("int8", "int4")  # see quantize.py


class Parser(argparse.ArgumentParser):
    """Of one command, as a person types it; its errors are one line, and half of an option's name is none."""

    def __init__(self, command, text, **options):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=command, description=text, formatter_class=layout, allow_abbrev=False, **options
        )

    def parse_args(self, argv=None, namespace=None):
        words = sys.argv[1:] if argv is None else [str(word) for word in argv]
        for before, word in zip(["", *words], words):
            # What a shell's "$variable" gives may be empty, and then means a mistake.
            if word == "" or (word.startswith("--") and word.endswith("=")):
                option = word or before
                name = option.rstrip("=") if option.startswith("-") else "an argument"
                self.error(f"{name} is empty; give a value, or leave it out")
        return super().parse_args(argv, namespace)

    def error(self, message):
        raise UserError(f"{message}; see: {self.prog} --help")


def shows_colours(stream):
    """Whether a stream is a terminal whose owner wants colours (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def positive(kind):
    """An argparse type: a finite int or float above 0."""

    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse
