"""What `python -m runs_train.sft` does to a decoder: go on training it, on what an assistant says.

    the model reads        <s> ### user \\n Hi \\n ### assistant \\n Hello !
    and has to predict                                            Hello ! </s>    each at the place before it

It is the loss of next_token.py, taken at fewer places: a question is read, not learned. So the head, the
largest matrix of a small model, is applied to the places of answers alone.

One conversation is one row. What packing several into a row would save is pads, and batches of one length
have few; the run says how many. So no token can see another conversation, whatever the model is made of, and
a conversation has the logits that it would have alone.

Shapes: B conversations in a batch, T tokens of the longest, V vocabulary, n tokens of answers in the batch.
Proof: tests/test_train_sft.py.
"""

import hashlib
import math

import torch
import torch.nn.functional as F

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
from runs_train.chat_data import PLAIN_TEMPLATE, Batches, read_corpus
from runs_train.folder import run_folder
from runs_train.fresh_model import BYTES_PER_PARAMETER, check_room
from runs_train.trained_checkpoint import (
    draw_losses,
    draw_measured,
    picture,
    save_checkpoint,
    time_row,
    write_readme,
)
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
BATCHES_MEASURED = 20  # of what is held out, as it trains; all of it in the end
NUM_SAMPLES, ANSWER_TOKENS = 4, 48


def train(options):
    options.device = choose_device(options.device)
    base = open_base(options)
    if base.stored:
        raise UserError(
            f"--checkpoint {options.checkpoint}: is stored in {base.stored}; lora trains beside that"
        )
    names = [path.name for path in companions(base.folder)]
    with run_folder(options, {*names, "chat_template.jinja", "generation_config.json"}) as folder:
        corpus = read_corpus(options.data)
        count = sum(parameter.numel() for parameter in base.model.parameters())
        what = (
            f"--checkpoint {options.checkpoint}: {count:,} parameters, gradients and Adam's two means of them"
        )
        check_room(count * BYTES_PER_PARAMETER, what, options.device)
        model = load_model(base.folder, options.device, torch.float32, arranged=False)
        torch.manual_seed(options.seed)  # of dropout, where the model has some
        run = Run(model, base, corpus, options, folder / "training")
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
    options.out = options.out or CHECKPOINTS / f"my-{name}-{options.page}"
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


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for conversations."""

    SETTINGS = ("batch_tokens", "context", "accumulate", "steps", "lr", "weight_decay", "clip", "seed")
    DATA_SETTINGS = ("conversations_sha256", "template_sha256", "base_sha256")
    PROGRESS = TrainingRun.PROGRESS | {"answers": list}

    def __init__(self, model, base, corpus, options, folder):
        tokenizer = base.tokenizer
        facts = corpus.facts | {"template_sha256": hash_of(tokenizer.chat_template)}
        facts["base_sha256"] = fingerprint(base.folder)
        super().__init__(model, make_optimizer(model, options, (0.9, 0.95)), options, facts, folder)
        self.base, self.tokenizer = base, tokenizer
        self.context = context_of(base.config, options)
        given = (tokenizer, self.context, options.batch_tokens)
        self.batches = Batches(corpus.train, *given, options.seed, f"--data {options.data}")
        self.held_out = Batches(corpus.held_out, *given, 0, f"--data {options.data}")
        # Logits and their gradients, in fp32: of as many places as the largest batch may have.
        logits = 2 * 4 * max(options.batch_tokens, self.context) * base.config.vocab_size
        check_room(logits, f"--batch-tokens {options.batch_tokens}: the logits of a batch", options.device)
        self.samples = self.choose_samples(corpus.held_out)
        self.ends = generation_defaults(base.folder, tokenizer)[1] | end_of_turn_ids(tokenizer)
        self.answers = []  # to the samples: before the first step, and lately
        self.hidden = make_forward(model, options, model.hidden)

    def choose_samples(self, conversations):
        """(question, prompt, right answer) of some that are held out, each up to its first answer."""
        samples = []
        for messages in (conversation.messages for conversation in conversations):
            n = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
            prompt = self.tokenizer.encode_chat(messages[:n])
            if len(prompt) < self.context:
                samples.append((messages[n - 1]["content"], prompt, messages[n]["content"]))
        return samples[:: max(1, len(samples) // NUM_SAMPLES)][:NUM_SAMPLES]

    def batch(self, n):
        return [side.to(self.options.device) for side in self.batches.batch(n)]  # each (B, T)

    def num_predictions(self, batch):
        _, is_answer = batch
        return is_answer[:, 1:].sum().item()

    def loss(self, batch):
        """Mean cross-entropy of the tokens of answers, given all before them in their conversation."""
        tokens, is_answer = batch
        targets = is_answer[:, 1:].bool()  # (B, T - 1)
        with autocast(self.options):
            hidden = self.hidden(tokens[:, :-1])  # (B, T - 1, D)
            logits = self.model.lm_head(hidden[targets])  # (n, V)
        return F.cross_entropy(logits.float(), tokens[:, 1:][targets])

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def evaluate(self):
        """The loss on a sample of what is held out, always the same; then the model answers some of it."""
        measured = self.measure(BATCHES_MEASURED)
        written = self.answer() if math.isfinite(measured) else [""] * len(self.samples)
        self.answers = [*self.answers[:1], written]
        self.evaluations.append((self.step, measured))
        if self.step:
            self.show_evaluation(f"held-out loss {measured:.3f}")
        else:
            say(f"before the first step   held-out loss {measured:.3f}")
        say(
            "".join(f"    | {question}  -->  {text}\n" for (question, *_), text in zip(self.shown(), written))
        )

    @torch.no_grad()
    def measure(self, most=None):
        """The held-out loss, in nats per token of the answers, of `most` batches or all."""
        self.model.eval()
        nats = count = 0
        for n in range(min(most or self.held_out.per_pass, self.held_out.per_pass)):
            batch = [side.to(self.options.device) for side in self.held_out.batch(n)]
            number = self.num_predictions(batch)
            nats, count = nats + self.loss(batch).item() * number, count + number
        return nats / count

    def answer(self):
        """What the model says to the samples by now: each time the most probable token."""
        self.model.eval()
        prompts, answers = [prompt for _, prompt, _ in self.samples], [[] for _ in self.samples]
        for tokens in generate(self.model, prompts, ANSWER_TOKENS, eos_ids=self.ends) if prompts else ():
            for answer, token in zip(answers, tokens):
                # A matrix may have rows for tokens that the tokenizer does not have.
                answer += [token] if token is not None and token < self.tokenizer.vocab_size else []
        return [on_one_line(self.tokenizer.decode(answer)) for answer in answers]

    def shown(self):
        return [
            (on_one_line(question), prompt, on_one_line(right)) for question, prompt, right in self.samples
        ]

    def introduce(self):
        count = sum(parameter.numel() for parameter in filter(is_trained, self.model.parameters()))
        print(f"{count:,} parameters are trained, {self.describe()}", flush=True)
        if not self.evaluations:
            self.evaluate()

    def describe(self):
        batches, facts = self.batches, self.facts
        passes = self.options.steps * self.options.accumulate / batches.per_pass
        text = (
            f"{facts['train']:,} conversations, {passes:.1f} passes over them in {self.options.steps} steps; "
        )
        text += f"{batches.share_of_pads():.1%} of the places are pads"
        return "\n".join([text, *self.losses_of_data()])

    def how_to_run(self, folder):
        return f"python run.py {folder} --chat"

    def losses_of_data(self):
        """What truncation took, a line each."""
        lines = []
        for part, name in (self.batches, "training"), (self.held_out, "held-out"):
            if part.num_cut:
                lines.append(
                    f"{part.num_cut:,} {name} conversations of more than {self.context} tokens are cut, by "
                    f"{part.num_lost:,} tokens of answers; {part.num_left_out:,} have no answer left and are "
                    "left out"
                )
        return lines

    def speed(self):
        per_batch = self.batches.lengths.sum() / self.batches.per_pass
        tokens = per_batch * self.options.accumulate * self.step
        return {"tokens_per_s": f"{tokens / self.seconds:.0f}"}


def context_of(config, options):
    longest = getattr(config, "max_seq_len", LONGEST)
    if (options.context or 0) > longest:
        raise UserError(f"--context {options.context} is longer than the model's max_seq_len, {longest}")
    return options.context or min(longest, LONGEST)


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
    files["chat_template.jinja"] = run.tokenizer.chat_template.encode()
    special = {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": run.tokenizer.eos_id}
    special = {name: token for name, token in special.items() if token is not None}
    # An answer is a matter of fact here, and the most probable one is wanted.
    files["generation_config.json"] = {**special, "eos_token_id": sorted(run.ends), "do_sample": False}
    save_checkpoint(folder, run.base.model_name, run.model, files, special)


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    measured = run.measure()
    draw(run, folder)
    write_readme(folder, run.options, readme_rows(run, measured), before_and_after(run))
    before, after = run.evaluations[0][1], measured
    for (question, _, right), *texts in zip(run.shown(), *run.answers):
        print(f"{question}\n    before: {texts[0]}\n    after:  {texts[-1]}\n    right:  {right}")
    print(f"held-out loss {before:.3f} before, {after:.3f} after; to talk to it: {run.how_to_run(folder)}")


def draw(run, folder):
    """Both losses; the gap that opens between them is overfitting."""
    with picture(folder, f"{run.options.checkpoint} on {run.facts['data']}") as (axes,):
        draw_losses(axes, run.losses, least_top=run.evaluations[1][1])
        draw_measured(axes, run.evaluations, "held-out conversations, a sample")
        axes.set_ylabel("nats per token of answers")


def readme_rows(run, measured):
    facts, trained = run.facts, sum(p.numel() for p in filter(is_trained, run.model.parameters()))
    all_of_them = sum(parameter.numel() for parameter in run.base.model.parameters())
    return {
        "tuned from": str(run.options.checkpoint),
        "parameters trained": f"{trained:,}, beside {all_of_them:,} of the model's own",
        "data": str(facts["data"]),
        "conversations": f"{facts['train']:,} to learn from, {facts['held_out']:,} held out",
        "sha256 of the conversations": facts["conversations_sha256"],
        "truncation": "; ".join(run.losses_of_data()) or f"none, at {run.context} tokens",
        "pads": f"{run.batches.share_of_pads():.1%} of the places of the batches",
        "time": time_row(run),
        "peak memory": spoken_bytes(peak_memory(run.options.device)),
        "held-out loss before": f"{run.evaluations[0][1]:.4f} nats per token of the answers (a sample)",
        "held-out loss after, all of it": f"{measured:.4f}",
    }


def before_and_after(run):
    """A table of what the model said to questions that it never learned from."""
    lines = ["Answers are the most probable ones, token by token, to questions that are held out.", ""]
    lines += ["| question | before | after | right |", "|---|---|---|---|"]
    for (question, _, right), *texts in zip(run.shown(), *run.answers):
        lines.append(f"| {question} | {texts[0]} | {texts[-1]} | {right} |")
    return "\n".join(lines)
