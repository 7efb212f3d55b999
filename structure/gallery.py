"""What lies in structure_images/, by the names of its files: what `show_structure.py --all` draws anew."""

import json
import re
from pathlib import Path

from models import config_names

IMAGES = Path(__file__).resolve().parents[1] / "structure_images"
ROPE = "-rope"  # behind the name of a picture of RoPE
THINKS = "-thinks"  # behind that of a page in which a text runs through a model
TREE = "family-tree"  # the name of its picture


def images(folder=IMAGES):
    """(names of the configs, whether it is dark, whether a page) of each picture and page of a folder."""
    known, found = config_names(), []
    for path in sorted(folder.glob("*")):
        stem = path.stem.removesuffix("-dark")
        names = (
            (stem,) if stem in known else next((pair for pair in pairs(stem) if set(pair) <= set(known)), ())
        )
        if names and path.suffix in (".png", ".html"):
            found.append((names, stem != path.stem, path.suffix == ".html"))
    return found


def rope_images(folder=IMAGES):
    """(name of the config, whether it is dark) of each picture of RoPE in a folder."""
    stems = [path.stem for path in sorted(folder.glob("*.png"))]
    named = [(stem.removesuffix("-dark").removesuffix(ROPE), stem) for stem in stems if ROPE in stem]
    return [(name, stem.endswith("-dark")) for name, stem in named if name in config_names()]


def tree_images(folder=IMAGES):
    """Whether it is dark, of each picture of the family tree in a folder."""
    return [path.stem.endswith("-dark") for path in sorted(folder.glob(f"{TREE}*.png"))]


def pairs(stem):
    """Every way to read "gpt2-llama-3-8b" as two names."""
    return [(stem[:n], stem[n + 1 :]) for n, sign in enumerate(stem) if sign == "-"]


def thinking_pages(folder=IMAGES):
    """(name of the checkpoint, what was asked) of each such page of a folder, which says it itself."""
    for path in sorted(folder.glob(f"*{THINKS}.html")):
        asked = re.search(r'"asked": ({[^}]*})', path.read_text(encoding="utf-8"))
        yield path.stem.removesuffix(THINKS), json.loads(asked[1])
