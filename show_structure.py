"""See a model: a picture, a page or a table of any architecture, drawn from the code that runs.

    python show_structure.py                          what can be drawn
    python show_structure.py llama-3-8b               structure_images/llama-3-8b.png and .svg
    python show_structure.py gpt2 --set num_layers=2 --set d_model=64 --out tiny.png
    python show_structure.py checkpoints/tiny-llama-python --dark
    python show_structure.py llama-3-8b --html        a page to click through: diagram, source, facts
    python show_structure.py --compare gpt2 llama-3-8b          two pictures as one; --html: as a page
    python show_structure.py llama-3.1-405b --table   parameters, memory and work of every module
    python show_structure.py llama-3.1-405b --json    all of it, for a program

Nothing is drawn by hand: the model stands on torch's meta device, where weights have shapes and take no
memory, and torch.export records what it does. A new file in models/ has its diagram without another line.
"""

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from models import (
    MODEL_NAMES,
    config_from_dict,
    config_names,
    config_to_dict,
    load_config,
    nearest,
)
from models.utils.command_line import CHECKPOINTS, Parser
from models.utils.errors import UserError, run_main
from models.utils.files import read_json
from structure.capture.capture import capture
from structure.facts import describe
from structure.table import table

IMAGES = Path(__file__).parent / "structure_images"
# What --all draws: each architecture once.
ZOO = (
    "transformer-base",
    "gpt2",
    "bert-base-uncased",
    "vit-b-16",
    "gpt-neox-20b",
    "transformer-lm-15m",
    "llama-3-8b",
)
FIRST = "llama-3-8b"  # in dark as well, and as a page
COMPARED = ("gpt2", "llama-3-8b")


def main(argv=None):
    args = parse(argv)
    if args.all:
        draw_all()
    elif args.compare:
        compare(*map(load, args.compare), args.out, args.html, args.dark)
    elif not args.name:
        print(what_there_is())
    else:
        show(load(args.name, args.set), args)


def show(subject, args):
    """What the options ask of one model."""
    box, info = subject
    if args.table:
        print("\n".join(table(box, info, args.batch, args.length, args.bandwidth)))
    elif args.json:
        print(json.dumps({**info, "structure": asdict(box)}))
    elif args.html:
        write_page(subject, args.out)
    else:
        draw(subject, args.out, args.dark)


def write_page(subject, out=None):
    from structure.page import page

    path = out or IMAGES / f"{file_name(subject[1]['name'])}.html"
    with written(path):
        page.write(*subject, path)
    print(f"wrote {path}")


def compare(first, second, out=None, html=False, dark=False):
    from structure.page import page
    from structure.picture import picture

    names = "-".join(file_name(info["name"]) for _, info in (first, second))
    path = out or IMAGES / f"{names}.{'html' if html else 'png'}"
    if html:
        with written(path):
            page.compare(*first, *second, path)
        print(f"wrote {path}")
    else:
        save(picture, picture.compare(*first, *second, dark), path, dark)


# Pictures ---------------------------------------------------------------------------------------------------


def draw_all():
    """Every image and page of the project's README."""
    subjects = {name: load(name) for name in ZOO}
    for name in ZOO:
        draw(subjects[name])
    draw(subjects[FIRST], dark=True)
    write_page(subjects[FIRST])
    for html in (False, True):
        compare(*(subjects[name] for name in COMPARED), html=html)


def draw(subject, out=None, dark=False):
    # matplotlib takes a second to come up, which a table need not wait for.
    from structure.picture import picture

    path = out or IMAGES / f"{file_name(subject[1]['name'])}.png"
    save(picture, picture.draw(*subject, dark=dark), path, dark)


def file_name(name):
    return re.sub(r"[^\w.=-]+", "-", name)


def save(picture, figure, path, dark):
    """path as .png and as .svg, both with the facts that they show inside."""
    name = path.stem if path.suffix in (".png", ".svg") else path.name
    path = path.with_name(name + "-dark" * dark)
    with written(path):
        picture.save(figure, path)
    print(f"wrote {path}.png and {path}.svg")


@contextmanager
def written(path):
    """A place that cannot be written is for the person at the keyboard to put right."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from None


# Models -----------------------------------------------------------------------------------------------------


def load(name, changes=()):
    """(box, info) of a config in configs/, of a JSON file, or of a checkpoint's folder."""
    model_name, config, where = find(name)
    if changes:
        fields = {
            **config_to_dict(model_name, config),
            **changed(changes, config_to_dict(model_name, config)),
        }
        model_name, config = config_from_dict(fields, where)
    box = capture(model_name, config)
    return box, describe(" ".join([title(name), *changes]), model_name, config, box)


def title(name):
    """How a picture calls it: the config's name, the file's, or the folder's."""
    path = Path(name).resolve()
    if name in config_names():
        return name
    return (
        path.stem if path.suffix == ".json" else path.parent.name if path.name == "converted" else path.name
    )


def find(name):
    """(model name, Config, what an error calls it)."""
    path = Path(name)
    if name in config_names() or path.suffix == ".json":
        return *load_config(name), f"config {name!r}"
    folder = path if path.is_dir() else CHECKPOINTS / name
    if not folder.is_dir():
        if name in MODEL_NAMES:
            sizes = [size for size in config_names() if load_config(size)[0] == name]
            raise UserError(f"{name} comes in sizes; give one of them: {', '.join(sizes)}")
        known = config_names() + checkpoints()
        raise UserError(f"no model named {name!r} in configs/ or checkpoints/; {nearest(name, known)}")
    for where in (folder / "converted" / "config.json", folder / "config.json"):
        if where.is_file() and "model" in read_json(where):
            return *config_from_dict(read_json(where), where), where
    # The converter brings tokenizers along, which take their time to come up.
    from conversion.source import open_source

    source = open_source(folder)
    return *config_from_dict(source.config, source.where), source.where


def changed(changes, fields):
    """{field: value} of --set field=value, where a value is JSON, or else text."""
    new = {}
    for change in changes:
        field, sign, value = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: write it as field=value")
        if field not in fields:
            raise UserError(f"--set {change}: unknown field {field!r}; {nearest(field, list(fields))}")
        try:
            new[field] = json.loads(value)
        except json.JSONDecodeError:
            new[field] = value
    return new


def checkpoints():
    """Folders under checkpoints/ that hold a model, as one names them."""
    return sorted(f"checkpoints/{path.parent.name}" for path in CHECKPOINTS.glob("*/config.json"))


def what_there_is():
    """Everything that can be drawn, by architecture."""
    names = {}
    for name in config_names():
        names.setdefault(load_config(name)[0], []).append(name)
    lines = [f"{model}: {', '.join(names[model])}" for model in MODEL_NAMES if model in names]
    folders = ", ".join(checkpoints()) or "none yet"
    return "\n".join([*lines, f"checkpoints: {folders}", "draw one: python show_structure.py NAME"])


# Options ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser("python show_structure.py", __doc__)
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="in configs/, a JSON file, or a checkpoint's folder")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value in its config")
    add("--out", type=Path, metavar="FILE", help="default: structure_images/NAME.png, or .html")
    add("--dark", action="store_true", help="a picture for a dark page, NAME-dark.png")
    add("--all", action="store_true", help=f"draw the images of the README: {', '.join(ZOO)}")
    add("--compare", nargs=2, metavar="NAME", help="two models side by side")

    add = parser.add_mutually_exclusive_group().add_argument
    add("--html", action="store_true", help="write a page instead of a picture")
    add("--table", action="store_true", help="print the numbers as text")
    add("--json", action="store_true", help="print everything as one JSON object")

    add = parser.add_argument_group("table").add_argument
    add("--batch", type=int, default=1, metavar="N", help="rows; default: %(default)s")
    add(
        "--length",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the prompt, and of the cache: %(default)s",
    )
    add("--bandwidth", type=float, default=100, metavar="GB/S", help="of the memory; default: %(default)s")
    args = parser.parse_args(argv)
    return checked(args)


def checked(args):
    given = [bool(args.name), args.all, bool(args.compare)]
    if sum(given) > 1:
        raise UserError("NAME, --all and --compare exclude each other; give one of them")
    if args.set and not args.name:
        raise UserError("--set goes with NAME")
    if args.all and (args.out or args.dark or args.html or args.table or args.json):
        raise UserError("--all draws pictures into structure_images/; leave out the other options")
    if args.compare and (args.table or args.json):
        raise UserError("--compare makes a picture, or with --html a page; leave out --table and --json")
    if (args.html or args.table or args.json or args.out or args.dark) and not any(given):
        raise UserError("say which model: give its NAME; without options the names are listed")
    if (args.table or args.json) and (args.out or args.dark):
        raise UserError("--table and --json print what they say; leave out --out and --dark")
    if args.html and args.dark:
        raise UserError("--dark is for pictures; a page is as dark as the browser asks for, key t changes it")
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; give the name of a file in it")
    for option in ("batch", "length", "bandwidth"):
        if getattr(args, option) <= 0:
            raise UserError(f"--{option} is {getattr(args, option)}; give more than 0")
    return args


if __name__ == "__main__":
    # A terminal that cannot show a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    run_main(main)
