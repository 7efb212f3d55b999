"""A Vision Transformer at the terminal: what run.py does with a model that says what an image shows.

Each --image goes through the preprocessing of preprocessor_config.json, and the five most probable labels are
printed with their probabilities; --attention draws what the answer was made of (attention_picture.py).

Shapes: h rows of patches, w columns of patches.
Proof: tests/test_run_vision_transformer.py, against `transformers`.
"""

import json
import sys
import time
from pathlib import Path

import torch

from conversion.config_fields import stored_labels
from models.utils.errors import UserError
from models.utils.files import check_output, one_line
from models.utils.image_processor import load_image_processor, open_image
from models.utils.machine import peak_memory, spoken_bytes
from runs_ar.generate import NOT_FINITE
from runs_encoder.attention_picture import attention, draw

OPTIONS = {"--checkpoint", "--device", "--dtype", "--image", "--attention", "--json", "--top"}
NUM_GUESSES = 5
MOST_PATCHES = 10_000  # every patch attends to every other


def run_vit(args, checkpoint):
    """checkpoint.load() is slow: what can be wrong with the input is found out before."""
    if not args.images and (example := checkpoint.example("example.png")):
        args.images = [example]
    check_options(args)
    folder, config = checkpoint.folder, checkpoint.config
    processor = load_image_processor(folder, config.num_channels)
    labels = stored_labels(folder) if config.num_labels else None
    inputs = [processor(open_image(path, config.num_channels)) for path in args.images]
    for path, image in zip(args.images, inputs):
        check_size(path, image, config)

    model = checkpoint.load()
    start, results = time.perf_counter(), []
    for path, image in zip(args.images, inputs):
        results.append(result(path, look(model, image), labels, args.top or NUM_GUESSES))
        if not args.json:
            print("\n".join(lines(results[-1])), flush=True)
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps(results))
    if args.attention:
        save_picture(args.attention, args.images[0], model, inputs[0], results[0])
    images = f"{len(inputs)} image{'s' * (len(inputs) > 1)} in {seconds:.2f} s"
    print(f"[{images}, peak memory {spoken_bytes(peak_memory(args.device))}]", file=sys.stderr)


@torch.inference_mode()
def look(model, image):
    """What the model says to one image: a logit for each label, or else its vector for the whole image."""
    out = model(image.to(model.pos_embed))[0].float().cpu()
    if not out.isfinite().all():
        raise UserError(NOT_FINITE)
    return out if out.dim() == 1 else out[0]  # the class token's, where hidden states come out


def result(path, logits, labels, num_guesses=NUM_GUESSES):
    """What --json prints for one image."""
    if labels is None:
        return {"image": str(path), "vector": logits.tolist()}
    multiple = labels["problem_type"] == "multi_label_classification"
    probabilities = logits.sigmoid() if multiple else logits.softmax(dim=-1)
    best = probabilities.topk(min(num_guesses, len(logits)))
    guesses = [
        {"label": labels["labels"][id], "id": id, "probability": probability}
        for probability, id in zip(best.values.tolist(), best.indices.tolist())
    ]
    return {"image": str(path), "labels": guesses}


def lines(result):
    """The same for people."""
    yield result["image"]
    yield from (f"  {guess['probability']:>7.2%}  {guess['label']}" for guess in result.get("labels", []))
    if "vector" in result:
        start = " ".join(f"{value:+.3f}" for value in result["vector"][:4])
        yield f"  no classifier; {len(result['vector'])} numbers: {start} ..."


def grid(image, config):
    """(h, w): the rows and columns of patches that the model makes of an image (1, C, height, width)."""
    return tuple(side // config.patch_size for side in image.shape[2:])


# What was asked for -----------------------------------------------------------------------------------------


def check_options(args):
    strange = sorted(args.given - OPTIONS)
    if strange:
        known = ", ".join(sorted(OPTIONS))
        raise UserError(f"{', '.join(strange)}: a Vision Transformer reads images alone; it takes {known}")
    if not args.images:
        raise UserError("there is nothing to look at; give --image FILE, more than once for several images")
    if args.attention and len(args.images) > 1:
        raise UserError(f"--attention draws the picture of one image; {len(args.images)} were given")
    if args.attention:
        check_output(args.attention, "--attention")


def check_size(path, image, config):
    """Where the checkpoint says that images keep their size, they may be too small or far too large."""
    h, w = grid(image, config)
    if h * w == 0:
        raise UserError(f"{path}: is smaller than a patch of {config.patch_size} pixels; give a larger image")
    if h * w > MOST_PATCHES:
        raise UserError(f"{path}: has {h * w:,} patches, at most {MOST_PATCHES:,} are read; make it smaller")


# The picture ------------------------------------------------------------------------------------------------


def save_picture(path, image_path, model, image, result):
    """Draw what the class token attends to."""
    _, probs = attention(model, image.to(model.pos_embed))
    guesses = [(guess["label"], guess["probability"]) for guess in result.get("labels", [])]
    try:
        draw(Path(path), open_image(image_path, 3), probs[:, 0], grid(image, model.config), guesses)
    except (OSError, ValueError) as error:
        where = f"--attention {path}: cannot be written ({one_line(error)})"
        raise UserError(f"{where}; give the name of a PNG") from None
