"""What `python -m runs_train.language_model` does to a decoder: predict every token from those before it.

    tokens of a window      <s> def  f  (  x )  :        one more than the model reads
    the model reads         <s> def  f  (  x )
    and has to predict          def  f  (  x )  :        each at the place of the token before it

A pass over the model gives a prediction at every place, so that a window of T + 1 tokens teaches T times. Any
decoder of the zoo is trained here, whatever its layers keep of a text: in training nothing is kept. Where it
has experts, expert_balance.py sees to it that all of them learn.

Shapes: B windows in a batch, T tokens that are read, V vocabulary.
Proof: tests/test_train_language_model.py.
"""

import math

import sentencepiece
import torch.nn.functional as F

from models import DECODER
from models.utils.machine import choose_device
from models.utils.sampling import Sampling, seeded_generators
from models.utils.tokenizer import load_tokenizer
from runs_ar.generate import generate
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.expert_balance import Routers
from runs_train.folder import run_folder
from runs_train.fresh_model import check_kind, check_room, fresh_model
from runs_train.text_data import Windows, forget_others, prepare
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
    context_of,
    learning_rate,
    make_forward,
    make_optimizer,
    say,
)

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # what the checkpoint recommends
# What is shown as it trains: a young model stays on its feet at a lower temperature.
SAMPLE_TOKENS, SAMPLE = 60, Sampling(temperature=0.6, top_p=0.95)
STDLIB_PROMPT = "def read_lines(path):"


def train(options):
    options.device = choose_device(options.device)
    model_name, _ = check_kind(options, DECODER, "tokens")
    with run_folder(options, TOKENIZER_FILES) as folder:
        corpus = prepare(options.data, folder / "training", options.vocab_size, options.tokenizer)
        model = fresh_model(options, vocab_size=corpus.facts["vocab_size"])
        run = Run(model, corpus, options, folder / "training")
        run.train()
        forget_others(corpus.folder)
        save(run, model_name, folder)
        report(run, folder)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for text."""

    SETTINGS = (
        "config",
        "context",
        "batch_size",
        "accumulate",
        "steps",
        "lr",
        "weight_decay",
        "clip",
        "seed",
    )
    DATA_SETTINGS = ("file_list_sha256", "tokenizer_sha256", "vocab_size")

    def __init__(self, model, corpus, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.95))
        super().__init__(model, optimizer, options, corpus.facts, folder)
        self.corpus = corpus
        self.context = context_of(model, options)
        # Logits and their gradients, in fp32: by far the most of a batch.
        logits = 2 * 4 * options.batch_size * self.context * model.config.vocab_size
        check_room(logits, f"--batch-size {options.batch_size}: the logits of a batch", options.device)
        self.windows = Windows(corpus.train, self.context, options.batch_size, options.seed)
        self.tokenizer = load_tokenizer(corpus.folder)
        self.bytes_of = bytes_of_tokens(self.tokenizer)
        self.routers = Routers(model)
        self.forward = make_forward(model, options)

    def batch(self, n):
        return self.windows.batch(n).to(self.options.device)  # (B, T + 1)

    def num_predictions(self, tokens):
        return tokens[:, 1:].numel()

    def loss(self, tokens):
        """Mean cross-entropy of every token but the first of its window, given those before it."""
        with autocast(self.options):
            logits = self.forward(tokens[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        return loss + self.routers.gradient()

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def evaluate(self):
        """Bits per byte of a sample of the held-out text, always the same windows; then the model writes."""
        stride = self.context
        with autocast(self.options):
            measured = bits_per_byte(
                self.model, self.corpus.held_out, self.bytes_of, self.context, stride, max_windows=100
            )
        text = self.write() if math.isfinite(measured) else ""
        self.evaluations.append((self.step, measured))
        self.show_evaluation(f"held-out bits per byte {measured:.3f}")
        say("".join(f"    | {line}\n" for line in text.splitlines()))

    def write(self):
        """What the model makes of the prompt by now; the same draws each time, so that one can compare."""
        prompt = self.prompt()
        options = {"sampling": SAMPLE, "generators": seeded_generators(self.options.seed, 1)}
        options["eos_ids"] = {self.tokenizer.eos_id}
        new = [token for (token,) in generate(self.model, [prompt], SAMPLE_TOKENS, **options)]
        text = self.tokenizer.decode(prompt + new)
        # What a model has learned of a terminal's escape sequences is not for this terminal.
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)

    def prompt(self):
        """--prompt, or what suits the text: the beginning of what is held out."""
        text = self.options.prompt or (STDLIB_PROMPT if self.facts["data"] == "stdlib" else None)
        tokens = self.tokenizer.encode(text, bos=True) if text else self.corpus.held_out[:8].tolist()
        return tokens[: math.ceil(self.context / 2)]

    def describe(self):
        windows = self.options.steps * self.options.accumulate * self.options.batch_size
        return (
            f"{len(self.corpus.train):,} tokens of training text, {windows / self.windows.per_pass:.1f} "
            f"passes over it in {self.options.steps} steps"
        )

    def speed(self):
        tokens = self.options.accumulate * self.options.batch_size * self.context
        return {"tokens_per_s": f"{tokens * self.step / self.seconds:.0f}"}


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, model_name, folder):
    """The checkpoint: the model, its tokenizer, and how it is best sampled."""
    tokenizer = (run.corpus.folder / "tokenizer.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    special = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    files = {
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": tokenizer_config(pieces),
        "generation_config.json": {**special, "do_sample": True, **SAMPLING},
    }
    save_checkpoint(folder, model_name, run.model, files, special)


def tokenizer_config(pieces):
    """How the tokens were made: BOS in front of a text, no space before its first word."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": pieces.id_to_piece(pieces.bos_id()),
        "eos_token": pieces.id_to_piece(pieces.eos_id()),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    print("measuring bits per byte on all of the held-out text")
    measured = bits_per_byte(run.model, run.corpus.held_out, run.bytes_of, run.context, run.context // 2)
    draw(run, folder)
    notes = f"Bits per byte are measured in fp32, by a window of {run.context} tokens that slides by "
    notes += f"{run.context // 2}."
    write_readme(folder, run.options, readme_rows(run, measured), notes)
    print(f"{measured:.4f} bits per byte; to see it write: python run.py --checkpoint {folder}")


def draw(run, folder):
    """Both curves in bits per byte; the gap that opens between them is overfitting."""
    bits_per_nat = len(run.corpus.train) / run.facts["train_bytes"] / math.log(2)
    with picture(folder, f"{run.options.config} on {run.facts['data']}") as (axes,):
        draw_losses(axes, [loss * bits_per_nat for loss in run.losses], least_top=run.evaluations[0][1])
        draw_measured(axes, run.evaluations, "held-out text, a sample")
        axes.set_ylabel("bits per byte")


def readme_rows(run, measured):
    facts, options = run.facts, run.options
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    tokens_read = run.step * options.accumulate * options.batch_size * run.context
    train_tokens = len(run.corpus.train)
    return {
        "parameters": f"{num_parameters:,}",
        "data": f"Python {facts['python']}'s standard library" if facts["python"] else facts["data"],
        "training text": f"{facts['train_bytes']:,} bytes in {facts['train_files']} files",
        "held-out text": f"{facts['held_out_bytes']:,} bytes in {facts['held_out_files']} files",
        "sha256 of the file list": facts["file_list_sha256"],
        "vocabulary": f"{facts['vocab_size']} pieces, {facts['train_bytes'] / train_tokens:.2f} bytes each",
        "tokens read": f"{tokens_read:,}, {tokens_read / train_tokens:.1f} times the training text",
        "time": time_row(run),
        "bits per byte, all held-out text": f"{measured:.4f}",
    }
