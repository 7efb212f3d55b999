"""What the pages of models/ share and where they differ: equal copies, or a sentence that says why.

Every page stands alone, so some of its code stands in other pages too. A name that two pages define at the
top level has the same text in both, comments included, or a sentence "Differs from <page>: <why>." in its
docstring (structure/differences.py reads both). Nothing is listed. The pages that say the same of a name, or
nothing, are a group, whose texts are equal; one group says nothing, and all sentences lead back to it.

    python tests/copies.py                                   check
    python tests/copies.py --carry models/llama.py RMSNorm   write llama's RMSNorm into the pages of its group
    python tests/copies.py --table                           the table "how the models differ", in Markdown
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
sys.path.insert(0, str(ROOT))  # for `python tests/copies.py`

from structure.differences import parts_of, read_pages  # noqa: E402

SENTENCE = re.compile(r"Differs from (\w+): (.+)\.")


def parts_by_name(pages):
    """{name: {page: Part}}; `pages`: {"llama.py": its text}."""
    found = {}
    for file, source in pages.items():
        for name, part in parts_of(source).items():
            found.setdefault(name, {})[file.removesuffix(".py")] = part
    return dict(sorted(found.items()))


def groups_of(parts):
    """{sentence: the pages whose part has it}; the sentence of those that say nothing is ""."""
    groups = {}
    for page, part in parts.items():
        groups.setdefault(part.differs, []).append(page)
    return groups


# ---------------------------------------------------------------------------- the check


def problems(pages):
    """One line for each part that is neither a copy nor says why not."""
    return [problem for name, parts in parts_by_name(pages).items() for problem in problems_of(name, parts)]


def problems_of(name, parts):
    groups = groups_of(parts)
    if "" not in groups:
        yield f"{name}: every page says from which it differs, so that none is the first"
    for sentence, group in groups.items():
        first, *others = group
        for other in others:
            if parts[other].text != parts[first].text:
                yield (
                    f"{name} in {other} is no copy of {first}'s: write one into the other (python "
                    f"tests/copies.py --carry models/{first}.py {name}), or say why in the docstring "
                    f'("Differs from {first}: ...")'
                )
        if sentence:
            yield from problems_of_sentence(name, parts, first)


def problems_of_sentence(name, parts, page):
    says = SENTENCE.fullmatch(parts[page].differs)
    if says is None:
        yield f'{name} in {page}: "{parts[page].differs}" is not "Differs from <page>: <why>."'
    elif says[1] not in parts:
        yield f"{name} in {page} differs from {says[1]}, which has none"
    elif not leads_to_the_first(parts, page):
        yield f"{name} in {page}: its sentence leads from page to page in a circle"


def leads_to_the_first(parts, page):
    """Whether the sentences lead from a page to one that has none."""
    passed = set()
    while page in parts and page not in passed:
        passed.add(page)
        says = SENTENCE.fullmatch(parts[page].differs)
        if says is None:
            return True
        page = says[1]
    return page not in parts


# ---------------------------------------------------------------------------- the commands


class CarryError(Exception):
    """A copy that cannot be carried."""


def carry(file, name, folder=MODELS):
    """Write the text of `name` in `file` into the other pages of its group; returns those that changed."""
    pages, page = read_pages(folder), file.removesuffix(".py")
    parts = parts_by_name(pages).get(name, {})
    group = groups_of(parts)[parts[page].differs] if page in parts else []
    if len(group) < 2:
        raise CarryError(f"models/{file} has no copy of {name} in another page; `--table` shows the copies")
    changed = [f"{other}.py" for other in group if parts[other].text != parts[page].text]
    for other in changed:
        lines, part = pages[other].splitlines(), parts[other.removesuffix(".py")]
        lines[part.first - 1 : part.last] = parts[page].text.splitlines()
        replace_file(Path(folder) / other, "\n".join(lines) + "\n")
    return changed


def replace_file(path, text):
    """Write beside, then rename: a page is never half written."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def table(pages):
    """How the models differ, for readers: a row for each sentence, then the parts that are the same."""
    differences, copies = ["| part | in | differs from | by |", "|---|---|---|---|"], []
    for name, parts in parts_by_name(pages).items():
        for sentence, group in groups_of(parts).items():
            if says := SENTENCE.fullmatch(sentence):
                differences.append(f"| `{name}` | {', '.join(group)} | {says[1]} | {says[2]} |")
            if len(group) > 1:
                copies.append(f"| `{name}` | {', '.join(group)} |")
    return "\n".join([*differences, "", "| part | the same text in |", "|---|---|", *copies])


def main():
    parser = argparse.ArgumentParser(description="What the pages of models/ share and where they differ.")
    parser.add_argument("--carry", nargs=2, metavar=("FILE", "NAME"), help="copy NAME from FILE to its group")
    parser.add_argument("--table", action="store_true", help="print how the models differ")
    options = parser.parse_args()
    if options.table:
        print(table(read_pages()))
        return 0
    if options.carry:
        try:
            changed = carry(Path(options.carry[0]).name, options.carry[1])
        except CarryError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"changed: {', '.join(changed)}" if changed else "all copies are equal")
        return 0
    found = problems(read_pages())
    print("\n".join(found) or "every part that pages share is a copy or says why not")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
