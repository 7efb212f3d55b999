"""Parts that pages of models/ share are copies or say why not, and a change is carried over exactly."""

import subprocess
import sys
from pathlib import Path

import pytest

from structure.differences import parts_of, read_pages
from tests.copies import CarryError, carry, problems, table

A = '''"""A."""

import math

# What every model needs.
@final
class Norm:
    # Keeps the scale.
    eps = 1  # small


def rope(x):
    return x + 1


SIZE = 3  # of both
ONLY_A = 1
'''
B = '''"""B."""


def rope(x):
    """Turned the other way.

    Differs from a: one is
    subtracted. That is all.
    """
    return x - 1


# What every model needs.
@final
class Norm:
    # Keeps the scale.
    eps = 1  # small


# Differs from a: has a type.
SIZE: int = 3  # of both
'''
C = '''"""C."""


# Differs from b: a constant.
def rope(x):
    """Differs from b: always the same."""
    return 0


# Differs from a: has a type.
SIZE: int = 3  # of both
'''
PAGES = {"a.py": A, "b.py": B, "c.py": C}


def test_the_pages_of_the_zoo():
    assert problems(read_pages()) == []


def test_the_samples_are_right():
    assert problems(PAGES) == []


@pytest.mark.parametrize(
    "file, old, new, report",
    [
        ("b.py", "small", "tiny", "Norm in b is no copy of a's"),
        ("b.py", "# What every", "# That every", "Norm in b is no copy of a's"),
        ("b.py", "    # Keeps the scale.\n", "", "Norm in b is no copy of a's"),
        ("b.py", "# Differs from a: has a type.\n", "", "SIZE in b is no copy of a's"),
        ("c.py", "SIZE: int = 3", "SIZE: int = 4", "SIZE in c is no copy of b's"),
        ("c.py", '    """Differs from b: always the same."""\n', "", "rope in c is no copy of a's"),
        ("b.py", "Differs from a: one", "Differs from d: one", "rope in b differs from d, which has none"),
        ("b.py", "Differs from a: one", "Differs from a page: one", "is not \"Differs from <page>: <why>.\""),
        ("b.py", "Differs from a: one", "Differs from c: one", "rope in b: its sentence leads from page"),
        ("a.py", "ONLY_A", "# Differs from b: alone.\nONLY_A", "ONLY_A in a differs from b, which has none"),
        ("a.py", "return x + 1", '"""Differs from c: more."""', "every page says from which it differs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported(file, old, new, report):
    assert old in PAGES[file]
    assert any(report in problem for problem in problems(PAGES | {file: PAGES[file].replace(old, new)}))


def test_what_one_page_alone_has_needs_nothing():
    assert not any("ONLY_A" in problem for problem in problems(PAGES))


def written(folder, **changed):
    for file, source in (PAGES | {f"{name}.py": source for name, source in changed.items()}).items():
        (folder / file).write_text(source)


def test_a_change_is_carried_and_nothing_else_moves(tmp_path):
    old, new = "# Keeps the scale.\n    eps = 1  # small", "# Keeps it.\n    eps = 2\n    more = 3  # too"
    written(tmp_path, a=A.replace(old, new))
    assert carry("a.py", "Norm", tmp_path) == ["b.py"]
    assert read_pages(tmp_path) == {"a.py": A.replace(old, new), "b.py": B.replace(old, new), "c.py": C}
    assert carry("a.py", "Norm", tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.py", "b.py", "c.py"]


def test_a_change_stays_in_its_group(tmp_path):
    """Those that say the same share their text; the first, from which they differ, keeps its own."""
    written(tmp_path, c=C.replace("SIZE: int = 3", "SIZE: int = 5"))
    assert carry("c.py", "SIZE", tmp_path) == ["b.py"]
    texts = [parts_of(source)["SIZE"].text for source in read_pages(tmp_path).values()]
    assert texts[0] == "SIZE = 3  # of both" and texts[1] == texts[2] and "= 5" in texts[1]


@pytest.mark.parametrize(
    "file, name", [("a.py", "rope"), ("a.py", "ONLY_A"), ("a.py", "none"), ("d.py", "Norm")]
)
def test_what_cannot_be_carried_is_refused(file, name, tmp_path):
    written(tmp_path)
    with pytest.raises(CarryError, match=f"models/{file} has no copy of {name}"):
        carry(file, name, tmp_path)


def test_the_table_has_every_sentence_and_every_group():
    assert table(PAGES).splitlines() == [
        "| part | in | differs from | by |",
        "|---|---|---|---|",
        "| `SIZE` | b, c | a | has a type |",
        "| `rope` | b | a | one is subtracted |",
        "| `rope` | c | b | always the same |",
        "",
        "| part | the same text in |",
        "|---|---|",
        "| `Norm` | a, b |",
        "| `SIZE` | b, c |",
    ]


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        ([], 0, "every part that pages share is a copy or says why not"),
        (["--table"], 0, "| part | in | differs from | by |"),
        (["--carry", "models/gpt2.py", "nothing"], 2, "error: models/gpt2.py has no copy of nothing"),
    ],
)
def test_the_command(arguments, status, text):
    root = Path(__file__).parent.parent
    command = [sys.executable, "tests/copies.py", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
