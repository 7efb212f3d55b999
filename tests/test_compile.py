"""The proof of models/utils/compile.py: compiled steps give what the model gives, and failures are survived.

What is compiled lands in one folder for the whole file, so that a step is compiled once.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.utils import compile as page
from models.utils.compile import attend, compile_decoding, row_times_int8, row_times_matrix
from models.utils.kernels.row_linear import load_row_linear
from models.utils.kernels.tiled_linear import TiledLinear, tile_layers, why_not_faster
from models.utils.quantize import Quantization, prepare, quantize_int8, quantize_layers
from models.utils.stacked_experts import stacked
from runs_ar.generate import generate
from runs_ss.speculate import ModelDrafter, speculate
from tests import zoo
from tests.compiler import needs_compiler
from tests.test_speculate import disturbed, tiny

ROOT = Path(__file__).parent.parent
PROMPT = [1, 40, 5, 6, 7, 8]


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "CACHE_FOLDER", tmp_path_factory.mktemp("compiled"))
        patch.setattr(page, "MIN_SLOTS", 32)
        yield


@pytest.fixture
def said():
    """What compile_decoding reports."""
    return []


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def small(name, **sizes):
    """One layer is enough for a step, and compiles in seconds."""
    model = tiny(name, **sizes)
    model.layers = model.layers[:1]
    return model


# Formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 3, 8, 50])
def test_a_row_times_a_matrix_is_linear(N):
    x, weight, bias = torch.randn(1, 1, 24), torch.randn(N, 24), torch.randn(N)
    torch.testing.assert_close(row_times_matrix(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(row_times_matrix(x, weight), F.linear(x, weight))


def test_bf16_is_summed_in_fp32():
    # 257 ones: bf16 has no 257, a sum in bf16 stays at 256.
    x = torch.cat([torch.ones(257), -torch.ones(128)]).bfloat16()
    assert row_times_matrix(x, torch.ones(1, 385).bfloat16()) == 129
    # (1 + 2^-7)^2 is 1 + 2^-6 + 2^-14, of which bf16 has no more than 1 + 2^-6.
    x, weight = torch.tensor([[1 + 2**-7, 1], [1 + 2**-7, -1 - 2**-6]]).bfloat16()
    assert row_times_matrix(x[None], weight[None]) == 2**-14


def test_a_row_times_int8_is_the_kernel():
    x = torch.randn(1, 64).bfloat16()
    codes, scale = quantize_int8(torch.randn(48, 64).bfloat16())
    expected = torch._weight_int8pack_mm(x, codes, scale)
    torch.testing.assert_close(row_times_int8(x, codes, scale), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_few_queries_attend_as_torch_says(K, T):
    B, H, S, d = 3, 4, 14, 8
    q, k, v = torch.randn(B, H, T, d), torch.randn(B, K, S, d), torch.randn(B, K, S, d)
    positions = torch.tensor([0, 4, 9])[:, None] + torch.arange(T)
    mask = torch.arange(S) <= positions[:, None, :, None]
    torch.testing.assert_close(
        attend(q, k, v, mask, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    )
    torch.testing.assert_close(
        attend(q, k, v, scale=0.3, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True),
    )


@pytest.mark.skipif(load_row_linear() is not None, reason=str(load_row_linear()))
def test_which_products_take_which_formula(monkeypatch):
    taken = []
    for name in ("row_linear", "row_times_matrix", "row_times_int8"):
        monkeypatch.setattr(page, name, lambda *args, name=name: taken.append(name))
    with page.FewRows():
        F.linear(torch.randn(1, 5, 64), torch.randn(4, 64))
        F.linear(torch.randn(1, 1, 48), torch.randn(4, 48))
        assert F.linear(torch.randn(2, 48), torch.randn(4, 48)).shape == (2, 4)
        torch.einsum("...i,oi->...o", torch.randn(1, 3, 64), torch.randn(4, 64))
        torch._weight_int8pack_mm(
            torch.randn(1, 64).bfloat16(), *quantize_int8(torch.randn(48, 64).bfloat16())
        )
    assert taken == ["row_linear", "row_times_matrix", "row_linear", "row_times_int8"]


# Steps ------------------------------------------------------------------------------------------------------


def assert_same_steps(model, compiled, batch_size, width, tolerance):
    """A prompt, then steps of `width` tokens at places of their own, in the model and in the compiled one."""
    torch.manual_seed(3)
    cache = compiled.new_cache(batch_size, 20)
    assert compiled.steps[(width, *page.shapes_of(cache))] is not None
    expected_cache = copy.deepcopy(cache)
    prompt = torch.randint(50, (batch_size, 7))
    model(prompt, cache=expected_cache), compiled(prompt, cache=cache)

    for step in range(3):
        # Row n goes back by n places: what stands there is written over.
        starts = 7 + width * step - torch.arange(batch_size)[:, None]
        positions = starts + torch.arange(width)
        tokens = torch.randint(50, (batch_size, width))
        logits, expected = (
            compiled(tokens, positions, cache),
            model(tokens, positions, expected_cache),
        )
        assert (logits - expected).abs().max() <= tolerance * max(1, expected.std())
        for ours, theirs in zip(page.tensors_of(cache), page.tensors_of(expected_cache)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * tolerance)


@needs_compiler
@zoo.every_decoder
def test_a_step_is_the_models(model_name, said):
    model = small(model_name)
    assert_same_steps(model, compile_decoding(copy.deepcopy(model), report=said.append), 1, 1, 1e-5)
    assert len(said) == 1 and "compiling" in said[0]


@needs_compiler
def test_ragged_rows_and_several_tokens(said):
    model = small("llama")
    compiled = compile_decoding(copy.deepcopy(model), (1, 4), said.append)
    assert_same_steps(model, compiled, 3, 1, 1e-5)
    assert_same_steps(model, compiled, 3, 4, 1e-5)
    # Fewer tokens than the step is wide are filled up; what the pads write is out of sight.
    assert {width for width, *_ in compiled.steps} == {1, 4}
    cache, expected_cache = compiled.new_cache(3, 20), model.new_cache(3, 32)
    tokens = torch.randint(50, (3, 2))
    positions = torch.tensor([[0, 1]] * 3)
    torch.testing.assert_close(
        compiled(tokens, positions, cache), model(tokens, positions, expected_cache), rtol=0, atol=1e-4
    )


def test_no_pad_stands_behind_the_context(said):
    """The last two places of GPT-2's position table: two pads more would have no position."""
    model = small("gpt2")
    compiled = compile_decoding(copy.deepcopy(model), (1, 4), said.append)
    cache, expected_cache = compiled.new_cache(1, 48), model.new_cache(1, 64)
    prompt, tokens, positions = (
        torch.randint(50, (1, 46)),
        torch.randint(50, (1, 2)),
        torch.tensor([[46, 47]]),
    )
    compiled(prompt, cache=cache), model(prompt, cache=expected_cache)
    expected = model(tokens, positions, expected_cache)
    torch.testing.assert_close(compiled(tokens, positions, cache), expected, rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_steps(kind, said):
    if kind == "int4" and why_not_faster() is not None:
        pytest.skip(why_not_faster())
    model = small("llama").bfloat16()
    quantize_layers(model, Quantization(kind, 32 if kind == "int4" else None))
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    # The kernel rounds activations too, and a bf16 that differs in its last bit may get another code.
    tile_layers(model)
    assert_same_steps(model, compiled, 1, 1, 0.15)


# Experts ----------------------------------------------------------------------------------------------------

# Widths that the kernels of products take, and widths that they do not.
WIDE = {"d_model": 64, "d_ff": 96, "d_expert": 32, "num_experts": 9, "num_active_experts": 3}
NARROW = {**WIDE, "d_model": 40, "d_expert": 24}


def with_experts(sizes, dtype=torch.float32):
    return small("qwen3_moe", **sizes).to(dtype)


@needs_compiler
@pytest.mark.parametrize("sizes", [WIDE, NARROW], ids=["wide", "narrow"])
def test_rows_of_a_batch_go_to_experts_of_their_own(sizes, said):
    model = with_experts(sizes)
    compiled = compile_decoding(copy.deepcopy(model), (1, 4), said.append)
    assert_same_steps(model, compiled, 3, 1, 1e-5)
    assert_same_steps(model, compiled, 3, 4, 1e-5)


@needs_compiler
def test_a_step_reads_the_experts_that_are_chosen(said):
    """All others may be anything, where the compiled step and a prompt read them."""
    model = with_experts(WIDE)
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    cache, expected_cache = compiled.new_cache(1, 20), model.new_cache(1, 32)
    token, position, chosen = torch.tensor([[7]]), torch.tensor([[0]]), set()
    ffn = model.layers[0].ffn
    for n, expert in enumerate(ffn.experts):
        expert.register_forward_hook(lambda *_, n=n: chosen.add(n))
    expected = model(token, position, expected_cache)
    assert len(chosen) == 3
    for n, expert in enumerate(compiled.layers[0].ffn.experts):
        if n not in chosen:
            for parameter in expert.parameters():
                parameter.fill_(torch.nan)
    torch.testing.assert_close(compiled(token, position, cache), expected, rtol=0, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_experts(kind, said):
    if kind == "int4" and why_not_faster() is not None:
        pytest.skip(why_not_faster())
    # In int8 a width of 48, which tiles do not take, stays with another formula.
    model = with_experts({**WIDE, "d_expert": 48} if kind == "int8" else WIDE, torch.bfloat16)
    quantize_layers(model, Quantization(kind, 32 if kind == "int4" else None))
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    tile_layers(model)
    assert_same_steps(model, compiled, 1, 1, 0.15)


def test_experts_take_no_more_memory_when_they_are_stacked():
    model = with_experts(WIDE)
    compiled = compile_decoding(model)
    ffn = compiled.layers[0].ffn
    for n, expert in enumerate(ffn.experts):
        stacked = ffn.stacked.expert.up_proj.weight[n]
        assert stacked.data_ptr() == expert.up_proj.weight.data_ptr()
        assert torch.equal(stacked, expert.up_proj.weight)


def test_matrices_that_lie_anyhow_are_brought_together():
    """As on a GPU, where nobody has put them side by side before."""
    parameters = [nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
    before = [parameter.clone() for parameter in parameters]
    together = stacked(parameters[::-1])
    for parameter, place, old in zip(parameters[::-1], together, before[::-1]):
        assert parameter.data_ptr() == place.data_ptr() and torch.equal(parameter, old)


def test_a_step_that_cannot_be_traced_is_told_in_a_line(said, capfd):
    model = with_experts(NARROW)
    original = model.layers[0].ffn.run
    # A loop as long as the data say, without a word to the tracer.
    model.layers[0].ffn.forward = lambda x: x + sum(1.0 for n in x.flatten().tolist() if n > 0)
    compiled = compile_decoding(model, report=said.append)
    compiled.new_cache(1, 20)
    assert said[-1].startswith("going on without compilation: ") and "\n" not in said[-1]
    assert capfd.readouterr() == ("", "")
    assert original


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_head_is_an_int8_copy(kind):
    model = small("gpt2").bfloat16()
    quantize_layers(model, Quantization(kind, 32 if kind == "int4" else None))
    compiled = compile_decoding(copy.deepcopy(model))
    prepare(model)
    assert torch.equal(compiled.token_embed.weight, model.token_embed.weight)
    assert model.lm_head.weight is model.token_embed.weight
    if why_not_faster() is None:
        assert isinstance(compiled.lm_head, TiledLinear) and compiled.lm_head.bits == 8
    hidden = torch.randn(1, 3, 32).bfloat16()
    expected = model.lm_head(hidden).float()
    error = (compiled.lm_head(hidden) - expected).norm() / expected.norm()
    assert 0 < error < 0.015  # 8 bits for a weight, 8 for an activation


def test_full_precision_keeps_its_head():
    model = compile_decoding(small("gpt2")).model
    assert model.lm_head.weight is model.token_embed.weight


def test_texts_are_the_same(said):
    model = small("llama")
    compiled = compile_decoding(copy.deepcopy(model), (1, 4), said.append)
    greedy = [tokens for (tokens,) in generate(model, [PROMPT], 20)]
    assert [tokens for (tokens,) in generate(compiled, [PROMPT], 20)] == greedy
    drafter = ModelDrafter(disturbed(model, 0.05))
    rounds = speculate(compiled, drafter, [PROMPT], 20, num_draft_tokens=3)
    assert [token for round in rounds for token in round.tokens[0]] == greedy


class LayerState(NamedTuple):
    state: torch.Tensor  # (B, D)


class States(NamedTuple):
    layers: tuple
    slots: None = None


class Recurrent(nn.Module):
    """A model whose memory is no slot per position: a state, two tuples deep."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=64, vocab_size=50)
        self.token_embed, self.mix = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 50, bias=False)

    def forward(self, tokens, positions=None, cache=None):
        return self.lm_head(self.hidden(tokens, positions, cache))

    def hidden(self, tokens, positions=None, cache=None):
        states, x = [cache.layers[0].state], self.token_embed(tokens)
        for t in range(tokens.shape[1]):
            moved = torch.tanh(self.mix(states[-1]) + x[:, t])
            is_pad = positions is not None and positions[:, t, None] < 0
            states.append(moved if is_pad is False else torch.where(is_pad, states[-1], moved))
        cache.layers[0].state.copy_(states[-1])
        return torch.stack(states[1:], dim=1)

    def new_cache(self, batch_size, num_slots, num_undo=0):
        return States((LayerState(torch.zeros(batch_size, 32)),))


@needs_compiler
def test_a_cache_is_any_nest_of_tensors_and_pads_move_no_state(said):
    model = Recurrent()
    compiled = compile_decoding(copy.deepcopy(model), (1, 3), said.append)
    cache, expected = compiled.new_cache(2, 20, num_undo=0), model.new_cache(2, 20)
    assert all(compiled.steps.values()) and len(compiled.steps) == 2, said
    for start, width in ((0, 1), (1, 3), (4, 2), (6, 1)):
        tokens, positions = torch.randint(50, (2, width)), torch.arange(start, start + width).expand(2, -1)
        out = compiled(tokens, positions, cache)
        torch.testing.assert_close(out, model(tokens, positions, expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(cache.layers[0].state, expected.layers[0].state, rtol=0, atol=1e-5)


def test_a_cache_that_holds_a_number_is_refused_by_a_sentence(monkeypatch, said):
    monkeypatch.setattr(Recurrent, "new_cache", lambda self, batch_size, num_slots: (torch.zeros(1), 7))
    compiled = compile_decoding(Recurrent(), report=said.append)
    compiled.new_cache(1, 20)
    expected = "going on without compilation: a step takes tensors alone, and this cache holds int too"
    assert said[-1] == expected


# The disk ---------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_second_start_compiles_nothing(monkeypatch, said):
    model = small("gpt2")
    compile_decoding(copy.deepcopy(model)).new_cache(1, 20)
    monkeypatch.setattr(page, "compile_step", None)
    assert_same_steps(model, compile_decoding(copy.deepcopy(model), report=said.append), 1, 1, 1e-5)
    assert said == []


def test_another_model_has_another_step():
    words = set()
    for name in ("gpt2", "llama"):
        model = small(name)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            for slots in (32, 64):
                words |= {page.fingerprint(model, model.new_cache(1, slots), width) for width in (1, 2)}
    assert len(words) == 16
    assert all(len(word) == 24 for word in words)


def test_a_step_of_other_kernels_has_another_file(monkeypatch):
    """It calls them with the arguments that they had when it was compiled."""
    model = small("gpt2")
    cache = model.new_cache(1, 32)
    before = page.fingerprint(model, cache, 1)
    monkeypatch.setattr(page, "libraries", lambda: ["row_linear_0.so"])
    assert page.fingerprint(model, cache, 1) != before


@needs_compiler
def test_weights_are_read_where_they_are(said):
    """The step holds no weights: one file serves all checkpoints of a config."""
    first, second = small("gpt2"), disturbed(small("gpt2"), 0.3)
    for model in (first, second):
        assert_same_steps(model, compile_decoding(copy.deepcopy(model), report=said.append), 1, 1, 1e-5)


# What can go wrong ------------------------------------------------------------------------------------------


def run(tmp_path, *options, **environment):
    """run.py on a tiny checkpoint in a process with caches of its own."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        **environment,
    }
    command = [sys.executable, "run.py", "--compile", "--max-new-tokens", "8", "--temperature", "0", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_compiler_the_run_goes_on(tmp_path):
    done = run(tmp_path, CXX="/nowhere/c++", PATH=str(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "going on without compilation" in done.stderr
    assert len(done.stdout) > 8


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, said, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the compiler\nbroke")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    monkeypatch.setattr(page, "CACHE_FOLDER", tmp_path)
    model = small("gpt2")
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    greedy = [tokens for (tokens,) in generate(model, [PROMPT], 5)]
    assert [tokens for (tokens,) in generate(compiled, [PROMPT], 5)] == greedy
    assert said[-1] == "going on without compilation: the compiler broke"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*args, package_path, **kwargs):
        Path(package_path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", interrupted)
    monkeypatch.setattr(page, "CACHE_FOLDER", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compile_decoding(small("gpt2")).new_cache(1, 20)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, said):
    (tmp_path / "file").touch()
    monkeypatch.setattr(page, "CACHE_FOLDER", tmp_path / "file" / "cache")
    folder = page.cache_folder(said.append)
    assert folder.is_dir() and "cannot be kept" in said[0]


def test_a_broken_file_in_the_cache(monkeypatch, said, tmp_path):
    monkeypatch.setattr(page, "CACHE_FOLDER", tmp_path)
    model = small("gpt2")
    cache = model.new_cache(1, 32)
    (tmp_path / f"{page.fingerprint(model, cache, 1)}.pt2").write_bytes(b"no library")
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    compiled.new_cache(1, 20)
    assert "going on without compilation" in said[-1]


def test_a_cpu_without_the_instructions(monkeypatch, said):
    """torch's own int4 kernel takes over; it is right, and it is not compiled."""
    monkeypatch.setattr(page, "tile_layers", lambda model: "this CPU has no such instructions")
    model = small("llama").bfloat16()
    quantize_layers(model, Quantization("int4", 32))
    compiled = compile_decoding(copy.deepcopy(model), report=said.append)
    tokens = [[token for (token,) in generate(each, [PROMPT], 5)] for each in (model, compiled)]
    assert tokens[0] == tokens[1]
    assert "this CPU" in said[0] and "without compilation" in said[-1]
    assert compiled.layers[0].attn.q_proj.tiled, "not in the order of torch's kernel"


@pytest.mark.parametrize(
    "options", [["--checkpoint", "checkpoints/tiny-bert-python"], ["--score", "README.md"]]
)
def test_what_does_not_decode_says_so(tmp_path, options):
    done = run(tmp_path, *options)
    assert done.returncode == 2
    assert "--compile: for decoders" in done.stderr and "Traceback" not in done.stderr
