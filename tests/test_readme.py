"""The README says what is there: its tree, its excerpts, its links, its commands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conversion.checkpoint import find_checkpoint
from structure.differences import read_pages
from tests.copies import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)


def tracked_files():
    """What git holds or would add; in a folder without git, everything that is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("the tree is compared with git's list of files, and this folder is no git checkout")
    return [Path(line) for line in listing.stdout.splitlines() if (ROOT / line).exists()]


def parse_tree(text):
    """{path: whether the tree also shows what is inside} from lines `name   what it is`, indented by two."""
    shown, parents = {}, []
    for line in text.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        parents = parents[:depth] + [line.split()[0]]
        path = Path(*parents)
        shown[path] = False
        if depth:
            shown[path.parent] = True
    return shown


def test_the_tree_is_the_tree():
    shown = parse_tree(next(code for _, code in CODE_BLOCKS if code.startswith("models/")))
    files = tracked_files()
    for path in shown:
        assert (ROOT / path).exists(), f"the README shows {path}, which is not there"

    opened = {Path()} | {path for path, is_open in shown.items() if is_open}
    for file in files:
        for parent in [p for p in file.parents if p in opened]:
            child = parent / file.relative_to(parent).parts[0]
            if not child.name.startswith((".", "__init__")):
                assert child in shown, f"{child} is not in the README's tree"


def test_excerpts_are_real_code():
    """Each Python block that is indented is cut out of a file that the README links to just before it."""
    excerpts = [code for language, code in CODE_BLOCKS if language == "python" and code.startswith(" ")]
    assert excerpts
    for code in excerpts:
        before = README[: README.index(code)]
        source = re.findall(r"\]\(([\w/]+\.py)\)", before)[-1]
        assert code in (ROOT / source).read_text(), f"the excerpt does not stand in {source}"


def test_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    find_checkpoint("checkpoints/tiny-llama-python")  # converts it, if that was not done before
    for language, code in CODE_BLOCKS:
        if language == "python" and not code.startswith(" "):
            exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "STYLE.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), f"{page} links to {target}, which is not there"


def commands():
    """Every `python script ...` in the README: in code spans, in indented blocks."""
    found = re.findall(r"`(python [^`]+)`", README)
    found += re.findall(r"^    (?:echo [^|]+\| )?(python .+?)(?:   .*)?$", README, flags=re.M)
    return sorted(set(found))


def test_commands_name_scripts_and_options_that_exist():
    assert len(commands()) > 10
    for command in commands():
        words = shlex.split(command)
        script = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1]
        assert (ROOT / script).exists(), f"README: {command}: {script} is not there"
        # The training pages share some of their options.
        pages = [script, "runs_train/options.py"] if script.startswith("runs_train") else [script]
        source = "".join((ROOT / page).read_text() for page in pages)
        for option in [word for word in words[2:] if word.startswith("--")]:
            assert option == "--help" or f'"{option}"' in source, f"README: {command}: no option {option}"


def test_the_table_of_differences_is_the_one_that_the_copies_test_holds():
    shown = README.split("<!-- differences -->")[1].split("<!-- end of differences -->")[0]
    assert shown.strip() == table(read_pages()).strip()
