"""Measuring one model: weights for all, a process for each subject, a check, and then turns."""

import random
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.checks import Expected, check, check_rows
from benchmarks.turns import Process, scratch_folder
from models import DECODER, ONE_PASS, build_model, inputs_of, kind_of, load_config
from models.utils.command_line import DTYPES
from models.utils.errors import UserError
from models.utils.machine import available_memory, spoken_bytes

WEIGHTS = {"float32": 4, "bfloat16": 2, "int8": 1.1, "int4": 0.7}  # bytes of one, about
GGUF_KINDS = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
ZOO = ("eager", "compiled", "speculative", "compiled+speculative", "served", "compiled+served")
PEERS = ("transformers", "llama.cpp")
IN_ONE_PASS = ("eager", "transformers")
# What a model that answers in one pass is given: its word for it, ours, and how many at once.
ANSWERS = {"tokens": ("texts", 16), "images": ("images", 8)}
TEXT_TOKENS = 128  # of a text for such a model
PROGRAM_BYTES = 350_000_000  # of a process beside its weights
CHECKED_TOKENS = 16
# The threads of a library go on spinning for some milliseconds when their work is done.
SECONDS_TO_SETTLE = 0.05


@dataclass(eq=False)
class Subject:
    """One thing that is measured, and what came of it."""

    config: str
    weights: str
    name: str
    process: Process
    figures: dict = field(default_factory=dict)  # single ones: seconds to load, peak memory, ...
    samples: dict = field(default_factory=dict)  # {"decode": [seconds per token, ...], ...}

    def takes_part(self, phase):
        if "speculative" in self.name:
            return phase == "decode"
        return "served" not in self.name or phase.startswith("batch")

    def run(self, task):
        time.sleep(SECONDS_TO_SETTLE)
        reply = self.process.call("run", prompts=task.prompts, new_tokens=task.new_tokens)
        return reply["result"], reply["peak_memory"]

    def note(self, phase, sample):
        self.samples.setdefault(phase, []).append(sample)


@dataclass(frozen=True)
class Task:
    prompts: list  # lists of token ids
    new_tokens: int | list  # of each prompt; a list: for each its own

    def longest_text(self):
        counts = (
            self.new_tokens if isinstance(self.new_tokens, list) else [self.new_tokens] * len(self.prompts)
        )
        return max(len(prompt) + count for prompt, count in zip(self.prompts, counts))

    def num_tokens(self):
        return (
            sum(self.new_tokens) if isinstance(self.new_tokens, list) else len(self.prompts) * self.new_tokens
        )


def measure(config, args, threads, read_memory):
    """The subjects of one config, with what they took. read_memory() is called once a round."""
    plan = plan_subjects(config, args)
    check_room(config, plan, torch.device(args.device))
    tasks = plan_tasks(config, args)
    prompt = next(iter(tasks.values())).prompts[0]
    with scratch_folder() as folder, ExitStack() as stack:
        expected = write_weights(config, plan, Path(folder), args, prompt)
        subjects = []
        for weights, name in tqdm(plan, f"{config}: loading and checking", leave=False, disable=None):
            process = stack.enter_context(start(config, weights, name, Path(folder), threads, args, tasks))
            subjects.append(Subject(config, weights, name, process))
            load_and_check(subjects[-1], prompt, expected)
        for phase, task in tasks.items():
            take_turns(subjects, phase, task, args.rounds, read_memory)
    return subjects


def plan_subjects(config, args):
    """(weights, subject) of all that is measured, in the order of the table."""
    plan = set()
    for name in args.subjects:
        for weights in args.weights:
            if why_not(config, name):
                continue
            if name == "transformers" and weights not in DTYPES:
                weights = "bfloat16"  # what int8 and int4 are compared with
            plan.add((weights, name))
    if not plan:
        reasons = "; ".join(f"no {name}: {why_not(config, name)}" for name in args.subjects)
        raise UserError(f"{config}: nothing is left to measure ({reasons}); give other --subjects")
    order = [*ZOO, *PEERS]
    return sorted(plan, key=lambda pair: (list(WEIGHTS).index(pair[0]), order.index(pair[1])))


def why_not(config, name):
    """Why a model is not measured as the subject called `name`, or None."""
    model_name, fields = load_config(config)
    if is_one_pass(config) and name not in IN_ONE_PASS:
        return "it answers in one pass"
    if name == "llama.cpp":
        from benchmarks.gguf_file import architecture  # needs the gguf package

        try:
            architecture(model_name, fields)
        except UserError as error:
            return str(error)
    return None


def is_one_pass(config):
    return kind_of(load_config(config)[0]) == ONE_PASS


def answers_of(config):
    """(what a model that answers in one pass is given, how many at once)."""
    return ANSWERS[inputs_of(load_config(config)[0])[0]]


def check_kind(config):
    """UserError for a model that none of the subjects can run."""
    model_name, _ = load_config(config)
    kind = kind_of(model_name)
    if kind not in (DECODER, ONE_PASS):
        raise UserError(f"{config} is an {kind}; give a decoder or a model that answers in one pass")
    if kind == ONE_PASS and inputs_of(model_name)[0] not in ANSWERS:
        given = inputs_of(model_name)[0]
        raise UserError(f"{config} is given {given}; benchmark.py draws {' and '.join(ANSWERS)}")


def check_room(config, plan, device):
    """UserError if the subjects, which are in memory all at once, or their files will not fit."""
    num_weights = sum(parameter.numel() for parameter in build_model(*load_config(config)).parameters())
    needed = sum(num_weights * WEIGHTS[weights] + PROGRAM_BYTES for weights, _ in plan)
    available = available_memory(device)
    if available is not None and needed > available:
        raise UserError(
            f"{config}: {len(plan)} subjects together need {spoken_bytes(needed)} of memory, "
            f"{spoken_bytes(available)} are free; give fewer --weights or --subjects"
        )
    # In fp32 for all, and then up to three times for each kind of weights.
    kinds = {weights for weights, _ in plan}
    needed = num_weights * (4 + sum(3 * WEIGHTS[kind] for kind in kinds))
    place = tempfile.gettempdir()
    if needed > shutil.disk_usage(place).free:
        raise UserError(
            f"{config}: the weights need {spoken_bytes(needed)} in {place}, which has less; "
            f"give fewer --weights, or another place with TMPDIR"
        )


def plan_tasks(config, args):
    """{phase: Task}, with prompts of random tokens; one for an image is a number."""
    name, (_, config) = config, load_config(config)
    dice = random.Random(0)

    def prompt(length):
        return [dice.randrange(config.vocab_size) for _ in range(length)]

    if is_one_pass(name):
        kind, usual = answers_of(name)

        def one_of(number):
            return [number] if kind == "images" else prompt(min(TEXT_TOKENS, config.max_seq_len))

        sizes = args.batches or [usual]
        return {f"batch {size}": Task([one_of(n) for n in range(size)], 1) for size in sizes}

    tasks = {
        "decode": Task([prompt(args.prompt_tokens)], args.new_tokens),
        "prefill": Task([prompt(min(args.prefill_tokens, config.max_seq_len - 1))], 1),
    }
    longest = min(2 * args.prompt_tokens, config.max_seq_len - args.new_tokens)
    for size in args.batches:
        prompts = [prompt(dice.randint(1, longest)) for _ in range(size)]
        tasks[f"batch {size}"] = Task(prompts, args.new_tokens)
    if args.requests:
        lengths, most = (8, min(256, config.max_seq_len // 2)), min(128, config.max_seq_len // 2)
        prompts = [prompt(dice.randint(*lengths)) for _ in range(args.requests)]
        counts = [dice.randint(16, most) for _ in prompts]
        tasks[f"batch of {args.requests} requests"] = Task(prompts, counts)
    return tasks


def write_weights(config, plan, folder, args, prompt):
    """Have the files written, by a process that is gone afterwards with its memory; what is to be said."""
    weights = list(dict.fromkeys(weights for weights, _ in plan))
    kinds = {weights: GGUF_KINDS[weights] for weights, name in plan if name == "llama.cpp"}
    drafting = any("speculative" in name for _, name in plan)
    print(f"{config}: writing weights", file=sys.stderr)
    settings = {"config": config, "folder": str(folder), "threads": args.threads}
    with Process("writer", f"{config}, writing weights", **settings) as writer:
        sizes = writer.call("write", weights=weights, gguf_kinds=kinds, draft=drafting)["result"]
        if is_one_pass(config):
            tokens = writer.call("one_pass_reference", prompt=prompt)["result"]
        else:
            num_checked = min(CHECKED_TOKENS, args.new_tokens)
            tokens = writer.call("reference", prompt=prompt, new_tokens=num_checked)["result"]
    return Expected(tokens, np.load(folder / "reference.npy"), sizes)


def start(config, weights, name, folder, threads, args, tasks):
    """The Process of one subject."""
    settings = {"threads": threads, "device": args.device}
    settings["dtype"] = weights if weights in DTYPES else "bfloat16"
    settings["folder"] = str(folder / (f"hf-{weights}" if name == "transformers" else weights))
    if name == "llama.cpp":
        kind = GGUF_KINDS[weights]
        settings = {"file": str(folder / f"{kind}.gguf"), "threads": threads}
        settings["num_slots"] = max(task.longest_text() for task in tasks.values())
        settings["num_texts"] = max(len(task.prompts) for task in tasks.values())
    if "speculative" in name:
        settings["draft"] = str(folder / "draft" / weights)
        settings |= {"num_draft_tokens": args.num_draft_tokens, "agreement": args.agreement}
    worker = f"{name} encoder" if is_one_pass(config) else name
    return Process(worker, f"{config}, {weights}, {name}", **settings)


def load_and_check(subject, prompt, expected):
    """What is known of a subject before its turns; UserError if it does not say what it should."""
    about = subject.process.call("about")
    loaded = subject.process.call("load")
    said = subject.process.call("run", prompts=[prompt], new_tokens=len(expected.tokens))["result"]
    logits = subject.process.call("logits", prompt=prompt)["result"]
    subject.figures = {
        "answers": answers_of(subject.config)[0] if is_one_pass(subject.config) else "tokens",
        **about["result"],
        "memory_before_loading": about["peak_memory"],
        "seconds_to_load": loaded["seconds"],
        "seconds_to_first_token_ever": said["times"][0],
        # What a peer reads is known from the files that it was given.
        "bytes_per_token": loaded["result"] or expected.sizes[f"{subject.name} {subject.weights}"],
        "notes": subject.process.call("notes")["result"] if subject.name in ZOO else [],
        **check(subject, said["tokens"][0], np.array(logits), expected),
    }
    for note in subject.figures["notes"]:
        print(f"{subject.process.label}: {note}", file=sys.stderr)


def take_turns(subjects, phase, task, rounds, read_memory):
    """Rounds of one turn each, the first of which is not timed; each begins with another subject."""
    subjects = [subject for subject in subjects if subject.takes_part(phase)]
    total = (rounds + 1) * len(subjects)
    with tqdm(total=total, desc=phase, leave=False, disable=None, unit="turn") as progress:
        rows = {}
        for subject in subjects:
            result, _ = subject.run(task)
            rows[subject] = result["tokens"]
            progress.update()
        if phase.startswith("batch"):
            check_rows(rows)
        for n in range(rounds):
            read_memory()
            for subject in subjects[n % len(subjects) :] + subjects[: n % len(subjects)]:
                take_turn(subject, phase, task)
                progress.update()


def take_turn(subject, phase, task):
    result, peak = subject.run(task)
    times = result["times"]
    if phase == "decode":
        subject.note("first token", times[0])
        subject.note("decode", (times[-1] - times[0]) / (len(times) - 1))
    elif phase == "prefill":
        subject.note("prefill", times[0])
    else:
        subject.note(phase, times[-1] / task.num_tokens())
        return  # a batch needs more memory than the peak that is told
    subject.figures["peak_memory"] = peak
    if "acceptance" in result:
        subject.figures["acceptance"] = result["acceptance"]
