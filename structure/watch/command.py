"""What `show_structure.py CHECKPOINT --prompt TEXT --html` does: a text, a run, a page.

prompt --text_of--> Text --think--> Thought --View--> numbers as text --page.write--> one file
"""

import base64
import io

import torch
from PIL import Image

from models import load_model
from models.utils.errors import UserError, report
from runs_ar.top import token_name
from structure.watch import page
from structure.watch.page import View, matrices_of, plan
from structure.watch.thought import Text, think
from structure.watch.writing import answers_of, pixels_of, text_of


def watch(checkpoint, subject, path, asked, write=None, ways=()):
    """Write the page. subject: (box, info) of the model. write: how a drafter writes, see writing.py.

    asked: {"prompt", "image", "num_new"}; None: what came with the checkpoint, 0: nothing is written.
    ways: (words, address) of the pages that it leads to.
    """
    (box, info), prompt, image, num_new = subject, asked["prompt"], asked["image"], asked["num_new"]
    sees = "images" in checkpoint.inputs
    check(checkpoint, sees, prompt, image, num_new)
    pixels = pixels_of(checkpoint, image) if sees else None
    checkpoint.check_memory(0)
    # The linear layers stay torch's own, which give gradients; codes need their kernels.
    model = load_model(checkpoint.folder, dtype=torch.float32, arranged=checkpoint.stored is not None)

    room = room_of(model, box, pixels)
    if sees:
        text, given, rounds = Text([], image=pixels), 0, []
    else:
        longest = min(room(page.MOST_TOKENS).num_tokens, checkpoint.config.max_seq_len)
        report(f"a page of this model holds {longest} tokens")
        if num_new >= longest:
            raise UserError(f"--new-tokens is {num_new}: with the text that is too long; give fewer")
        text, given, rounds = text_of(checkpoint, prompt, model, num_new, longest, write)
    thought = think(model, text)
    num_places = len(thought.steps[0].after)
    fits = room(num_places)
    if fits.num_tokens < num_places:
        raise UserError(f"{num_places} places are more than a page of this model holds, {fits.num_tokens}")

    answers, names = answers_of(checkpoint, thought)
    view = View(
        thought,
        text,
        box,
        fits,
        names=names,
        answers=answers,
        rows=places(checkpoint, text, num_places, pixels),
        source=[token_name(checkpoint.tokenizer, id) for id in text.source or ()],
        given=num_places if sees else given,
        rounds=rounds,
    )
    view.data["asked"] = asked
    if sees:
        view.data["image"] = picture(pixels, checkpoint.config)
    page.write(path, box, info, view, ways)
    size = path.stat().st_size
    report(f"{num_places} places; {size / 1e6:.1f} MB")


def check(checkpoint, sees, prompt, image, num_new):
    if sees and (prompt is not None or num_new):
        raise UserError("this model reads images: give --image FILE, without --prompt and --new-tokens")
    if image and not sees:
        raise UserError("--image: this model reads text; give --prompt TEXT")
    if num_new and checkpoint.kind not in ("decoder", "encoder-decoder"):
        raise UserError("--new-tokens: this model reads and does not write; leave it out")


def room_of(model, box, pixels):
    """plan for this model, by what a run of two tokens keeps."""
    tokens = [1, 1]
    text = Text(tokens, source=tokens if hasattr(model, "encode") else None, image=pixels)
    heads = think(model, text).attention
    number = sum(len(each.probs) for each in heads)
    kept = [tensor for each in heads if each.q is not None for tensor in (each.q, each.k)]
    numbers = sum(len(tensor) * tensor.shape[-1] for tensor in kept)
    matrices = matrices_of(box)
    return lambda num_tokens: plan(num_tokens, number, numbers, matrices)


def places(checkpoint, text, num_places, pixels):
    """What each place is called: tokens, or the patches of an image by row and column."""
    if pixels is None:
        return [token_name(checkpoint.tokenizer, id) for id in text.tokens]
    rows, columns = grid(pixels, checkpoint.config)
    patches = [f"{row + 1}, {column + 1}" for row in range(rows) for column in range(columns)]
    return ["class"] * (num_places - len(patches)) + patches


def grid(pixels, config):
    return tuple(side // config.patch_size for side in pixels.shape[2:])


def picture(pixels, config):
    """{data, rows, columns}: the image as the model reads it, from black to white, and its patches."""
    x = pixels[0, :3] if pixels.shape[1] >= 3 else pixels[0, :1].expand(3, -1, -1)
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-9)
    file = io.BytesIO()
    Image.fromarray((x * 255).byte().movedim(0, -1).numpy()).save(file, format="PNG")
    rows, columns = grid(pixels, config)
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"data": data, "rows": rows, "columns": columns}
