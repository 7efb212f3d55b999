"""See a model: a picture, a page or a table of any architecture, drawn from the code that runs.

    python show_structure.py                          what can be drawn
    python show_structure.py llama-3-8b               structure_images/llama-3-8b.png and .svg
    python show_structure.py gpt2 --set num_layers=2 --set d_model=64 --out tiny.png
    python show_structure.py tiny-llama-python --dark             a checkpoint, by its name or its folder
    python show_structure.py llama-3-8b --html        a page to click through: diagram, source, facts
    python show_structure.py tiny-llama-python --prompt "def main" --new-tokens 20 --html   watch it think
    python show_structure.py --compare gpt2 llama-3-8b          two pictures as one; --html: as a page
    python show_structure.py llama-3.1-405b --table   parameters, memory and work of every module
    python show_structure.py llama-3.1-405b --json    all of it, for a program
    python show_structure.py llama-3.1-8b --rope      how far RoPE's pairs reach, and what scaling does
    python show_structure.py --tree                   what came from what; --html: all pages, in site/

Nothing is drawn by hand: the model stands on torch's meta device, where weights have shapes and take no
memory, and torch.export records what it does. A new file in models/ has its diagram without another line.
"""

import json
import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from conversion.find import find_folder, what_was_meant
from models import CONFIGS_FOLDER, MODEL_NAMES, ONE_PASS, config_from_dict, config_names, kind_of, nearest
from models.utils.command_line import CHECKPOINTS, Parser
from models.utils.errors import UserError, report, run_main
from models.utils.files import one_line, read_json
from structure.gallery import (
    IMAGES,
    ROPE,
    THINKS,
    TREE,
    images,
    rope_images,
    thinking_pages,
    tree_images,
)

# torch and matplotlib take seconds to import: whatever needs them is imported where a model is drawn, so that
# a list of names and the answer to a typo need not wait.

SITE = Path(__file__).parent / "site"
LARGEST = 10**9  # of a number in a config; no model has more of anything
COUNTS = re.compile(r"num_(?!active)(\w+_)?(layers|experts)")  # each an object, even on the meta device
MOST_MODULES = 100_000
NUM_NEW = 16  # tokens that a model writes on a page of the website
MOST = 10**12  # of rows, tokens and GB/s


def main(argv=None):
    args = parse(argv)
    if args.all:
        draw_all()
    elif args.compare:
        compare(*map(load, args.compare), args.out, args.html, args.dark)
    elif args.tree and args.html:
        write_site(args.out or SITE)
    elif args.tree:
        draw_tree(args.out, args.dark)
    elif not args.name:
        print(what_there_is())
    elif args.rope:
        draw_rope(args.name, args.set, args.out, args.dark)
    elif args.runs:
        asked = {"prompt": args.prompt, "image": args.image, "num_new": args.new_tokens or 0}
        watch_it_think(args.name, asked, args.out, args.draft, args.lookup)
    else:
        show(load(args.name, args.set), args)


def show(subject, args):
    """What the options ask of one model."""
    from dataclasses import asdict

    from structure.table import table

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


def watch_it_think(name, asked, out=None, draft=None, lookup=False, ways=()):
    """The page of a run: a text of one's own through a checkpoint's weights. asked: see structure/watch."""
    import torch

    from conversion.checkpoint import open_checkpoint
    from structure.watch.command import watch

    checkpoint = open_checkpoint(name, device="cpu", dtype=torch.float32)
    path, write = out or IMAGES / f"{file_name(Path(name).name)}{THINKS}.html", None
    if draft or lookup:
        from runs_ss.rounds import with_drafts

        write = with_drafts(checkpoint, draft)
    with written(path):
        watch(checkpoint, load(name), path, asked, write, ways)
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


def write_site(folder, names=None):
    """The family tree, and all pages that it leads to."""
    from structure.tree import site

    with written(folder):
        for path in site.write(folder, lambda name: load(size_of(name)), names, run_example):
            print(f"wrote {path}")


def run_example(model_name, path, ways):
    """The page of the example that came with a small checkpoint of a model; False where there is none."""
    here = [name for name in config_names() if (CHECKPOINTS / name / "config.json").is_file()]
    name = next((name for name in here if model_of(name) == model_name), None)
    if name:
        num_new = 0 if kind_of(model_name) == ONE_PASS else NUM_NEW
        asked = {"prompt": None, "image": None, "num_new": num_new}
        watch_it_think(str(CHECKPOINTS / name), asked, path, ways=ways)
    return bool(name)


# Pictures ---------------------------------------------------------------------------------------------------


def draw_all():
    """Draw anew all that lies in structure_images/."""
    subjects = {}
    for name, dark in rope_images():
        draw_rope(name, dark=dark)
    for dark in tree_images():
        draw_tree(dark=dark)
    for name, asked in list(thinking_pages()):
        watch_it_think(name, asked)
    for names, dark, html in images():
        subjects |= {name: load(name) for name in names if name not in subjects}
        shown = [subjects[name] for name in names]
        if len(names) > 1:
            compare(*shown, html=html, dark=dark)
        elif html:
            write_page(*shown)
        else:
            draw(*shown, dark=dark)


def draw(subject, out=None, dark=False):
    from structure.picture import picture

    path = out or IMAGES / f"{file_name(subject[1]['name'])}.png"
    save(picture, picture.draw(*subject, dark=dark), path, dark)


def draw_rope(name, changes=(), out=None, dark=False):
    """How far each pair of a head reaches: of a model's config alone, so that nothing is captured."""
    shown, fields, where = read(name, changes)
    model_name, config = checked_config(fields, where)

    from structure import rope
    from structure.picture import picture

    path = out or IMAGES / f"{file_name(shown)}{ROPE}.png"
    save(picture, rope.draw(shown, model_name, config, dark), path, dark)


def draw_tree(out=None, dark=False):
    """Of the docstrings alone, so that nothing is captured."""
    from structure.picture import picture
    from structure.tree import draw
    from structure.tree.ancestry import relatives

    save(picture, draw.draw(relatives(), dark), out or IMAGES / f"{TREE}.png", dark)


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
    """(box, info) of a config in configs/, of a JSON file, of a checkpoint, or of a model in some size."""
    shown, fields, where = read(name, changes)
    model_name, config = checked_config(fields, where)

    from structure.capture.capture import capture
    from structure.facts import describe

    try:
        box = capture(model_name, config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{where}: too large to be drawn ({one_line(error)[:80]}); give smaller sizes"
        ) from None
    return box, describe(shown, model_name, config, box)


def read(name, changes=()):
    """(how a picture calls it, its config's fields with the changes, what an error calls it)."""
    name, fields, where = find(name)
    return " ".join([name, *changes]), {**fields, **changed(changes, fields)}, where


def checked_config(fields, where):
    """(name in models/, Config) of fields that may be built."""
    check_sizes(fields, where)
    try:
        return config_from_dict(fields, where)
    except UserError as error:
        raise UserError(f"{error}{numbers_of(str(error), fields)}") from None


def find(name):
    """(how a picture calls it, its config's fields, what an error calls it)."""
    if name in MODEL_NAMES and name not in config_names():
        name = size_of(name)
    if name in config_names():
        return name, read_json(CONFIGS_FOLDER / f"{name}.json"), f"config {name!r}"
    path = Path(name)
    if path.suffix == ".json":
        return path.stem, read_json(path), path
    try:
        folder = find_folder(name)
    except UserError:
        raise UserError(f"no model named {name!r} in configs/ or checkpoints/; {meant(name)}") from None
    name = folder.resolve()
    name = name.parent.name if name.name == "converted" else name.name
    for where in (folder / "converted" / "config.json", folder / "config.json"):
        if where.is_file() and "model" in read_json(where):
            return name, read_json(where), where
    from conversion.source import open_source

    source = open_source(folder)
    return name, source.config, source.where


def size_of(model_name):
    """The config that a model is drawn in: the one of structure_images/, or the first there is."""
    sizes = [size for size in config_names() if model_of(size) == model_name]
    if not sizes:
        raise UserError(f"configs/ has no config of {model_name}; give a JSON file or a checkpoint")
    drawn = [names[0] for names, *_ in images() if len(names) == 1 and names[0] in sizes]
    size = (drawn or sizes)[0]
    report(f"{model_name} in the size {size}; there are: {', '.join(sizes)}")
    return size


def model_of(config_name):
    return read_json(CONFIGS_FOLDER / f"{config_name}.json").get("model")


def meant(name):
    """The end of an error about a misspelt name."""
    known = nearest(name, [*config_names(), *checkpoints(), *MODEL_NAMES])
    return known if known.startswith("did you mean") else what_was_meant(name)


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
        except (ValueError, RecursionError):
            raise UserError(
                f"--set {field}={value[:20]}...: no number that can be read; give a smaller one"
            ) from None
    return new


def check_sizes(fields, where):
    """Stop before memory is taken for sizes that no model has."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_sizes(value, where)
        elif type(value) is int and abs(value) > LARGEST:
            shown = value if abs(value) < 10**20 else "a number of more than 20 digits"
            raise UserError(f"{where}: {name} is {shown}; give at most {LARGEST:,}")
    counts = {name: n for name, n in fields.items() if COUNTS.fullmatch(name) and type(n) is int}
    if math.prod(counts.values()) > MOST_MODULES:
        named = " and ".join(f"{name} {n:,}" for name, n in counts.items())
        raise UserError(f"{where}: {named} are too many to build; give {MOST_MODULES:,} at most")


def numbers_of(message, fields):
    """The values of the fields that an error names, where it does not say them itself."""
    named = [name for name in fields if re.search(rf"\b{re.escape(name)}\b", message)]
    if len(named) < 2:
        return ""
    return f" ({', '.join(f'{name} is {fields[name]}' for name in named)})"


def checkpoints():
    """Folders under checkpoints/ that hold a model, as one names them."""
    return sorted(f"checkpoints/{path.parent.name}" for path in CHECKPOINTS.glob("*/config.json"))


def what_there_is():
    """Everything that can be drawn, by architecture."""
    names = {}
    for name in config_names():
        names.setdefault(model_of(name), []).append(name)
    lines = [f"{model}: {', '.join(names[model])}" for model in MODEL_NAMES if model in names]
    folders = ", ".join(checkpoints()) or "none yet"
    return "\n".join([*lines, f"checkpoints: {folders}", "draw one: python show_structure.py NAME"])


# Options ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser("python show_structure.py", __doc__)
    add = parser.add_argument
    add(
        "name", nargs="?", metavar="NAME", help="in configs/, models/, checkpoints/, a folder, or a JSON file"
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another value in its config")
    add("--out", type=Path, metavar="FILE", help="default: structure_images/NAME.png, or .html; site/")
    add("--dark", action="store_true", help="a picture for a dark page, NAME-dark.png")
    add("--all", action="store_true", help="draw anew all that lies in structure_images/")
    add("--compare", nargs=2, metavar="NAME", help="two models side by side")
    add("--tree", action="store_true", help="all models by year; with --html every page, in a folder")

    add = parser.add_mutually_exclusive_group().add_argument
    add("--html", action="store_true", help="write a page instead of a picture")
    add("--table", action="store_true", help="print the numbers as text")
    add("--json", action="store_true", help="print everything as one JSON object")
    add("--rope", action="store_true", help="draw the tokens that each pair of a head takes for a full turn")

    add = parser.add_argument_group("watch it think (with --html)").add_argument
    add("--prompt", metavar="TEXT", help="runs through the checkpoint's weights; each number is in the page")
    add("--image", metavar="FILE", help="the same for a model that sees")
    add("--new-tokens", type=int, metavar="N", help="let it write so many, greedily")
    add("--draft", metavar="CHECKPOINT", help="a smaller one that guesses ahead while it writes")
    add("--lookup", action="store_true", help="guess from the text so far instead")

    add = parser.add_argument_group("table").add_argument
    add("--batch", type=int, default=1, metavar="N", help="rows; default: %(default)s")
    length = "tokens of the prompt, and of the cache: %(default)s"
    add("--length", type=int, default=1024, metavar="N", help=length)
    add("--bandwidth", type=float, default=100, metavar="GB/S", help="of the memory; default: %(default)s")
    return checked(parser.parse_args(argv))


def checked(args):
    runs = {"--prompt": args.prompt, "--image": args.image, "--new-tokens": args.new_tokens}
    runs |= {"--draft": args.draft, "--lookup": args.lookup or None}
    args.runs = [option for option, value in runs.items() if value is not None]
    if args.runs and not (args.name and args.html) or args.runs and args.set:
        raise UserError(f"{args.runs[0]} goes with CHECKPOINT and --html, and without --set")
    if args.new_tokens is not None and args.new_tokens < 1:
        raise UserError(f"--new-tokens is {args.new_tokens}; give 1 or more")
    if args.draft and args.lookup:
        raise UserError("--draft and --lookup both guess ahead; give one of them")
    if (args.draft or args.lookup) and args.new_tokens is None:
        raise UserError("--draft and --lookup guess what is written: give --new-tokens N too")
    given = [bool(args.name), args.all, bool(args.compare), args.tree]
    if sum(given) > 1:
        raise UserError("NAME, --all, --compare and --tree exclude each other; give one of them")
    if args.set and not args.name:
        raise UserError("--set goes with NAME")
    if args.all and (args.out or args.dark or args.html or args.table or args.json or args.rope):
        raise UserError("--all draws pictures into structure_images/; leave out the other options")
    if (args.compare or args.tree) and (args.table or args.json or args.rope):
        makes = f"--{'compare' if args.compare else 'tree'} makes a picture, or with --html"
        raise UserError(f"{makes} pages; leave out --table, --json and --rope")
    if (args.html or args.table or args.json or args.rope or args.out or args.dark) and not any(given):
        raise UserError("say which model: give its NAME; without options the names are listed")
    if (args.table or args.json) and (args.out or args.dark):
        raise UserError("--table and --json print what they say; leave out --out and --dark")
    if args.html and args.dark:
        raise UserError("--dark is for pictures; a page is as dark as the browser asks for, key t changes it")
    check_out(args.out, is_folder=args.tree and args.html)
    for option in ("batch", "length", "bandwidth"):
        value = getattr(args, option)
        if not 0 < value <= MOST:  # which NaN is not either
            raise UserError(f"--{option} is {value:.4g}; give more than 0, and at most {MOST:,}")
    return args


def check_out(out, is_folder=False):
    """Before a model is drawn for it: a place for a file, or for the folder of --tree --html."""
    if out is None:
        return
    if is_folder and out.is_file():
        raise UserError(f"--out {out}: is no folder; --tree --html writes a page for each model into one")
    if os.path.isdir(out) and not is_folder:
        raise UserError(f"--out {out}: is a folder; give the name of a file in it")
    around = next((folder for folder in out.parents if os.path.lexists(folder)), None)
    if around and not os.path.isdir(around):
        raise UserError(f"--out {out}: cannot be written ({around} is no folder); give another --out")


if __name__ == "__main__":
    # A terminal that cannot show a character shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    run_main(main)
