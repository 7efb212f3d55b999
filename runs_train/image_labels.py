"""What `python -m runs_train.image_classifier` does to a Vision Transformer: name what an image shows.

A Transformer has to learn from its images what a convolution knows from the start: that things may stand
elsewhere (Dosovitskiy et al. 2021, section 3.1, "inductive bias"). So few images need help: each is shifted a
little every time it is shown. And no label is held to be certain: the targets give the right one 1 - e, and
share e among all (label smoothing; Szegedy et al. 2016, section 7).

Shapes: B images in a batch, C channels, Y labels.
Proof: tests/test_train_image_classifier.py.
"""

import torch
import torch.nn.functional as F

from conversion.config_fields import label_fields
from models import ONE_PASS
from models.utils.image_processor import FILE, image_processor
from models.utils.machine import choose_device
from runs_train.folder import run_folder
from runs_train.fresh_model import check_kind, fresh_model
from runs_train.image_data import Batches, prepare
from runs_train.trained_checkpoint import (
    draw_losses,
    draw_measured,
    percent,
    picture,
    save_checkpoint,
    time_row,
    write_readme,
)
from runs_train.training_run import TrainingRun, autocast, learning_rate, make_forward, make_optimizer


def train(options):
    options.device = choose_device(options.device)
    model_name, config = check_kind(options, ONE_PASS, "images")
    with run_folder(options, [FILE]) as folder:
        album = prepare(options.data, config.image_size, config.num_channels, options.shift)
        model = fresh_model(options, num_labels=len(album.names), pooler=False)
        run = Run(model, album, options, folder / "training")
        run.train()
        save(run, model_name, folder)
        report(run, folder)


# A run ------------------------------------------------------------------------------------------------------


class Run(TrainingRun):
    """The loop itself stands in training_run.py; here is what it does for images."""

    SETTINGS = (
        "config",
        "batch_size",
        "accumulate",
        "steps",
        "lr",
        "weight_decay",
        "clip",
        "label_smoothing",
    )
    SETTINGS += ("shift", "seed")
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
        return (
            f"{len(self.album.train):,} images to train on, {len(self.album.held_out):,} held out, "
            f"{self.passes(self.options.steps):.1f} passes in {self.options.steps} steps"
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


def save(run, model_name, folder):
    """The checkpoint: the model, what is done to an image before it, and what its logits stand for."""
    labels = {"labels": run.album.names, "problem_type": "single_label_classification"}
    files = {FILE: run.album.preprocessing}
    save_checkpoint(folder, model_name, run.model, files, label_fields(labels))


def report(run, folder):
    """Measure the model as it was written, and put its story beside it."""
    measured = accuracy(run.model, run.album.held_out, run.processor)
    draw(run, folder)
    notes = (
        "Accuracy is the share of the held-out images (every fifth of each label) whose most probable label\n"
        "is the right one. It is measured in fp32."
    )
    write_readme(folder, run.options, readme_rows(run, measured), notes)
    print(f"{measured:.2%} of the held-out images named")
    print(f"to see it at work: python run.py --checkpoint {folder} --image FILE")


def draw(run, folder):
    """The training loss; below it how many of the held-out images are named wrongly."""
    with picture(folder, f"{run.options.config} on {run.facts['data']}", panels=2) as (losses, wrong):
        draw_losses(losses, run.losses)
        losses.set_ylabel("nats per image")
        errors = [(step, 100 - named) for step, named in percent(run.evaluations)]
        draw_measured(wrong, errors, "held-out images named wrongly")
        wrong.set(ylabel="percent", ylim=(0, 1.1 * max(share for _, share in errors[len(errors) // 4 :]) + 1))


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
