"""Train an encoder-decoder on pairs of texts, as the Transformer's paper did, to a checkpoint that runs.

    python -m runs_train.seq2seq --config tiny-transformer-dates --data dates --out checkpoints/my-dates
    python -m runs_train.seq2seq --config my-config.json --data english-german.tsv --vocab-size 8000

    source         "3 Mar 87"   --encoder-->  memory
    target   <pad> "1987-03-0"  --decoder-->  logits --cross-entropy, smoothed--> "1987-03-03" </s>

The decoder reads the target shifted by one and learns to say the next token at every place at once (teacher
forcing); what it wrote itself it reads only when it is used. Paper: Vaswani et al. 2017, section 5: pairs of
similar length together (5.1), Adam's constants and the learning rate of eq. 3 (5.3), label smoothing (5.4).
Since that rate never comes down to zero, the weights never come to rest. The paper uses a mean of the last
checkpoints (6.1); here a running mean of the weights is what is measured and stored.

A run that was stopped (Ctrl-C saves it) and is started again by the same command goes on as if it had never
been stopped; the loop that sees to it is training_run.py's.

In the folder --out, by default checkpoints/NAME, a run writes
    training/                             the tokenizer, and state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout (Marian's), in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_seq2seq.py.
"""

import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import create_model, load_config
from models.utils.errors import UserError, run_main
from runs_train.exact_match import exact_matches, share
from runs_train.options import (
    TrainingParser,
    add_folder_options,
    add_machine_options,
    number,
    prepare_folder,
    whole,
)
from runs_train.pair_data import Batches, prepare
from runs_train.trained_checkpoint import draw_losses, picture, save_checkpoint, time_row, write_readme
from runs_train.training_run import TrainingRun, autocast, make_forward, make_optimizer

TOKENIZER_FILES = ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    model_name, _ = load_config(options.config)
    if model_name != "transformer":
        raise UserError(
            f"--config {options.config} is a {model_name}, which has no encoder; give a transformer"
        )
    folder = prepare_folder(options)
    corpus = prepare(options.data, folder / "training" / "tokenizer", options.vocab_size)

    torch.manual_seed(options.seed)
    sizes = {"vocab_size": corpus.tokenizer.vocab_size, "pad_id": corpus.tokenizer.pad_id}
    model = create_model(options.config, **sizes).to(options.device)
    run = Run(model, corpus, options, folder / "training")
    run.train()
    save(run, model_name, folder)
    report(run, folder, argv)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for pairs of texts."""

    # Not --steps: eq. 3 asks for no end, so that a run that was too short is made longer.
    SETTINGS = ("config", "batch_size", "accumulate", "lr", "warmup", "label_smoothing")
    SETTINGS += ("average", "weight_decay", "clip", "seed", "float32")
    DATA_SETTINGS = ("pairs_sha256", "pieces")

    WITH_STATE = (*TrainingRun.WITH_STATE, "average")

    def __init__(self, model, corpus, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.98), eps=1e-9)
        super().__init__(model, optimizer, options, corpus.facts, folder)
        self.corpus, self.pad_id = corpus, corpus.tokenizer.pad_id
        longest = model.config.max_seq_len
        self.batches = Batches(corpus.train, corpus.tokenizer, longest, options.batch_size, options.seed)
        self.sample = corpus.held_out[:: -(-len(corpus.held_out) // 500)]
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.average))
        self.forward = make_forward(model, options)

    def train_step(self):
        super().train_step()
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

    def describe(self):
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        passes = self.options.steps * self.options.accumulate / self.batches.per_pass
        print(
            f"{num_parameters:,} parameters, {self.facts['train_pairs']:,} training pairs, "
            f"{passes:.1f} passes over them in {self.options.steps} steps"
        )
        if self.batches.num_left_out:
            longest = self.model.config.max_seq_len
            print(f"{self.batches.num_left_out} pairs longer than max_seq_len, {longest}, are left out")

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
    files = {name: (run.folder / "tokenizer" / name).read_bytes() for name in TOKENIZER_FILES}
    token_ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    # As in Marian's checkpoints: a target begins with the pad, which never comes again, and ends with EOS.
    token_ids |= {"decoder_start_token_id": tokenizer.pad_id, "forced_eos_token_id": tokenizer.eos_id}
    longest = {"bad_words_ids": [[tokenizer.pad_id]], "max_length": run.model.config.max_seq_len}
    files["generation_config.json"] = {**token_ids, **longest, "num_beams": 1, "do_sample": False}
    save_checkpoint(folder, model_name, run.average.module, files, token_ids)


def report(run, folder, argv):
    """Measure the model as it was written, and put its story beside it."""
    print("measuring exact match on all held-out pairs")
    matches = exact_matches(run.average.module, run.corpus.tokenizer, run.corpus.held_out)
    draw(run, folder / "loss.png")
    write_readme(folder, "seq2seq", argv, readme_rows(run, matches), readme_notes(run, matches))
    print(f"{share(matches):.2%} exact; to see it write: python run.py --checkpoint {folder} --prompt TEXT")


def draw(run, path):
    with picture(path, f"{run.options.config} on {run.facts['data']}") as axes:
        draw_losses(axes, run.losses)
        axes.set_ylabel("loss, nats per token (smoothed)")
        percent = axes.twinx()
        steps, shares = zip(*run.evaluations)
        percent.plot(steps, [100 * s for s in shares], "C1.-", linewidth=1, label="held-out pairs, a sample")
        percent.set(ylabel="exact match, %", ylim=(0, 105))


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


# Options ----------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = TrainingParser("seq2seq", __doc__)
    add_data_options(parser.add_argument_group("what [default]").add_argument)
    add_training_options(parser.add_argument_group("how [default]").add_argument)
    add_machine_options(parser.add_argument_group("on this machine [default]").add_argument)
    return parser.parse_args(argv)


def add_data_options(add):
    add_folder_options(add)
    add("--data", required=True, help="lines of source TAB target, or dates: free-form dates, made by rule")
    add("--vocab-size", type=whole(8), metavar="V", help="pieces of each language [characters]")


AVERAGE_HELP = "of the running mean, what it keeps in a step; 0: the last weights [%(default)s]"


def add_training_options(add):
    add("--steps", type=whole(1), default=4000, metavar="N", help="updates in all [%(default)s]")
    add("--batch-size", type=whole(1), default=128, metavar="B", help="pairs at once [%(default)s]")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="batches per update [%(default)s]")
    add("--lr", type=number(above=0), default=1.0, metavar="F", help="times eq. 3's rate [%(default)s]")
    add("--warmup", type=whole(1), default=800, metavar="N", help="steps up to its peak [%(default)s]")
    add("--label-smoothing", type=number(least=0, most=1), default=0.1, metavar="E", help="[%(default)s]")
    add("--average", type=number(least=0, most=1), default=0.99, metavar="D", help=AVERAGE_HELP)
    add("--weight-decay", type=number(least=0), default=0.0, metavar="W", help="AdamW's [%(default)s]")
    add("--clip", type=number(above=0), default=1.0, metavar="G", help="the longest gradient [%(default)s]")
    add("--seed", type=whole(0), default=0, metavar="N", help="for weights and batches [%(default)s]")


if __name__ == "__main__":
    run_main(main)
