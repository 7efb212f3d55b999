"""What a model file says of itself: which class and function a line belongs to, and the shapes it promises.

The shape comments (STYLE.md, section 3) are read here for the letters of a diagram; tests check them.
"""

import ast
import inspect
import io
import re
import tokenize
from functools import cache
from pathlib import Path

from structure.capture.blocks import Source

PROJECT = Path(__file__).parents[2]


class Page:
    """One Python file, its lines counted from 1."""

    def __init__(self, path):
        path = Path(path)
        self.name = str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        tree = ast.parse(text)
        self.doc = ast.get_docstring(tree) or ""
        self.comments = trailing_comments(text)
        self.definitions = {node.name: node for node in tree.body if isinstance(node, DEFINITIONS)}
        self.statements, self.scopes, self.rounds = [], [], []
        for node in ast.walk(tree):
            if isinstance(node, SIMPLE):
                self.statements.append((node.lineno, node.end_lineno, node))
            if isinstance(node, LOOPS):
                self.rounds.append(loop_of(node))
        for name, node in self.definitions.items():
            if isinstance(node, ast.ClassDef):
                methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
                self.scopes += [(method.lineno, method.end_lineno, name, method.name) for method in methods]
            else:
                self.scopes.append((node.lineno, node.end_lineno, None, name))

    def scope(self, line):
        """(class or None, function) around a line, or None outside of all."""
        return next(((cls, name) for first, last, cls, name in self.scopes if first <= line <= last), None)

    def statement(self, line):
        """The statement around a line, as (first line, last line, syntax tree)."""
        around = [entry for entry in self.statements if entry[0] <= line <= entry[1]]
        return min(around, key=lambda entry: entry[1] - entry[0], default=(line, line, None))

    def loops(self, line):
        """(line of the `for`, names of what it runs over) of the loops around a line, the outermost first."""
        return [(at, names) for at, names, first, last in self.rounds if first <= line <= last]

    def specs(self, line):
        """The shapes that the statement around a line promises, each a tuple of dimensions."""
        return shapes_in(self.comments.get(self.statement(line)[1], ""))

    def parameters(self, function):
        """{parameter: its shapes} of a method or function, where each stands on a line of its own."""
        return {
            argument.arg: shapes_in(self.comments.get(argument.end_lineno, ""))
            for argument in function.args.args
        }

    def method(self, cls, name):
        return next((method for method in self.methods(cls) if method.name == name), None)

    def methods(self, cls):
        """Those of a class, then those of the classes of this page that it derives from."""
        node = self.definitions[cls]
        own = [child for child in node.body if isinstance(child, ast.FunctionDef)]
        bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in self.definitions]
        return own + [method for base in bases for method in self.methods(base)]

    def specs_of_input(self, cls, path):
        """The shapes of an argument of the model: by its comment, or its field's in a record (cache_0_k)."""
        arguments = [shape for method in self.methods(cls) for shape in self.parameters(method).get(path, [])]
        records = [node for node in self.definitions.values() if isinstance(node, ast.ClassDef)]
        fields = [field for record in records for field in record.body if isinstance(field, ast.AnnAssign)]
        ends = [field for field in fields if path.endswith(f"_{field.target.id}")]
        name = max((field.target.id for field in ends), key=len, default="")
        comments = [self.comments.get(field.end_lineno, "") for field in ends if field.target.id == name]
        return arguments + [shape for comment in comments for shape in shapes_in(comment)]

    def source(self, line):
        first, last, _ = self.statement(line)
        return Source(self.name, first, last)

    def definition(self, name):
        node = self.definitions.get(name)
        return self.definition_of(node) if node else None

    def definition_of(self, node):
        return Source(self.name, node.lineno, node.end_lineno)

    def docstring(self, name):
        node = self.definitions.get(name)
        return (ast.get_docstring(node) or "") if node else ""

    def fields(self, cls):
        """The names of a record's fields."""
        node = self.definitions.get(cls)
        return [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)] if node else []

    def letters(self, cls="Config"):
        """{field: letter} of a config whose fields are commented "D: the width ..."."""
        node = self.definitions.get(cls)
        fields = node.body if node else []
        found = {
            field.target.id: re.match(r"([A-Za-z]\w*): ", self.comments.get(field.end_lineno, ""))
            for field in fields
            if isinstance(field, ast.AnnAssign)
        }
        return {name: match[1] for name, match in found.items() if match}

    def expression(self, line, target, place=0):
        """The operation in the statement around a line, as it is written: "gate * self.up_proj(x)".

        target: torch's name of it; where it has no part of its own, it is the whole value. place: which, if
        there are several.
        """
        statement = self.statement(line)[2]
        value = getattr(statement, "value", None)
        if value is None:
            return ""
        found = [node for node in ast.walk(value) if is_operation(node, target)]
        # Of sums of sums the innermost runs first.
        node = found[::-1][place] if place < len(found) else value
        return ast.unparse(node)


def loop_of(node):
    """(line of a loop's `for`, names of what it runs over, first and last line of what runs each time)."""
    if isinstance(node, ast.For):
        over, first, last = node.iter, node.body[0].lineno, node.end_lineno
    else:
        over, first, last = node.generators[0].iter, node.lineno, node.end_lineno
    names = [each.attr for each in ast.walk(over) if isinstance(each, ast.Attribute)]
    return node.lineno, names, first, last


def is_operation(node, target):
    """Whether a piece of syntax is a call of torch's function, or its sign."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, SIGNS.get(target, ()))
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], SIGNS.get(target, ()))
    called = getattr(node, "func", None)
    return target == getattr(called, "attr", getattr(called, "id", None))


SIGNS = {"add": ast.Add, "sub": ast.Sub, "mul": ast.Mult, "div": ast.Div, "eq": ast.Eq, "ne": ast.NotEq}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef)
LOOPS = (ast.For, ast.ListComp, ast.GeneratorExp)
SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Assert)


@cache
def page_of(path):
    return Page(path)


def page_of_class(cls):
    return page_of(inspect.getfile(cls))


def trailing_comments(text):
    """{line: comment} of comments that stand behind code."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in comments
        if token.line[: token.start[1]].strip()
    }


def shapes_in(comment):
    """[("B", "T", "D"), ...] from a comment "(B, T, D), (B, T): a note"; [] where it speaks of no shape."""
    comment = re.sub(r"^(each|[A-Za-z]\w* x) ", "", comment)
    shapes = []
    while match := re.match(r"\(((?:[^()]|\([^()]*\))*)\)(, )?", comment):
        shapes.append(tuple(dim.strip() for dim in match[1].split(",") if dim.strip()))
        comment = comment[match.end() :]
        if not match[2]:
            break
    return shapes
