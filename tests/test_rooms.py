"""Who may import whom: downward only, and no room holds more than a quarter of the code.

    scripts -> runs_serve runs_parallel -> runs_train runs_ss runs_encoder structure -> runs_ar -> conversion
            -> models/__init__.py -> models/utils

The pages of models/ import no room: each stands alone. Nothing imports a script, nor the tests; benchmarks is
what benchmark.py is made of. Every import statement counts, those inside functions too.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UTILS, DOOR, PAGES, SCRIPTS = "models/utils", "models/__init__.py", "models/*.py", "scripts"
# Rooms on one line may not import each other; a room may import its own files and all rooms below.
FLOORS = [
    [UTILS],
    [DOOR],
    ["conversion"],
    ["runs_ar"],
    ["runs_train", "runs_ss", "runs_encoder", "structure"],
    # What drafts by prompt lookup, which is in runs_ss, and what trains as runs_train does.
    ["runs_serve", "runs_parallel"],
    ["benchmarks"],
    [SCRIPTS],
]
FLOOR_OF = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    """The room of a file, by its path from the project's root."""
    parts = path.parts
    if len(parts) == 1:
        return SCRIPTS
    if parts[0] != "models":
        return parts[0]
    return UTILS if parts[1] == "utils" else DOOR if parts[1] == "__init__.py" else PAGES


def files():
    """{path from the root: its text} of the code that is no test."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))} - {"tests"}
    found = [path for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) == 1]
    found += [path for room in sorted(rooms | {"models"}) for path in (ROOT / room).rglob("*.py")]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in sorted(found)}


def imports(source):
    """(line, name of a module or of what is imported from one) of every import in a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def target_of(name):
    """The path of the project's file that an imported name is in; None for other people's modules."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = Path(*parts[:length]) if length else Path()
        for candidate in (path.with_suffix(".py") if length else path, path / "__init__.py"):
            if length and (ROOT / candidate).is_file():
                return candidate
    return None


def problems(sources):
    """A line for every import that runs upward, or into a room that is nobody's to import."""
    found = []
    for path, source in sources.items():
        room = room_of(path)
        for line, name in imports(source):
            target = target_of(name)
            if target is None:
                continue
            other = room_of(target)
            allowed = (
                room == other
                and room not in (PAGES, SCRIPTS)
                or FLOOR_OF.get(other, 99) < FLOOR_OF.get(room, -1)
                and other != "benchmarks"
                or other == PAGES
                and room in FLOOR_OF  # a page may be used by all but other pages
                or other == "benchmarks"
                and path.name == "benchmark.py"
            )
            if not allowed:
                found.append(f"{path}:{line}: {room} imports {name} of {other}")
    return found


def test_imports_run_downward():
    sources = files()
    assert {room_of(path) for path in sources} >= {UTILS, DOOR, PAGES, SCRIPTS, "conversion", "structure"}
    assert problems(sources) == []


def test_every_room_has_a_floor():
    unknown = {room_of(path) for path in files()} - set(FLOOR_OF) - {PAGES}
    assert not unknown, f"say in FLOORS who may import {', '.join(sorted(unknown))}"


@pytest.mark.parametrize(
    "path, source, report",
    [
        ("models/utils/x.py", "from models import load_model", "models/utils imports models.load_model"),
        ("models/utils/x.py", "def f():\n    import conversion.convert", "x.py:2: models/utils imports"),
        ("models/llama.py", "from models.utils.errors import UserError", "models/*.py imports models.utils"),
        ("models/llama.py", "from models.gpt2 import Model", "models/*.py imports models.gpt2"),
        ("conversion/x.py", "from runs_ar.generate import generate", "conversion imports runs_ar"),
        ("runs_ar/x.py", "from runs_ss import speculate", "runs_ar imports runs_ss.speculate"),
        ("runs_ss/x.py", "from runs_serve.engine import Engine", "runs_ss imports runs_serve"),
        ("runs_serve/x.py", "from runs_ss.lookup import Index", None),
        ("runs_parallel/x.py", "from runs_train.next_token import Run", None),
        ("runs_train/x.py", "from runs_parallel.ranks import joined", "runs_train imports runs_parallel"),
        ("runs_ss/x.py", "import runs_train.options", "runs_ss imports runs_train.options"),
        ("structure/x.py", "from run import main", "structure imports run.main of scripts"),
        ("run.py", "import benchmark", "scripts imports benchmark of scripts"),
        ("run.py", "from benchmarks import zoo", "scripts imports benchmarks.zoo"),
        ("run.py", "from tests.zoo import every_model", "scripts imports tests.zoo"),
        ("benchmarks/x.py", "from runs_ss.speculate import speculate", None),
        ("benchmark.py", "from benchmarks.zoo import Eager", None),
        ("runs_ss/x.py", "from runs_ar.generate import generate\nimport torch", None),
        ("conversion/x.py", "from models.llama import rope", None),
    ],
)
def test_an_import_that_runs_upward_is_found(path, source, report):
    found = problems({Path(path): source})
    assert (len(found) == 1 and report in found[0]) if report else found == []


def test_no_room_is_more_than_a_quarter():
    lines = Counter()
    for path, source in files().items():
        lines[room_of(path)] += len(source.splitlines())
    figures = ", ".join(f"{room} {n / lines.total():.0%} ({n})" for room, n in lines.most_common())
    assert lines.most_common(1)[0][1] <= lines.total() / 4, f"of {lines.total()} lines: {figures}"
