"""Copies among the model files are equal, variants have reasons, and a change is carried over exactly."""

import subprocess
import sys
from pathlib import Path

import pytest

from structure.variants import GROUPS, VARIANTS, Group
from tests.copies import (
    CarryError,
    carry,
    definitions,
    problems,
    read_models,
    table,
    text_of,
)

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
    """Turned the other way."""
    return x - 1


# What every model needs.
@final
class Norm:
    # Keeps the scale.
    eps = 1  # small


SIZE: int = 3  # of both
'''
SOURCES = {"a.py": A, "b.py": B}
NORM = Group("Norm", ("a.py", "b.py"))
REASONS = {
    "rope": {"a.py": "Turns left.", "b.py": "Turns right."},
    "SIZE": {"a.py": "Has no type.", "b.py": "Has a type."},
}


def test_the_model_files():
    assert problems(read_models(), GROUPS, VARIANTS) == []


def test_the_samples_are_right():
    assert definitions(A) == {"Norm": (5, 9), "rope": (12, 13), "SIZE": (16, 16), "ONLY_A": (17, 17)}
    assert problems(SOURCES, [NORM], REASONS) == []


@pytest.mark.parametrize(
    "sources, groups, variants, report",
    [
        (
            {"b.py": B.replace("small", "tiny")},
            [NORM],
            {},
            "Norm in b.py differs from a.py; copy with: python",
        ),
        ({"b.py": B.replace("# What every", "# That every")}, [NORM], {}, "Norm in b.py differs from a.py"),
        ({"b.py": B.replace("    # Keeps the scale.\n", "")}, [NORM], {}, "Norm in b.py differs from a.py"),
        (
            {"b.py": B.replace("class Norm", "class Other")},
            [NORM],
            {},
            "names b.py, which does not define it",
        ),
        ({}, [Group("Norm", ("a.py", "c.py"))], {}, "names c.py, which does not define it"),
        ({}, [Group("Norm", ("a.py",))], {"Norm": {"b.py": "Copied."}}, "the group of Norm has one file"),
        ({}, [], {}, "Norm in a.py is neither in a group nor a variant"),
        ({"c.py": "SIZE = 4\n"}, [NORM], {}, "SIZE in c.py is neither in a group nor a variant"),
        ({}, [NORM, NORM], {}, "Norm in a.py is listed 2 times"),
        ({}, [NORM], {"Norm": {"a.py": "Is special."}}, "Norm in a.py is listed 2 times"),
        (
            {},
            [],
            {"Norm": {"a.py": "One.", "b.py": "Two."}},
            "variant in a.py, but equals b.py; make it a group",
        ),
        ({}, [NORM], {"ONLY_A": {"a.py": "Alone."}}, "ONLY_A is a variant, but at most one file defines it"),
        ({}, [NORM], {"gone": {"a.py": "Was here."}}, "gone is a variant, but at most one file defines it"),
        (
            {"c.py": "x = 1\n"},
            [NORM],
            {"rope": REASONS["rope"] | {"c.py": "Is not."}},
            "c.py, which does not",
        ),
        ({}, [NORM], {"rope": REASONS["rope"] | {"a.py": "turns left"}}, "rope in a.py is not one sentence"),
        (
            {},
            [NORM],
            {"rope": REASONS["rope"] | {"a.py": "Turns. Left."}},
            "rope in a.py is not one sentence",
        ),
    ],
)
def test_what_is_wrong_is_reported(sources, groups, variants, report):
    assert any(report in problem for problem in problems(SOURCES | sources, groups, REASONS | variants))


def written(tmp_path, **sources):
    for file, source in (SOURCES | {name + ".py": source for name, source in sources.items()}).items():
        (tmp_path / file).write_text(source)


def test_a_change_is_carried_and_nothing_else_moves(tmp_path):
    changed = A.replace(
        "# Keeps the scale.\n    eps = 1  # small", "# Keeps it.\n    eps = 2\n    more = 3  # too"
    )
    written(tmp_path, a=changed)
    assert carry("a.py", "Norm", tmp_path, [NORM]) == ["b.py"]
    after = (tmp_path / "b.py").read_text()
    assert text_of(after, "Norm") == text_of(changed, "Norm") != text_of(B, "Norm")
    assert after == B.replace(text_of(B, "Norm"), text_of(changed, "Norm"))
    assert (tmp_path / "a.py").read_text() == changed
    assert carry("a.py", "Norm", tmp_path, [NORM]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.py", "b.py"]


def test_what_cannot_be_carried_is_refused(tmp_path):
    written(tmp_path, b=B.replace("class Norm", "class Other"))
    with pytest.raises(CarryError, match="b.py does not define Norm"):
        carry("a.py", "Norm", tmp_path, [NORM])
    with pytest.raises(CarryError, match="no group of rope holds a.py"):
        carry("a.py", "rope", tmp_path, [NORM])


def test_the_table_has_every_reason_and_every_group():
    rendered = table([NORM], REASONS)
    assert "| `rope` | a.py | Turns left. |" in rendered
    assert "| `Norm` | a.py, b.py |" in rendered
    assert len(rendered.splitlines()) == 2 + 4 + 3 + 1


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        ([], 0, "every copy is equal"),
        (["--table"], 0, "| part | in | how it differs |"),
        (["--carry", "models/gpt2.py", "nothing"], 2, "error: no group of nothing holds gpt2.py"),
    ],
)
def test_the_command(arguments, status, text):
    root = Path(__file__).parent.parent
    command = [sys.executable, "tests/copies.py", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
