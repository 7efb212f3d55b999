"""The models of this project as subjects of a measurement: plain, compiled, speculative."""

import random
import time

import torch

from benchmarks.clock import synchronized
from benchmarks.one_pass import OnePass
from models import load_model
from models.utils.compile import compile_decoding
from models.utils.machine import dtype_named, keep_freed_memory
from runs_ar.generate import generate, prefill
from runs_serve.engine import Engine
from runs_serve.request import Request
from runs_ss.speculate import ModelDrafter, speculate


class Eager:
    """A converted checkpoint, run by runs_ar/generate.py."""

    arranged = True  # whether its weights come in the order that a model as it is written reads

    def __init__(self, folder, threads, device, dtype):
        keep_freed_memory()
        if threads:
            torch.set_num_threads(threads)
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype_named(dtype)
        self.said = []

    def about(self):
        return {"threads": torch.get_num_threads(), "torch_runs_as": torch.backends.cpu.get_cpu_capability()}

    def load(self):
        """How many bytes a decoded token reads."""
        self.model = load_model(self.folder, self.device, self.dtype, arranged=self.arranged)
        return bytes_read_per_token(self.model)

    def notes(self):
        """What went otherwise than asked for, a line each."""
        return self.said

    @torch.inference_mode()
    def logits(self, prompt):
        """For the token that follows the prompt, whose last token is fed by itself, as in decoding."""
        cache = self.model.new_cache(1, len(prompt))
        prefill(self.model, [prompt[:-1]], cache)
        last, position = (torch.tensor([[n]], device=self.device) for n in (prompt[-1], len(prompt) - 1))
        return self.model(last, position, cache)[0, -1].float().tolist()

    def run(self, prompts, new_tokens):
        """The new tokens of each prompt, and for each step the seconds from the start until it was done.

        new_tokens: how many; a list of numbers: for each prompt its own, and then it is one after another.
        """
        if isinstance(new_tokens, list):
            return in_turn(self.run, prompts, new_tokens)
        rows, times = [[] for _ in prompts], []
        started = synchronized(self.device)
        for step in generate(self.model, prompts, new_tokens):
            times.append(time.perf_counter() - started)
            for row, token in zip(rows, step):
                row.append(token)
        return {"tokens": rows, "times": times}


class Compiled(Eager):
    """The same with its decode step compiled."""

    arranged = False

    def load(self):
        super().load()
        self.model = compile_decoding(self.model, report=self.said.append)
        return bytes_read_per_token(self.model)


class Served(Eager):
    """The engine of runs_serve/: all prompts at once, each as long as it wants, on paged memory."""

    def run(self, prompts, new_tokens):
        """As Eager.run. The engine is a new one each time, which has seen none of the prompts."""
        counts = new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(prompts)
        requests = [Request(prompt, count) for prompt, count in zip(prompts, counts)]
        engine = Engine(self.model, max_running=len(prompts), block_size=16, num_blocks=blocks_for(requests))
        rows, times = [[] for _ in prompts], []
        started = synchronized(self.device)
        numbers = {engine.add(request): row for row, request in enumerate(requests)}
        while engine.has_work:
            for event in engine.step():
                rows[numbers[event.request]].append(event.token)
            times.append(time.perf_counter() - started)
        return {"tokens": rows, "times": times}


class CompiledServed(Served, Compiled):
    """The same, its steps compiled."""


class Encoder(OnePass, Eager):
    """A model that answers in one pass, called as a function."""

    def answers(self, inputs):
        return self.model(inputs)


class Speculative(Eager):
    """Speculative sampling with a drafter that agrees as often as it is told to.

    A real drafter agrees with its target because both were trained on the same texts; random weights agree on
    nothing. So a small model does all the work of drafting, and what it says is replaced by the target's own
    next token, which is known from a run before, or with probability 1 - agreement by another.
    """

    def __init__(self, draft, num_draft_tokens, agreement, **settings):
        super().__init__(**settings)
        self.draft_folder, self.num_draft_tokens, self.agreement = draft, num_draft_tokens, agreement
        self.known = {}

    def load(self):
        num_bytes = super().load()
        self.drafter = load_model(self.draft_folder, self.device, self.dtype, arranged=self.arranged)
        return num_bytes

    def run(self, prompts, new_tokens):
        (prompt,) = prompts
        if (tuple(prompt), new_tokens) not in self.known:
            self.learn(prompt, new_tokens)
        return self.speculate(prompt, new_tokens, self.known[tuple(prompt), new_tokens])

    def learn(self, prompt, new_tokens):
        """What the target says. Where two tokens are nearly even, five rows at once may choose another than
        one row does; so the second time it is what the target said while it was verifying."""
        known = super().run([prompt], new_tokens)["tokens"][0]
        known = self.speculate(prompt, new_tokens, known)["tokens"][0]
        self.known[tuple(prompt), new_tokens] = known

    def speculate(self, prompt, new_tokens, known):
        tokens, times, accepted, judged = [], [], 0, 0
        drafter = AgreeingDrafter(self.drafter, prompt + known, self.agreement)
        started = synchronized(self.device)
        for (new,), (drafts,), (num_accepted,) in speculate(
            self.model, drafter, [prompt], new_tokens, num_draft_tokens=self.num_draft_tokens
        ):
            tokens += new
            times += [time.perf_counter() - started] * len(new)
            accepted += num_accepted
            judged += min(len(new), len(drafts))
        return {"tokens": [tokens], "times": times, "acceptance": accepted / judged if judged else None}


class CompiledSpeculative(Speculative):
    """The same with target and drafter compiled."""

    arranged = False

    def load(self):
        super().load()
        # A verification reads the last token and the drafts; a drafter begins with two tokens where the
        # round before accepted all of its own.
        widths = (1, self.num_draft_tokens + 1)
        self.model = compile_decoding(self.model, widths=widths, report=self.said.append)
        self.drafter = compile_decoding(self.drafter, widths=(1, 2), report=self.said.append)
        return bytes_read_per_token(self.model)


class AgreeingDrafter(ModelDrafter):
    def __init__(self, model, text, agreement):
        super().__init__(model)
        self.text, self.agreement, self.dice = text, agreement, random.Random(0)

    def draft(self, texts, num_tokens, sampling, u):
        made = super().draft(texts, num_tokens, sampling, u)
        place = len(texts[0])
        said = self.text[place : place + num_tokens]
        said += [0] * (num_tokens - len(said))
        guesses = [
            token if self.dice.random() < self.agreement else (token + 1) % self.vocab_size for token in said
        ]
        return made._replace(tokens=made.tokens.new_tensor([guesses]))


def in_turn(run, prompts, new_tokens):
    """One prompt after the other, as a caller does who has nothing better."""
    made = [run([prompt], count) for prompt, count in zip(prompts, new_tokens)]
    return {
        "tokens": [row for one in made for row in one["tokens"]],
        "times": [sum(one["times"][-1] for one in made)],
    }


def blocks_for(requests):
    """Blocks of 16 tokens in which all have room at once."""
    return sum(-(-(len(request.prompt) + request.max_new_tokens) // 16) for request in requests)


def bytes_read_per_token(model):
    """Every parameter but the rows of the embeddings that a token does not look up, and idle experts."""
    tables = {"token_embed.weight", "pos_embed.weight"}
    named = model.named_parameters(remove_duplicate=False)
    read = sum(parameter.nbytes for name, parameter in named if name not in tables)
    for module in model.modules():
        if hasattr(module, "experts") and hasattr(module, "router"):
            one = sum(parameter.nbytes for parameter in module.experts[0].parameters())
            read -= (len(module.experts) - module.num_active) * one
    return read
