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
    wrong = []
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        if text.count(mutant.old) != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.file}: {mutant.why}: the old text stands there {text.count(mutant.old)} times")
        elif mutant.file.endswith(".py"):
            ast.parse(text.replace(mutant.old, mutant.new))
    assert not wrong, "\n".join(wrong)


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
    (tmp_path / "list").write_text("# why\n\na.py: wrong: sign\n- x\n-     - y\n+ z\nt.py::t\n\nb.py: gone\n- x\nt.py\n")
    assert read_mutants(tmp_path / "list") == [
        Mutant("a.py", "wrong: sign", "x\n    - y", "z", "t.py::t"),
        Mutant("b.py", "gone", "x", "", "t.py"),
    ]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_noticed_is_red(tree, jobs, capsys):
    tests = {"half": "red", "nothing": "STILL GREEN", "skipped": "SKIPPED", "missing": "NO SUCH TEST"}
    mutants = [Mutant("page.py", name, "x / 2", "x / 3", f"test_page.py::test_{name}") for name in tests]
    mutants.append(Mutant("page.py", "broken", "return", "retrun", "test_page.py"))
    assert try_mutants(mutants, tree, jobs) == 4
    lines = capsys.readouterr().out.splitlines()
    said = {line.rpartition(" ")[2]: line[:14].rstrip() for line in lines}
    assert said == {**tests, "broken": "PYTEST FAILED"}
    assert (tree / "page.py").read_text() == PAGE
    # One after the other in the same copy, each without the change before it.
    assert try_mutants([Mutant("page.py", "again", "x / 2", "2 * x / 4", "test_page.py::test_half")], tree) == 1


def test_a_copy_holds_what_git_would_take(tree, tmp_path):
    copied = copy_tree(tree, tmp_path / "download-copy")
    assert sorted(path.name for path in copied.iterdir()) == [".gitignore", "page.py", "test_page.py"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
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
    assert not [p for p in Path("/proc").glob("[0-9]*/cwd") if str(scratch) in link_of(p)], "a test still runs"


def link_of(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""
