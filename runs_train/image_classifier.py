"""Train a Vision Transformer of the zoo to name images, from fresh weights to a checkpoint that runs.

    python -m runs_train.image_classifier --config tiny-vit-digits --data digits --out checkpoints/my-vit

    images --image_data.py--> shifted by a pixel --> model --cross-entropy--> gradients --AdamW--> model

A Transformer has to learn from its images what a convolution knows from the start: that things may stand
elsewhere (Dosovitskiy et al. 2021, section 3.1, "inductive bias"). So few images need help: each is shifted a
little every time it is shown. And no label is held to be certain: the targets give the right one 1 - e, and
share e among all (label smoothing; Szegedy et al. 2016, section 7).

All that a step reads and does follows from its number: which images, how far shifted, at which learning rate.
So a run that was stopped (Ctrl-C saves it) and is started again by the same command goes on as if it had
never been stopped: to the bit on a CPU.

In the folder --out, by default checkpoints/NAME, a run writes
    training/state.pt                     from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_image_classifier.py.
"""

import sys

import torch
import torch.nn.functional as F

from conversion.config_fields import label_fields
from models import create_model, load_config
from models.utils.errors import UserError, run_main
from models.utils.image_processor import FILE, image_processor
from runs_train.image_data import Batches, prepare
from runs_train.options import (
    TrainingParser,
    add_folder_options,
    add_machine_options,
    number,
    prepare_folder,
    whole,
)
from runs_train.trained_checkpoint import draw_losses, picture, save_checkpoint, time_row, write_readme
from runs_train.training_run import TrainingRun, autocast, learning_rate, make_forward, make_optimizer


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(argv)
    model_name, config = load_config(options.config)
    if model_name != "vision_transformer":
        raise UserError(f'--config {options.config}: give a config of model "vision_transformer"')
    folder = prepare_folder(options)
    album = prepare(options.data, config.image_size, config.num_channels)

    torch.manual_seed(options.seed)
    model = create_model(options.config, num_labels=len(album.names), pooler=False).to(options.device)
    run = Run(model, album, options, folder / "training")
    run.train()
    save(run, folder)
    report(run, folder, argv)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for images."""

    SETTINGS = ("config", "batch_size", "accumulate", "steps", "lr", "warmup", "weight_decay", "clip")
    SETTINGS += ("label_smoothing", "shift", "seed", "float32")
    DATA_SETTINGS = ("sha256", "num_labels")

    def __init__(self, model, album, options, folder):
        optimizer = make_optimizer(model, options, betas=(0.9, 0.999))
        super().__init__(model, optimizer, options, album.facts, folder)
        self.album = album
        self.batches = Batches(album.train, options.batch_size, options.shift, options.seed)
        self.processor = image_processor(album.preprocessing, model.config.num_channels)
        self.forward = make_forward(model, options)

    def batch(self, n):
        """(images (B, C, height, width), labels (B,))."""
        pixels, labels = self.batches.batch(n)
        return self.processor.normalize(pixels).to(self.options.device), labels.to(self.options.device)

    def num_predictions(self, batch):
        return len(batch[-1])

    def loss(self, batch):
        images, labels = batch
        with autocast(self.options):
            logits = self.forward(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.options.label_smoothing)

    def learning_rate(self):
        return learning_rate(self.step, self.options)

    def evaluate(self):
        with autocast(self.options):
            measured = accuracy(self.model, self.album.held_out, self.processor)
        self.evaluations.append((self.step, measured))
        self.show_evaluation(f"held-out images named {measured:.2%}")

    def describe(self):
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(
            f"{num_parameters:,} parameters, {len(self.album.train):,} images to train on, "
            f"{len(self.album.held_out):,} held out, {self.passes(self.options.steps):.1f} passes in "
            f"{self.options.steps} steps"
        )

    def speed(self):
        return {"images_per_s": f"{self.images_seen() / self.seconds:.0f}"}

    def images_seen(self):
        return self.step * self.options.accumulate * self.options.batch_size

    def passes(self, steps):
        return steps * self.options.accumulate / self.batches.per_pass


@torch.no_grad()
def accuracy(model, images, processor, batch_size=256):
    """The share of the images whose most probable label is the right one."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(images), batch_size):
        chosen = slice(start, start + batch_size)
        logits = model(processor.normalize(images.pixels[chosen]).to(device))
        right += (logits.argmax(dim=-1).cpu() == images.labels[chosen]).sum().item()
    return right / len(images)


# What a run leaves behind -----------------------------------------------------------------------------------


def save(run, folder):
    """The checkpoint: the model, what is done to an image before it, and what its logits stand for."""
    labels = {"labels": run.album.names, "problem_type": "single_label_classification"}
    files = {FILE: run.album.preprocessing}
    save_checkpoint(folder, "vision_transformer", run.model, files, label_fields(labels))


def report(run, folder, argv):
    """Measure the model as it was written, and put its story beside it."""
    measured = accuracy(run.model, run.album.held_out, run.processor)
    draw(run, folder / "loss.png")
    notes = (
        "Accuracy is the share of the held-out images (every fifth of each label) whose most probable label\n"
        "is the right one. It is measured in fp32."
    )
    write_readme(folder, "image_classifier", argv, readme_rows(run, measured), notes)
    print(f"{measured:.2%} of the held-out images named")
    print(f"to see it at work: python run.py --checkpoint {folder} --image FILE")


def draw(run, path):
    """The training loss, and on an axis of its own how many held-out images are named wrongly."""
    with picture(path, f"{run.options.config} on {run.facts['data']}") as axes:
        draw_losses(axes, run.losses)
        axes.set_ylabel("nats per image")
        right = axes.twinx()
        steps, measured = zip(*run.evaluations)
        percent = [100 * (1 - share) for share in measured]
        right.plot(steps, percent, "C1", linewidth=1, marker=".", label="held-out images named wrongly")
        right.set_ylabel("percent")
        right.set_ylim(0, 1.1 * max(percent[len(percent) // 4 :]) + 1)


def readme_rows(run, measured):
    names, held_out = run.album.names, run.album.held_out
    data = "scikit-learn's digits" if run.facts["data"] == "digits" else run.facts["data"]
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return {
        "parameters": f"{num_parameters:,}",
        "data": data,
        "labels": f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}",
        "images to train on": f"{len(run.album.train):,}",
        "images held out": f"{len(held_out):,}",
        "sha256 of pixels and labels": run.facts["sha256"],
        "images seen": f"{run.images_seen():,}, each {run.passes(run.step):.0f} times",
        "time": time_row(run),
        "accuracy, held-out images": f"{measured:.2%} ({round(measured * len(held_out))} of {len(held_out)})",
    }


# Options ----------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = TrainingParser("image_classifier", __doc__)
    add_data_options(parser.add_argument_group("what [default]").add_argument)
    add_training_options(parser.add_argument_group("how [default]").add_argument)
    add_machine_options(parser.add_argument_group("on this machine [default]").add_argument)
    options = parser.parse_args(argv)
    if options.label_smoothing >= 1:
        raise UserError(f"--label-smoothing {options.label_smoothing} leaves nothing of the label; give less")
    return options


def add_data_options(add):
    add_folder_options(add)
    add(
        "--data",
        required=True,
        help="a folder with a subfolder of images per label; or digits: scikit-learn's",
    )


def add_training_options(add):
    add("--steps", type=whole(1), default=2400, metavar="N", help="updates in all [%(default)s]")
    add("--batch-size", type=whole(1), default=64, metavar="B", help="images at once [%(default)s]")
    add("--accumulate", type=whole(1), default=1, metavar="N", help="batches per update [%(default)s]")
    add("--lr", type=number(above=0), default=2e-3, help="the highest learning rate [%(default)s]")
    add("--warmup", type=whole(0), default=200, metavar="N", help="steps up to it [%(default)s]")
    add("--weight-decay", type=number(least=0), default=0.05, metavar="W", help="AdamW's [%(default)s]")
    add("--clip", type=number(above=0), default=1.0, metavar="G", help="the longest gradient [%(default)s]")
    add("--label-smoothing", type=number(least=0), default=0.1, metavar="E", help="see above [%(default)s]")
    add("--shift", type=whole(0), default=1, metavar="N", help="pixels, at most [%(default)s]")
    add("--seed", type=whole(0), default=0, metavar="N", help="for weights, order and shifts [%(default)s]")


if __name__ == "__main__":
    run_main(main)
