"""What `python -m runs_train.masked_language_model` does to a BERT: guess hidden tokens from both sides.

A language model predicts each token from those before it. BERT predicts a hidden token from both sides, and
in exchange learns from 15% of the tokens only (Devlin et al. 2019, section 3.1). With --masked it is another
share: a larger one teaches more per step (Wettig et al. 2023), and all figures are measured with 15%. The
paper's second task, to tell whether two texts follow each other, is left out: RoBERTa does no worse without
it (Liu et al. 2019, section 4.2).

Shapes: B passages in a batch, T tokens of the longest of them, D width, M position table.
Proof: tests/test_train_masked_language_model.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import ONE_PASS
from models.utils.errors import UserError
from models.utils.machine import choose_device
from models.utils.tokenizer import load_tokenizer
from runs_train.folder import run_folder
from runs_train.fresh_model import check_kind, fresh_model
from runs_train.passage_data import (
    PAD,
    TOKENIZER_CONFIG,
    Passages,
    cut,
    hide_for_evaluation,
    hide_for_training,
    padded,
    prepare,
    spans,
)
from runs_train.text_data import forget_others
from runs_train.trained_checkpoint import (
    MUTED,
    draw_losses,
    draw_measured,
    percent,
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
)

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
EVALUATION_TOKENS = 4096  # of a batch; the masks of the held-out text depend on it, so it is no option


def train(options):
    options.device = choose_device(options.device)
    model_name, config = check_kind(options, ONE_PASS, "tokens")
    if getattr(config, "head", "masked_lm") != "masked_lm":
        raise UserError(f'--config {options.config}: has the head "{config.head}"; give one with "masked_lm"')
    with run_folder(options, TOKENIZER_FILES) as folder:
        corpus = prepare(options.data, folder / "training", options.vocab_size)
        model = fresh_model(options, vocab_size=options.vocab_size)
        start_near(model)
        run = Run(model, corpus, options, folder / "training")
        run.train()
        forget_others(corpus.folder)
        save(run, model_name, folder)
        report(run, folder)


@torch.no_grad()
def start_near(model):
    """First weights with which a token attends to its neighbours (Trockman and Kolter 2023).

    From plain random weights all tokens get the same attention. The model then sees no order, and with as
    little text as here takes long to find any. What makes the difference: the position table begins as
    sinusoids (Vaswani et al. 2017, section 3.5), whose products fall with distance, and queries and keys
    begin as the same map, so that what is alike, in place or in kind, attends to each other.
    """
    if not hasattr(model, "pos_embed"):  # RoPE falls with distance by itself
        return
    M, D = model.pos_embed.weight.shape
    frequencies = 1000 ** -(torch.arange(0, D, 2) / D)  # (D / 2,)
    angles = torch.arange(M)[:, None] * frequencies  # (M, D / 2)
    sinusoids = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :D]  # (M, D)
    # Of the same size as the embeddings that they are added to.
    model.pos_embed.weight.copy_(sinusoids * math.sqrt(2) * model.token_embed.weight.std())
    for layer in model.layers:
        torch.nn.init.normal_(layer.attn.q_proj.weight, std=1.25 / math.sqrt(D))
        layer.attn.k_proj.weight.copy_(layer.attn.q_proj.weight)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for gaps in text."""

    SETTINGS = ("config", "context", "batch_tokens", "accumulate", "steps", "lr", "masked", "weight_decay")
    SETTINGS += ("clip", "seed")
    DATA_SETTINGS = ("file_list_sha256", "vocab_size")

    def __init__(self, model, corpus, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.98))
        super().__init__(model, optimizer, options, corpus.facts, folder)
        self.corpus = corpus
        self.context = context_of(model, options)
        self.passages = Passages(corpus.train, self.context, options.batch_tokens, options.seed)
        self.hidden = make_forward(model, options, model.hidden)

    def batch(self, n):
        """(tokens, inputs, chosen), each (B, T)."""
        tokens = self.passages.batch(n)
        inputs, chosen = hide_for_training(
            tokens, self.options.masked, self.options.vocab_size, seed=self.options.seed + n
        )
        return [tensor.to(self.options.device) for tensor in (tokens, inputs, chosen)]

    def num_predictions(self, batch):
        return batch[-1].sum().item()

    def loss(self, batch):
        """Mean cross-entropy of the chosen tokens; the head is applied to these alone, a seventh of all."""
        tokens, inputs, chosen = batch
        with autocast(self.options):
            logits = self.model.lm_head(self.hidden(inputs, attention_mask=inputs != PAD)[chosen])
        return F.cross_entropy(logits.float(), tokens[chosen])

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def evaluate(self):
        with autocast(self.options):
            measured = masked_accuracy(self.model, self.corpus.held_out, self.context)
        self.evaluations.append((self.step, measured.accuracy))
        self.show_evaluation(f"hidden tokens of the held-out text guessed {measured.accuracy:.2%}")

    def describe(self):
        passes = self.options.steps * self.options.accumulate / self.passages.per_pass
        return (
            f"{len(self.corpus.train):,} tokens of training text in {self.facts['train_passages']:,} "
            f"passages, {passes:.1f} passes over it in {self.options.steps} steps"
        )

    def speed(self):
        return {"tokens_per_s": f"{self.tokens_read() / self.seconds:.0f}"}

    def tokens_read(self):
        return self.step * self.options.accumulate * len(self.corpus.train) // self.passages.per_pass


# Evaluation -------------------------------------------------------------------------------------------------


class Accuracy(NamedTuple):
    accuracy: float  # the share of the hidden tokens that the model holds most probable
    constant: float  # the same for the best constant guess: always the token that is hidden most often
    constant_id: int  # which token that is


@torch.no_grad()
def masked_accuracy(model, tokens, context):
    """How many of 15% of the tokens the model guesses, given the rest; the gaps are always the same."""
    model.eval()
    device = next(model.parameters()).device
    rows = sorted(cut(tokens, context), key=len)
    guesses, truths = [], []
    for n, (start, stop) in enumerate(spans([len(row) for row in rows], EVALUATION_TOKENS)):
        batch = padded(rows[start:stop])
        inputs, chosen = hide_for_evaluation(batch, seed=n)
        hidden = model.hidden(inputs.to(device), attention_mask=(inputs != PAD).to(device))
        guesses.append(model.lm_head(hidden[chosen.to(device)]).argmax(dim=-1).cpu())
        truths.append(batch[chosen])
    guesses, truths = torch.cat(guesses), torch.cat(truths)
    counts = truths.bincount()
    right = (guesses == truths).sum().item()
    return Accuracy(right / len(truths), counts.max().item() / len(truths), counts.argmax().item())


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, model_name, folder):
    """The checkpoint: the model, and its tokenizer in both forms that BERT's come in."""
    files = {name: (run.corpus.folder / name).read_bytes() for name in ("tokenizer.json", "vocab.txt")}
    longest = {"model_max_length": run.model.config.max_seq_len}
    files["tokenizer_config.json"] = TOKENIZER_CONFIG | longest
    save_checkpoint(folder, model_name, run.model, files, {"pad_token_id": PAD})


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    measured = masked_accuracy(run.model.float(), run.corpus.held_out, run.context)
    draw(run, folder, measured.constant)
    guess = load_tokenizer(run.corpus.folder).token_text(measured.constant_id)
    notes = (
        "Measured in fp32: 15% of the tokens become [MASK], always the same ones, and of all tokens the\n"
        f"most probable one is the guess. The best constant guess is always `{guess}`."
    )
    write_readme(folder, run.options, readme_rows(run, measured), notes)
    print(
        f"{measured.accuracy:.2%} of the hidden tokens guessed; always guessing {guess!r} would be right in "
        f"{measured.constant:.2%}\nto see it at work: python run.py --checkpoint {folder}"
    )


def draw(run, folder, constant):
    """The training loss; below it how many of the held-out text's hidden tokens are guessed."""
    with picture(folder, f"{run.options.config} on {run.facts['data']}", panels=2) as (losses, guessed):
        draw_losses(losses, run.losses)
        losses.set_ylabel("nats per hidden token")
        draw_measured(guessed, percent(run.evaluations), "held-out tokens guessed")
        guessed.axhline(
            100 * constant, color=MUTED, linewidth=1, linestyle=":", label="the best constant guess"
        )
        guessed.set(ylabel="percent", ylim=(0, None))


def readme_rows(run, measured):
    facts = run.facts
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    tokens_read, train_tokens = run.tokens_read(), len(run.corpus.train)
    source = f"Python {facts['python']}'s standard library, docstrings" if facts["python"] else facts["data"]
    return {
        "parameters": f"{num_parameters:,}",
        "data": source,
        "training text": f"{facts['train_passages']:,} passages, {facts['train_bytes']:,} bytes",
        "held-out text": f"{facts['held_out_passages']:,} passages, {facts['held_out_bytes']:,} bytes",
        "files": f"{facts['train_files']} and {facts['held_out_files']}",
        "sha256 of the file list": facts["file_list_sha256"],
        "vocabulary": f"{facts['vocab_size']} pieces, {facts['train_bytes'] / train_tokens:.2f} bytes each",
        "tokens read": f"{tokens_read:,}, {tokens_read / train_tokens:.1f} times the training text",
        "time": time_row(run),
        "hidden tokens guessed, all held-out text": f"{measured.accuracy:.2%}",
        "the best constant guess": f"{measured.constant:.2%}",
    }
