"""The proof of models/gpt_neox.py."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from conversion.convert import convert
from conversion.tables import from_hf_config, to_hf_config
from models import build_model, create_model, load_config, load_model
from models.utils.errors import UserError
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close, tolerance
from tests.shape_cases import Case, run_decoder


def rope(fraction=0.3, base=1000.0):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}
    }


class TestGPTNeoX(DecoderProof):
    model_name = "gpt_neox"
    oracle_config, oracle_model = GPTNeoXConfig, GPTNeoXForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 120,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,  # of 20 features, of which RoPE turns 0.3 * 20 = 6
        "intermediate_size": 88,
        "layer_norm_eps": 1e-4,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **rope(),
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 60, **rope(0.6)},
        "num_layers": {"num_hidden_layers": 1},
        "num_heads": {"num_attention_heads": 4, **rope(0.2)},
        "d_ff": {"intermediate_size": 70},
        "norm_eps": {"layer_norm_eps": 0.1},
        "rotary_dim": rope(fraction=1.0),
        "rope_base": rope(base=50.0),
        "parallel_residual": {"use_parallel_residual": False},
        "gelu_approximation": {"hidden_act": "gelu_fast"},
        "attn_bias": {"attention_bias": False},
        "tied_head": {"tie_word_embeddings": True},
    }
    no_effect = {
        "max_seq_len": "RoPE has no limit of its own",
        "gelu_approximation": "the two forms differ by 5e-4 at most; test_two_forms_of_gelu tells them apart",
    }

    def test_two_forms_of_gelu(self, pair):
        """Hardly 100 tolerances lie between them, but enough that the wrong one would not pass for right."""
        exact, inputs = pair[1], self.inputs(pair[1], 2, 29)
        config = dataclasses.replace(exact.config, gelu_approximation="tanh")
        tanh = build_model("gpt_neox", config, device="cpu").eval()
        tanh.load_state_dict(exact.state_dict())
        expected = exact(*inputs)
        assert (tanh(*inputs) - expected).abs().max() > 20 * tolerance(expected)

    def test_no_position_beyond_the_rotated_features(self, model):
        """The features that RoPE leaves alone are equal at every position, the others are not."""
        x = torch.randn(1, 1, 1, 20).expand(1, 1, 5, 20)
        cos, sin = neox().rope(torch.arange(5)[None], model.config)
        turned = neox().rotate(x, cos, sin)
        assert torch.equal(turned[..., 6:], x[..., 6:])
        assert (turned[0, 0, 1:, :6] != x[0, 0, 1:, :6]).all()

    def test_angles_are_exact_in_bf16_too(self, model):
        """bf16 has no number between 256 and 258."""
        cos, sin = neox().rope(torch.tensor([[256, 257, 100_001]]), model.config)
        assert cos.dtype == sin.dtype == torch.float32
        assert (cos[0, 0, 0] != cos[0, 0, 1]).all() and (sin[0, 0, 0] != sin[0, 0, 1]).all()

    def test_attention_is_the_four_lines_of_its_docstring(self, model):
        attn, config = model.layers[0].attn, model.config
        x, positions = torch.randn(2, 7, config.d_model), torch.arange(7).expand(2, 7)
        rotation = neox().rope(positions, config)

        def heads(proj):
            return proj(x).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)

        q, k = (neox().rotate(heads(proj), *rotation) for proj in (attn.q_proj, attn.k_proj))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(7, 7).tril().bool(), -math.inf)
        out = scores.softmax(dim=-1) @ heads(attn.v_proj)
        expected = attn.o_proj(out.transpose(1, 2).flatten(2))
        assert_close(attn(x, rotation, None, positions, None), expected)


def neox():
    import models.gpt_neox

    return models.gpt_neox


# The published layouts --------------------------------------------------------------------------------------


@pytest.fixture
def oracle():
    return TestGPTNeoX().oracle()


def published(oracle, folder, change=lambda state: state, **fields):
    """The checkpoint as EleutherAI publishes it: the old config.json, and buffers among the weights."""
    oracle.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for n in range(oracle.config.num_hidden_layers):
        attention = f"gpt_neox.layers.{n}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = oracle.gpt_neox.rotary_emb.inv_freq.clone()
    save_file(change(state), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["attention_bias"]
    old = {"rotary_pct": 0.3, "rotary_emb_base": 1000, "attention_probs_dropout_prob": 0}
    (folder / "config.json").write_text(json.dumps({**config, **old, **fields}))
    return folder


def check(oracle, folder):
    convert(folder, progress=False)
    model = load_model(folder)
    tokens = random_tokens(model, 2, 21)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)


def test_as_published(oracle, tmp_path):
    check(oracle, published(oracle, tmp_path))


def test_the_head_under_the_name_that_transformers_5_has_in_memory(oracle, tmp_path):
    def rename(state):
        return {name.replace("embed_out", "lm_head"): tensor for name, tensor in state.items()}

    check(oracle, published(oracle, tmp_path, rename))


def test_fp16_bin_shards(oracle, tmp_path):
    """As GPT-NeoX-20B and Pythia were first published: half precision, pickled, in several files."""
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.half())
    folder = published(oracle, tmp_path)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    names, weight_map = list(state), {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    convert(folder, progress=False)
    assert load_model(folder).lm_head.weight.dtype == torch.float16
    model = load_model(folder, dtype=torch.float32)
    tokens = random_tokens(model, 2, 21)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)


def test_the_fused_weight_is_stored_per_head():
    """Rows of q, k, v of head 0, then of head 1: not three blocks, as in GPT-2."""
    from conversion.tensor_table import TRANSFORMS

    rows = ["q0", "q0", "k0", "k0", "v0", "v0", "q1", "q1", "k1", "k1", "v1", "v1"]
    numbers = torch.tensor([["qkv".index(row[0]) * 10 + int(row[1]) for row in rows]]).T
    q, k, v = TRANSFORMS["split_per_head"].forward(numbers, {"num_heads": 2})
    assert [block.flatten().tolist() for block in (q, k, v)] == [
        [0, 0, 1, 1],
        [10, 10, 11, 11],
        [20, 20, 21, 21],
    ]
    assert torch.equal(TRANSFORMS["split_per_head"].inverse([q, k, v], {"num_heads": 2}), numbers)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'.*implements gelu, "),
        ({"rotary_pct": 0.01}, "rotary_pct is 0.01, which is 0 of a head's 20 features"),
        ({"rotary_pct": 0.25}, "5 of a head's 20 features.*even"),
        ({"rotary_pct": 1.5}, "30 of a head's 20"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear.*default"),
        ({"gated": True}, "does not know gated"),
    ],
)
def test_a_config_that_the_page_does_not_implement(fields, message):
    sizes = {"model_type": "gpt_neox", "hidden_size": 120, "num_attention_heads": 6, "rotary_pct": 0.3}
    with pytest.raises(UserError, match=message):
        from_hf_config({**sizes, **fields})


def test_a_config_that_says_nothing_of_rope():
    """As transformers takes it: a quarter, rounded down, and base 10,000."""
    sizes = {"hidden_size": 364, "num_attention_heads": 4}  # a quarter of 91 features is 22.75
    theirs = GPTNeoXConfig(**sizes).rope_parameters
    ours = from_hf_config({"model_type": "gpt_neox", **sizes})[1]
    assert ours["rotary_dim"] == int(91 * theirs["partial_rotary_factor"]) == 22
    assert ours["rope_base"] == theirs["rope_theta"] == 10_000


def test_angles_are_computed_in_fp32():
    """bf16 has no number between 256 and 258."""
    config = load_config("pythia-70m")[1]
    cos, _ = neox().rope(torch.tensor([[256, 257]]), config)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 1, 0] == pytest.approx(math.cos(257), abs=1e-6)
    model = create_model("pythia-14m", num_layers=1, vocab_size=30).bfloat16().eval()
    with torch.no_grad():
        exact = model.float()(torch.arange(300)[None] % 30)
        half = model.bfloat16()(torch.arange(300)[None] % 30)
    assert (half.float() - exact).std() < 0.02 * exact.std()


@pytest.mark.parametrize("head_dim", [16, 20, 80, 96, 98, 256])
def test_rotary_pct_there_and_back(head_dim):
    for rotary_dim in range(2, head_dim + 1, 2):
        config = {"num_heads": 3, "d_model": 3 * head_dim, "rotary_dim": rotary_dim}
        fields = dict.fromkeys(["vocab_size", "max_seq_len", "num_layers", "d_ff", "norm_eps"], 1)
        rest = {"rope_base": 1e4, "parallel_residual": True, "gelu_approximation": "none", "attn_bias": True}
        theirs = to_hf_config("gpt_neox", {**fields, **rest, **config, "tied_head": False})
        assert from_hf_config(theirs)[1]["rotary_dim"] == rotary_dim


# The published sizes ----------------------------------------------------------------------------------------

# The model cards of EleutherAI/pythia-70m to -12b, and Black et al. 2022, section 2.1, for GPT-NeoX-20B.
COUNTS = {
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = build_model(*load_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", ["pythia-14m", "pythia-31m", *COUNTS])
def test_a_quarter_of_each_head_is_rotated(name):
    config = load_config(name)[1]
    assert 4 * config.rotary_dim == config.d_model // config.num_heads
    assert config.d_ff == 4 * config.d_model


def test_fresh_weights():
    model = create_model("pythia-70m", num_layers=4, vocab_size=300, d_model=320)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 2 / (4 * 320**0.5) if adds else (2 / (5 * 320)) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
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


SHAPES = Case(shape_configs, run_decoder, {"B": 7, "T": 11, "S": 13, "d": 10}, same={("H", "d")})
