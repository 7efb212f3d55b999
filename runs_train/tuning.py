"""What all pages do alike that tune a checkpoint: open it, let it answer as it learns, leave a new one.

    sft.py, lora.py    fine_tuning.py    it learns what an assistant says
    dpo.py             preferences.py    it learns which of two answers is better
    grpo.py            rewarded.py       it learns from what it writes itself, and a program judges

All weights are trained here; adapters.py does the same with adapters beside weights that stay.

Shapes: B rows of a batch, T tokens of the longest, V vocabulary, n tokens of answers in the batch.
Proof: tests/test_train_sft.py, tests/test_train_dpo.py, tests/test_train_grpo.py.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from conversion.adapter import fingerprint
from conversion.checkpoint import open_checkpoint
from conversion.find import find_folder
from conversion.hub import COMPANIONS
from models import DECODER, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.files import read_text
from models.utils.machine import choose_device, peak_memory, spoken_bytes
from runs_ar.chat import end_of_turn_ids
from runs_ar.generate import generate, generation_defaults
from runs_train.chat_data import PLAIN_TEMPLATE
from runs_train.expert_balance import Routers
from runs_train.folder import run_folder
from runs_train.fresh_model import BYTES_PER_PARAMETER, check_room
from runs_train.trained_checkpoint import save_checkpoint, time_row, write_readme
from runs_train.training_run import (
    TrainingRun,
    autocast,
    is_trained,
    learning_rate,
    make_forward,
    make_optimizer,
    say,
)

LONGEST = 2048  # tokens of a conversation, where --context says nothing
NUM_SAMPLES, ANSWER_TOKENS = 4, 48


def train(options, run_class):
    """Train all weights; run_class, a Tuning, says on what, and what a step does."""
    options.device = choose_device(options.device)
    base = open_base(options)
    if base.stored:
        raise UserError(
            f"--checkpoint {options.checkpoint}: is stored in {base.stored}; lora trains beside that"
        )
    names = [path.name for path in companions(base.folder)]
    with run_folder(options, {*names, "chat_template.jinja", "generation_config.json"}) as folder:
        data = run_class.read(options)
        count = sum(parameter.numel() for parameter in base.model.parameters())
        what = (
            f"--checkpoint {options.checkpoint}: {count:,} parameters, gradients and Adam's two means of them"
        )
        check_room(count * BYTES_PER_PARAMETER, what, options.device)
        model = load_model(base.folder, options.device, torch.float32, arranged=False)
        torch.manual_seed(options.seed)  # of dropout, where the model has some
        run = run_class(model, base, data, options, folder / "training")
        run.train()
        save(run, folder)
        report(run, folder)


# What is tuned ----------------------------------------------------------------------------------------------


def open_base(options):
    """The Checkpoint of --checkpoint, with the template that the conversations are laid out by."""
    folder = find_folder(options.checkpoint)
    base = open_checkpoint(folder, device=options.device, dtype=torch.float32)
    if base.kind != DECODER:
        raise UserError(
            f"--checkpoint {options.checkpoint}: a {base.model_name} is a {base.kind}; "
            f"{options.page} trains a decoder"
        )
    name = folder.parent.name if folder.name == "converted" else folder.name
    options.out = options.out or CHECKPOINTS / f"my-{name.removeprefix('my-')}-{options.page}"
    if "template" in options:  # without the option a checkpoint may go on without one
        give_template(base.tokenizer, options)
    return base


def give_template(tokenizer, options):
    if options.template:
        tokenizer.chat_template = read_text(options.template, "--template")
    elif tokenizer.chat_template is None:
        if tokenizer.eos_id is None:
            raise UserError(
                f"--checkpoint {options.checkpoint}: has no chat template, and no EOS token for a plain one; "
                "give --template FILE"
            )
        print("the checkpoint has no chat template; it gets a plain one (chat_data.py shows it)")
        tokenizer.chat_template = PLAIN_TEMPLATE


def companions(folder):
    """The files of the tokenizer, and whatever else a checkpoint needs to run."""
    return [path for pattern in COMPANIONS for path in folder.glob(pattern) if path.parent == folder]


# A run ------------------------------------------------------------------------------------------------------


class Tuning(TrainingRun):
    """A checkpoint in training. Besides what TrainingRun asks for, a page's run gives

    read(options)     static: the data, with .train, .held_out and .facts
    prepare(data)     what is to be made of them before the first step, and self.samples
    measure(most)     the figures that FIGURES names, on held-out data: of `most` batches or all
    draw(folder)      the picture of the run
    data_rows()       {name: what is known of the data}, for the README
    """

    SETTINGS = ("accumulate", "steps", "lr", "weight_decay", "clip", "seed")
    DATA_SETTINGS = ("data_sha256", "template_sha256", "base_sha256")
    PROGRESS = TrainingRun.PROGRESS | {"answers": list}
    FIGURES = {"held-out loss": ".3f"}  # and how each is written
    MEASURED = 20  # batches, as it trains; all of them in the end. None: all of them always

    def __init__(self, model, base, data, options, folder):
        facts = data.facts | {"template_sha256": hash_of(base.tokenizer.chat_template or "")}
        facts["base_sha256"] = fingerprint(base.folder)
        super().__init__(model, make_optimizer(model, options, (0.9, 0.95)), options, facts, folder)
        self.base, self.tokenizer = base, base.tokenizer
        self.context = context_of(base.config, options)
        self.answers = []  # to the samples: before the first step, and lately
        self.routers = Routers(model)
        self.hidden = make_forward(model, options, model.hidden)
        self.prepare(data)
        self.ends = generation_defaults(base.folder, base.tokenizer)[1]
        if base.tokenizer.chat_template:
            self.ends |= end_of_turn_ids(base.tokenizer)

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def log_probs(self, tokens, is_answer, model=None):
        """(B, T - 1): the log-probability of each token but the first; 0 for those that are no answer's.

        model: another one than that which is trained.
        """
        targets = is_answer[:, 1:].bool()  # (B, T - 1)
        hidden, head = (model.hidden, model.lm_head) if model else (self.hidden, self.model.lm_head)
        with autocast(self.options):
            # The head is the largest matrix of a small model: it sees the places of answers alone.
            logits = head(hidden(tokens[:, :-1])[targets])  # (n, V)
        found = -F.cross_entropy(logits.float(), tokens[:, 1:][targets], reduction="none")  # (n,)
        return found.new_zeros(targets.shape).masked_scatter(targets, found)

    def check_logits(self, places):
        """UserError where there is no room for logits of so many places, and their gradients, in fp32."""
        what = "the logits of a batch"
        if "batch_tokens" in self.options:
            what = f"--batch-tokens {self.options.batch_tokens}: {what}"
        check_room(2 * 4 * places * self.base.config.vocab_size, what, self.options.device)

    # What it says as it learns.

    def choose_samples(self, conversations):
        """(question, prompt, right answer) of some that are held out, each up to its first answer."""
        samples = []
        for messages in (conversation.messages for conversation in conversations):
            n = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
            prompt = self.tokenizer.encode_chat(messages[:n])
            if len(prompt) < self.context:
                samples.append((messages[n - 1]["content"], prompt, messages[n]["content"]))
        return samples[:: max(1, len(samples) // NUM_SAMPLES)][:NUM_SAMPLES]

    def evaluate(self):
        """Measure what is held out, always the same sample of it; then the model answers some of it."""
        figures = self.measure(self.MEASURED)
        written = self.answer() if all(map(math.isfinite, figures)) else [""] * len(self.samples)
        self.answers = [*self.answers[:1], written]
        self.evaluations.append((self.step, *figures))
        if self.step:
            self.show_evaluation(self.spoken(figures))
        else:
            say(f"before the first step   {self.spoken(figures)}")
        self.show_answers(written)

    def show_answers(self, written):
        pairs = zip(self.shown(), written)
        say("".join(f"    | {question}  -->  {text}\n" for (question, *_), text in pairs))

    def spoken(self, figures):
        return ", ".join(
            f"{name} {value:{form}}" for (name, form), value in zip(self.FIGURES.items(), figures)
        )

    def answer(self):
        """What the model says to the samples by now: each time the most probable token."""
        written = self.write([prompt for _, prompt, _ in self.samples], ANSWER_TOKENS)
        return [on_one_line(self.text_of(tokens)) for tokens in written]

    def write(self, prompts, most, **how):
        """The tokens that continue each prompt, at most so many; how: as `generate` takes it."""
        self.model.eval()
        written = [[] for _ in prompts]
        for tokens in generate(self.model, prompts, most, eos_ids=self.ends, **how) if prompts else ():
            for row, token in zip(written, tokens):
                row += [] if token is None else [token]
        return written

    def text_of(self, tokens):
        # A matrix may have rows for tokens that the tokenizer does not have.
        return self.tokenizer.decode([token for token in tokens if token < self.tokenizer.vocab_size])

    def shown(self):
        return [
            (on_one_line(question), prompt, on_one_line(right)) for question, prompt, right in self.samples
        ]

    def introduce(self):
        count = sum(parameter.numel() for parameter in filter(is_trained, self.model.parameters()))
        print(f"{count:,} parameters are trained, {self.describe()}", flush=True)
        if not self.evaluations:
            self.evaluate()

    def how_to_run(self, folder):
        return f"python run.py {folder}{' --chat' if self.tokenizer.chat_template else ''}"

    def compared(self):
        """What became of the samples, for the end of the run."""
        lines = []
        for (question, _, right), *texts in zip(self.shown(), *self.answers):
            lines += [question, f"    before: {texts[0]}", f"    after:  {texts[-1]}", f"    right:  {right}"]
        return "\n".join(lines)

    def before_and_after(self):
        """A table of what the model said to questions that it never learned from."""
        lines = ["Answers are the most probable ones, token by token, to questions that are held out.", ""]
        lines += ["| question | before | after | right |", "|---|---|---|---|"]
        for (question, _, right), *texts in zip(self.shown(), *self.answers):
            lines.append(f"| {question} | {texts[0]} | {texts[-1]} | {right} |")
        return "\n".join(lines)


def without_dropout(model):
    """A model whose probabilities are the same in training: two of them are compared, not one and a half."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def context_of(config, options):
    longest = getattr(config, "max_seq_len", LONGEST)
    wanted = getattr(options, "context", None)
    if (wanted or 0) > longest:
        raise UserError(f"--context {wanted} is longer than the model's max_seq_len, {longest}")
    return wanted or min(longest, LONGEST)


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def on_one_line(text):
    """As a terminal or a table may show it."""
    text = " ".join(text.split())
    return "".join(letter if letter.isprintable() and letter != "|" else "?" for letter in text)


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, folder):
    """The checkpoint: the model, the files of its base's tokenizer, its template, and what ends an answer."""
    files = {path.name: path.read_bytes() for path in companions(run.base.folder)}
    if run.tokenizer.chat_template:
        files["chat_template.jinja"] = run.tokenizer.chat_template.encode()
    special = {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": run.tokenizer.eos_id}
    special = {name: token for name, token in special.items() if token is not None}
    if run.tokenizer.chat_template:
        # An answer is a matter of fact here, and the most probable one is wanted.
        files["generation_config.json"] = {**special, "eos_token_id": sorted(run.ends), "do_sample": False}
    save_checkpoint(folder, run.base.model_name, run.model, files, special)


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    measured = run.measure()
    run.draw(folder)
    trained = sum(parameter.numel() for parameter in filter(is_trained, run.model.parameters()))
    of_base = sum(parameter.numel() for parameter in run.base.model.parameters())
    rows = {
        "tuned from": str(run.options.checkpoint),
        "parameters trained": f"{trained:,}, beside {of_base:,} of the model's own",
        "data": str(run.facts["data"]),
        **run.data_rows(),
        "sha256 of the data": run.facts["data_sha256"],
        "time": time_row(run),
        "peak memory": spoken_bytes(peak_memory(run.options.device)),
        "before": run.spoken(run.evaluations[0][1:]) + (" (a sample)" if run.MEASURED else ""),
        "after": run.spoken(measured),
    }
    write_readme(folder, run.options, rows, run.before_and_after())
    print(run.compared())
    print(f"before: {rows['before']}\nafter:  {rows['after']}; to talk to it: {run.how_to_run(folder)}")
