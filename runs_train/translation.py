"""What `python -m runs_train.seq2seq` does to an encoder-decoder: say the target, token by token.

    source         "3 Mar 87"   --encoder-->  memory
    target   <pad> "1987-03-0"  --decoder-->  logits --cross-entropy, smoothed--> "1987-03-03" </s>

The decoder reads the target shifted by one and learns to say the next token at every place at once (teacher
forcing); what it wrote itself it reads only when it is used. Paper: Vaswani et al. 2017, section 5: pairs of
similar length together (5.1), Adam's constants and the learning rate of eq. 3 (5.3), label smoothing (5.4).
Since that rate never comes down to zero, the weights never come to rest. The paper uses a mean of the last
checkpoints (6.1); here a running mean of the weights is what is measured and stored.

Shapes: B pairs in a batch, S tokens of the longest source, T of the longest target, V vocabulary.
Proof: tests/test_train_seq2seq.py.
"""

import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import ENCODER_DECODER
from models.utils.machine import choose_device
from runs_train.exact_match import ROWS, exact_matches, share, translate
from runs_train.folder import run_folder
from runs_train.fresh_model import check_kind, check_room, fresh_model
from runs_train.pair_data import Batches, prepare
from runs_train.text_data import forget_others
from runs_train.trained_checkpoint import (
    draw_losses,
    draw_measured,
    percent,
    picture,
    save_checkpoint,
    time_row,
    write_readme,
)
from runs_train.training_run import TrainingRun, autocast, make_forward, make_optimizer, say

TOKENIZER_FILES = ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")


def train(options):
    options.device = choose_device(options.device)
    model_name, _ = check_kind(options, ENCODER_DECODER, "source")
    with run_folder(options, (*TOKENIZER_FILES, "generation_config.json")) as folder:
        corpus = prepare(options.data, folder / "training", options.vocab_size)
        model = fresh_model(options, vocab_size=corpus.tokenizer.vocab_size, pad_id=corpus.tokenizer.pad_id)
        run = Run(model, corpus, options, folder / "training")
        run.train()
        forget_others(corpus.folder)
        save(run, model_name, folder)
        report(run, folder)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for pairs of texts."""

    # Not --steps: eq. 3 asks for no end, so that a run that was too short is made longer.
    SETTINGS = ("config", "batch_size", "accumulate", "lr", "label_smoothing", "average", "weight_decay")
    SETTINGS += ("clip", "seed")
    DATA_SETTINGS = ("pairs_sha256", "pieces")

    WITH_STATE = (*TrainingRun.WITH_STATE, "average")

    def __init__(self, model, corpus, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.98), eps=1e-9)
        super().__init__(model, optimizer, options, corpus.facts, folder)
        self.corpus, self.pad_id = corpus, corpus.tokenizer.pad_id
        longest = model.config.max_seq_len
        # Keys and values in fp32, of which the encoder's are few beside the target's.
        cache = 2 * 4 * ROWS * longest * model.config.d_model * model.config.num_decoder_layers
        check_room(
            cache, f"--config {options.config}: targets of {longest} tokens to measure", options.device
        )
        self.batches = Batches(corpus.train, corpus.tokenizer, longest, options.batch_size, options.seed)
        self.sample = corpus.held_out[:: -(-len(corpus.held_out) // 500)]
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.average))
        self.forward = make_forward(model, options)

    def update(self, loss):
        super().update(loss)
        self.average.update_parameters(self.model)

    def batch(self, n):
        return [side.to(self.options.device) for side in self.batches.batch(n)]

    def num_predictions(self, batch):
        _, target = batch
        return (target != self.pad_id).sum().item()

    def loss(self, batch):
        """Mean smoothed cross-entropy of every token of the targets, given those before it and the source."""
        source, target = batch
        before = F.pad(target, (1, 0), value=self.pad_id)[:, :-1]
        with autocast(self.options):
            logits = self.forward(source, before)
        return smoothed_loss(logits.float(), target, self.options.label_smoothing, self.pad_id)

    def learning_rate(self):
        return learning_rate(self.step, self.model.config.d_model, self.options)

    def evaluate(self):
        """Exact match of a sample of the held-out pairs, always the same ones."""
        measured = share(exact_matches(self.average.module, self.corpus.tokenizer, self.sample))
        self.evaluations.append((self.step, measured))
        self.show_evaluation(f"held-out exact match {measured:.1%}")
        sources = [pair.source for pair in self.sample[:: -(-len(self.sample) // 3)]]
        for source, text in zip(sources, translate(self.average.module, self.corpus.tokenizer, sources)):
            say(f"    | {source}  -->  {text}")

    def describe(self):
        passes = self.options.steps * self.options.accumulate / self.batches.per_pass
        text = f"{self.facts['train_pairs']:,} training pairs, {passes:.1f} passes over them "
        text += f"in {self.options.steps} steps"
        if self.batches.num_left_out:
            longest = self.model.config.max_seq_len
            text += f"\n{self.batches.num_left_out} pairs longer than max_seq_len, {longest}, are left out"
        return text

    def speed(self):
        pairs = self.options.accumulate * self.options.batch_size
        return {"pairs_per_s": f"{pairs * self.step / self.seconds:.0f}"}


def smoothed_loss(logits, target, smoothing, pad_id):
    """Cross-entropy with the right token at 1 - smoothing and the rest spread over the vocabulary evenly.

    It keeps the model from growing ever more certain: worse likelihood, better accuracy (section 5.4).
    """
    logits, target = logits.flatten(0, 1), target.flatten()
    return F.cross_entropy(logits, target, ignore_index=pad_id, label_smoothing=smoothing)


def learning_rate(step, d_model, options):
    """Eq. 3: a straight line up for `warmup` steps, then down with the root of the step."""
    step += 1  # the paper counts from 1
    return options.lr * d_model**-0.5 * min(step**-0.5, step * options.warmup**-1.5)


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, model_name, folder):
    """The checkpoint: the model, its tokenizer, and how it is best used."""
    tokenizer = run.corpus.tokenizer
    files = {name: (run.corpus.folder / name).read_bytes() for name in TOKENIZER_FILES}
    token_ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    # As in Marian's checkpoints: a target begins with the pad, which never comes again, and ends with EOS.
    token_ids |= {"decoder_start_token_id": tokenizer.pad_id, "forced_eos_token_id": tokenizer.eos_id}
    longest = {"bad_words_ids": [[tokenizer.pad_id]], "max_length": run.model.config.max_seq_len}
    files["generation_config.json"] = {**token_ids, **longest, "num_beams": 1, "do_sample": False}
    save_checkpoint(folder, model_name, run.average.module, files, token_ids)


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    print("measuring exact match on all held-out pairs")
    matches = exact_matches(run.average.module, run.corpus.tokenizer, run.corpus.held_out)
    draw(run, folder)
    write_readme(folder, run.options, readme_rows(run, matches), readme_notes(run, matches))
    print(f"{share(matches):.2%} exact; to see it write: python run.py --checkpoint {folder} --prompt TEXT")


def draw(run, folder):
    """The training loss; below it how many of the held-out pairs come out exactly right."""
    with picture(folder, f"{run.options.config} on {run.facts['data']}", panels=2) as (losses, exact):
        draw_losses(losses, run.losses)
        losses.set_ylabel("nats per token, smoothed")
        draw_measured(exact, percent(run.evaluations), "held-out pairs, a sample")
        exact.set(ylabel="exact match, percent", ylim=(0, 105))


def readme_rows(run, matches):
    facts, options = run.facts, run.options
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    pairs_read = run.step * options.accumulate * options.batch_size
    return {
        "parameters": f"{num_parameters:,}",
        "data": facts["data"],
        "training pairs": f"{facts['train_pairs']:,}",
        "held-out pairs": f"{facts['held_out_pairs']:,}",
        "sha256 of the pairs": facts["pairs_sha256"],
        "vocabulary": f"{run.corpus.tokenizer.vocab_size} {'pieces' if facts['pieces'] else 'characters'}",
        "pairs read": f"{pairs_read:,}, {pairs_read / facts['train_pairs']:.1f} times the training pairs",
        "time": time_row(run),
        "exact match, all held-out pairs": f"{share(matches):.2%}",
    }


def readme_notes(run, matches):
    """How the figure was measured and, where pairs are of several kinds, how it is for each."""
    notes = "Exact match is measured in fp32 with greedy decoding."
    if len(matches) == 1:
        return notes
    lines = [f"| `{kind}` | {right:,} of {total:,} |" for kind, (right, total) in matches.items()]
    return "\n".join([notes, "", "| kind of pair | exact |", "|---|---|", *lines])
