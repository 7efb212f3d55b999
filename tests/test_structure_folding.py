"""What a diagram shows once of what a model has many of: layers in turns, experts, a loop over time."""

import importlib.util
import json
import sys
from dataclasses import asdict
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structure import facts
from structure.capture.capture import capture_model
from structure.capture.trace import trace
from structure.compare import compare
from structure.facts import evaluate, totals, walk
from structure.page import page
from structure.picture import picture
from structure.table import table

HEAD = '''"""A page that no file of models/ is like."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int  # V: of tokens
    d_model: int  # D: of the stream
    num_layers: int  # L: layers
FIELDS


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(make_layer(config, n) for n in range(config.num_layers))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

'''
PLAIN = (
    HEAD
    + """
    def forward(
        self,
        tokens: Tensor,  # (B, T)
    ) -> Tensor:
        x = self.token_embed(tokens)  # (B, T, D)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)  # (B, T, V)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class Expert(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu())


def make_layer(config: Config, n: int):
    return Layer(config)


"""
)
EXPERT_FIELDS = """
    d_ff: int  # f: of an expert
    num_experts: int  # E: experts
    num_active_experts: int  # A: for a token
"""
DENSE = (
    PLAIN.replace("FIELDS", EXPERT_FIELDS)
    + '''
class FeedForward(nn.Module):
    """Every expert sees every token."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_active_experts = config.num_active_experts
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(dim=-1)
        return sum(shares[..., n, None] * expert(x) for n, expert in enumerate(self.experts))
'''
)
CHOSEN = (
    DENSE[: DENSE.index("    def forward(self, x: Tensor) -> Tensor:\n        shares")]
    + '''    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (t, D)
        shares, chosen = self.router(tokens).topk(self.num_active_experts)  # each (t, A)
        out = torch.zeros_like(tokens)
        for n, expert in enumerate(self.experts):
            give(out, expert, tokens, shares.softmax(dim=-1), chosen == n)
        return out.view_as(x)  # (B, T, D)


def give(out, expert, tokens, shares, is_chosen):
    """A function that calls a module between its operations."""
    rows, place = torch.nonzero(is_chosen, as_tuple=True)  # each (e,)
    out.index_add_(0, rows, shares[rows, place, None] * expert(tokens[rows]))
'''
)
# The matrices of all experts in one tensor, of which those of the chosen are looked up.
TOGETHER = (
    PLAIN.replace("FIELDS", EXPERT_FIELDS)
    + """
class FeedForward(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        E, D, f = config.num_experts, config.d_model, config.d_ff
        self.num_active_experts = config.num_active_experts
        self.router = nn.Linear(D, E, bias=False)
        self.up_proj = nn.Parameter(torch.zeros(E, f, D))
        self.down_proj = nn.Parameter(torch.zeros(E, D, f))

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).topk(self.num_active_experts)  # each (B, T, A)
        inner = (self.up_proj[chosen] @ x[:, :, None, :, None]).relu()
        return (shares[..., None, None] * (self.down_proj[chosen] @ inner)).sum(dim=2)[..., 0]  # (B, T, D)
"""
)
NUMBERED = DENSE.replace(
    "for n, expert in enumerate(self.experts))", "for n, expert in ((n, self.experts[n]) for n in range(3)))"
)
TURNS = (
    PLAIN.replace(
        "FIELDS", "    d_ff: int  # f: of a layer\n    pattern: str  # a letter for each layer"
    ).replace("return Layer(config)", "return {'a': Layer, 'b': Other}[config.pattern[n]](config)")
    + """
class Other(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


FeedForward = Expert
"""
)
LOOP = (
    HEAD.replace("FIELDS", "    d_state: int  # N: rows of the state")
    + """
    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "tuple | None" = None,
    ) -> Tensor:
        if cache is not None and not torch.compiler.is_compiling():
            assert (positions[:, 0] >= 0).all(), "begins with a pad"
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, positions, cache[n] if cache else None)
        return self.lm_head(x)  # (B, T, V)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int = 0):
        shape = batch_size, self.config.d_state, self.config.d_model
        return tuple(State(self.token_embed.weight.new_zeros(shape)) for _ in self.layers)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, positions: Tensor, cache: "State | None") -> Tensor:
        return x + self.mixer(x, positions, cache)


class Mixer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.q_proj = nn.Linear(config.d_model, config.d_state, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_state, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: "State | None") -> Tensor:
        q, k = self.q_proj(x), self.k_proj(x)  # each (B, T, N)
        state = x.new_zeros(x.shape[0], q.shape[-1], x.shape[-1])  # (B, N, D)
        if cache is not None:
            state = cache.conv_state
        outs = []
        for t in range(x.shape[1]):
            state = 0.9 * state + k[:, t, :, None] * x[:, t, None, :]  # (B, N, D)
            outs.append(q[:, t, None, :] @ state)
        if cache is not None:
            cache.keep(state)
        return torch.cat(outs, dim=1)  # (B, T, D)


class State(NamedTuple):
    conv_state: Tensor  # (B, N, D)

    def keep(self, state: Tensor):
        self.conv_state.copy_(state)


def make_layer(config: Config, n: int):
    return Layer(config)
"""
)
SIZES = {"vocab_size": 101, "d_model": 24, "num_layers": 6}
EXPERTS = {**SIZES, "d_ff": 40, "num_experts": 8, "num_active_experts": 2}
PAGES = {
    "dense": (DENSE, EXPERTS),
    "chosen": (CHOSEN, EXPERTS),
    "together": (TOGETHER, EXPERTS),
    "numbered": (NUMBERED, {**EXPERTS, "num_experts": 3, "num_layers": 2}),
    "turns": (TURNS, {**SIZES, "num_layers": 14, "d_ff": 40, "pattern": "aabaabaabaabaa"}),
    "alternating": (TURNS, {**SIZES, "num_layers": 6, "d_ff": 40, "pattern": "ababab"}),
    "loop": (LOOP, {**SIZES, "d_state": 9}),
}
every = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def captured(folder):
    """(box, info, the page's module, its Config) of a page of PAGES."""

    @cache
    def load(name):
        text, fields = PAGES[name]
        path = folder / f"strange_{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        config = module.Config(**fields)
        with torch.device("meta"):
            box = capture_model(module.Model(config))
        return box, facts.describe(name, name, config, box), module, config

    return load


def box_called(root, identity):
    return next(box for box, _ in walk(root) if box.id == identity)


# All of them ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(captured, folder):
    """The page of a model of PAGES."""

    @cache
    def write(name):
        page.write(*captured(name)[:2], folder / f"{name}.html")
        return folder / f"{name}.html"

    return write


@every
def test_it_is_drawn_in_every_form(name, captured, folder, written):
    box, info, *_ = captured(name)
    picture.save(picture.draw(box, info), folder / name)
    assert picture.shown(folder / f"{name}.png") == picture.facts_drawn(box)
    assert "layers.0" in written(name).read_text()
    page.compare(box, info, *captured("dense")[:2], folder / "pair.html")
    picture.save(picture.compare(box, info, *captured("dense")[:2]), folder / "pair")
    assert compare(box, box).differences == ()
    assert f"{box.parameters:,}" in table(box, info)[1]
    json.dumps({**info, "structure": asdict(box)})


@every
def test_all_parameters_are_counted(name, captured):
    box, _, module, config = captured(name)
    model = module.Model(config)
    assert box.parameters == sum(parameter.numel() for parameter in model.parameters())


@every
def test_no_box_reads_what_is_made_from_it(name, captured):
    for box, _ in walk(captured(name)[0]):
        ids, placed = [child.id for child in box.children], set()
        before = {each: {edge.source for edge in box.edges if edge.target == each} & set(ids) for each in ids}
        while ready := [each for each in ids if each not in placed and not before[each] - placed]:
            placed |= set(ready)
        assert placed == set(ids), box.id


@pytest.mark.parametrize("name", ["dense", "together", "numbered", "turns", "alternating", "loop"])
def test_flops_are_those_that_torch_counts(name, captured):
    """Of all layers, of all experts and of all rounds, though one of each was recorded."""
    box, info, module, config = captured(name)
    model, tokens = module.Model(config).eval(), torch.ones(2, 5, dtype=torch.long)
    call = {"tokens": tokens}
    if hasattr(model, "new_cache"):
        call |= {"positions": torch.arange(5).expand(2, 5), "cache": model.new_cache(2, 11)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**call)
    flops = {"B": 2, "T": 5, "S": 11}
    assert evaluate(info["facts"]["model"]["flops"], **flops) == counter.get_total_flops()


# Layers -----------------------------------------------------------------------------------------------------


def test_layers_that_take_turns_are_one_turn(captured):
    """aab four times, then aa: the turn is drawn once, and the rest beside it."""
    root = captured("turns")[0]
    turn, rest = [child for child in root.children if child.id.startswith("layers")]
    assert (turn.label, turn.repeat) == ("3 layers", 4)
    assert [(child.label, child.repeat) for child in turn.children] == [("Layer", 2), ("Other", 1)]
    assert turn.children[0].members == tuple(f"layers.{n}" for n in (0, 1, 3, 4, 6, 7, 9, 10))
    assert turn.children[1].members == tuple(f"layers.{n}" for n in (2, 5, 8, 11))
    assert (rest.id, rest.repeat, rest.members) == ("layers.12", 2, ("layers.12", "layers.13"))
    assert turn.parameters == 2 * turn.children[0].parameters + turn.children[1].parameters
    assert [(edge.source, edge.target) for edge in root.edges if edge.residual][1:3] == [
        ("token_embed", turn.id),
        (turn.id, rest.id),
    ]


def test_two_kinds_that_alternate(captured):
    [turn] = [child for child in captured("alternating")[0].children if child.id.startswith("layers")]
    assert (turn.label, turn.repeat, [child.repeat for child in turn.children]) == ("2 layers", 3, [1, 1])


# Experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "chosen"])
def test_experts_are_folded_like_layers(name, captured, written):
    root, info, *_ = captured(name)
    expert = box_called(root, "layers.0.ffn.experts.0")
    assert (expert.repeat, expert.active, expert.parameters) == (8, 2, 2 * 24 * 40)
    assert expert.members == tuple(f"layers.0.ffn.experts.{n}" for n in range(8))
    assert info["facts"][expert.id]["repeat"] == 6 * 8
    assert any("Expert x 8, 2 active" in line for line in table(root, info))
    texts = [text.get_text() for text in picture.draw(root, info).axes[0].texts]
    assert "2 of 8 active" in texts and "× 8" in texts
    assert "× 8, 2 active" in written(name).read_text()


@pytest.mark.parametrize("name", ["dense", "chosen", "together"])
def test_active_parameters_by_hand(name, captured):
    """Of each layer's 8 experts a token uses 2; it uses all else."""
    root, info, *_ = captured(name)
    outside, expert = 2 * 101 * 24 + 6 * 24 * 8, 2 * 24 * 40
    assert root.parameters == outside + 6 * 8 * expert
    assert root.used == info["facts"]["model"]["active"] == outside + 6 * 2 * expert
    assert f"{root.used:,} of {root.parameters:,} parameters are active for a token" in table(root, info)
    texts = [text.get_text() for text in picture.draw(root, info).axes[0].texts]
    assert "active for a token" in texts and f"{root.used:,}" in texts
    # bf16: a token reads its experts, the router and the head, and one row of the table.
    assert info["read"]["bf16"] == 2 * (root.used - 101 * 24)
    # Three rows choose 2 of 8 by chance: an expert is left out by all of them with probability (3/4)^3.
    read = 2 * (outside - 101 * 24) + 2 * 6 * 8 * expert * (1 - (3 / 4) ** 3)
    found = totals(info, "bf16", batch=3, bandwidth=1)
    assert found["tokens_per_second"] == pytest.approx(3 * 1e9 / read)


def test_what_data_decides_is_as_long_as_the_tokens_of_an_expert(captured):
    """2 of 8 experts for each of B T tokens: a quarter of them for each."""
    root, info, *_ = captured("chosen")
    expert = box_called(root, "layers.0.ffn.experts.0")
    assert expert.output.numbers == ("B*T/4", 24)
    up = box_called(root, "layers.0.ffn.experts.0.up_proj")
    assert up.flops == ((2 * 24 * 40 // 4, "B*T"),)
    experts = 6 * 2 * 2 * (2 * 24 * 40)  # layers, active, FLOPs, weights
    others = 6 * 2 * 24 * 8 + 2 * 24 * 101
    assert evaluate(info["facts"]["model"]["flops"], B=1, T=1) == experts + others


def test_experts_that_are_asked_for_by_number_are_drawn_one_by_one(captured):
    root = captured("numbered")[0]
    experts = [box.id for box, _ in walk(root) if ".experts." in box.id and box.children]
    assert experts == [f"layers.0.ffn.experts.{n}" for n in range(3)]


# Time -------------------------------------------------------------------------------------------------------


def test_a_loop_over_time_is_one_round(captured, written):
    root, info, *_ = captured("loop")
    loop = box_called(root, "layers.0.mixer:loop")
    assert (loop.label, loop.times, loop.title) == ("loop over time", "T", "for t in range(x.shape[1])")
    assert sorted(child.label for child in loop.children) == ["add", "matmul", "multiply"]
    assert {box.times for box, _ in walk(loop)} == {"T"}
    assert '<span class="repeat">× T</span>' in written("loop").read_text()
    assert not any(edge.residual for edge in loop.edges), "a state is no residual stream"
    matmul = next(child for child in loop.children if child.label == "matmul")
    assert (matmul.role, matmul.flops) == ("recurrence", ((2 * 9 * 24, "B*T"),))
    assert matmul.output.numbers == ("B", 1, 24), "of one round"
    assert info["facts"][matmul.id]["activation"] == [[24, "B*T"]], "of all"
    assert box_called(root, "layers.0.mixer:concat").output.letters == "(B, T, D)"


def test_a_state_is_kept_however_long_the_text(captured):
    root, info, *_ = captured("loop")
    assert info["facts"]["model"]["cache"] == [[6 * 9 * 24, "B"]]
    cache = next(box for box, _ in walk(root) if box.role == "cache")
    assert cache.title == "state of the past" and cache.output.letters == "(B, N, D)"
    found = totals(info, "bf16", batch=3, cached=1000)
    assert (found["cache"], found["cache_per_token"]) == (2 * 3 * 6 * 9 * 24, 0)


def test_few_tokens_are_recorded_only_where_each_is_a_round(captured):
    _, _, module, config = captured("loop")
    with torch.device("meta"):
        traced = trace(module.Model(config))
    assert traced.sizes["T"] < 20 and len(traced.ops) < 60
    _, _, module, config = captured("chosen")
    with torch.device("meta"):
        assert trace(module.Model(config)).sizes["T"] > 1000


def test_a_model_without_heads_has_none_in_its_legend(captured):
    for name, texts in (("loop", {"Letters", "recurrence"}), ("chosen", {"Experts"})):
        box, info, *_ = captured(name)
        drawn = {text.get_text() for text in picture.draw(box, info).axes[0].texts}
        assert texts <= drawn and "Heads" not in drawn
