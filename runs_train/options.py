"""The command line of the training pages: what they all ask, and numbers that are checked as they are read.

Proof: tests/test_train_language_model.py.
"""

import argparse
import math
from pathlib import Path

from models.utils.command_line import CHECKPOINTS, Parser
from models.utils.errors import UserError
from models.utils.files import remove
from models.utils.machine import choose_device


class TrainingParser(Parser):
    """Of `python -m runs_train.PAGE`; --help begins with the page's own text."""

    def __init__(self, page, text):
        super().__init__(f"python -m runs_train.{page}", text)

    def parse_args(self, argv=None):
        options = super().parse_args(argv)
        if options.warmup >= options.steps:
            raise UserError(f"--warmup {options.warmup} leaves nothing of --steps {options.steps}; give less")
        options.device = choose_device(options.device)
        return options


def add_folder_options(add):
    add("--config", required=True, metavar="NAME", help="a config of configs/, or the path of a JSON file")
    add("--out", metavar="FOLDER", help="where to write [checkpoints/NAME]")
    add("--restart", action="store_true", help="begin anew, in place of what is in that folder")


def add_machine_options(add):
    add("--device", help="cpu, cuda, cuda:1, mps [the best of cuda, mps, cpu]")
    add("--float32", action="store_true", help="no bf16: for machines that are slow at it")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    add("--eval-every", type=whole(1), default=250, metavar="N", help="steps [%(default)s]")
    add("--save-every", type=whole(1), default=250, metavar="N", help="steps [%(default)s]")


def whole(least):
    """An argparse type: a whole number from `least` up."""

    def parse(text):
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return parse


def number(above=-math.inf, least=-math.inf, most=math.inf):
    """An argparse type: a finite number `above` one, or from the `least` to the `most`."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value < math.inf and least <= value <= most):
            bound = f"from {least} to {most}" if math.isfinite(most) else f"from {least} up"
            bound = f"above {above}" if math.isfinite(above) else bound
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
        return value

    return parse


def prepare_folder(options):
    """Where the run writes. What another run left there is not replaced unasked."""
    folder = Path(options.out or CHECKPOINTS / Path(options.config).stem)
    if options.restart:
        remove(folder / "training")
    elif (folder / "config.json").is_file() and not (folder / "training" / "state.pt").is_file():
        raise UserError(f"{folder} holds a model already; give another --out, or --restart to replace it")
    return folder
