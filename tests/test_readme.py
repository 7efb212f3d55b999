"""The README says what is there: its tree, its excerpts, its links, its commands."""

import re
import shlex
from pathlib import Path

import pytest

from conversion.checkpoint import find_checkpoint
from tests import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)


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


# Generated tables -------------------------------------------------------------------------------------------


def test_the_generated_tables_are_new():
    assert tables.problems() == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A README with two regions, one of them old, in a folder that has no other."""
    path = tmp_path / "README.md"
    regions = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("models", "transcript")]
    path.write_text("Before.\n" + "".join(regions))
    monkeypatch.setattr(tables, "pages", lambda: [path])
    return path


def test_an_old_table_is_found_and_written(page, monkeypatch, capsys):
    assert tables.main(["--check"]) == 1
    assert "README.md: <!-- models --> is not new; run: python -m tests.tables" in capsys.readouterr().out
    monkeypatch.setitem(tables.REGIONS, "transcript", lambda folder: "as it is")
    assert tables.main([]) == 0
    text = page.read_text()
    assert (
        text.startswith("Before.\n<!-- models -->\n| page |") and "as it is\n<!-- /transcript -->\n" in text
    )
    assert all(f"{name}.py" in text for name in tables.MODEL_NAMES)
    assert tables.main(["--check"]) == 0


def test_a_region_that_nobody_writes_or_ends_is_found(page):
    page.write_text("<!-- modles -->\n<!-- /modles -->\n<!-- tree -->\n")
    found = "\n".join(tables.problems())
    assert "nobody writes a region <!-- modles -->" in found and "<!-- tree --> has no end" in found
