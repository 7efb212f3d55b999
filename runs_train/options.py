"""The command line of the training pages: what they all ask, and numbers that are checked as they are read.

It imports nothing slow: --help, and what is wrong with a command, are answered before torch is imported.
Proof: tests/test_train_loops.py.
"""

import argparse
import math

from models.utils.command_line import QUANTIZED, Parser
from models.utils.errors import UserError

MOST = 2**62  # numbers that are added to each other still fit into 64 bits
ADAPTER_OPTIONS = ("rank", "alpha", "dropout", "targets", "quantize", "group_size")
MOST_TOKENS = 2**16  # token ids are stored in 16 bits


class TrainingParser(Parser):
    """Of `python -m runs_train.PAGE`, or what `start` says; --help begins with the page's own text."""

    def __init__(self, page, text, start=None):
        super().__init__(start or f"python -m runs_train.{page}", text)
        self.page, self.longest_warmup, self.least_warmup = page, 0, 0

    def group(self, name):
        return self.add_argument_group(f"{name} [default]").add_argument

    def parse_args(self, arguments):
        """The options; `start` and `arguments` (but --restart) are the command that goes on with the run."""
        options = super().parse_args(arguments)
        options.page, options.start = self.page, self.prog
        options.arguments = [word for word in arguments if word != "--restart"]
        options.num_shares = 1  # that a model is cut into, one for each device; see runs_parallel
        adapter = [name for name in ADAPTER_OPTIONS if getattr(options, name, None) != self.get_default(name)]
        if adapter and not getattr(options, "lora", True):
            raise UserError(
                "--rank, --alpha, --dropout, --targets, --quantize and --group-size go with --lora"
            )
        if options.warmup is not None and options.warmup >= options.steps:
            raise UserError(f"--warmup {options.warmup} leaves nothing of --steps {options.steps}; give less")
        # Of fewer steps than usual as large a share, which a run that goes on with more of them keeps.
        share = options.steps * self.longest_warmup // self.get_default("steps")
        options.default_warmup = max(self.least_warmup, min(self.longest_warmup, share))
        options.eval_every = options.eval_every or min(250, math.ceil(options.steps / 6))
        return options


def add_folder_options(add):
    add("--config", required=True, metavar="NAME", help="a config of configs/, or a JSON file's path")
    add("--out", metavar="FOLDER", help="where to write [checkpoints/my-NAME]")
    add("--restart", action="store_true", help="begin anew, in place of the run in that folder")


def add_tuning_options(add, data):
    """What is tuned, on which data, and where to."""
    add(
        "--checkpoint",
        required=True,
        metavar="NAME",
        help="a name in checkpoints/ or a folder: what is tuned",
    )
    add("--data", required=True, help=data)
    add("--out", metavar="FOLDER", help="where to write [checkpoints/my-NAME-PAGE]")
    add("--restart", action="store_true", help="begin anew, in place of the run in that folder")


def add_chat_options(add, data="JSON lines of conversations, or stdlib: what its functions do"):
    """What is tuned, and on which conversations."""
    add_tuning_options(add, data)
    add("--template", metavar="FILE", help="a chat template (Jinja) [the checkpoint's own, or a plain one]")
    add(
        "--context", type=whole(2), metavar="T", help="longest conversation, in tokens [max_seq_len, to 2048]"
    )
    batch = "places of a batch, in tokens [%(default)s]"
    add("--batch-tokens", type=whole(1), default=2048, metavar="N", help=batch)


def add_adapter_options(add):
    rank = "directions in which a matrix may change [%(default)s]"
    add("--rank", type=whole(1, 4096), default=8, metavar="R", help=rank)
    add("--alpha", type=number(above=0), default=16.0, metavar="F", help="of the factor F / R [%(default)s]")
    dropout = "of what the adapters read [%(default)s]"
    add("--dropout", type=number(least=0, most=0.99), default=0.0, metavar="P", help=dropout)
    add("--targets", type=names, default=(), metavar="NAMES", help="linear layers: q_proj,v_proj, say [all]")
    add("--quantize", choices=QUANTIZED, help="the frozen weights; the adapters never")
    add("--group-size", type=int, metavar="N", help="of int4: 32 (default), 64 or 128")


def add_lora_options(add):
    """For a page that trains all weights or adapters."""
    add("--lora", action="store_true", help="train adapters beside the weights, which stay (lora.py)")
    add_adapter_options(add)


def names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_step_options(
    parser, steps, lr, warmup, weight_decay, draws, lr_help="the highest learning rate", least=0
):
    """draws: what the seed draws; least: of the warm-up. What this returns adds more options to the group."""
    parser.longest_warmup, parser.least_warmup = warmup, least
    add = parser.group("how")
    add("--steps", type=whole(1), default=steps, metavar="N", help="updates in all [%(default)s]")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="batches per update [%(default)s]")
    add("--lr", type=number(above=0), default=lr, metavar="F", help=f"{lr_help} [%(default)s]")
    add("--warmup", type=whole(least), metavar="N", help=f"steps up to it [{warmup}, fewer of fewer --steps]")
    add("--weight-decay", type=number(least=0), default=weight_decay, help="AdamW's [%(default)s]")
    add("--clip", type=number(above=0), default=1.0, metavar="G", help="the longest gradient [%(default)s]")
    add("--seed", type=whole(0), default=0, metavar="N", help=f"for {draws} [%(default)s]")
    return add


def add_machine_options(add):
    add("--device", help="cpu, cuda, cuda:1, mps [the best of cuda, mps, cpu]")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products [bfloat16 where that is fast]")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    add("--eval-every", type=whole(1), metavar="N", help="steps [250, or a sixth of --steps]")
    add("--save-every", type=whole(1), default=250, metavar="N", help="steps [%(default)s]")


def whole(least, most=MOST):
    """An argparse type: a whole number from the `least` to the `most`."""
    bound = f"from {least} up" if most == MOST else f"from {least} to {most}"

    def parse(text):
        # Digits beyond any bound are not converted: Python refuses 5,000 of them with another error.
        if not (text.isascii() and text.isdecimal() and len(text) < 30 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
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
