"""What every training page does alike: the loop, its progress, and a state on disk from which it goes on.

    batches --loss--> gradients --clipped--> AdamW --> model       once per step, `accumulate` batches each

A page derives its own Run from TrainingRun and says what a batch is, what its loss is, and how well the model
does. All that a step reads and does must follow from its number and the random state: then a run that was
stopped and is started again by the same command goes on as if it had never been stopped, to the bit on a CPU.
(torch's random state, that is; neither Python's nor numpy's is kept.)

Proof: tests/test_train_loops.py, for every page.
"""

import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models import load_config
from models.utils.errors import UserError, one_line
from models.utils.files import remove, write_atomically
from models.utils.machine import dtype_named, keep_freed_memory, training_dtype
from models.utils.training_notes import write_notes
from runs_train.folder import writing
from runs_train.fresh_model import count_parameters
from runs_train.interrupts import Interrupts

SECONDS_BETWEEN_LINES = 20  # of progress, where there is no terminal for a bar


class TrainingRun:
    """A model in training: all that changes from step to step, and how it is kept on disk.

    A page gives these methods:
        batch(n)                 the n-th batch, on the device
        num_predictions(batch)   how many predictions its loss is the mean of
        loss(batch)              that mean
        learning_rate()          of the step `self.step`
        evaluate()               measures, and appends (step, figure) to self.evaluations
        describe()               how much there is to do
        speed()                  {"tokens_per_s": ...} or the like, for the progress bar
    and names what the losses depend on, which must not change when a run goes on:
        SETTINGS                 of `options`, what was said on the command line
        DATA_SETTINGS            of `facts`, what is known of the data
    """

    def __init__(self, model, optimizer, options, facts, folder):
        self.model, self.optimizer, self.options, self.facts = model, optimizer, options, facts
        self.folder = folder
        self.step = 0
        self.seconds = 0.0
        self.losses = []  # one per step
        self.evaluations = []  # (step, figure)
        self.interrupts = Interrupts()
        for parameter in filter(is_trained, model.parameters()):
            # The backward pass is one long call, in which Python hears of no Ctrl-C. Here it gets a turn.
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)

    def train(self):
        """All steps that are still to do. Ctrl-C breaks off at once, and what was reached is kept."""
        keep_freed_memory()  # every step takes and frees the same blocks: up to a third of its time
        self.load_state()
        self.settle_options()
        self.introduce()
        with self.interrupts, self.progress_bar() as bar:
            try:
                self.evaluate_if_due()  # the run may have been stopped between a step and this
                while self.step < self.options.steps:
                    self.train_step()
                    self.evaluate_if_due()
                    self.show_progress(bar)
                    if self.is_due(self.options.save_every):
                        self.save_state()
            except KeyboardInterrupt:
                if self.step:
                    self.save_state()
                    say(f"stopped after step {self.step}; the same command goes on from here")
                raise

    def train_step(self):
        """One update: the gradients of `accumulate` batches, clipped, then AdamW.

        Broken off, it leaves no trace: the same step will draw the same random numbers again.
        """
        start, number, random = time.perf_counter(), self.step, random_state(self.options.device)
        try:
            loss = self.find_gradients()
            with self.interrupts.held():
                self.update(loss)
        except KeyboardInterrupt:
            if self.step == number:
                set_random_state(random, self.options.device)
            raise
        self.seconds += time.perf_counter() - start

    def find_gradients(self):
        """Leave the gradients, clipped, in the parameters; the loss: the mean over the step's predictions."""
        self.model.train()
        first, total, count = self.step * self.options.accumulate, 0.0, 0
        for n in range(first, first + self.options.accumulate):
            batch = self.batch(n)
            num_predictions = self.num_predictions(batch)
            # The sum over them, so that each counts the same in whichever batch it is.
            loss = self.loss(batch) * num_predictions
            loss.backward()
            total, count = total + loss.item(), count + num_predictions
        total, count = self.mean_over_ranks(total, count)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        norm = self.clip()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UserError(
                f"step {self.step + 1}: the loss is {total / count}, the gradient's length {norm}; "
                f"begin anew with --restart and a lower --lr ({self.kept()})"
            )
        return total / count

    def mean_over_ranks(self, total, count):
        """Of all processes that train together, as their gradients are: here of one. See runs_parallel."""
        return total, count

    def clip(self):
        """Shorten the gradient where it is too long; its length before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip).item()

    def update(self, loss):
        """What is never left half done: all that makes one step into the next."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss)

    def is_due(self, every):
        """Every so many steps, and after the last."""
        return self.step % every == 0 or self.step == self.options.steps

    def evaluate_if_due(self):
        measured_at = self.evaluations[-1][0] if self.evaluations else 0
        if self.step > measured_at and self.is_due(self.options.eval_every):
            start = time.perf_counter()
            self.evaluate()
            self.seconds += time.perf_counter() - start

    # What is shown.

    def settle_options(self):
        """What neither the command nor the state says."""
        if self.options.warmup is None:
            self.options.warmup = self.options.default_warmup
        if self.options.dtype is None:
            dtype, line = training_dtype(self.options.device)
            self.options.dtype = str(dtype).removeprefix("torch.")
            line = line or f"{self.options.dtype}: this {self.options.device.type} has instructions for it"
            print(f"{line}; --dtype takes another", flush=True)

    def introduce(self):
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"{num_parameters:,} parameters, {self.describe()}")
        ours, name = asdict(self.model.config), self.options.config
        theirs = asdict(load_config(name)[1])
        changes = [f"{key} is {ours[key]}, not {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        if changes:
            # A name like transformer-lm-15m promises a size.
            print(f"{name} itself has {count_parameters(name):,}: with these data {', '.join(changes)}")
        sys.stdout.flush()

    def progress_bar(self):
        # disable=None: no bar where standard error is no terminal.
        self.last_line = -math.inf
        return tqdm(total=self.options.steps, initial=self.step, unit="step", disable=None)

    def show_progress(self, bar):
        bar.set_postfix(loss=f"{self.losses[-1]:.3f}", **self.speed(), refresh=False)
        bar.update()
        now = time.perf_counter()
        if bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            left = self.seconds / self.step * (self.options.steps - self.step) / 60
            speed = ", ".join(f"{value} {unit}" for unit, value in self.speed().items())
            # The first steps are slow, and say nothing of the rest.
            speed += f", {left:.1f} minutes left" if self.last_line > -math.inf else ""
            say(f"step {self.step:6}   loss {self.losses[-1]:.3f}   {speed}")
            self.last_line = now

    def show_evaluation(self, text):
        recent = self.losses[-self.options.eval_every :]
        say(f"step {self.step:6}   loss {sum(recent) / len(recent):.3f}   {text}")
        self.last_line = time.perf_counter()

    # What is kept. Batches and learning rates follow from `step`; dropout draws from the random state.

    PROGRESS = {"step": int, "seconds": float, "losses": list, "evaluations": list}
    WITH_STATE = ("model", "optimizer")

    def save_state(self):
        state = {name: getattr(self, name) for name in self.PROGRESS}
        state |= {name: getattr(self, name).state_dict() for name in self.WITH_STATE}
        state["random"] = random_state(self.options.device)
        state["settings"] = self.settings()
        path = self.folder / "state.pt"
        with writing(path):
            self.write_notes()
            # Opened here: then torch says why it cannot write, see `writing`.
            with write_atomically(path) as partial, open(partial, "wb") as file:
                torch.save(state, file)
            for old in self.folder.glob("state-*"):  # of several processes
                remove(old)

    def write_notes(self):
        """Whose folder it is, now that this run has a state of its own there."""
        options = self.options
        write_notes(self.folder.parent, page=options.page, start=options.start, arguments=options.arguments)

    def kept(self):
        path = self.folder / "state.pt"
        return f"{path} has an earlier step" if path.is_file() else "no state was kept yet"

    def load_state(self):
        """Go on where state.pt was written, if it is there and nobody says --restart."""
        path = self.folder / "state.pt"
        if not self.options.restart and any(self.folder.glob("state-*/.metadata")):
            raise UserError(
                f"{self.folder}: holds a run of several processes; go on with torchrun -m "
                "runs_parallel.language_model, give another --out, or --restart to begin anew"
            )
        # An earlier run's state stays where it is until this run has one of its own.
        if self.options.restart or not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); begin anew with --restart"
            ) from None
        try:
            self.check_settings(path, state["settings"])
            self.take(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"[:200]
            raise UserError(
                f"{path}: is no state of this run ({reason}); begin anew with --restart"
            ) from None

    def check_settings(self, path, stored):
        for name in ("warmup", "dtype"):
            # Left open, they stay what they were.
            if getattr(self.options, name) is None:
                setattr(self.options, name, stored[name])
        for name, value in self.settings().items():
            if stored.get(name) != value:
                raise UserError(
                    f"{path}: that run was started with {name} {stored.get(name)}, not {value}; "
                    "give the same command to go on with it, another --out, or --restart to begin anew"
                )

    def take(self, state):
        """The state's content in place of our own; an error of Python's if it is no such content."""
        for name, kind in self.PROGRESS.items():
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is {type(state[name]).__name__}, not {kind.__name__}")
            setattr(self, name, state[name])
        if len(self.losses) != self.step:
            raise ValueError(f"{len(self.losses)} losses of {self.step} steps")
        for name in self.WITH_STATE:
            getattr(self, name).load_state_dict(state[name])
        for parameter, means in self.optimizer.state.items():
            # Which load_state_dict does not look at.
            if any(mean.shape not in (parameter.shape, ()) for mean in means.values()):
                raise ValueError("the optimizer's means have other shapes than the parameters")
        set_random_state(state["random"], self.options.device)

    def settings(self):
        settings = {name: getattr(self.options, name) for name in ("page", "dtype", "warmup", *self.SETTINGS)}
        return settings | {name: self.facts[name] for name in self.DATA_SETTINGS}


def say(text):
    """To standard error, above the progress bar if there is one."""
    tqdm.write(text, sys.stderr)


# Parts of a step --------------------------------------------------------------------------------------------


def make_optimizer(model, options, betas, eps=1e-8):
    """AdamW. Weight decay is for matrices: a norm's weight or a bias has no reason to be near zero."""
    parameters = list(filter(is_trained, model.parameters()))
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=eps, fused=True)


def is_trained(parameter):
    return parameter.requires_grad


def learning_rate(step, options):
    """A straight line up during the warm-up, then half a cosine down to zero."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def context_of(model, options):
    longest = getattr(model.config, "max_seq_len", None)
    if longest is None:  # a model that keeps a state has no longest text
        return options.context or 512
    if (options.context or 0) > longest:
        raise UserError(f"--context {options.context} is longer than the model's max_seq_len, {longest}")
    return options.context or longest


def autocast(options):
    """Matrix products in bf16, what needs digits in fp32; the weights themselves stay in fp32."""
    if options.dtype == "float32":
        return nullcontext()
    return torch.autocast(options.device.type, dtype_named(options.dtype))


def make_forward(model, options, forward=None):
    """The forward pass: --gradient-checkpointing trades speed for memory, --compile a slow start for speed.

    forward: a method of the model that training calls instead of the model itself.
    """
    if options.gradient_checkpointing:
        # A layer forgets all but its input, and computes the rest again in the backward pass.
        stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in (layer for layers in stacks for layer in layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if options.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        print("--compile needs a C++ compiler, and none was found; going on without", file=sys.stderr)
    elif options.compile:
        # The compiled module is another view of the same parameters; `model` keeps their names.
        return torch.compile(forward or model)
    return forward or model


def random_state(device):
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states, device):
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
