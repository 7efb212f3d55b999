"""One HTML file that ties a model's diagram to its source: it opens from disk and needs no network.

frame.html.jinja is what all pages share, page.html.jinja shows one model and comparison.html.jinja two;
page.css is their looks. page.js ties boxes and lines together, panes.js makes room, facts.js computes. All of
it goes into the file.
"""

import ast
import re
from difflib import SequenceMatcher
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, String

from models.utils.files import write_atomically
from structure.capture.blocks import COLOURS, GROUND, MUTED, ROLES, SPINE, TEXT, repeats
from structure.compare import compare as compare_models
from structure.page.rows import arrange, is_circle

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent

# Kinds of text in the source that have a colour; the first that holds a token counts.
KINDS = {
    Comment: "comment",
    String.Doc: "docstring",
    String: "string",
    Number: "number",
    Keyword: "keyword",
    Name.Builtin: "builtin",
    Name.Class: "defined",
    Name.Function: "defined",
    Name.Decorator: "keyword",
}
SHAPE_COMMENT = re.compile(r"#\s*(\(|each \(|\w x \()")


def write(box, info, path, ways=()):
    """Write the page of one model.

    box: the whole model, from capture.py. info: what facts.describe says of it. ways: (words, address) of
    the pages that it leads to.
    """
    shown = model(box, info)
    panes = {"diagram": "Diagram", "source": "Source", "facts": "Facts"}
    values = {"title": info["name"], "summary": shown["summary"], "panes": panes, "models": [shown]}
    render("page", path, "facts.js", ways=ways, **values)


def compare(box_a, info_a, box_b, info_b, path, ways=()):
    """Write the page of two models side by side, arguments as for write: what is the same is faded."""
    comparison = compare_models(box_a, box_b)
    left = [(each.left, each.right) for each in comparison.differences]
    right = [(theirs, ours) for ours, theirs in left]
    same_a, same_b = same_lines(source_of(box_a).splitlines(), source_of(box_b).splitlines())
    models = [
        model(box_a, info_a, marked(box_a, left), same_a),
        model(box_b, info_b, marked(box_b, right), same_b),
    ]
    for side, page in enumerate(models):
        page["data"]["twins"] = {pair[side]: pair[1 - side] for pair in comparison.pairs}
    panes = {"differences": "Differences", "first": info_a["name"], "second": info_b["name"]}
    title = f"{info_a['name']} and {info_b['name']}"
    summary = "What is the same is faded; sizes do not count."
    values = {"title": title, "summary": summary, "panes": panes, "models": models}
    render("comparison", path, "comparison.js", comparison=comparison, ways=ways, **values)


def render(name, path, *scripts, folders=(), **values):
    """A page with boxes and lines. scripts: beside those that all have; folders: see write_page."""
    scripts = ["theme.js", "page.js", "panes.js", *scripts]
    write_page(name, path, scripts, ["page.css"], folders, **values)


def write_page(name, path, scripts, styles, folders=(), **values):
    """The file of a template, with its scripts and styles inside.

    folders: where these may be, and what the template includes, besides this one.
    """
    folders = [HERE, *folders]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}

    def texts(names):
        """Files of the project's own, as they are; nothing else in a page goes unescaped."""
        places = [next(at / each for at in folders if (at / each).is_file()) for each in names]
        return Markup("\n".join(place.read_text(encoding="utf-8") for place in places))

    colours = {"ground": GROUND, "text": TEXT, "muted": MUTED, "spine": SPINE}
    shared = {"roles": COLOURS, "colours": colours, "css": texts(styles), "js": texts(scripts), "ways": ()}
    text = environment.get_template(f"{name}.html.jinja").render(**shared | values)
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def model(box, info, marks=None, same=()):
    """What the template shows of a model, and the `data` that page.js and facts.js read.

    marks: {id: numbers of the differences that a box takes part in}, None where nothing is compared.
    same: the lines, counted from 1, that the other model has too.
    """
    source = source_of(box)
    roles = {each.role for each in inside(box) if not is_circle(each)}
    leaves = shapes_left(box)
    return {
        "info": info,
        "summary": ast.get_docstring(ast.parse(source)).split("\n\n")[0].replace("\n", " "),
        "roles": [role for role in ROLES if role in roles and role not in ("group", "operation")],
        "box": view(box, marks),
        "lines": highlighted(source),
        "same_lines": same,
        "indents": [len(line) - len(line.lstrip()) for line in source.splitlines()],
        "data": {
            "name": info["name"],
            "root": box.id,
            "config": info["config"],
            "boxes": {
                each.id: described(each, info["facts"][each.id], leaves.get(each.id, ()))
                for each in inside(box)
            },
            "letters": letters(info["facts"]),
            "read": info["read"],
            "experts": info["experts"],
            "wires": {each.id: wires(each) for each in inside(box) if each.children},
        },
    }


def source_of(box):
    return (PROJECT / box.definition.file).read_text(encoding="utf-8")


def same_lines(left, right):
    """Of both lists of lines: the numbers, counted from 1, of those that the other has too, in order."""
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    numbers = [(block.a + n, block.b + n) for block in blocks for n in range(1, block.size + 1)]
    return {a for a, _ in numbers}, {b for _, b in numbers}


def marked(box, differences):
    """{id: numbers of the differences that name a box}, for each box that is not the same in the other model.

    differences: (ids here, ids there). What is inside a box that the other lacks is not the same either.
    """
    boxes = {each.id: each for each in inside(box)}
    found = {}
    for number, (here, there) in enumerate(differences, 1):
        for id in here:
            found.setdefault(id, []).append(number)
            for each in [] if there else inside(boxes[id]):
                found.setdefault(each.id, [])
    return found


def inside(box):
    """The box and all boxes in it, each before what it holds."""
    return [box, *(each for child in box.children for each in inside(child))]


def shapes_left(box):
    """{id: the shapes in which a box's result goes on, where they are another view of it: heads apart}."""
    found = {}
    for each in inside(box):
        outputs = {child.id: child.output for child in each.children}
        for edge in each.edges:
            output = outputs.get(edge.source)
            if output and edge.shape.numbers != output.numbers:
                found.setdefault(edge.source, {})[edge.shape] = None
    return found


def described(box, facts, leaves):
    """A box as page.js reads it; lines are [first, last] in the model's file, terms [coefficient, "B*T"]."""
    return {
        "label": box.label,
        "title": box.title,
        "role": box.role,
        "members": list(box.members),
        "sources": [[source.first, source.last] for source in box.sources],
        "definition": box.definition and [box.definition.first, box.definition.last],
        "doc": box.doc,
        "once": box.once,
        "of": [box.active, box.repeat],
        "tied_to": box.tied_to,
        "weights": [[name, list(shape), list(names)] for name, shape, names in box.weights],
        "output": box.output and [box.output.letters, list(box.output.numbers)],
        "attends": box.attends,
        "leaves": [[shape.letters, list(shape.numbers)] for shape in leaves],
        **facts,
    }


def letters(facts):
    """What the sizes of this model depend on, of B batch, T prompt, N source, S cached."""
    terms = [term for fact in facts.values() for name in ("flops", "cache") for _, term in fact[name]]
    return sorted({letter for term in terms for letter in term.split("*") if letter})


def wires(box):
    """[[anchors on the way], whether it is the residual stream, source, target] of each line in a box."""
    return [[path, edge.residual, edge.source, edge.target] for path, edge in arrange(box).wires]


def view(box, marks=None, level=1, takes=(), is_open=True):
    """A box as the template draws it: the rows of its children, views themselves; marks as for model."""
    rows = arrange(box)
    # Layers and what they are made of are open; inside attention and the like nothing is.
    opens = box.role == "group"
    views = {
        child.id: view(child, marks, level + 1, rows.takes.get(child.id, ()), opens) for child in box.children
    }
    # What leaves the box has its shape below the box.
    shapes = {edge.source: spoken(edge.shape) for edge in box.edges if edge.target != "out" or level == 1}
    on_spine = {item.key for row in rows.rows for item in row if item.place == "spine"}
    return {
        "box": box,
        "level": level,
        "title": "" if ":" in box.id else box.title,
        "takes": takes,
        "repeats": repeats(box) + (f", {box.active} active" if box.active else ""),
        "circle": is_circle(box),
        "marks": (marks or {}).get(box.id, []),
        "is_same": marks is not None and box.id not in marks,
        "open": is_open,
        "has_gutter": rows.has_gutter,
        "num_slots": rows.num_slots,
        "rows": [
            [(item, views.get(item.key), shapes.get(item.key, "")) for item in row] for row in rows.rows
        ],
        "joins": {edge.source for edge in box.edges if edge.target in on_spine and not edge.residual},
        "idle": [views[each] for each in rows.idle],
    }


def spoken(shape):
    """The shape's letters, or its numbers where no comment gives letters."""
    return shape.letters or (f"({', '.join(map(str, shape.numbers))})" if shape.numbers else "")


def highlighted(source):
    """The lines of a Python file as HTML, each with its spans closed."""
    lines = [[]]
    for token, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens(source.removesuffix("\n")):
        kind = next((name for family, name in KINDS.items() if token in family), "")
        if kind == "comment" and SHAPE_COMMENT.match(text):
            kind = "shape"
        for n, part in enumerate(text.split("\n")):
            if n:
                lines.append([])
            if part:
                lines[-1].append(
                    Markup('<span class="{}">{}</span>').format(kind, part) if kind else escape(part)
                )
    return [Markup("").join(parts) for parts in lines]
