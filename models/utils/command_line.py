"""What all commands share; it imports nothing slow, so that --help and a typo answer at once."""

import argparse
from pathlib import Path

from models.utils.errors import UserError

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
DTYPES = ("float32", "bfloat16", "float16")  # names in torch


class Parser(argparse.ArgumentParser):
    """Of one command, as a person types it; its errors are one line, and half of an option's name is none."""

    def __init__(self, command, text, **options):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=command, description=text, formatter_class=layout, allow_abbrev=False, **options
        )

    def error(self, message):
        raise UserError(f"{message}; see: {self.prog} --help")


def positive(kind):
    """An argparse type: a finite int or float above 0."""

    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse
