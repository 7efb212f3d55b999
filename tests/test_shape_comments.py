"""The shape comments of every model file are true; the checker finds each mistake put in on purpose."""

import functools
import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from tests.shape_comments import SpecError, check, judge, judge_instead, parse_spec, record

MODELS = Path(__file__).parent.parent / "models"

# ----------------------------------------------------------------------------------- the model files

FILES = sorted(path.name for path in MODELS.glob("*.py") if path.name != "__init__.py")


def case(name):
    """How a page is built and run, as its test says."""
    tests = importlib.import_module(f"tests.test_{name.removesuffix('.py')}")
    assert hasattr(tests, "SHAPES"), f"tests/test_{name} has no SHAPES: say how its model is built and run"
    return tests.SHAPES


@functools.cache
def recorded(name):
    """(page, recorder) of a model file that was run once and judged."""
    page, recorder = record((MODELS / name).read_text(), f"models/{name}", case(name).drive)
    judge(page, recorder)
    return page, recorder


@pytest.mark.parametrize("name", FILES)
def test_every_shape_comment_is_true(name):
    page, _ = recorded(name)
    assert not page.problems, "\n".join(page.problems[line] for line in sorted(page.problems))
    assert len(page.specs) >= 10, "a model file tells the shapes of its tensors"


@pytest.mark.parametrize("name", FILES)
def test_the_sizes_tell_every_letter_and_product_apart(name):
    page, recorder = recorded(name)
    for config in {id(call.stage): call.stage.sizes for call in recorder.calls if call.stage.sizes}.values():
        sizes = config | case(name).sizes
        assert set(sizes) == page.free_letters | set(page.sized_letters.values())
        sizes = {letter: size for letter, size in sizes.items() if letter not in case(name).by_data}
        terms = {(letter,): size for letter, size in sizes.items()}
        for pair in itertools.combinations_with_replacement(sizes, 2):
            if not {pair, pair[::-1]} & case(name).same:
                terms[pair] = sizes[pair[0]] * sizes[pair[1]]
        values = list(terms.values())
        assert [term for term, value in terms.items() if values.count(value) > 1] == []


# Where no positions are given, a call attends to exactly its own tokens, and S is T.
TRUE_TOO = {("(B, T)", "(B, S)")}


@pytest.mark.parametrize("name", FILES)
def test_every_comment_made_wrong_is_noticed(name):
    page, recorder = recorded(name)
    # A letter whose size the data decides may stand for any size.
    letters = sorted((page.free_letters | set(page.sized_letters.values())) - case(name).by_data)
    unnoticed, tried = [], 0
    for line, spec in page.specs.items():
        for wrong in wrong_versions(spec.text, letters):
            tried += 1
            true_too = TRUE_TOO | case(name).true_too
            if (spec.text, wrong) not in true_too and not judge_instead(page, recorder, line, wrong):
                unnoticed.append(f"{page.filename}:{line}: {spec.text} -> {wrong}")
    assert unnoticed == []
    assert tried >= 20 * len(page.specs)


def wrong_versions(text, letters):
    """The spec with another letter or number in each place, its first two dimensions exchanged, one dimension
    more and one less, other arithmetic, and with or without None."""
    for found in re.finditer(r"(?<![\w.])([A-Za-z](_\w+)?|\d+)(?!\w| x | \()", text):
        others = [str(int(found[0]) + 1)] if found[0].isdigit() else letters
        yield from (
            text[: found.start()] + other + text[found.end() :] for other in others if other != found[0]
        )
    changed = [
        re.sub(r"\((\w+), (\w+)", r"(\2, \1", text, count=1),
        re.sub(r"\((\w+|\.\.\.), ", "(", text, count=1),
        re.sub(r",?\)", ", 1)", text, count=1),
        text.replace("//", "*"),
        text.replace(" * ", " + "),
        text.removesuffix(" or None"),
    ]
    yield from (wrong for wrong in changed if wrong != text and ",)" not in wrong)
    if re.match(r"\(", text) and not text.endswith("None"):
        yield text + " or None"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_model_file_with_one_false_comment_fails(name, place):
    """The same from end to end, for a few comments: the changed file is read, run and judged."""
    lines = sorted(line for line, spec in recorded(name)[0].specs.items() if spec.text.startswith("("))
    line = {"first": lines[0], "middle": lines[len(lines) // 2], "last": lines[-1]}[place]
    lines_of_source = (MODELS / name).read_text().splitlines()
    lines_of_source[line - 1] = lines_of_source[line - 1].replace("# (", "# (1, ", 1)
    problems = check("\n".join(lines_of_source) + "\n", name, case(name).drive)
    assert any(problem.startswith(f"{name}:{line}: `(1, ") for problem in problems)


# -------------------------------------------------------------------------------- mistakes put in on purpose

SAMPLE = '''"""A model that has one of everything.

Shapes: B batch, T positions in this call,
    S positions attended (T, or more), n tensors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    d_model: int  # D
    num_heads: int  # H: of d features
    head_dim: int  # d, any
    num_layers: int  # L


class Cache(NamedTuple):
    k: Tensor  # (B, H, S, d)
    length: int


@dataclass
class Pair:
    a: Tensor  # (B, T)
    b: Tensor


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, H, d = config.d_model, config.num_heads, config.head_dim
        self.weight = nn.Parameter(torch.ones(D, H * d))  # (D, H * d)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        mask: Tensor | None = None,  # (B, T) or None: True = attend
        *,
        scale: float = 1.0,
    ) -> Tensor:
        B, T, _ = x.shape
        q = (x @ self.weight).view(B, T, self.config.num_heads, -1).transpose(1, 2)  # (B, H, T, d)
        first, last = q[:, :, 0], q[:, :, -1:].mean()  # (B, H, d), ()
        halves = q[..., ::2], q[..., 1::2]  # each (..., d // 2)
        layers = [x + n for n in range(self.config.num_layers)]  # L x (B, T, D)
        if mask is not None:
            x = x * mask[:, :, None]
            x[..., 0] += first.sum() + last
            x.mul_(2)
        pair = Pair(x[..., 0], b=x)
        self.cache = Cache._make((q.repeat(1, 1, 2, 1), 2 * T))
        written = self.write(q, pair.b)  # (B, H, T, d), (B, H, S, d), (B, T * D)
        for layer in layers:
            x = x + layer
        for head in halves[0].unbind(1):  # (B, T, d // 2)
            head.sum()  # ()
        return self.last(q, layers[0])  # (B, H * (d - 1) + 1 - H, 1)

    def write(self, q: Tensor, x: Tensor):
        k = self.cache.k
        k[:, :, : q.shape[2]] = q  # (B, H, S, d)
        k[:, :, : q.shape[2]].copy_(q)  # (B, H, S, d)
        both = [q, k]  # (B, H, T, d), (B, H, S, d)
        x = x.flatten(1)  # (B, (T + 0) * D)
        x += 1
        return both, x

    def last(self, q: Tensor, x: Tensor) -> Tensor:  # (B, ((d - 2) + 1) * H + 1 - H, 1)
        if x.shape[1] == 1:
            return q[:, 0, 0, 0].view(-1, 1, 1).expand(-1, q.shape[1] * (q.shape[3] - 1) + 1 - q.shape[1], -1)
        return q[:, :, 0, :-1].flatten(1)[:, : 1 - q.shape[1], None]
'''


def run_sample(module, recorder, changing=False):
    config = module.Config(d_model=16, num_heads=5, head_dim=12, num_layers=3)
    recorder.building(config)
    model = module.Model(config)
    for T in 7, 1:
        recorder.running(config, B=11, T=T, S={T, 2 * T})
        model(torch.randn(11, T, 16))
        model(torch.randn(11, T, 16), torch.ones(11, T, dtype=torch.bool))


def test_the_sample_is_true():
    assert check(SAMPLE, "sample.py", run_sample) == []


# Blocks of four lines: the mistake; what stands in the sample; what stands there instead; part of the report.
SEEDS = """
swapped letters
    transpose(1, 2)  # (B, H, T, d)
    transpose(1, 2)  # (B, T, H, d)
    (11, 5, 7, 12) is found

a parameter
    x: Tensor,  # (B, T, D)
    x: Tensor,  # (B, D, T)
    with B = 11, D = 16, T = 7, but (11, 7, 16) is

wrong rank
    x: Tensor,  # (B, T, D)
    x: Tensor,  # (B, D)
    (11, 7, 16) is found

wrong arithmetic
    d))  # (D, H * d)
    d))  # (D, H + d)
    (16, 60) is found

wrong division
    each (..., d // 2)
    each (..., d // 3)
    (11, 5, 7, 6) is found

a return
    # (B, H * (d - 1) + 1 - H, 1)
    # (B, H * d - 1 + 1 - H, 1)
    (11, 51, 1) is found

a return of the header
    # (B, ((d - 2) + 1) * H + 1 - H, 1)
    # (B, 1, H)
    (11, 51, 1) is found

an in-place write
    = q  # (B, H, S, d)
    = q  # (B, H, T, d)
    (11, 5, 14, 12) is found

an in-place method
    copy_(q)  # (B, H, S, d)
    copy_(q)  # (B, H, T, d)
    (11, 5, 14, 12) is found

a tuple assignment
    # (B, H, d), ()
    # (B, d, H), ()
    (11, 5, 12) is found

too few shapes
    # (B, H, d), ()
    # (B, H, d)
    2 tensors are found

too many shapes
    both = [q, k]  # (B, H, T, d), (B, H, S, d)
    both = [q, k]  # (B, H, T, d), (B, H, S, d), ()
    2 tensors are found

a list of tensors
    L x (B, T, D)
    L x (B, D, T)
    (11, 7, 16) is found

a list of another length
    L x (B, T, D)
    H x (B, T, D)
    3 tensors are found

a list where a tensor is
    = q  # (B, H, S, d)
    = q  # H x (B, S, d)
    where a list of tensors is meant

an optional
    (B, T) or None: True
    (T, B) or None: True
    (11, 7) is found

an optional, not said
    (B, T) or None: True
    (B, T): True
    None is found

an optional that never is None
    = q  # (B, H, S, d)
    = q  # (B, H, S, d) or None
    was never None

a tensor that is None
    x += 1
    z = q, None  # (B, H, T, d), (B, H, S, d)
    but None is found

tensors that are None
    x += 1
    z = None, None  # (B, H, T, d), (B, H, S, d) or None
    (None; None) is found

a NamedTuple field
    k: Tensor  # (B, H, S, d)
    k: Tensor  # (B, S, H, d)
    (11, 5, 14, 12) is found

a dataclass field
    a: Tensor  # (B, T)
    a: Tensor  # (B, D)
    (11, 7) is found

a loop variable
    unbind(1):  # (B, T, d // 2)
    unbind(1):  # (T, B, d // 2)
    (11, 7, 6) is found

a scalar
    head.sum()  # ()
    head.sum()  # (1,)
    () is found

each, in one place only
    each (..., d // 2)
    each (B, S, T, 6)
    (11, 5, 7, 6) is found

an undeclared letter
    each (..., d // 2)
    each (..., K)
    uses K, which nothing declares

a free letter that changes
    both = [q, k]  # (B, H, T, d), (B, H, S, d)
    both = [q, k]  # (B, H, n, d), (B, H, n, d)
    14, 12) is

a letter that never stands alone
    each (..., d // 2)
    each (..., n - 1)
    never stands alone

a letter that is bound later
    # (B, (T + 0) * D)
    # (B, (n + 0) * D)
    never stands alone

a variable that is no letter's value
    B, T, _ = x.shape
    T, B, _ = x.shape
    the variable T is 11

a new shape without a comment
    x = x.flatten(1)  # (B, (T + 0) * D)
    x = x.flatten(1)
    new shape (11, 112)

a return of a new shape
    return both, x
    return both, x.T
    makes the new shape (112, 11)

a statement of a new shape
    head.sum()  # ()
    head.sum()
    makes the new shape ()

a loop over a new shape
    unbind(1):  # (B, T, d // 2)
    unbind(1):
    makes the new shape (11, 7, 6)

a record's unspoken field
    b=x)
    b=x[0])
    makes the new shape (7, 16)

a new shape by transposing
    x += 1
    x = x.mT
    makes the new shape (112, 11)

a new shape from nothing
    x += 1
    z = torch.ones(4)
    makes the new shape (4,) from no tensor

a new shape that an earlier round has read
    x += 1
    for y in (k, q): z = y[:, :, :1].expand(-1, -1, 14, -1)
    makes the new shape (11, 5, 14, 12) from (11, 5, 7, 12) and

a branch never taken
    x += 1
    if x is None: x = x[0]  # (D,)
    `(D,)` was never run

a function never called
    x += 1
    def f(x): return x[0]  # (D,)
    `(D,)` was never run

a comment in the wrong place
    if mask is not None:
    if mask is not None:  # (B, T)
    `(B, T)` speaks of nothing

two parameters on a line
    *,
    *, a=1, b=2,  # (B, T)
    `(B, T)` speaks of nothing

no tensor
    length: int
    length: int  # ()
    `()` is said, but int is found

no tensors
    B, T, _ = x.shape
    B, T, _ = x.shape  # (B, T)
    (int; int; int) is found

a letter declared twice
    n tensors.
    n tensors, D again.
    declares D, which is declared already

a letter declared by two fields
    num_layers: int  # L
    num_layers: int  # H
    declared by two fields

letters badly declared
    n tensors.
    and so on.
    `and so on` after `Shapes:` is not of the form
"""
SEEDS = [[line.strip() for line in block.splitlines()] for block in SEEDS.strip().split("\n\n")]


@pytest.mark.parametrize(
    "text, instead, report", [seed[1:] for seed in SEEDS], ids=[seed[0] for seed in SEEDS]
)
def test_a_mistake_is_found(text, instead, report):
    """It is reported once, and on the line where it stands."""
    assert SAMPLE.count(text) == 1
    source = SAMPLE.replace(text, instead)
    line = 1 + SAMPLE.split(text)[0].count("\n")
    problems = [problem for problem in check(source, "sample.py", run_sample) if report in problem]
    assert len(problems) == 1
    # What the docstring declares is reported where `Shapes:` begins.
    assert problems[0].startswith(f"sample.py:{3 if line == 4 else line}: ")


@pytest.mark.parametrize(
    "comment",
    [
        "(B, T",
        "(B, T))",
        "(B,T)",
        "(B T)",
        "(B, , T)",
        "(, B)",
        "(B, ...)",
        "(B, T) or none",
        "(B, T) or",
        "(B, T), (B, T) or None or None",
        "(B, T) the tokens",
        "(B, T):the tokens",
        "(B, T):",
        "(B, -T)",
        "(B / 2, T)",
        "(B * , T)",
        "((B, T)",
        "(2 B, T)",
        "(B, each)",
        "each",
        "each (B, T), (B, T)",
        "each (B, T) or None",
        "each layer's mask",
        "L x",
        "L x (B, T) x 2",
        "L x L x (B, T)",
        "2 x (B, T)",
        "(eq. 1)",
    ],
)
def test_what_looks_like_a_shape_must_parse(comment):
    with pytest.raises(SpecError):
        parse_spec(comment)
    source = SAMPLE.replace("return both, x", f"return both, x  # {comment}")
    found = [problem for problem in check(source, "sample.py", run_sample) if "does not parse" in problem]
    assert len(found) == 1
    assert found[0].startswith(f"sample.py:{1 + source.split('return both')[0].count(chr(10))}: `{comment}`")


def test_the_language():
    assert parse_spec("()").shapes == ((),)
    assert parse_spec("(D,)").shapes == parse_spec("(D)").shapes == (("D",),)
    assert parse_spec("(B, 1), (..., d // 2) or None: why").shapes == (("B", 1), (..., ("//", "d", 2)))
    assert parse_spec("(a + b - c * d // e, )") == parse_spec("(a + b - c * d // e, )")
    assert parse_spec("(a - b - c * (d + 1) // e)").shapes == (
        (("-", ("-", "a", "b"), ("//", ("*", "c", ("+", "d", 1)), "e")),),
    )
    several = parse_spec("L x (B, T, D): one per layer")
    assert (several.count, several.shapes, several.letters()) == ("L", (("B", "T", "D"),), set("LBTD"))
    assert parse_spec("each (H * d,)").each
    assert parse_spec("(B) or None").or_none


@pytest.mark.parametrize("comment", ["the tokens", "tokens (B, T)", "maximum x", "reach (B, T)", "eq. 1"])
def test_other_comments_are_left_alone(comment):
    assert check(SAMPLE.replace("x += 1", f"x += 1  # {comment}"), "sample.py", run_sample) == []


def test_an_error_of_the_model_names_its_own_line():
    source = SAMPLE.replace("x += 1", "x += torch.ones(2, 3, 4)")
    with pytest.raises(RuntimeError) as error:
        check(source, "sample.py", run_sample)
    line = 1 + source.split("x += torch")[0].count("\n")
    assert ("sample.py", line) in [(str(entry.path), entry.lineno + 1) for entry in error.traceback]


def test_a_model_file_without_a_case_fails():
    with pytest.raises(AssertionError, match=r"tests/test_style\.py has no SHAPES"):
        case("style.py")
