"""Whoever adds a model writes four files and changes none: a page, a table, a config, a test.

Three strange pages (tests/strange_pages/) are added to a copy of the zoo, each with these four: a decoder
with norms on q and k, one without heads whose layers read token by token and keep a state, one with experts
that the data choose. In the copy everything that the project does with a page is done with them
(tests/visit_page.py), and the tests that look at every page look at them. What is forgotten when a page is
added is a red test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STRANGE = Path(__file__).parent / "strange_pages"
PAGES = sorted(path.stem for path in (STRANGE / "models").glob("*.py"))
NOT_COPIED = (".*", "__pycache__", "checkpoints", "structure_images", "benchmark_results", "strange_pages")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A copy of the project with the strange pages in it."""
    folder = tmp_path_factory.mktemp("house") / "zoo"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for path in STRANGE.rglob("*.*"):
        if path.suffix in (".py", ".json"):
            place = folder / path.relative_to(STRANGE)
            assert not place.exists(), f"{place.name} would replace a file of the project"
            shutil.copyfile(path, place)
    return folder


def python(zoo, *arguments):
    """What a command prints in the copy, and its status."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(zoo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=zoo, env=environment, capture_output=True, text=True)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize("page", PAGES)
def test_what_is_done_with_a_page_is_done_with_a_strange_one(zoo, tmp_path, page):
    out, errors, status = python(zoo, "-m", "tests.visit_page", page, tmp_path)
    assert status == 0, errors
    assert {step: what for step, what in json.loads(out).items() if what} == {}


def run_tests(zoo, *names):
    options = ["-q", "-p", "no:cacheprovider", "-k", " or ".join(PAGES)]
    return python(zoo, "-m", "pytest", *options, *(f"tests/test_{name}.py" for name in names))


def test_the_tests_of_every_page_look_at_them(zoo):
    """Their own proofs, what a page must have, style, shape comments, examples, speculation; and copies."""
    out, errors, status = run_tests(zoo, *PAGES, "pages", "style", "shape_comments", "examples", "speculate")
    assert status == 0, out[-5000:] + errors
    out, errors, status = python(zoo, "tests/copies.py")
    assert status == 0, out + errors


def test_what_is_forgotten_is_a_red_test(zoo):
    forgotten = {
        "conversion/tables/normed_decoder.py": "models/normed_decoder.py has no table",
        "configs/recurrence.json": "models/recurrence.py has no config",
        "tests/test_routed_decoder.py": "models/routed_decoder.py has no test",
    }
    kept = {name: (zoo / name).read_bytes() for name in forgotten}
    for name in forgotten:
        (zoo / name).unlink()
    try:
        out, _, status = run_tests(zoo, "pages")
    finally:
        for name, content in kept.items():
            (zoo / name).write_bytes(content)
    assert status == 1
    for report in forgotten.values():
        assert report in out
