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

import math
import sys

import sentencepiece
import torch
import torch.nn.functional as F

from models import create_model, load_config
from models.utils.errors import run_main
from models.utils.tokenizer import load_tokenizer
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.options import (
    TrainingParser,
    add_folder_options,
    add_machine_options,
    number,
    prepare_folder,
    whole,
)
from runs_train.text_data import Windows, prepare
from runs_train.trained_checkpoint import draw_losses, picture, save_checkpoint, time_row, write_readme
from runs_train.training_run import (
    TrainingRun,
    autocast,
    context_of,
    learning_rate,
    make_forward,
    make_optimizer,
)


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
    save(run, model_name, folder)
    report(run, folder, argv)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for text."""

    SETTINGS = ("config", "context", "batch_size", "accumulate", "steps", "lr", "warmup")
    SETTINGS += ("weight_decay", "clip", "seed", "float32")
    DATA_SETTINGS = ("file_list_sha256", "tokenizer_sha256", "vocab_size")

    def __init__(self, model, corpus, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.95))
        super().__init__(model, optimizer, options, corpus.facts, folder)
        self.corpus = corpus
        self.context = context_of(model, options)
        self.windows = Windows(corpus.train, self.context, options.batch_size, options.seed)
        self.bytes_of = bytes_of_tokens(load_tokenizer(folder / "tokens"))
        self.forward = make_forward(model, options)

    def batch(self, n):
        return self.windows.batch(n).to(self.options.device)

    def num_predictions(self, tokens):
        return tokens[:, 1:].numel()

    def loss(self, tokens):
        """Mean cross-entropy of every token but the first of its window, given those before it."""
        with autocast(self.options):
            logits = self.forward(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def evaluate(self):
        """Bits per byte of a sample of the held-out text: always the same windows, side by side."""
        stride = self.context
        with autocast(self.options):
            measured = bits_per_byte(
                self.model, self.corpus.held_out, self.bytes_of, self.context, stride, max_windows=100
            )
        self.evaluations.append((self.step, measured))
        self.show_evaluation(f"held-out bits per byte {measured:.3f}")

    def describe(self):
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        passes = (
            self.options.steps * self.options.accumulate * self.options.batch_size / self.windows.per_pass
        )
        print(
            f"{num_parameters:,} parameters, {len(self.corpus.train):,} tokens of training text, "
            f"{passes:.1f} passes over it in {self.options.steps} steps"
        )

    def speed(self):
        tokens = self.options.accumulate * self.options.batch_size * self.context
        return {"tokens_per_s": f"{tokens * self.step / self.seconds:.0f}"}


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, model_name, folder):
    """The checkpoint: the model, its tokenizer, and how it is best sampled."""
    tokenizer = (run.folder / "tokens" / "tokenizer.model").read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    special = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    files = {
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": tokenizer_config(pieces),
        "generation_config.json": {**special, **sampling},
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


def report(run, folder, argv):
    """Measure the model as it was written, and put its story beside it."""
    print("measuring bits per byte on all of the held-out text")
    measured = bits_per_byte(run.model, run.corpus.held_out, run.bytes_of, run.context, run.context // 2)
    draw(run, folder / "loss.png")
    notes = f"Bits per byte are measured in fp32, by a window of {run.context} tokens that slides by "
    notes += f"{run.context // 2}."
    write_readme(folder, "language_model", argv, readme_rows(run, measured), notes)
    print(f"{measured:.4f} bits per byte; to see it write: python run.py --checkpoint {folder}")


def draw(run, path):
    """Both curves in bits per byte; the gap that opens between them is overfitting."""
    bits_per_nat = len(run.corpus.train) / run.facts["train_bytes"] / math.log(2)
    with picture(path, f"{run.options.config} on {run.facts['data']}") as axes:
        draw_losses(axes, [loss * bits_per_nat for loss in run.losses], least_top=run.evaluations[0][1])
        axes.plot(*zip(*run.evaluations), linewidth=1, marker=".", label="held-out text, a sample")
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


# Options ----------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = TrainingParser("language_model", __doc__)
    add_data_options(parser.add_argument_group("what [default]").add_argument)
    add_training_options(parser.add_argument_group("how [default]").add_argument)
    add_machine_options(parser.add_argument_group("on this machine [default]").add_argument)
    return parser.parse_args(argv)


def add_data_options(add):
    add_folder_options(add)
    add("--data", required=True, help="a text file, a folder of them, or stdlib: Python's library, as source")
    add("--vocab-size", type=whole(260), default=4096, metavar="V", help="of the tokenizer [%(default)s]")
    add("--tokenizer", metavar="FILE", help="a sentencepiece tokenizer.model to use instead of training one")


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


if __name__ == "__main__":
    run_main(main)
