"""Where each model comes from, as the docstrings of models/ say it: no list of models is kept.

A page says in its docstring what it is, "New against gpt2:" with one difference a line, and its papers. From
that come its name, its nearest relative before it in the reading order, what changed, and its year.
"""

import ast
import re
from dataclasses import dataclass

from models import ONE_PASS, inputs_of, kind_of
from structure.differences import read_pages

NEW = re.compile(r"^New against ([^:\n]+):\n((?:- .*\n(?: +.*\n)*)+)", re.MULTILINE)
PAPERS = re.compile(r"^Papers?: .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)
PAPER = re.compile(r"\b((?:19|20)\d\d)[a-z]?\b(?: \(([^)]*)\))?")


@dataclass(frozen=True)
class Relative:
    """A model among its relatives."""

    name: str  # "llama"
    title: str  # "Llama 3"
    about: str  # the rest of its docstring's first sentence
    kind: str  # "decoder", "encoder", "encoder-decoder", "vision"
    year: int | None  # None where its docstring names no paper
    parent: str | None  # the page that it is new against; None for the first
    against: str  # the same as its docstring says it: of the first, in words; "" where it says nothing
    changes: tuple  # what is new, an item a line

    @property
    def pair(self):
        """How a comparison of it with its parent is called; None for the first."""
        return f"{self.parent}-{self.name}" if self.parent else None


def relatives(pages=None):
    """Every model as a Relative, the older first, and each after its parent where their year is the same.

    pages: {"llama.py": its text}; without, those of models/.
    """
    pages = read_pages() if pages is None else pages
    found = [relative(file.removesuffix(".py"), docstring_of(text), pages) for file, text in pages.items()]
    return in_time(found)


def docstring_of(source):
    return ast.get_docstring(ast.parse(source)) or ""


def relative(name, doc, pages):
    title, _, about = " ".join(doc.split("\n\n")[0].split()).partition(": ")
    said = NEW.search(doc + "\n")
    against = said[1] if said else ""
    parent = against if f"{against}.py" in pages else None
    items = re.split(r"^- ", said[2], flags=re.MULTILINE)[1:] if said else []
    changes = tuple(" ".join(item.split()) for item in items)
    return Relative(
        name, title or name, about, spoken_kind(name), year_of(doc, title), parent, against, changes
    )


def spoken_kind(name):
    """What can be done with a model in a word; a model that answers in one pass by what it reads."""
    kind = kind_of(name)
    if kind != ONE_PASS:
        return kind
    return "vision" if "images" in inputs_of(name) else "encoder"


def year_of(doc, title):
    """Of the paper that names the model, as in "2024 (Llama 3, section 3.2)", or else of the newest."""
    papers = PAPERS.search(doc)
    years = [(int(year), of or "") for year, of in PAPER.findall(papers[0] if papers else "")]
    own = [year for year, of in years if re.match(rf"{re.escape(title)}\b", of)]
    return max(own or [year for year, _ in years], default=None)


def in_time(found):
    """Sorted by year; one without a year stands with its parent, and parents stand before their children."""
    by_name = {each.name: each for each in found}

    def lineage(each):
        """The names from the first ancestor down to this model; a circle is cut."""
        names = [each.name]
        while (parent := by_name[names[0]].parent) and parent not in names:
            names.insert(0, parent)
        return names

    def when(each):
        years = [by_name[name].year for name in lineage(each)]
        known = [year for year in years if year]
        return each.year or (known[-1] if known else 0)

    return sorted(found, key=lambda each: (when(each), len(lineage(each)), each.name))
