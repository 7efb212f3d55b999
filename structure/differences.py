"""What the pages of models/ have in common and where they differ, read from the pages themselves.

Every page stands alone, so some of its code stands in other pages too. A name that two pages define at the
top level has the same text in both, or a docstring with a sentence that begins "Differs from <page>:" and
says why. (What has no docstring, as an assignment, has that sentence in the comment right above it.)
tests/copies.py holds that true; here it is read, for the comparison of two models above all.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

MODELS = Path(__file__).resolve().parents[1] / "models"
# To a full stop at the end, or before a capital: that of "eq. 4" ends no sentence.
SENTENCE = re.compile(r"Differs from [^:]+: .*?\.(?=\s+[^\sa-z\d]|\s*$)", re.DOTALL)


class Part(NamedTuple):
    """A class, a function or a value at the top level of a page."""

    name: str
    first: int  # lines, counted from 1, both included: with decorators and the comment lines right above
    last: int
    text: str
    differs: str  # "Differs from gpt2: ..." on one line, or ""


def parts_of(source):
    """{name: Part} of a page's text, in the order of the page."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = min([node.lineno] + [each.lineno for each in getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        text = "\n".join(lines[first - 1 : node.end_lineno])
        for name in names_of(node):
            found[name] = Part(name, first, node.end_lineno, text, sentence_of(node, text))
    return found


def names_of(node):
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def sentence_of(node, text):
    """The sentence that says why a part differs, on one line; "" where it says nothing."""
    said = ast.get_docstring(node) if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else comment(text)
    for paragraph in re.split(r"\n\s*\n", said or ""):
        if match := SENTENCE.search(paragraph):
            return " ".join(match[0].split())
    return ""


def comment(text):
    """The lines of comment that a text begins with."""
    lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()
    return "\n".join(line.lstrip("# ") for line in lines)


def read_pages(folder=MODELS):
    """{"llama.py": its text} of every page."""
    paths = sorted(path for path in Path(folder).glob("*.py") if path.name != "__init__.py")
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


@cache
def part_at(path, line):
    """The Part of a page that a line belongs to, None between them."""
    parts = parts_of(Path(path).read_text(encoding="utf-8")).values()
    return next((part for part in parts if part.first <= line <= part.last), None)
