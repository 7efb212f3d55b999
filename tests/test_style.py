"""Every page keeps the rules of STYLE.md that a machine can check; a page that breaks one is found."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from models import load_config

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
FILES = sorted(path.name for path in MODELS.glob("*.py") if path.name != "__init__.py")

MAX_COLUMNS, MAX_DOCSTRING, MAX_FUNCTION, MAX_NESTING = 110, 30, 30, 2
# Options make the first longer than the others' 350; the second has components instead of one of each, the
# third a second form of attention, two kinds of experts, and a layer ahead.
MAX_LINES = {"transformer.py": 450, "modular_decoder.py": 680, "deepseek_v3.py": 480}
# It reads files, in the words of those files, and has a sampler among its components.
HAS_A_REGISTRY = {"modular_decoder.py"}

BASES = {"nn.Module", "NamedTuple"}
# A reader meets the whole architecture first, and each class answers the one above.
ORDER = ["Config", "Model", "Layer", "Attention", "FeedForward", "Norm", "Cache"]
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)

CALLS_THAT_BELONG_ELSEWHERE = {
    "print": "prints belong to the runners",
    "hasattr": "a model knows what it has",
    "getattr": "a model knows what it has",
    "cross_entropy": "losses belong to runs_train",
    "multinomial": "sampling belongs to models/utils",
    "argmax": "sampling belongs to models/utils",
}
OTHER_NAMES = {
    "d_model": "n_embd dim hidden_size embedding_dim embed_dim",
    "num_layers": "n_layer n_layers depth",
    "num_heads": "n_head n_heads",
    "head_dim": "head_size",
    "num_kv_heads": "n_local_heads num_query_groups n_kv_heads",
    "d_ff": "intermediate_size hidden_dim ffn_dim",
    "max_seq_len": "n_ctx block_size",
    "rope_base": "rope_theta",
    "B, the batch": "bs",
}


class Style:
    """The rules that one file breaks, one line each."""

    def __init__(self, source, file):
        self.source, self.file, self.broken = source, file, []
        self.has_a_registry = file in HAS_A_REGISTRY
        self.tree = ast.parse(source)
        self.comments = {
            token.start[0]: token.string
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for check in self.page, self.imports, self.configs, self.classes, self.functions, self.words:
            check()

    def breaks(self, line, text):
        self.broken.append(f"models/{self.file}:{line}: {text}")

    def nodes(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def page(self):
        """The file as a whole, and the docstring it begins with."""
        lines = self.source.splitlines()
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_COLUMNS:
                self.breaks(number, f"has {len(line)} columns, {MAX_COLUMNS} is the most")
        if len(lines) > MAX_LINES.get(self.file, 350):
            self.breaks(len(lines), "the page is too long")
        docstring = ast.get_docstring(self.tree) or ""
        if len(docstring.splitlines()) > MAX_DOCSTRING:
            self.breaks(1, f"the docstring has more than {MAX_DOCSTRING} lines")
        if not docstring.split("\n\n")[0].endswith("."):
            self.breaks(1, "the docstring begins with no sentence")
        for part in "\nShapes: ", f"tests/test_{self.file}", "Picture: python show_structure.py ":
            if part not in docstring:
                self.breaks(1, f"the docstring does not have `{part.strip()}`")
        if not re.search(r"^New against [^:]+:\n(- .*\n){2}", docstring, re.M):
            self.breaks(1, "the docstring does not list what is new, `New against <page>:`, one line each")

    def imports(self):
        """The standard library and torch, at the top."""
        top = {node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
        for node in self.nodes(ast.Import, ast.ImportFrom):
            modules = (
                [node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            for module in modules:
                allowed = {"torch", *sys.stdlib_module_names} | (
                    {"confection"} if self.has_a_registry else set()
                )
                if module.split(".")[0] not in allowed or getattr(node, "level", 0):
                    self.breaks(node.lineno, f"imports {module}; a model file stands alone")
                if module.startswith("torch.optim"):
                    self.breaks(node.lineno, "optimizers belong to runs_train")
            if node not in top:
                self.breaks(node.lineno, "imports stand at the top")

    def configs(self):
        """Config and the dataclasses inside it: frozen, no defaults, every field commented."""
        classes = {node.name: node for node in self.nodes(ast.ClassDef)}
        if "Config" not in classes:
            self.breaks(1, "has no Config")
        for node in classes.values():
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_config = node.name == "Config" or any("dataclass" in decorator for decorator in decorators)
            if is_config and decorators != ["dataclass(frozen=True)"]:
                self.breaks(node.lineno, f"{node.name} is no frozen dataclass")
            for field in node.body if is_config else []:
                if isinstance(field, ast.Assign) or getattr(field, "value", None) and self.is_field(field):
                    self.breaks(field.lineno, f"{node.name} has a default")
                if self.is_field(field) and field.end_lineno not in self.comments:
                    self.breaks(field.lineno, f"{node.name}.{field.target.id} has no comment")

    def is_field(self, node):
        return isinstance(node, ast.AnnAssign)

    def classes(self):
        """What they derive from, what they are called, and in which order they stand."""
        ranks, names = [], {node.name for node in self.nodes(ast.ClassDef)}
        for node in self.nodes(ast.ClassDef):
            for base in map(ast.unparse, node.bases):
                if base not in BASES and not (self.has_a_registry and base in names):
                    self.breaks(node.lineno, f"{node.name} derives from {base}")
            model = self.file.removesuffix(".py").replace("_", "")
            if model in node.name.lower():
                self.breaks(node.lineno, f"{node.name} carries the model's name")
            rank = [n for n, word in enumerate(ORDER) if node.name.endswith(word)]
            if rank and ranks and rank[0] < max(ranks):
                self.breaks(
                    node.lineno, f"{node.name} stands below {ORDER[max(ranks)]}; the order is {ORDER}"
                )
            ranks += rank

    def functions(self):
        """Short, flat, with named arguments."""
        for node in self.nodes(ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION:
                self.breaks(node.lineno, f"{node.name} has {length} lines, {MAX_FUNCTION} is the most")
            if nesting(node) > MAX_NESTING:
                self.breaks(
                    node.lineno, f"{node.name} is nested {nesting(node)} deep, {MAX_NESTING} is the most"
                )
            if node.args.kwarg:
                self.breaks(node.lineno, f"{node.name} takes **{node.args.kwarg.arg}")
        for node in self.nodes(ast.Try) if not self.has_a_registry else ():
            self.breaks(node.lineno, "a model file tries nothing")

    def words(self):
        """No calls that belong to other rooms; one vocabulary."""
        for node in self.nodes(ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in CALLS_THAT_BELONG_ELSEWHERE and not (self.has_a_registry and name == "argmax"):
                self.breaks(node.lineno, f"calls {name}: {CALLS_THAT_BELONG_ELSEWHERE[name]}")
            if any(keyword.arg is None for keyword in node.keywords) and not self.has_a_registry:
                self.breaks(node.lineno, "passes ** on")
        ours = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}
        for name, line in self.defined_names():
            if name in ours:
                self.breaks(line, f"{name} is called {ours[name]} here")

    def defined_names(self):
        """(name, line) of everything that the file itself gives a name to."""
        for node in self.nodes(ast.Name, ast.Attribute):
            if isinstance(node.ctx, ast.Store):
                yield getattr(node, "id", None) or node.attr, node.lineno
        if not self.has_a_registry:  # whose components are told their sizes in the words of the files
            yield from ((node.arg, node.lineno) for node in self.nodes(ast.arg))


def nesting(node):
    """How deep blocks stand in blocks inside a function; an elif is no deeper than its if."""
    deepest = 0
    for name in "body", "orelse", "handlers", "finalbody":
        for child in getattr(node, name, []):
            elif_ = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
            deeper = isinstance(child, BLOCKS) and not elif_
            deepest = max(deepest, deeper + nesting(child))
    return deepest


@pytest.mark.parametrize("file", FILES)
def test_the_model_files(file):
    assert Style((MODELS / file).read_text(encoding="utf-8"), file).broken == []


@pytest.mark.parametrize("file", FILES)
def test_what_a_docstring_names_is_there(file):
    """The page that it is new against, and a picture of this page."""
    docstring = ast.get_docstring(ast.parse((MODELS / file).read_text(encoding="utf-8")))
    for page in re.findall(r"^New against (\w+):", docstring, re.M):
        assert f"{page}.py" in FILES and page != file.removesuffix(".py")
    config = re.search(r"show_structure.py ([\w.-]+)", docstring)[1]
    assert load_config(config)[0] == file.removesuffix(".py")


def test_one_page_begins_the_reading_order():
    """All others say which page they are new against."""
    first = [file for file in FILES if not re.search(r"^New against \w+:", (MODELS / file).read_text(), re.M)]
    assert first == ["transformer.py"]


# Letters of shapes outside models/ --------------------------------------------------------------------------

ROOMS = ("runs_ar", "runs_encoder", "runs_serve", "runs_ss")
DIM = r"(?:\d+|[A-Za-z])(?: [-+*/x] (?:\d+|[A-Za-z]))*"
SHAPE = re.compile(rf"\((?:{DIM}, )+{DIM}\)|\({DIM},\)")


def undeclared_letters(source):
    """The letters of shapes in comments and docstrings that no line "Shapes:" of the page declares."""
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts += [token.string for token in tokens if token.type == tokenize.COMMENT]
    shapes = [shape for text in texts for shape in SHAPE.findall(text) if re.search("[A-Z]", shape)]
    used = {letter for shape in shapes for letter in re.findall("[A-Za-z]", shape.replace(" x ", " * "))}
    line = re.search(r"^Shapes: ((?:.+\n)+?)(?=\S|\n|\Z)", texts[0] + "\n", re.M)
    declared = {item.split()[0] for item in line[1].rstrip(".\n").split(", ")} if line else set()
    return sorted(used - declared)


@pytest.mark.parametrize(
    "path",
    [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))],
    ids=lambda path: path.name,
)
def test_every_page_declares_the_letters_of_its_shapes(path):
    assert undeclared_letters(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source, letters",
    [
        ('"""Shapes: B rows, V vocabulary."""\nx = 1  # (B, V)\n', []),
        ('"""Shapes: B rows."""\nx = 1  # (B, V)\n', ["V"]),
        ('"""A page."""\ndef f(x):\n    """Gives (B x K, T + 1)."""\n', ["B", "K", "T"]),
        ('"""A page."""\n# (T,) of them, f(x, y) and a call g(B)\n', ["T"]),
    ],
)
def test_an_undeclared_letter_is_found(source, letters):
    assert undeclared_letters(source) == letters


# A page that is good, and what breaks it --------------------------------------------------------------------

GOOD = '''"""A model: nothing more.

New against other:
- less
- not more

Shapes: B batch.
Proof: tests/test_sample.py. Picture: python show_structure.py sample
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    d_model: int  # D


class Model(nn.Module):
    def forward(self, x):
        for n in range(3):
            if n:
                x = F.silu(x)
            elif x is None:
                x = F.relu(x, inplace=False)
        return x


class Norm(nn.Module):
    def forward(self, x):
        """One line."""
        return x
'''


def test_a_good_file_is_good():
    assert Style(GOOD, "sample.py").broken == []


@pytest.mark.parametrize(
    "text, instead, report",
    [
        ("return x", "return x  # " + 100 * "-", "columns"),
        ("Proof:", 27 * "More.\n" + "Proof:", "docstring has more than 30 lines"),
        ("Picture:", "Drawn:", "does not have `Picture: python"),
        ("- less\n", "", "does not list what is new"),
        ("New against", "New beside", "does not list what is new"),
        ("nothing more.", "nothing more", "begins with no sentence"),
        ("Shapes:", "Sizes:", "does not have `Shapes:`"),
        ("test_sample", "test_other", "does not have `tests/test_sample.py`"),
        ("import math", "import numpy", "imports numpy"),
        ("import math", "from . import utils", "imports ."),
        ("import math", "from models.utils import errors", "imports models.utils"),
        ("import math", "from torch.optim import AdamW", "optimizers"),
        ("for n in", "import math\n        for n in", "imports stand at the top"),
        ("class Config", "class Settings", "has no Config"),
        ("(frozen=True)", "", "is no frozen dataclass"),
        ("@dataclass(frozen=True)\n", "", "is no frozen dataclass"),
        ("int  # D", "int = 3  # D", "has a default"),
        ("int  # D", "int", "Config.d_model has no comment"),
        ("class Norm(nn.Module)", "class Norm(nn.LayerNorm)", "derives from nn.LayerNorm"),
        ("class Norm(", "class SampleNorm(", "carries the model's name"),
        ("class Norm(", "class Layer(", None),
        ("class Norm(", "class Norm:\n    pass\n\n\nclass Layer(", "Layer stands below Norm"),
        ('"""One line."""', 28 * "x += 1\n        ", "forward has 31 lines, 30 is the most"),
        ('"""One line."""', 27 * "x += 1\n        ", None),
        ("x = F.silu(x)", "if x:\n                    x = F.silu(x)", "is nested 3 deep"),
        (
            "def forward(self, x):\n        for",
            "def forward(self, x, **options):\n        for",
            "takes **options",
        ),
        ("x = F.silu(x)", "print(x)", "calls print"),
        ("x = F.silu(x)", "hasattr(x, 'y')", "calls hasattr"),
        ("x = F.silu(x)", "x = F.cross_entropy(x)", "losses belong"),
        ("x = F.silu(x)", "x = x.argmax()", "sampling belongs"),
        ("x = F.silu(x)", "x = F.silu(**x)", "passes ** on"),
        ("x = F.silu(x)", "n_embd = 3", "n_embd is called d_model here"),
        (
            "def forward(self, x):\n        for",
            "def forward(self, x, n_head):\n        for",
            "n_head is called",
        ),
        ("d_model: int", "hidden_size: int", "hidden_size is called d_model"),
        ("return x", "try:\n            return x\n        finally:\n            pass", "tries nothing"),
    ],
)
def test_a_broken_rule_is_found(text, instead, report):
    assert text in GOOD
    broken = Style(GOOD.replace(text, instead, 1), "sample.py").broken
    assert any(report in line for line in broken) if report else broken == []
    assert all(re.match(r"models/sample\.py:\d+: ", line) for line in broken)


def test_a_long_page_is_found():
    longer = GOOD + 330 * "\n" + "x = 1\n"
    assert any("too long" in line for line in Style(longer, "sample.py").broken)
    assert not any("too long" in line for line in Style(longer, "transformer.py").broken)
