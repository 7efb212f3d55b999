"""The tables of the READMEs, written from the code: models, configs, differences, proofs, the tree.

    python -m tests.tables             writes every region between <!-- NAME --> and <!-- /NAME --> anew
    python -m tests.tables --check     says which of them are not what would be written; status 1 if any

In every *.md of the project, NAME is one of REGIONS below. tests/test_readme.py holds them new.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from conversion.checkpoint import find_checkpoint
from models import DECODER, build_model, config_names, kind_of, load_config
from runs_parallel import figures
from structure.differences import read_pages
from tests.copies import table as differences
from tests.tiny_readmes import model_name_of, of_kind, row
from tests.zoo import MODEL_NAMES, configs_of

ROOT = Path(__file__).parent.parent
LINES_A_MINUTE = 10  # of code that is read line by line
REGION = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- /\2 -->)", re.DOTALL)
# Folders that hold no code say themselves what they are in a README, or here.
FOLDERS = {
    "checkpoints": "Small trained models that come with the project; downloads stand beside them.",
    "configs": "The sizes of published models, a JSON file each.",
    "structure_images": "What show_structure.py --all draws.",
    "tests": "What proves each file; see tests/README.md.",
}


# What the files say of themselves ---------------------------------------------------------------------------


def project_files():
    """Paths from the root of what git holds or would add; without git, of all that is no cache."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return sorted(Path(line) for line in listing.stdout.splitlines() if (ROOT / line).is_file())
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part[0] in "._" for part in path.parts[:-1]))


def first_sentence(text):
    """Of a docstring or a README, on one line; a heading, a list or a command is no sentence."""
    paragraphs = re.split(r"\n\s*\n", text)
    said = next((" ".join(each.split()) for each in paragraphs if re.match(r"[\w`]", each)), "")
    return re.split(r"(?<=\.)\s(?=[A-Z`])", said)[0]


def docstring(path):
    return ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def link(name, path, folder):
    """A link to a file from a README in `folder`."""
    return f"[{name}]({Path(os.path.relpath(path, folder)).as_posix()})"


# The regions ------------------------------------------------------------------------------------------------


def models(folder):
    """A line per model: its page, what it is, its sizes, how long it takes to read."""
    rows = []
    for name in sorted(MODEL_NAMES, key=place_in_reading_order):
        page = Path("models", f"{name}.py")
        num_lines = len((ROOT / page).read_text(encoding="utf-8").splitlines())
        minutes = max(5, 5 * round(num_lines / LINES_A_MINUTE / 5))
        configs = ", ".join(sorted(configs_of(name)))
        rows.append(
            (link(f"{name}.py", page, folder), first_sentence(docstring(page)), configs, f"{minutes} min")
        )
    return table(("page", "what it is", "sizes in configs/", "to read"), rows)


def place_in_reading_order(model_name):
    """Where models/README.md names the page first; what it does not name comes last."""
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    place = text.find(f"[{model_name}.py]({model_name}.py)")
    return place if place >= 0 else len(text)


def configs(folder):
    """A line per config: its model, what can be done with it, its parameters."""
    rows = []
    for name in config_names():
        model_name, _ = load_config(name)
        everything, active = num_parameters(name)
        counted = f"{everything:,}" + (f" ({active:,} for a token)" if active < everything else "")
        rows.append((name, link(model_name, f"models/{model_name}.py", folder), kind_of(model_name), counted))
    return table(("config", "model", "kind", "parameters"), rows)


def num_parameters(config_name):
    """(all parameters of a config's model, those that work for a token: of experts the active ones).

    A layer that looks ahead guesses the next token but one, and works for none.
    """
    model = build_model(*load_config(config_name))
    everything = sum(parameter.numel() for parameter in model.parameters())
    model.ahead = None
    return everything, figures.active_parameters(model)


def trained(folder):
    """A line per decoder that was trained here: its size, what it has read, how it predicts; best first."""
    rows = []
    for name in of_kind(DECODER):
        everything, active = num_parameters(name)
        page = f"{model_name_of(name)}.py"
        figures = (float(row(name, "bits per byte, all held-out text")), row(name, "tokens read"))
        links = link(name, f"checkpoints/{name}/README.md", folder), link(page, f"models/{page}", folder)
        rows.append(
            (*links, f"{everything:,}", f"{active:,}", figures[1].split(", ")[0], f"{figures[0]:.4f}")
        )
    head = ("checkpoint", "page", "parameters", "for a token", "tokens read", "bits per byte")
    return table(head, sorted(rows, key=lambda cells: cells[-1]))


def tree(folder):
    """Every file of code with what it says of itself, folder by folder."""
    # tests/README.md has a table of the tests.
    files = [path for path in project_files() if path.suffix == ".py" and path.parts[0] != "tests"]
    folders = {parent for path in files for parent in path.parents} | {Path(name) for name in FOLDERS}
    lines = []
    for place in sorted(folders, key=lambda place: (place != Path(), place)):
        inside = [path for path in files if path.parent == place and path.name != "__init__.py"]
        if place != Path():
            lines.append(("  " * (len(place.parts) - 1) + f"{place.name}/", about_folder(place)))
        depth = "  " * len(place.parts)
        lines += [(f"{depth}{path.name}", first_sentence(docstring(path))) for path in inside]
    width = max(len(name) for name, _ in lines) + 2
    return "```\n" + "\n".join(f"{name:{width}}{what}".rstrip() for name, what in lines) + "\n```"


def about_folder(place):
    if place.as_posix() in FOLDERS:
        return FOLDERS[place.as_posix()]
    for name in ("__init__.py", "README.md"):
        if (ROOT / place / name).is_file():
            text = (ROOT / place / name).read_text(encoding="utf-8")
            said = first_sentence(docstring(place / name) if name.endswith(".py") else text)
            if said:
                return said
    return ""


def proofs(folder):
    """A line per test file: what it says it proves, and the files that name it as their proof."""
    files = [path for path in project_files() if path.suffix == ".py" and path.parts[0] != "tests"]
    said = {path: " ".join(docstring(path).split()) for path in files}
    rows = []
    for path in project_files():
        if path.parent == Path("tests") and path.name.startswith("test_") and path.suffix == ".py":
            proved = [each.as_posix() for each, text in said.items() if path.as_posix() in text]
            rows.append((link(path.name, path, folder), first_sentence(docstring(path)), ", ".join(proved)))
    return table(("test", "what it shows", "of"), rows)


PLACED = ("llama-3-8b", "llama-3-70b", "llama-3.1-405b", "deepseek-v3")


def devices(folder):
    """A line per model and dtype: how many tokens of cache fit beside the weights, on which GPUs."""
    places = [(1, ranks, memory) for memory in (24, 80) for ranks in (1, 2, 4, 8)]
    places += [(2, 8, 80), (4, 8, 80)]
    heads = [f"{ranks} x {memory} GB" for _, ranks, memory in places[:8]]
    heads += [f"{machines} machines of 8 x {memory} GB" for machines, _, memory in places[8:]]
    rows = []
    for name in PLACED:
        size = figures.weigh(name)
        for dtype in ("bf16", "int8", "int4"):
            weights = (size.split[dtype] + size.whole[dtype]) / 1e9
            fit = [figures.tokens_that_fit(size, dtype, r, memory * 1e9, m) for m, r, memory in places]
            rows.append((f"{name}, {dtype}", f"{weights:,.0f} GB", *map(thousands, fit)))
    return table(("", "weights", *heads), rows)


def thousands(count):
    """42,262 -> 42 k; less than a thousand tokens are none to speak of."""
    if count < 1000:
        return "-"
    return f"{count / 1e3:,.0f} k" if count < 1e6 else f"{count / 1e6:,.1f} M"


def links(folder):
    """A line per model: what tensor parallelism sends, and from which link on it pays."""
    rows = []
    for name in PLACED:
        size = figures.weigh(name)
        sent = [f"{figures.sent_per_token_and_layer(size, ranks) / 1e3:.0f} kB" for ranks in (2, 4, 8)]
        all_layers = figures.sent_per_token_and_layer(size, 8) * size.config.num_layers / 1e6
        longest = [f"{figures.longest_exchange(size, ranks) * 1e6:.0f} us" for ranks in (2, 8)]
        slowest = f"{figures.slowest_link(size) / 1e9:.0f} GB/s"
        rows.append((name, *sent, f"{all_layers:.1f} MB", *longest, slowest))
    head = ("", "2 ranks", "4 ranks", "8 ranks", "8 ranks, all layers", "2 ranks: an exchange", "8 ranks")
    return table((*head, "a prompt's link"), rows)


def transcript(folder):
    """What `python run.py` prints here, with a seed that lets it be printed again."""
    find_checkpoint("tiny-llama-python")  # a conversion is not what the transcript is to show
    command = [sys.executable, "run.py", "--seed", "1"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
    )
    printed = f"{done.stderr.splitlines()[0]}\n{done.stdout.rstrip()}"
    return f"```\n$ python run.py\n{printed.replace(f'{ROOT}/', '')}\n```"


REGIONS = {
    "models": models,
    "configs": configs,
    "trained": trained,
    "differences": lambda folder: differences(read_pages()),
    "tree": tree,
    "proofs": proofs,
    "devices": devices,
    "links": links,
    "transcript": transcript,
}
NOT_CHECKED = {"transcript"}  # seconds and tokens differ from machine to machine


# Files ------------------------------------------------------------------------------------------------------


def renewed(path, leave=()):
    """A README's text with its regions written anew, but those in `leave`."""

    def write(region):
        start, name, old, end = region.groups()
        if name not in REGIONS or name in leave:
            return region[0]
        return f"{start}{REGIONS[name](path.parent)}\n{end}"

    return REGION.sub(write, (ROOT / path).read_text(encoding="utf-8"))


def pages():
    return [path for path in project_files() if path.suffix == ".md"]


def problems():
    """A line for every region that is old, unknown, or never ends."""
    found = []
    for path in pages():
        text = (ROOT / path).read_text(encoding="utf-8")
        new = renewed(path, leave=NOT_CHECKED)
        for old_region, new_region in zip(REGION.finditer(text), REGION.finditer(new)):
            name = old_region[2]
            if name not in REGIONS:
                found.append(f"{path}: nobody writes a region <!-- {name} -->; known: {', '.join(REGIONS)}")
            elif old_region[0] != new_region[0]:
                found.append(f"{path}: <!-- {name} --> is not new; run: python -m tests.tables")
        opened = set(re.findall(r"^<!-- (\w+) -->$", text, re.M)) - {
            match[2] for match in REGION.finditer(text)
        }
        found += [f"{path}: <!-- {name} --> has no end <!-- /{name} -->" for name in sorted(opened)]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.tables", description="The tables of the READMEs.")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is not new")
    if parser.parse_args(argv).check:
        found = problems()
        print("\n".join(found) or "all tables are new")
        return 1 if found else 0
    for path in pages():
        text = renewed(path)
        if text != (ROOT / path).read_text(encoding="utf-8"):
            beside = (ROOT / path).with_name(path.name + ".partial")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, ROOT / path)
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
