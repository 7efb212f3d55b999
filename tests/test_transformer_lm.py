"""The proof of models/transformer_lm.py: each part against torch's own, the whole against `transformers`."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import convert_hf_checkpoint
from conversion.convert import convert, inspect, reverse
from conversion.tables import from_hf_config, to_hf_config
from models import build_model, create_model, load_config, load_model
from models import llama as llama_page
from models import transformer_lm as page
from models.utils.errors import UserError, run_main
from tests.decoder_proof import DecoderProof, assert_close, random_tokens
from tests.shape_cases import Case, run_decoder

BASE = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 66,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 10,
    "intermediate_size": 88,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CHANGES = {
    "vocab_size": {"vocab_size": 89},
    "max_seq_len": {"max_position_embeddings": 50},
    "d_model": {"hidden_size": 48},
    "num_layers": {"num_hidden_layers": 1},
    # As many features in all, so that the weights keep their shapes.
    "num_heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
    "head_dim": {"head_dim": 16},
    "d_ff": {"intermediate_size": 72},
    "norm_eps": {"rms_norm_eps": 0.1},
    "tied_head": {"tie_word_embeddings": True},
}


class TestWithRope(DecoderProof):
    """Read from Llama's layout, for which this page has to be asked for."""

    model_name = "transformer_lm"
    oracle_config, oracle_model = LlamaConfig, LlamaForCausalLM
    base = {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    changes = {**CHANGES, "rope_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}}
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    def convert(self, folder):
        convert(folder, model="transformer_lm", progress=False)

    def test_logits_equal_those_of_llama_py(self, pair, tmp_path):
        oracle, model = pair
        oracle.save_pretrained(tmp_path)
        convert(tmp_path, progress=False)
        llama = load_model(tmp_path)
        assert type(llama) is llama_page.Model
        tokens = random_tokens(model, 2, 23)
        assert_close(model(tokens), llama(tokens))


class TestWithoutRope(DecoderProof):
    """Read from SmolLM3's layout, every layer one without RoPE; nothing else reads it."""

    model_name = "transformer_lm"
    oracle_config, oracle_model = SmolLM3Config, SmolLM3ForCausalLM
    base = {**BASE, "no_rope_layers": [0, 0, 0]}
    changes = {**CHANGES, "rope_base": {"no_rope_layers": [1, 1, 1]}}
    no_effect = TestWithRope.no_effect

    def test_there_is_no_rope(self, model):
        """Without positions, order shows in the mask alone: the last token sees the others as a set."""
        assert model.config.rope_base is None
        tokens = random_tokens(model, 2, 12)
        shuffled = torch.cat([tokens[:, :11].flip(1), tokens[:, 11:]], dim=1)
        alone = page.Model(page.Config(**{**vars(model.config), "num_layers": 1})).eval()
        alone.load_state_dict(model.state_dict(), strict=False)
        assert_close(alone(shuffled)[:, -1], alone(tokens)[:, -1])
        assert not torch.allclose(alone(shuffled)[:, 5], alone(tokens)[:, 5], atol=0.1)


# The parts, each on its own ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same(ours, theirs, inputs, gradients=True):
    """Equal outputs and, for floating inputs and parameters, equal gradients."""
    results = []
    for function in ours, theirs:
        copies = [x.clone().requires_grad_(x.is_floating_point() and gradients) for x in inputs]
        out = function(*copies)
        if gradients:
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
            (out * weights).sum().backward()
        results.append([out] + [x.grad for x in copies if x.grad is not None])
    assert len(results[0]) == len(results[1]) == 1 + gradients * sum(x.is_floating_point() for x in inputs)
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 4, 7), (0, 7)])
def test_linear(shape):
    ours, theirs = page.Linear(7, 5), nn.Linear(7, 5, bias=False)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, [torch.randn(shape)])
    assert_same(
        lambda x, w: torch.func.functional_call(ours, {"weight": w}, (x,)),
        F.linear,
        [torch.randn(shape), torch.randn(5, 7)],
    )


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4)])
def test_embedding(shape):
    ours, theirs = page.Embedding(9, 6), nn.Embedding(9, 6)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(9, shape)
    assert torch.equal(ours(tokens), theirs(tokens))
    # A token that stands twice gets the sum of both gradients.
    twice = torch.tensor([3, 5, 3])
    for embedding in ours, theirs:
        (embedding(twice) * torch.arange(18.0).view(3, 6)).sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(eps):
    ours, theirs = page.RMSNorm(8, eps), nn.RMSNorm(8, eps)
    weight = torch.randn(8)
    for norm in ours, theirs:
        norm.weight.data.copy_(weight)
    for scale in 1e-3, 1.0, 1e3:
        assert_same(ours, theirs, [scale * torch.randn(2, 3, 8)])


def test_silu():
    assert_same(
        page.silu, nn.SiLU(), [torch.cat([torch.linspace(-20, 20, 99), torch.tensor([-1e4, 0.0, 1e4])])]
    )


def test_feed_forward_is_swiglu():
    ours = page.FeedForward(6, 11)
    gate, up, down = ours.gate_proj.weight, ours.up_proj.weight, ours.down_proj.weight
    assert_same(
        ours, lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [torch.randn(2, 3, 6)]
    )


INF = math.inf


@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(2, 3, 50),
        100 * torch.randn(4, 20),
        torch.tensor([[1e30, 1e30, -1e30], [3e38, 3e38, 3e38], [-3e38, -3e38, -3e38]]),
        torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, -5.0], [-3e38, -INF, -INF]]),
        torch.tensor([[2.0], [-4.0]]),
    ],
    ids=["usual", "large", "huge", "masked", "one"],
)  # fmt: skip
def test_softmax(scores):
    assert_same(page.softmax, lambda x: torch.softmax(x, dim=-1), [scores])
    probs = page.softmax(scores)
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(scores.shape[:-1]))
    assert (probs[scores == -INF] == 0).all()


def test_softmax_of_nothing_is_as_torch_has_it():
    nothing = torch.full((2, 3), -INF)
    assert page.softmax(nothing).isnan().all() and nothing.softmax(dim=-1).isnan().all()


def test_softmax_counts_in_fp32():
    """In bf16 a sum stops growing at 256, where its steps are 2."""
    probs = page.softmax(torch.zeros(1, 3000, dtype=torch.bfloat16))
    assert probs.dtype == torch.bfloat16
    assert torch.equal(probs, torch.zeros(1, 3000, dtype=torch.bfloat16).softmax(dim=-1))


@pytest.mark.parametrize("kind", ["causal", "everything", "random"])
def test_attention(kind):
    B, H, T, S, d = 2, 3, 5, 9, 4
    q, k, v = torch.randn(B, H, T, d), torch.randn(B, H, S, d), torch.randn(B, H, S, d)
    mask = page.causal_mask(torch.arange(4, 9).expand(B, T), S)
    if kind == "everything":
        mask = torch.ones(B, 1, T, S, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(B, 1, T, S) < 0.3
        mask[..., 2] = True
    assert_same(
        lambda q, k, v: page.attention(q, k, v, mask),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        [q, k, v],
    )


def test_attention_leaves_its_inputs_alone():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    mask = page.causal_mask(torch.arange(5)[None], 5)
    before = [x.clone() for x in (q, k, v, mask)]
    page.attention(q, k, v, mask)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, mask), before))


def test_causal_mask():
    whole = page.causal_mask(torch.arange(6).expand(2, 6), 6)
    assert torch.equal(whole, torch.ones(2, 1, 6, 6, dtype=torch.bool).tril())
    # Rows at places of their own: row 0 decodes position 3, row 1 position 0.
    step = page.causal_mask(torch.tensor([[3], [0]]), 5)
    assert step[:, 0, 0].tolist() == [[True, True, True, True, False], [True, False, False, False, False]]


def test_rope_turns_by_the_angles_of_the_paper():
    """Su et al. 2021, eq. 34, in complex numbers: pair i at position m is multiplied by exp(i m theta_i)."""
    d, base = 10, 100.0
    positions = torch.tensor([[0, 1, 2, 50], [7, 3, 3, 1000]])
    x = torch.randn(2, 3, 4, d)
    turned = page.rotate(x, *page.rope(positions, d, base))
    for i in range(d // 2):
        angles = positions.double() * base ** (-2 * i / d)
        pair = torch.complex(x[..., i].double(), x[..., i + d // 2].double())
        pair = pair * torch.polar(torch.ones_like(angles), angles)[:, None]
        torch.testing.assert_close(turned[..., i].double(), pair.real, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(turned[..., i + d // 2].double(), pair.imag, rtol=1e-5, atol=1e-4)


def test_rope_is_relative():
    """q at m times k at n depends on m - n alone."""
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(m, n):
        turned = [page.rotate(x, *page.rope(torch.tensor([[at]]), 8, 100.0)) for x, at in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-2


def test_rope_is_in_fp32_whatever_the_weights_are():
    cos, sin = page.rope(torch.tensor([[256, 257]]), 8, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[0, 0, 0] != cos[0, 0, 1]).any()
    assert page.rotate(torch.randn(1, 2, 2, 8).bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("rope", [True, False])
def test_multi_head_self_attention(rope):
    """On its own, as its docstring has it: with RoPE like llama.py, without like nn.MultiheadAttention."""
    B, T, D, H = 2, 6, 12, 3
    ours = page.Attention(D, H, D // H)
    x, positions = torch.randn(B, T, D), torch.arange(T).expand(B, T)
    mask, rotation = page.causal_mask(positions, T), page.rope(positions, D // H, 100.0)
    if rope:
        fields = dict(
            vars(load_config("tiny-llama-python")[1]), d_model=D, num_heads=H, num_kv_heads=H, head_dim=4
        )
        theirs = llama_page.Attention(llama_page.Config(**fields))
        theirs.load_state_dict(ours.state_dict())
        assert_same(
            lambda x: ours(x, mask, rotation), lambda x: theirs(x, rotation, None, positions, None), [x]
        )
        return
    theirs = nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    names = ("q_proj", "k_proj", "v_proj")
    theirs.in_proj_weight.data.copy_(torch.cat([getattr(ours, name).weight for name in names]))
    theirs.out_proj.weight.data.copy_(ours.o_proj.weight)
    assert_same(
        lambda x: ours(x, mask), lambda x: theirs(x, x, x, attn_mask=~mask[0, 0], need_weights=False)[0], [x]
    )


def test_layer_is_llamas():
    fields = dict(
        vars(load_config("tiny-llama-python")[1]), d_model=12, num_heads=3, num_kv_heads=3, head_dim=4
    )
    theirs = llama_page.Layer(llama_page.Config(**{**fields, "d_ff": 20}))
    kept = (
        "vocab_size",
        "max_seq_len",
        "d_model",
        "num_layers",
        "num_heads",
        "head_dim",
        "norm_eps",
        "tied_head",
    )
    ours = page.Layer(page.Config(**{name: fields[name] for name in kept}, d_ff=20, rope_base=100.0))
    theirs.load_state_dict(ours.state_dict())
    positions = torch.arange(6).expand(2, 6)
    mask, rotation = page.causal_mask(positions, 6), page.rope(positions, 4, 100.0)
    assert_same(
        lambda x: ours(x, mask, rotation),
        lambda x: theirs(x, rotation, None, positions, None),
        [torch.randn(2, 6, 12)],
    )


# Fresh weights ----------------------------------------------------------------------------------------------

# A normal distribution cut at 3 std is that much narrower: 1 - 6 phi(3) / (2 Phi(3) - 1) of the variance.
CUT = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def assert_drawn(weight, std):
    assert weight.mean().item() == pytest.approx(0, abs=0.02 * std)
    assert weight.std().item() == pytest.approx(CUT * std, rel=0.01)
    assert 2.9 * std < weight.abs().max() <= 3 * std * (1 + 1e-6)


def test_fresh_weights():
    """Each part draws its own, and what was there before is gone; a tied matrix is the head's."""
    for tied in True, False:
        model = create_model("transformer-lm-15m", num_layers=1, vocab_size=300, tied_head=tied)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        model.init_weights()
        for module in model.modules():
            if isinstance(module, page.Linear):
                assert_drawn(module.weight, math.sqrt(2 / sum(module.weight.shape)))
            if isinstance(module, page.RMSNorm):
                assert (module.weight == 1).all()
    assert_drawn(model.token_embed.weight, 1.0)


def test_parts_draw_their_weights_when_made():
    assert_drawn(page.Linear(300, 400).weight, math.sqrt(2 / 700))
    assert_drawn(page.Embedding(300, 400).weight, 1.0)


# The sizes of Llama 2 7B and of stories15M (llama2.c), and so their counts.
COUNTS = {"transformer-lm-15m": 15_191_712, "transformer-lm-7b": 6_738_415_616}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = build_model(*load_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


# From Hugging Face's layout and back ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A small Llama as published by old versions: RoPE's frequencies are stored with the layers."""
    model = LlamaForCausalLM(LlamaConfig(**TestWithRope.base))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    frequencies = model.model.rotary_emb.inv_freq
    state |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": frequencies.clone() for n in range(3)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_the_page_is_chosen_by_model(folder, tmp_path):
    convert(folder, progress=False)
    assert type(load_model(folder)) is llama_page.Model
    convert(folder, model="transformer_lm", progress=False)
    assert type(load_model(folder)) is page.Model


def test_num_kv_heads_may_be_left_out(folder):
    convert(changed(folder, num_key_value_heads=None), model="transformer_lm", progress=False)
    assert load_model(folder).config.num_heads == 6


@pytest.mark.parametrize("rope", [True, False])
def test_reversed_it_is_read_by_transformers(rope, tmp_path):
    """Also of a small vocabulary, which SmolLM3's default pad token would not be in."""
    fields = {"vocab_size": 50, "num_layers": 2, "head_dim": 20, "rope_base": 100.0 if rope else None}
    model = create_model("transformer-lm-15m", **fields)
    config = to_hf_config("transformer_lm", {"model": "transformer_lm", **vars(model.config)})
    assert config["model_type"] == ("llama" if rope else "smollm3")
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "config.json").write_text(json.dumps({"model": "transformer_lm", **vars(model.config)}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, converted / "model.safetensors")

    oracle, loading = AutoModelForCausalLM.from_pretrained(
        reverse(tmp_path, progress=False), attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    tokens = random_tokens(model, 2, 23)
    with torch.no_grad():
        assert_close(model.eval()(tokens), oracle(tokens).logits)


REFUSED = [
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2 and num_attention_heads is 6"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear', factor"),
    ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling has rope_type 'dynamic';"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters has"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"attention_bias": True}, "attention_bias is True; models/transformer_lm.py implements False"),
    ({"mlp_bias": True}, "mlp_bias is True; models/transformer_lm.py implements False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"head_dim": 9}, "head_dim must be even"),
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported by models/transformer_lm.py: llama, smollm3"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=[str(list(fields)[0]) for fields, _ in REFUSED])
def test_what_the_page_does_not_implement_is_refused_by_name(fields, message, folder, monkeypatch, capsys):
    arguments = [str(changed(folder, **fields)), "--model", "transformer_lm"]
    monkeypatch.setattr("sys.argv", ["convert_hf_checkpoint.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_main(convert_hf_checkpoint.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error and "config.json" in error
    assert not (folder / "converted").exists()


@pytest.mark.parametrize("layers", [[1, 1, 0], None, [], "absent"])
def test_smollm3_with_rope_in_some_layers_is_refused(layers):
    """SmolLM3 3B has it in three layers of four, and so has a config that does not say."""
    fields = {**SmolLM3Config(**TestWithoutRope.base).to_dict(), "no_rope_layers": layers}
    fields = {name: value for name, value in fields.items() if value != "absent"}
    with pytest.raises(UserError, match="no_rope_layers is .*models/transformer_lm.py implements 0 or 1"):
        from_hf_config(fields)


def test_metas_files_are_llamas(folder):
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")
    with pytest.raises(UserError, match="Meta's files are for models/llama.py; leave out --model"):
        convert(folder, model="transformer_lm", progress=False)


def test_inspect_shows_this_page(folder, capsys):
    inspect(folder, model="transformer_lm")
    shown = capsys.readouterr().out
    assert "becomes models/transformer_lm.py" in shown and "num_kv_heads" not in shown
    assert "layers.{n}.attn.q_proj.weight" in shown and "skipped: RoPE's frequencies" in shown


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
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


def run_shapes(model, recorder, B, T, S):
    """As any decoder, and its attention on its own."""
    run_decoder(model, recorder, B, T, S)
    recorder.running(model.config, B=B, T=T, S=T)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    model.layers[0].attn(torch.rand(B, T, model.config.d_model), mask)


SHAPES = Case(shape_configs, run_shapes, {"B": 7, "T": 11, "S": 13})
