"""The list of mutants fits the code, and what makes them says the truth and leaves nothing behind."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutant, copy_tree, read_mutants, try_mutants

MUTANTS = read_mutants(ROOT / "tests/mutants.txt")
PAGE = "def half(x):\n    return x / 2\n"
TESTS = """
import pytest, page

def test_half():
    assert page.half(6) == 3

@pytest.mark.skip
def test_skipped():
    assert page.half(6) == 3

def test_nothing():
    assert page.half

def test_no_end():
    import time
    open("started", "w").close()
    time.sleep(100)
"""


def test_each_old_text_stands_once_in_its_file():
    lost = [f"{mutant.file}: {mutant.why}" for mutant in MUTANTS if not mutant.fits(ROOT)]
    assert not lost, "say what stands there now:\n" + "\n".join(lost)


def test_each_mutant_is_code():
    for mutant in MUTANTS:
        changed = (ROOT / mutant.file).read_text(encoding="utf-8").replace(mutant.old, mutant.new)
        assert mutant.old != mutant.new and (not mutant.file.endswith(".py") or ast.parse(changed)), mutant


def test_each_test_is_there():
    """A test of a class may stand in the class that it is derived from, in another file."""
    names = {n for path in (ROOT / "tests").glob("*.py") for n in re.findall(r"\w+", path.read_text())}
    for mutant in MUTANTS:
        file, *parts = mutant.test.split("::")
        assert (ROOT / file).is_file(), mutant
        assert {part.partition("[")[0] for part in parts} <= names, mutant


def test_no_mutant_twice():
    assert max(Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS).values()) == 1


@pytest.fixture
def tree(tmp_path):
    """A project with one page and its tests, and the list's format told by an example."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "page.py").write_text(PAGE)
    (tmp_path / "test_page.py").write_text(TESTS)
    (tmp_path / ".gitignore").write_text("download*\n")
    (tmp_path / "download.bin").write_text("large")
    return tmp_path


def test_a_list_is_read(tmp_path):
    first, second = "a.py: wrong: sign\n- x\n-     - y\n+ z\nt.py::t\n", "b.py: gone\n- x\nt.py\n"
    (tmp_path / "list").write_text(f"# What it is for.\n\n{first}\n\n# Others.\n\n{second}")
    assert read_mutants(tmp_path / "list") == [
        Mutant("a.py", "wrong: sign", "x\n    - y", "z", "t.py::t"),
        Mutant("b.py", "gone", "x", "", "t.py"),
    ]


def test_what_is_noticed_is_red(tree, capsys):
    """Two at a time, and so several in one copy, each without the change before it."""
    expected = {"half": "red", "nothing": "STILL GREEN", "skipped": "skipped", "missing": "NO SUCH TEST"}
    mutants = [Mutant("page.py", name, "x / 2", "x / 3", f"test_page.py::test_{name}") for name in expected]
    mutants.append(Mutant("page.py", "unreadable", "return", "retrun", "test_page.py"))
    mutants.append(Mutant("page.py", "equal", "x / 2", "2 * x / 4", "test_page.py::test_half"))
    mutants.append(Mutant("page.py", "twice", "x", "y", "test_page.py::test_half"))
    assert try_mutants(mutants, tree, jobs=2) == 5
    lines = capsys.readouterr().out.splitlines()
    said = {line.partition("page.py: ")[2]: line[:13].rstrip() for line in lines}
    expected |= {"unreadable": "PYTEST FAILED", "equal": "STILL GREEN", "twice": "NOT THERE"}
    assert said == expected
    assert (tree / "page.py").read_text() == PAGE


def test_a_copy_holds_what_git_would_take(tree, tmp_path):
    copied = copy_tree(tree, tmp_path / "download-copy")
    assert sorted(path.name for path in copied.iterdir()) == [".gitignore", "page.py", "test_page.py"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_nothing_is_left_when_it_is_broken_off(tree, sent):
    """Started as from a terminal, where SIGINT is not ignored."""
    (tree / "tests").mkdir()
    (tree / "tests/mutants.py").write_text((ROOT / "tests/mutants.py").read_text())
    (tree / "tests/mutants.txt").write_text("page.py: slow\n- x / 2\n+ x / 3\ntest_page.py::test_no_end\n")
    scratch = tree / "download-scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "tests/mutants.py"], cwd=tree, env=os.environ | {"TMPDIR": str(scratch)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not list(scratch.glob("*/0/started")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    assert process.wait(timeout=60) == 130
    assert list(scratch.iterdir()) == []
    assert (tree / "page.py").read_text() == PAGE
    places = map(place_of, Path("/proc").glob("[0-9]*"))
    assert not [place for place in places if str(scratch) in place], "a test still runs"


def place_of(process):
    """Its working directory, on Linux."""
    try:
        return os.readlink(process / "cwd")
    except OSError:
        return ""
