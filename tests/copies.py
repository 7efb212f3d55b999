"""What the model files share and where they differ: copies that stay equal, variants that give a reason.

Every file of models/ stands alone, so some of its code stands in other files too. A name that two files
define at the top level is in a group, whose files hold the same text, or is a variant with a reason per file.

    python tests/copies.py                                   check
    python tests/copies.py --carry models/llama.py RMSNorm   write llama's RMSNorm into the files of its group
    python tests/copies.py --table                           the table "how the models differ", in Markdown
"""

import argparse
import ast
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
sys.path.insert(0, str(ROOT))  # for `python tests/copies.py`

from structure.variants import GROUPS, VARIANTS  # noqa: E402

# ---------------------------------------------------------------------------- reading


def definitions(source):
    """Top-level name -> (first line, last line), counted from 1, of the text that defines it.

    Decorators, the comment lines right above and a trailing comment belong to it.
    """
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = min([node.lineno] + [each.lineno for each in getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        found |= dict.fromkeys(names_of(node), (first, node.end_lineno))
    return found


def names_of(node):
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def text_of(source, name):
    first, last = definitions(source)[name]
    return "\n".join(source.splitlines()[first - 1 : last])


def read_models(folder=MODELS):
    """File name -> source of every model file."""
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(Path(folder).glob("*.py"))
        if path.name != "__init__.py"
    }


# ---------------------------------------------------------------------------- the check


def problems(sources, groups, variants):
    """One line for everything that the lists above say and the files do not, or the other way round."""
    texts = {
        file: {name: text_of(source, name) for name in definitions(source)}
        for file, source in sources.items()
    }
    found = [problem for group in groups for problem in problems_of_group(texts, group)]
    for name in sorted({name for names in texts.values() for name in names} | set(variants)):
        copies = [file for group in groups if group.name == name for file in group.files]
        found += problems_of_name(texts, name, copies, variants.get(name, {}))
    return found


def problems_of_group(texts, group):
    missing = [file for file in group.files if group.name not in texts.get(file, {})]
    if missing:
        return [f"the group of {group.name} names {file}, which does not define it" for file in missing]
    first, *others = group.files
    carry = f"python tests/copies.py --carry models/{first} {group.name}"
    differing = [file for file in others if texts[file][group.name] != texts[first][group.name]]
    found = [f"{group.name} in {file} differs from {first}; copy with: {carry}" for file in differing]
    return found if others else [f"the group of {group.name} has one file, {first}"]


def problems_of_name(texts, name, copies, reasons):
    """`copies`: the files of its groups; `reasons`: file -> reason of its variants."""
    files = [file for file in texts if name in texts[file]]
    if len(files) < 2:
        return [f"{name} is a variant, but at most one file defines it"] if reasons else []
    found = []
    for file in files:
        listed = copies.count(file) + (file in reasons)
        if not listed:
            found.append(
                f"{name} in {file} is neither in a group nor a variant; add it to structure/variants.py"
            )
        if listed > 1:
            found.append(f"{name} in {file} is listed {listed} times")
    for file, reason in reasons.items():
        twins = [
            other for other in files if other != file and texts[other][name] == texts.get(file, {}).get(name)
        ]
        if file not in files:
            found.append(f"{name} is a variant in {file}, which does not define it")
        elif twins:
            found.append(f"{name} is a variant in {file}, but equals {twins[0]}; make it a group")
        if not is_sentence(reason):
            found.append(f"the reason for {name} in {file} is not one sentence")
    return found


def is_sentence(text):
    return text[:1].isupper() and text.endswith(".") and ". " not in text and "\n" not in text


# ---------------------------------------------------------------------------- the commands


class CarryError(Exception):
    """A copy that cannot be carried."""


def carry(file, name, folder=MODELS, groups=None):
    """Write the text of `name` in `file` into the other files of its group; returns those that changed."""
    sources = read_models(folder)
    group = next((each for each in groups or GROUPS if each.name == name and file in each.files), None)
    if group is None:
        raise CarryError(f"no group of {name} holds {file}; the groups stand in structure/variants.py")
    missing = [other for other in group.files if name not in definitions(sources.get(other, ""))]
    if missing:
        raise CarryError(f"{missing[0]} does not define {name}; write it there once, by hand, in its place")

    text, changed = text_of(sources[file], name), []
    for other in group.files:
        if text_of(sources[other], name) != text:
            first, last = definitions(sources[other])[name]
            lines = sources[other].splitlines()
            lines[first - 1 : last] = text.splitlines()
            replace_file(Path(folder) / other, "\n".join(lines) + "\n")
            changed.append(other)
    return changed


def replace_file(path, text):
    """Write beside, then rename: a model file is never half written."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def table(groups, variants):
    """How the models differ, for readers: a row for each variant, then the parts that are the same."""
    rows = ["| part | in | how it differs |", "|---|---|---|"]
    for name, reasons in variants.items():
        rows += [f"| `{name}` | {file} | {reason} |" for file, reason in reasons.items()]
    rows += ["", "| part | the same text in |", "|---|---|"]
    rows += [f"| `{group.name}` | {', '.join(group.files)} |" for group in groups]
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description="What the model files share and where they differ.")
    parser.add_argument("--carry", nargs=2, metavar=("FILE", "NAME"), help="copy NAME from FILE to its group")
    parser.add_argument("--table", action="store_true", help="print the table of the variants")
    options = parser.parse_args()
    if options.table:
        print(table(GROUPS, VARIANTS))
        return 0
    if options.carry:
        try:
            changed = carry(Path(options.carry[0]).name, options.carry[1])
        except CarryError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"changed: {', '.join(changed)}" if changed else "all copies are equal")
        return 0
    found = problems(read_models(), GROUPS, VARIANTS)
    print("\n".join(found) or "every copy is equal and every variant has its reason")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
