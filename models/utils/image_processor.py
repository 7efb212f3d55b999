"""From an image file to the numbers that a vision model reads, as preprocessor_config.json says.

    processor = load_image_processor("checkpoints/tiny-vit-digits", num_channels=1)
    images = processor(open_image("digit.png", num_channels=1))        # (1, C, height, width)

    file --open_image--> upright, 8 bits, C channels --resize--> (height, width)
         --rescale--> 0 to 1 --normalize--> (x - mean) / std

Proof: tests/test_run_vision_transformer.py, against `transformers`.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from models.utils.errors import UserError, one_line
from models.utils.files import converted_folder, read_json

FILE = "preprocessor_config.json"
LARGEST_SIDE = 4096  # pixels, in each direction, of what a model is given
# Pillow reads dozens of formats; for some it starts other programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # what Pillow calls images of 8 bits with so many channels


@dataclass(frozen=True)
class ImageProcessor:
    """What is done to every image; one step after the other, each may be switched off."""

    size: tuple | None  # (height, width), whatever the image's own proportions; None: as it is
    resample: Image.Resampling  # how new pixels are made of the old ones
    scale: float  # 1/255 brings 0 to 255 to 0 to 1
    mean: np.ndarray  # of each channel
    std: np.ndarray

    def __call__(self, image):
        return self.normalize(self.resize(image))

    def resize(self, image):
        """The pixels of a Pillow image as they are kept: (C, height, width), uint8."""
        if self.size:
            image = image.resize(self.size[::-1], self.resample)
        elif max(image.size) > LARGEST_SIDE:
            raise UserError(f"an image of {image.size} pixels is too large for a model that resizes none")
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def normalize(self, pixels):
        """The numbers of one image, or of several at once: (B, C, height, width), fp32."""
        x = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        return torch.from_numpy(x.reshape(-1, *x.shape[-3:]))


# Images -----------------------------------------------------------------------------------------------------


def open_image(path, num_channels):
    """The Pillow image in a file, upright, in 8 bits per channel, with so many channels."""
    if num_channels not in MODES:
        known = ", ".join(map(str, MODES))
        raise UserError(f"{path}: the model reads {num_channels} channels; images have {known}")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of an image")
    try:
        with warnings.catch_warnings():
            # Only of sizes that no camera makes; Pillow itself stops at twice as many pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return to_channels(ImageOps.exif_transpose(image), num_channels)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: is no image of a kind that is read here ({known})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: is too large ({one_line(error)}); make the image smaller") from None
    except Exception as error:  # a damaged file leads Pillow's many readers to errors of many kinds
        raise UserError(f"{path}: cannot be read ({one_line(error)}); is the file whole?") from None


def to_channels(image, num_channels):
    """Grey, coloured, with a palette or transparent: in the channels that the model reads."""
    if image.mode in ("I", "F"):
        raise ValueError(f"numbers of 32 bits, whose white nobody knows; mode {image.mode}")
    if image.mode.startswith("I;16"):
        # Pillow would cut off what is above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = "A" in image.getbands() or "transparency" in image.info
    if transparent and num_channels != 4:
        # On white paper, as transformers has it; what is hidden below full transparency is not to be seen.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[num_channels])


# preprocessor_config.json -----------------------------------------------------------------------------------

# What transformers' ViTImageProcessor takes where the file is silent.
DEFAULTS = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": Image.Resampling.BILINEAR,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Steps that other models have, and that are not implemented here.
OFF = {"do_center_crop", "do_pad", "do_flip_channel_order", "do_reduce_labels"}
# Names of classes, and arguments of steps that are off; channels are converted in any case.
INERT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "crop_size",
    "pad_size", "default_to_square", "data_format", "input_data_format", "device", "return_tensors",
    "disable_grouping", "_valid_processor_keys",
}  # fmt: skip


def load_image_processor(folder, num_channels):
    """The processor of a converted checkpoint, for images of so many channels."""
    path = converted_folder(folder) / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; put it into the checkpoint's folder and convert it again")
    return image_processor(read_json(path), num_channels, path)


def image_processor(fields, num_channels, where=FILE):
    """The processor that a preprocessor_config.json describes; `where` is what an error names."""
    for name in sorted(OFF & fields.keys()):
        if fields[name]:
            raise UserError(
                f"{where}: {name} is {fields[name]!r}, a step that image_processor.py does not have"
            )
    strange = sorted(fields.keys() - DEFAULTS.keys() - OFF - INERT)
    if strange:
        raise UserError(f"{where}: models/utils/image_processor.py does not know {', '.join(strange)}")
    fields = {**DEFAULTS, **{name: fields[name] for name in DEFAULTS if fields.get(name) is not None}}

    rescales, normalizes = fields["do_rescale"], fields["do_normalize"]
    try:
        return ImageProcessor(
            size_of(fields["size"]) if fields["do_resize"] else None,
            Image.Resampling(fields["resample"]),
            positive(fields["rescale_factor"]) if rescales else 1.0,
            per_channel(fields["image_mean"] if normalizes else 0.0, num_channels),
            per_channel(fields["image_std"] if normalizes else 1.0, num_channels, positive),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {one_line(error)}") from None


def size_of(size):
    """(height, width) from 224 or {"height": 224, "width": 224}."""
    # {"shortest_edge": 224}, which keeps an image's proportions, is not for these models.
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    whole = all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides.values())
    if not whole or set(sides) != {"height", "width"}:
        raise ValueError(f"size is {size!r}, where a number of pixels is expected, or height and width")
    return sides["height"], sides["width"]


def per_channel(value, num_channels, check=None):
    """One number for all channels or one for each, as an array (C,)."""
    values = value if isinstance(value, list) else [value] * num_channels
    if len(values) != num_channels:
        raise ValueError(
            f"image_mean and image_std have {len(values)} numbers, the model {num_channels} channels"
        )
    return np.array([(check or finite)(each) for each in values], dtype=np.float32)


def finite(value):
    if type(value) not in (int, float) or not -math.inf < value < math.inf:
        raise ValueError(f"{value!r} stands where a number is expected")
    return value


def positive(value):
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} stands where a number above 0 is expected")
    return value
