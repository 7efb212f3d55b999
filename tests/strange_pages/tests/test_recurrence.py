"""The proof of models/recurrence.py, a page of the test that adds pages (tests/test_strange_pages.py)."""

import pytest
import torch

from models import build_model, load_config
from models import recurrence as page
from tests.decoder_proof import random_tokens
from tests.model_proof import assert_close
from tests.shape_cases import Case

SMALL = page.Config(vocab_size=101, max_seq_len=64, d_model=30, num_layers=3, d_state=7, norm_eps=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model("recurrence", SMALL, device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
        parameter.data += 1 if "norm" in name else 0
    return model.eval().requires_grad_(False)


def test_a_mixer_is_a_weighted_sum_over_the_past(model):
    """out_t = sum over s <= t of (q_t . (keep_(s+1) ... keep_t k_s)) v_s, all at once and without a state."""
    mixer, x = model.layers[0].mixer, torch.randn(2, 11, 30)
    q, k, v, keep = (proj(x) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.keep_proj))
    sums = torch.sigmoid(keep).log().cumsum(dim=1)
    fades = (sums[:, :, None] - sums[:, None]).exp()  # (B, T, S, N)
    scores = torch.einsum("btn,btsn,bsn->bts", q, fades, k).tril()
    expected = mixer.o_proj(torch.nn.functional.silu(mixer.gate_proj(x)) * (scores @ v))
    assert_close(mixer(x, torch.arange(11).expand(2, -1), None), expected)


def test_cached_equals_full(model):
    tokens, cache = random_tokens(model, 2, 40), model.new_cache(2, 40)
    pieces = [model(tokens[:, :10], cache=cache)]
    for start, end in [(10, 17), (17, 18), (18, 39), (39, 40)]:
        pieces.append(model(tokens[:, start:end], torch.arange(start, end).expand(2, -1), cache))
    assert_close(torch.cat(pieces, dim=1), model(tokens))


def test_pads_move_nothing(model):
    """Rows of different lengths, padded on the right with position -1, decode as if alone."""
    lengths, tokens, cache = torch.tensor([11, 4, 7]), random_tokens(model, 3, 20), model.new_cache(3, 24)
    positions = torch.arange(11).expand(3, -1)
    model(tokens[:, :11], positions.where(positions < lengths[:, None], -1), cache)
    for n in range(5):
        positions = (lengths + n)[:, None]
        step = model(tokens.gather(1, positions), positions, cache)
        for row, length in enumerate(lengths.tolist()):
            assert_close(step[row, 0], model(tokens[row : row + 1, : length + n + 1])[0, -1])


def test_a_call_may_begin_num_undo_tokens_earlier_and_nowhere_else(model):
    tokens, draft = random_tokens(model, 2, 20), random_tokens(model, 2, 6, seed=1)
    cache = model.new_cache(2, 26, num_undo=5)
    model(tokens[:, :10], cache=cache)
    model(draft, torch.arange(10, 16).expand(2, -1), cache)
    # Both rows go back, each its own way: to 11, where the draft's first token counts, and to 13.
    text = torch.cat([tokens[:, :10], draft], dim=1)
    for first, second in [(11, 13), (12, 14)]:
        positions = torch.tensor([[first], [second]])
        step = model(text.gather(1, positions), positions, cache)
        assert_close(step[0, 0], model(text[:1, : first + 1])[0, -1])
        assert_close(step[1, 0], model(text[1:, : second + 1])[0, -1])
    with pytest.raises(ValueError, match="row 0 begins at position 14, .* begin at 11 or 12 or 13;"):
        model(draft[:, :1], torch.tensor([[14], [15]]), cache)
    with pytest.raises(ValueError, match="row 1 begins at position 9"):
        model(draft[:, :1], torch.tensor([[13], [9]]), cache)


def test_without_undo_a_row_goes_on_behind_its_last_token(model):
    cache = model.new_cache(1, 20)
    model(random_tokens(model, 1, 10), cache=cache)
    with pytest.raises(ValueError, match="begin at 10;"):
        model(random_tokens(model, 1, 1), torch.tensor([[9]]), cache)


def test_exports_with_its_cache(model):
    cache = model.new_cache(1, 16)
    model(random_tokens(model, 1, 8), cache=cache)
    token, position = random_tokens(model, 1, 1), torch.tensor([[8]])
    program = torch.export.export(model, (token, position, cache), strict=False)
    # Exporting calls the model with stand-ins; the cache is what it was.
    assert_close(program.module()(token, position, cache), model(token, position, fresh(model)))


def fresh(model):
    """A cache that has read the same 8 tokens."""
    cache = model.new_cache(1, 16)
    model(random_tokens(model, 1, 8), cache=cache)
    return cache


def test_every_parameter_is_trained(model):
    torch.manual_seed(0)
    made = build_model("recurrence", SMALL, device="cpu")
    made.init_weights()
    made(random_tokens(made, 2, 12)).square().mean().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parameter_count():
    model = build_model(*load_config("recurrence"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 88_188_672


# Shapes -----------------------------------------------------------------------------------------------------


def run_shapes(model, recorder, B, T, U):
    """The whole pass, in training and in evaluation; a prompt into a cache, then one token, then several."""
    tokens = torch.randint(model.config.vocab_size, (B, T))
    recorder.running(model.config, B=B, T=T, U=U)
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    cache = model.new_cache(B, 3 * T, num_undo=U - 1)
    model(tokens, cache=cache)
    recorder.running(model.config, B=B, T=1, U=U)
    model(tokens[:, :1], torch.full((B, 1), T), cache)
    recorder.running(model.config, B=B, T=T - 1, U=U)
    model(tokens[:, 1:], torch.arange(T, 2 * T - 1).expand(B, -1), cache)


def shape_configs(module):
    yield module.Config(vocab_size=31, max_seq_len=64, d_model=16, num_layers=2, d_state=9, norm_eps=1e-5)


SHAPES = Case(shape_configs, run_shapes, {"B": 7, "T": 11, "U": 5})
