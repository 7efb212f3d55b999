"""Whatever stands in the files of a checkpoint, each step either works or ends with one UserError.

A hundred damages, drawn from a seed: bytes flipped, cut off or added, JSON values of wrong types and absurd
sizes, safetensors headers that say something else, pickles of tensors that are not plain.
"""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conversion.config_fields import stored_labels
from conversion.convert import convert, inspect, reverse
from models import load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.image_processor import load_image_processor
from models.utils.tokenizer import load_tokenizer

NUM_CASES = 100
ODD = [
    None, True, -1, 0, 1, 7, 2**31, 10**30, 10**400, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "<s>",
    "\x1b[31mred\nerror: fine", "y" * 5000, "\ud800", [], {}, [1], ["<s>"], [None], [{}], {"a": 1}, {"": ""},
]  # fmt: skip
HEADER_DTYPES = ["I8", "BOOL", "F8_E4M3", "C64", "I64", "F64", "F16", "U8", "XX", 5]
SHAPES = [[], [0], [-1], [2**63], [10**10, 10**10], [1] * 100, "x", None]
PICKLED = [
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.to(torch.bool),
    lambda tensor: torch.zeros(1).expand(10**6, 10**6),
    lambda tensor: {"a": tensor},
    lambda tensor: "a word",
]


def damaged_json(draw, content):
    """One value, at any depth, lost, renamed, or replaced by an odd one."""
    places, queue = [], [content]
    for node in queue:
        keys = list(node) if isinstance(node, dict) else range(min(len(node), 50))
        places += [(node, key) for key in keys]
        queue += [node[key] for key in keys if isinstance(node[key], dict | list)]
    # Mostly near the top, where there are fewer of them.
    node, key = places[min(draw.randrange(len(places)) for _ in range(2))]
    way = draw.random()
    if way < 0.1 and isinstance(node, dict):
        node[draw.choice(["auto_map", "\x1b[2J", "q" * 5000])] = node.pop(key)
    elif way < 0.2 and type(node[key]) is int:
        node[key] += draw.choice([-1, 1, 1000, 10**6])
    else:
        node[key] = draw.choice(ODD)
    return content


def damaged_bytes(draw, content):
    way = draw.random()
    if way < 0.3:
        return content[: draw.randrange(len(content) + 1)]
    if way < 0.4:
        return content + draw.randbytes(100)
    content = bytearray(content)
    for _ in range(draw.choice([1, 3, 30])):
        content[draw.randrange(min(len(content), draw.choice([400, 10**9])))] = draw.randrange(256)
    return bytes(content)


def damaged_safetensors(draw, content):
    size = int.from_bytes(content[:8], "little")
    way = draw.random()
    if way < 0.2:
        return damaged_bytes(draw, content)
    if way < 0.3:
        lie = draw.choice([0, size - 1, size + 1, len(content), 2**40, 2**64 - 1])
        return lie.to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + size])
    name = draw.choice([name for name in header if name != "__metadata__"])
    if way < 0.7:
        field = draw.choice(["dtype", "shape", "data_offsets"])
        offsets = [[0, 0], [5, 2], [0, 2**63], [-1, 1], "x"]
        header[name][field] = draw.choice(
            {"dtype": HEADER_DTYPES, "shape": SHAPES, "data_offsets": offsets}[field]
        )
    else:
        header[draw.choice(["\x1b[31m", "n" * 5000, "a\nerror: x", ""])] = header.pop(name)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]


def damage(draw, path):
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.8:
        content = json.dumps(damaged_json(draw, json.loads(content))).encode()
    elif path.suffix == ".safetensors":
        content = damaged_safetensors(draw, content)
    else:
        content = damaged_bytes(draw, content)
    path.write_bytes(content)


def pickle_weights(draw, folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = draw.choice(list(state))
    state[name] = draw.choice(PICKLED)(state[name])
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=draw.random() < 0.5)
    if draw.random() < 0.3:
        damage(draw, folder / "pytorch_model.bin")


def attempt(step, *arguments, **options):
    """What a step gives, or None where it ends as it should; anything but a UserError is a failure."""
    try:
        return step(*arguments, **options)
    except UserError as error:
        assert str(error)
        return None


def talk(tokenizer):
    ids = tokenizer.encode("Hello def f(x): [MASK] déjà <s> <|im_end|> vu\n 12")
    stream = tokenizer.stream()
    assert isinstance("".join(map(stream.push, ids)) + stream.finish() + tokenizer.decode(ids), str)
    return [tokenizer.token_bytes(id) for id in ids]


@torch.no_grad()
def answer(model):
    config = model.config
    if hasattr(config, "image_size"):
        size = (1, config.num_channels, config.image_size, config.image_size)
        return model(torch.zeros(size).to(model.pos_embed)) if config.image_size < 100 else None
    tokens = torch.zeros(1, 1, dtype=torch.long)
    return model(tokens, tokens) if hasattr(model, "encode") else model(tokens)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_works_or_says_why_not(tmp_path, capsys):
    sources = sorted(CHECKPOINTS.glob("tiny-*"))
    needless = shutil.ignore_patterns("*.md", "*.png", "example.txt", "converted", "reversed", "training")
    for case in range(NUM_CASES):
        draw = random.Random(case)
        source = draw.choice(sources)
        folder = tmp_path / f"{case}-{source.name}"
        shutil.copytree(source, folder, ignore=needless)

        way = draw.random()
        if way < 0.15:
            pickle_weights(draw, folder)
        else:
            place = convert(folder, progress=False) if way < 0.45 else folder
            files = [path for path in sorted(place.glob("*")) if path.is_file() and path.name[0] != "."]
            damage(draw, draw.choice(files))
        if way >= 0.45 or way < 0.15:
            attempt(inspect, folder)
            attempt(convert, folder, progress=False)
        model, tokenizer = attempt(load_model, folder), attempt(load_tokenizer, folder)
        if model is not None:
            attempt(answer, model)
        if tokenizer is not None:
            attempt(talk, tokenizer)
            attempt(tokenizer.encode_chat, [{"role": "user", "content": "hi <s>"}])
        if (folder / "converted" / "labels.json").exists():
            attempt(stored_labels, folder / "converted")
            attempt(load_image_processor, folder, 1)
        attempt(reverse, folder, progress=False)
        shutil.rmtree(folder)
        capsys.readouterr()
