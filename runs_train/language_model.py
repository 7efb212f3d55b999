"""Train a decoder of the zoo on text, from fresh weights to a checkpoint that runs.

    python -m runs_train.language_model --config tiny-llama-python --data stdlib --out checkpoints/my-llama

    text --text_data.py--> tokens --windows--> model --cross-entropy--> gradients --AdamW--> model

All that a step reads and does follows from its number: which windows, at which learning rate. A run that was
stopped (Ctrl-C saves it) and is started again by the same command therefore goes on as if it had never been
stopped, with the same losses: to the bit on a CPU, where sums are always made in the same order.

In the folder --out, by default checkpoints/NAME, a run writes
    training/                             the tokens, and state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_language_model.py.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models import create_model, load_config
from models.utils.errors import UserError, run_main
from models.utils.files import one_line, remove, write_atomically
from models.utils.machine import choose_device
from models.utils.tokenizer import load_tokenizer
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.text_data import Windows, prepare
from runs_train.trained_checkpoint import save_trained

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    model_name, _ = load_config(options.config)
    folder = prepare_folder(options)
    corpus = prepare(options.data, folder / "training" / "tokens", options.vocab_size, options.tokenizer)

    torch.manual_seed(options.seed)
    model = create_model(options.config, vocab_size=corpus.facts["vocab_size"]).to(options.device)
    run = Run(model, corpus, options, folder / "training")
    run.train()
    save_trained(run, model_name, folder, argv)


# A run ------------------------------------------------------------------------------------------------------


class Run:
    """A model in training: all that changes from step to step, and how it is kept on disk."""

    def __init__(self, model, corpus, options, folder):
        self.model, self.corpus, self.options, self.folder = model, corpus, options, folder
        self.context = context_of(model, options)
        self.windows = Windows(corpus.train, self.context, options.batch_size, options.seed)
        self.bytes_of = bytes_of_tokens(load_tokenizer(folder / "tokens"))
        self.optimizer = make_optimizer(model, options)
        self.forward = make_forward(model, options)
        self.step = 0
        self.seconds = 0.0
        self.losses = []  # one per step, in nats per token
        self.evaluations = []  # (step, bits per byte of a sample of the held-out text)

    def train(self):
        self.load_state()
        self.describe()
        with InterruptFlag() as interrupted, self.progress_bar() as bar:
            while self.step < self.options.steps and not interrupted:
                start = time.perf_counter()
                self.train_step()
                if self.is_due(self.options.eval_every):
                    self.evaluate()
                self.seconds += time.perf_counter() - start
                self.show_progress(bar)
                if self.is_due(self.options.save_every):
                    self.save_state()
        if self.step < self.options.steps:
            self.save_state()
            print(f"stopped after step {self.step}; the same command goes on from here")
            raise KeyboardInterrupt

    def train_step(self):
        """One update: the gradients of `accumulate` batches, clipped, then AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)

        self.model.train()
        step_loss = 0.0
        for n in range(self.options.accumulate):
            tokens = self.windows.batch(self.step * self.options.accumulate + n)
            loss = self.loss(tokens.to(self.options.device)) / self.options.accumulate
            loss.backward()
            step_loss += loss.item()
        if not math.isfinite(step_loss):
            raise UserError(f"step {self.step}: the loss is {step_loss}; try a lower --lr, with --restart")

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(step_loss)

    def loss(self, tokens):
        """Mean cross-entropy of every token but the first of its window, given those before it."""
        with autocast(self.options):
            logits = self.forward(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def evaluate(self):
        """Bits per byte of a sample of the held-out text: always the same windows, side by side."""
        stride = self.context
        with autocast(self.options):
            measured = bits_per_byte(
                self.model, self.corpus.held_out, self.bytes_of, self.context, stride, max_windows=100
            )
        self.evaluations.append((self.step, measured))
        recent = self.losses[-self.options.eval_every :]
        mean = sum(recent) / len(recent)
        tqdm.write(
            f"step {self.step:6}   loss {mean:.3f}   held-out bits per byte {measured:.3f}", sys.stderr
        )

    def is_due(self, every):
        return self.step % every == 0 or self.step == self.options.steps

    # What is shown.

    def describe(self):
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        passes = (
            self.options.steps * self.options.accumulate * self.options.batch_size / self.windows.per_pass
        )
        print(
            f"{num_parameters:,} parameters, {len(self.corpus.train):,} tokens of training text, "
            f"{passes:.1f} passes over it in {self.options.steps} steps"
        )

    def progress_bar(self):
        # disable=None: no bar where standard error is a file.
        return tqdm(total=self.options.steps, initial=self.step, unit="step", disable=None)

    def show_progress(self, bar):
        tokens = self.options.accumulate * self.options.batch_size * self.context
        bar.set_postfix(
            loss=f"{self.losses[-1]:.3f}",
            tokens_per_s=f"{tokens * self.step / self.seconds:.0f}",
            refresh=False,
        )
        bar.update()

    # What is kept. Windows and learning rates follow from `step`; dropout draws from the random state.

    PROGRESS = ("step", "seconds", "losses", "evaluations")

    def save_state(self):
        state = {name: getattr(self, name) for name in self.PROGRESS}
        state["model"] = self.model.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["random"] = random_state(self.options.device)
        state["settings"] = self.settings()
        with write_atomically(self.folder / "state.pt") as path:
            torch.save(state, path)

    def load_state(self):
        """Go on where state.pt was written, if it is there."""
        path = self.folder / "state.pt"
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); begin anew with --restart"
            ) from None
        for name, value in self.settings().items():
            if state["settings"][name] != value:
                raise UserError(
                    f"{path}: that run was started with {name} {state['settings'][name]}, not {value}; "
                    "give the same command to go on with it, another --out, or --restart to begin anew"
                )
        for name in self.PROGRESS:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"], self.options.device)

    def settings(self):
        """All that the losses depend on; it must not change when a run goes on."""
        of_options = ("config", "context", "batch_size", "accumulate", "steps", "lr", "warmup")
        of_options += ("weight_decay", "clip", "seed", "float32")
        of_data = ("file_list_sha256", "tokenizer_sha256", "vocab_size")
        settings = {name: getattr(self.options, name) for name in of_options}
        return settings | {name: self.corpus.facts[name] for name in of_data}


# Parts of a step --------------------------------------------------------------------------------------------


def make_optimizer(model, options):
    """AdamW. Weight decay is for matrices: a norm's weight or a bias has no reason to be near zero."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, options):
    """A straight line up during the warm-up, then half a cosine down to zero."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def autocast(options):
    """Matrix products in bf16, what needs digits in fp32; the weights themselves stay in fp32."""
    return nullcontext() if options.float32 else torch.autocast(options.device.type, torch.bfloat16)


def make_forward(model, options):
    """The forward pass, with the options that trade memory or a slow start for speed."""
    if options.gradient_checkpointing:
        # A layer forgets all but its input, and computes the rest again in the backward pass.
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if options.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        print("--compile needs a C++ compiler, and none was found; going on without", file=sys.stderr)
    elif options.compile:
        # The compiled module is another view of the same parameters; `model` keeps their names.
        return torch.compile(model)
    return model


def context_of(model, options):
    longest = model.config.max_seq_len
    if (options.context or 0) > longest:
        raise UserError(f"--context {options.context} is longer than the model's max_seq_len, {longest}")
    return options.context or longest


def random_state(device):
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states, device):
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class InterruptFlag:
    """True after Ctrl-C: the step that is under way is finished first. A second Ctrl-C does not wait."""

    def __init__(self):
        self.pressed = False

    def __bool__(self):
        return self.pressed

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


# Options ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see: python -m runs_train.language_model --help")


def parse_options(argv):
    parser = Parser(
        prog="python -m runs_train.language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(parser.add_argument_group("what [default]").add_argument)
    add_training_options(parser.add_argument_group("how [default]").add_argument)
    add_machine_options(parser.add_argument_group("on this machine [default]").add_argument)
    options = parser.parse_args(argv)
    if options.warmup >= options.steps:
        raise UserError(f"--warmup {options.warmup} leaves nothing of --steps {options.steps}; give less")
    options.device = choose_device(options.device)
    return options


def add_data_options(add):
    add("--config", required=True, metavar="NAME", help="a config of configs/, or the path of a JSON file")
    add("--data", required=True, help="a text file, a folder of them, or stdlib: Python's library, as source")
    add("--vocab-size", type=whole(260), default=4096, metavar="V", help="of the tokenizer [%(default)s]")
    add("--tokenizer", metavar="FILE", help="a sentencepiece tokenizer.model to use instead of training one")
    add("--out", metavar="FOLDER", help="where to write [checkpoints/NAME]")
    add("--restart", action="store_true", help="begin anew, in place of what is in that folder")


def add_training_options(add):
    add("--steps", type=whole(1), default=2400, metavar="N", help="updates in all [%(default)s]")
    add("--batch-size", type=whole(1), default=8, metavar="B", help="windows at once [%(default)s]")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="batches per update [%(default)s]")
    add("--context", type=whole(2), metavar="T", help="tokens of a window [the model's max_seq_len]")
    add("--lr", type=number(above=0), default=2e-3, help="the highest learning rate [%(default)s]")
    add("--warmup", type=whole(0), default=200, metavar="N", help="steps up to it [%(default)s]")
    add("--weight-decay", type=number(least=0), default=0.1, metavar="W", help="AdamW's [%(default)s]")
    add("--clip", type=number(above=0), default=1.0, metavar="G", help="the longest gradient [%(default)s]")
    add("--seed", type=whole(0), default=0, metavar="N", help="for weights and windows [%(default)s]")


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


def number(above=-math.inf, least=-math.inf):
    """An argparse type: a finite number above one bound, or from the other up."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value < math.inf and value >= least):
            bound = f"from {least} up" if math.isinf(above) else f"above {above}"
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


if __name__ == "__main__":
    run_main(main)
