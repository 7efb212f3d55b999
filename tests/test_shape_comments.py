"""The shape comments of every model file are true; the checker finds each mistake put in on purpose."""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.shape_comments import SpecError, check, judge, judge_instead, parse_spec, record

MODELS = Path(__file__).parent.parent / "models"

# ------------------------------------------------------- how each model is run; a new model adds a Case


def run_decoder(model, recorder, B, T, S, **free):
    """Every way of calling a decoder: whole pass, prefill, decode, chunks; in training and in evaluation."""
    config, vocab_size = model.config, model.config.vocab_size
    tokens = torch.randint(vocab_size, (B, T))
    slots = torch.arange(S).expand(B, S)

    recorder.running(config, B=B, T=T, S=T, **free)
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    recorder.running(config, B=1, T=T, S=T, **free)
    model(tokens[:1])

    # The prompt fills a fresh cache, then each row decodes one token at a place of its own.
    recorder.running(config, B=B, T=T, S={T, S}, **free)
    cache = model.new_cache(B, S)
    model(tokens, cache=cache)
    recorder.running(config, B=B, T=1, S=S, **free)
    model(tokens[:, :1], T - torch.arange(B)[:, None] % 2, cache)

    # Chunked prefill: several tokens at given positions.
    recorder.running(config, B=B, T=T, S=S, **free)
    cache = model.new_cache(B, S)
    model.hidden(tokens, slots[:, :T], cache)
    recorder.running(config, B=B, T=S - T, S=S, **free)
    model.hidden(tokens[:, T - S :], slots[:, T:], cache)


def llama_configs(module):
    """Without and with everything that is optional."""
    for on in False, True:
        yield module.Config(
            vocab_size=31,
            max_seq_len=25,
            d_model=16,
            num_layers=2,
            num_heads=12,
            num_kv_heads=3,
            head_dim=10,
            d_ff=29,
            norm_eps=1e-5,
            rope_base=10_000.0,
            rope_scaling=module.RopeScaling(4.0, 1.0, 4.0, 64) if on else None,
            qkv_bias=on,
            o_bias=on,
            ffn_bias=on,
            tied_head=on,
        )


def run_transformer(model, recorder, B, T, S, d, n, w):
    """Encoding, the whole pass in training and in evaluation, and the decoder's ways with a cache."""
    config, factor = model.config, model.config.cross_downsample
    length = factor * (n - 1) + 1  # the last of the n states is the mean of one
    source, target = torch.randint(config.vocab_size, (B, length)), torch.randint(config.vocab_size, (B, T))
    source[1:3, 5:] = config.pad_id
    slots = torch.arange(S).expand(B, S)
    free = {"d": d, "n": n, "w": config.d_model // 2 if config.positions == "sinusoidal" else d // 2}

    recorder.running(config, B=B, T=length, S=length, **free)
    memory = model.encode(source)
    recorder.running(config, B=B, T={length, T, n}, S={length, T, n}, **free)
    model.train()(source, target).sum().backward()
    model.eval()(source, target)

    recorder.running(config, B=B, T=n, S={S, n}, **free)
    cache = model.new_cache(memory, S)
    recorder.running(config, B=B, T=T, S={T, S, n}, **free)
    model.decode(target, None, cache)
    recorder.running(config, B=B, T=1, S={S, n}, **free)
    model.decode(target[:, :1], T - torch.arange(B)[:, None] % 2, cache)
    recorder.running(config, B=B, T=S - T, S={S, n}, **free)
    model.hidden(target[:, T - S :], slots[:, T:], cache)


def transformer_configs(module):
    """The paper's, and one with all that is optional for each of the other positions."""
    for positions in "sinusoidal", "alibi", "rope":
        on = positions != "sinusoidal"
        yield module.Config(
            vocab_size=54,
            max_seq_len=34,
            d_model=30,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_heads=3,
            d_ff=28,
            norm_eps=1e-5,
            dropout=0.1,
            activation="relu",
            positions=positions,
            window=4 if on else None,
            cross_downsample=2 if on else 1,
            scale_embedding=not on,
            output_bias=on,
            pad_id=53,
        )


def gpt2_configs(module):
    yield module.Config(
        vocab_size=40,
        max_seq_len=26,
        d_model=15,
        num_layers=2,
        num_heads=3,
        d_ff=17,
        norm_eps=1e-5,
        dropout=0.1,
    )


def run_bert(model, recorder, B, T, **free):
    """With padding and without, in training and in evaluation; the head of some tokens; the pooler."""
    config = model.config
    tokens, segments = torch.randint(config.vocab_size, (B, T)), torch.randint(config.num_segments, (B, T))
    mask = torch.arange(T) < T - torch.arange(B)[:, None]
    recorder.running(config, B=B, T=T, **free)
    model.train()(tokens, segments, mask).sum().backward()
    model.eval()(tokens)
    recorder.running(config, B=1, T=T, **free)
    hidden = model.hidden(tokens[:1])
    if config.pooler:
        model.pooler(hidden)


def bert_configs(module):
    """A model for each head, and one that has none."""
    for head in None, "masked_lm", "next_sentence", "pretraining", "sequence", "tokens":
        yield module.Config(
            vocab_size=43,
            max_seq_len=31,
            num_segments=3,
            d_model=15,
            num_layers=4,
            num_heads=3,
            d_ff=29,
            norm_eps=1e-12,
            activation="relu" if head == "tokens" else "gelu",
            dropout=0.1,
            pooler=head not in ("masked_lm", "tokens"),
            head=head,
            num_labels=23 if head in ("sequence", "tokens") else None,
        )


def run_vision_transformer(model, recorder, B, h_px, w_px, g, **free):
    """Images that stretch the position table and leave pixels over; then those of its own size."""
    config = model.config
    images = torch.randn(B, config.num_channels, h_px, w_px)
    recorder.running(config, B=B, h_px=h_px, w_px=w_px, g=g, **free)
    model.train()(images).sum().backward()
    model.eval()(images)
    recorder.running(config, B=1, h_px=h_px, w_px=w_px, g=g, **free)
    model(images[:1])

    size = config.image_size
    free |= {"h": g, "w": g, "P": g * g, "T": g * g + 1}
    recorder.running(config, B=B, h_px=size, w_px=size, g=g, **free)
    model(torch.randn(B, config.num_channels, size, size))


def vision_transformer_configs(module):
    """With a classifier, with a pooler, and with neither."""
    for pooler, num_labels in (False, 23), (True, None), (False, None):
        yield module.Config(
            image_size=85,
            patch_size=5,
            num_channels=37,
            d_model=38,
            num_layers=7,
            num_heads=19,
            d_ff=29,
            norm_eps=1e-5,
            qkv_bias=pooler,
            dropout=0.1,
            pooler=pooler,
            num_labels=num_labels,
        )


def gpt_neox_configs(module):
    """Parallel and sequential, without and with everything that is optional."""
    for on in False, True:
        yield module.Config(
            vocab_size=23,
            max_seq_len=29,
            d_model=30,
            num_layers=2,
            num_heads=3,
            d_ff=17,
            norm_eps=1e-5,
            rotary_dim=8,
            rope_base=10_000.0,
            parallel_residual=on,
            gelu_approximation="none",
            attn_bias=on,
            tied_head=on,
        )


def transformer_lm_configs(module):
    """With RoPE and without."""
    for base in 100.0, None:
        yield module.Config(
            vocab_size=23,
            max_seq_len=29,
            d_model=17,
            num_layers=2,
            num_heads=3,
            head_dim=10,
            d_ff=19,
            norm_eps=1e-5,
            rope_base=base,
            tied_head=base is None,
        )


def run_transformer_lm(model, recorder, B, T, S):
    """As any decoder, and its attention on its own."""
    run_decoder(model, recorder, B, T, S)
    recorder.running(model.config, B=B, T=T, S=T)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    model.layers[0].attn(torch.rand(B, T, model.config.d_model), mask)


@dataclass(frozen=True)
class Case:
    """One model file: its configs, how to run it, and the sizes of the free letters."""

    configs: Callable  # module -> configs
    run: Callable  # (model, recorder, **sizes)
    sizes: dict
    same: set = frozenset()  # products that equal a letter by the architecture
    true_too: set = frozenset()  # (spec, another spec that cannot be told from it)

    def drive(self, module, recorder):
        torch.manual_seed(0)
        for config in self.configs(module):
            recorder.building(config)
            model = module.Model(config)
            model.init_weights()
            self.run(model, recorder, **self.sizes)


CASES = {
    "bert.py": Case(bert_configs, run_bert, {"B": 7, "T": 11, "d": 5, "Y": 23}, same={("H", "d")}),
    "gpt2.py": Case(gpt2_configs, run_decoder, {"B": 7, "T": 11, "S": 19, "d": 5}, same={("H", "d")}),
    "vision_transformer.py": Case(
        vision_transformer_configs,
        run_vision_transformer,
        # Y, the labels, is Config's letter, and has no size where there is no classifier.
        {"B": 11, "h_px": 67, "w_px": 18, "h": 13, "w": 3, "g": 17, "P": 39, "T": 40, "d": 2, "Y": 23},
        same={("H", "d"), ("h", "w")},
    ),
    "gpt_neox.py": Case(
        gpt_neox_configs, run_decoder, {"B": 7, "T": 11, "S": 13, "d": 10}, same={("H", "d")}
    ),
    "llama.py": Case(llama_configs, run_decoder, {"B": 7, "T": 11, "S": 13}),
    "transformer.py": Case(
        run=run_transformer,
        configs=transformer_configs,
        sizes={"B": 7, "T": 11, "S": 19, "d": 10, "n": 13, "w": 15},
        same={("H", "d")},
        # In the encoder T = S, since all attend to all; the memory's keys and values are n, for T and for S.
        true_too={
            ("(B, T, D)", "(B, S, D)"),
            ("(B, n)", "(B, S)"),
            ("(B, n)", "(B, T)"),
            ("(B, 1, T, T)", "(B, 1, S, T)"),
            ("(B, 1, T, T)", "(B, 1, T, S)"),
            ("each (B, H, T, d)", "each (B, H, S, d)"),
        },
    ),
    "transformer_lm.py": Case(transformer_lm_configs, run_transformer_lm, {"B": 7, "T": 11, "S": 13}),
}

# ----------------------------------------------------------------------------------- the model files

FILES = sorted(path.name for path in MODELS.glob("*.py") if path.name != "__init__.py")


@functools.cache
def recorded(name):
    """(page, recorder) of a model file that was run once and judged."""
    assert name in CASES, f"models/{name} has no Case in {__file__}: say how its model is built and run"
    page, recorder = record((MODELS / name).read_text(), f"models/{name}", CASES[name].drive)
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
        sizes = config | CASES[name].sizes
        assert set(sizes) == page.free_letters | set(page.sized_letters.values())
        terms = {(letter,): size for letter, size in sizes.items()}
        for pair in itertools.combinations_with_replacement(sizes, 2):
            if not {pair, pair[::-1]} & CASES[name].same:
                terms[pair] = sizes[pair[0]] * sizes[pair[1]]
        values = list(terms.values())
        assert [term for term, value in terms.items() if values.count(value) > 1] == []


# Where no positions are given, a call attends to exactly its own tokens, and S is T.
TRUE_TOO = {("(B, T)", "(B, S)")}


@pytest.mark.parametrize("name", FILES)
def test_every_comment_made_wrong_is_noticed(name):
    page, recorder = recorded(name)
    letters = sorted(page.free_letters | set(page.sized_letters.values()))
    unnoticed, tried = [], 0
    for line, spec in page.specs.items():
        for wrong in wrong_versions(spec.text, letters):
            tried += 1
            true_too = TRUE_TOO | CASES[name].true_too
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
    problems = check("\n".join(lines_of_source) + "\n", name, CASES[name].drive)
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
    with pytest.raises(AssertionError, match="no Case"):
        recorded("unheard_of.py")
