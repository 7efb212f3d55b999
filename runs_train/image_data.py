"""Labelled images for training: a folder of files becomes pixels, of which every fifth is held out.

    a subfolder per label, or "digits" --resize--> pixels (B, C, height, width), uint8 --shifted--> batches

digits: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn (a part of the "Optical
Recognition of Handwritten Digits" set of the UCI repository; E. Alpaydin and C. Kaynak 1998).

Of each label's images every fifth is held out, in the order of their names (in scikit-learn's order), so that
the same images are held out whoever trains.

Shapes: B images, of a whole part or of a batch; C channels.
Proof: tests/test_train_image_classifier.py.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.utils.errors import UserError
from models.utils.image_processor import DEFAULTS, image_processor, open_image
from runs_train.fresh_model import check_room

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """Some images and what they show."""

    pixels: np.ndarray  # (B, C, height, width), uint8
    labels: torch.Tensor  # (B,)

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Album:
    """All images of a run, and how they are brought into the form that the model reads."""

    train: Images
    held_out: Images
    names: list  # of the labels, in the order of the logits
    preprocessing: dict  # preprocessor_config.json
    facts: dict  # what is known of the data


def prepare(data, image_size, num_channels, shift=0):
    """The images of `data`, as squares of `image_size`: "digits" or a folder that has one per label.

    shift: how far they will be moved.
    """
    if shift > image_size:
        raise UserError(f"--shift {shift} moves images of {image_size} pixels out of sight; give less")
    fields = preprocessing(image_size, num_channels)
    if data == "digits":
        pixels, labels, names = digits()
    else:
        pixels, labels, names = read_folder(Path(data), image_processor(fields, num_channels), num_channels)
    if pixels.shape[1:] != (num_channels, image_size, image_size):
        raise UserError(
            f"--data {data}: images of {' x '.join(map(str, pixels.shape[1:]))} numbers, where --config asks "
            f"for {num_channels} x {image_size} x {image_size} (channels, height, width)"
        )
    is_held_out = every_fifth(labels)
    train, held_out = (Images(pixels[chosen], labels[chosen]) for chosen in (~is_held_out, is_held_out))
    # Rounded, since a person may want to read them.
    fields["image_mean"] = [round(x, 4) for x in (train.pixels / 255).mean(axis=(0, 2, 3)).tolist()]
    fields["image_std"] = [round(x, 4) for x in (train.pixels / 255).std(axis=(0, 2, 3)).tolist()]
    facts = {
        "data": str(data),
        "sha256": hashlib.sha256(pixels.tobytes() + labels.numpy().tobytes()).hexdigest(),
        "num_labels": len(names),
    }
    return Album(train, held_out, names, fields, facts)


def preprocessing(image_size, num_channels):
    """preprocessor_config.json; mean and std are replaced once the images are known."""
    size = {"height": image_size, "width": image_size}
    fields = {"image_processor_type": "ViTImageProcessor", **DEFAULTS, "resample": 2, "size": size}
    return fields | {"image_mean": [0.5] * num_channels, "image_std": [0.5] * num_channels}


def every_fifth(labels):
    """(B,) bool: the fifth image of each label, the tenth, and so on."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held_out[(labels == label).nonzero()[4::5]] = True
    return held_out


# Where images come from -------------------------------------------------------------------------------------


def digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "--data digits: comes with scikit-learn; python -m pip install scikit-learn"
        ) from None
    data = load_digits()
    # Grey in 17 steps, from 0 to 16.
    pixels = (data.images[:, None] * (255 / 16)).round().astype(np.uint8)
    return pixels, torch.from_numpy(data.target).long(), [str(digit) for digit in range(10)]


def read_folder(folder, processor, num_channels):
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder; give one that has a subfolder of images per label")
    groups = {path.name: image_files(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    groups = {name: files for name, files in groups.items() if files}
    few = [name for name, files in groups.items() if len(files) < 5]
    if len(groups) < 2 or few:
        raise UserError(
            f"--data {folder}: needs subfolders for two labels or more with five images or more each; there "
            f"are {len(groups)}, too small: {', '.join(few) or 'none'}"
        )
    files = [file for group in groups.values() for file in group]
    num_bytes = len(files) * num_channels * math.prod(processor.size)
    check_room(num_bytes, f"--data {folder}: the pixels of {len(files)} images", torch.device("cpu"))
    pixels = [
        processor.resize(open_image(file, num_channels))
        for file in tqdm(files, desc=str(folder), unit="image", disable=None)
    ]
    labels = [label for label, group in enumerate(groups.values()) for _ in group]
    return np.stack(pixels), torch.tensor(labels), list(groups)


def image_files(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


# Batches ----------------------------------------------------------------------------------------------------


class Batches:
    """Batch n of a run, which follows from its number: each pass has the images in an order of its own."""

    def __init__(self, images, batch_size, shift, seed):
        if batch_size > len(images):
            raise UserError(f"--batch-size {batch_size}: there are {len(images)} images to train on")
        self.images, self.batch_size, self.shift, self.seed = images, batch_size, shift, seed
        self.per_pass = len(images) // batch_size

    def batch(self, n):
        """(pixels, labels), the pixels shifted."""
        number, place = divmod(n, self.per_pass)
        order = torch.randperm(len(self.images), generator=generator(self.seed, 2 * number))
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        shifted = shift_each(self.images.pixels[chosen], self.shift, generator(self.seed, 2 * n + 1))
        return shifted, self.images.labels[chosen]


def generator(seed, number):
    """Random numbers of their own for each seed and number; of what it is given, torch reads 32 bits only."""
    return torch.Generator().manual_seed((seed * 2_654_435_761 + number) % 2**32)


def shift_each(pixels, most, generator):
    """Each image moved by up to `most` pixels in each direction; what comes in repeats the edge."""
    height, width = pixels.shape[-2:]
    padded = np.pad(pixels, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    places = torch.randint(2 * most + 1, (len(pixels), 2), generator=generator).tolist()
    return np.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places)])
