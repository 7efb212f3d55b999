"""The proof of models/gpt_oss.py."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from conversion.convert import convert, reverse
from conversion.tables import from_hf_config
from models import build_model, load_config, load_model
from models import gpt_oss as page
from models.utils.errors import UserError
from models.utils.kernels.tiled_linear import load_kernel, tiled
from models.utils.quantize import MXFP4Linear, Quantization, dequantize_mxfp4
from runs_ar.generate import generate
from runs_ss.speculate import ModelDrafter, speculate
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw
from tests.shape_cases import Case

# As published, with sizes at which some pairs are fast, some slow, and both ends lie between two pairs.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 32.0,
    "original_max_position_embeddings": 60,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "truncate": False,
}
WINDOW = 7


class TestGptOss(DecoderProof):
    model_name = "gpt_oss"
    oracle_config, oracle_model = GptOssConfig, GptOssForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 200,
        "hidden_size": 66,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "sliding_window": WINDOW,
        "intermediate_size": 44,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "swiglu_alpha": 1.3,
        "swiglu_limit": 1.5,
        "rms_norm_eps": 1e-4,
        "rope_parameters": YARN,
        "experts_implementation": "eager",
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 48},
        "num_layers": {"num_hidden_layers": 1},
        "num_heads": {"num_attention_heads": 22},
        "num_kv_heads": {"num_key_value_heads": 3},
        "head_dim": {"head_dim": 16},
        "window": {"sliding_window": 5},
        "d_expert": {"intermediate_size": 72},
        "num_experts": {"num_local_experts": 4},
        "num_active_experts": {"num_experts_per_tok": 3},
        "swiglu_alpha": {"swiglu_alpha": 1.702},
        "swiglu_limit": {"swiglu_limit": 1.0},
        "norm_eps": {"rms_norm_eps": 0.1},
        "rope_base": {"rope_parameters": {**YARN, "rope_theta": 50.0}},
        "rope_scaling": {"rope_parameters": {**YARN, "factor": 2.0}},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    @pytest.mark.parametrize(
        "field, value",
        [
            ("beta_fast", 7.0),
            ("beta_slow", 0.2),
            ("original_max_position_embeddings", 200),
            ("attention_factor", 1.5),
        ],
    )
    def test_every_field_of_yarn(self, pair, tmp_path, field, value):
        oracle = self.oracle(rope_parameters={**YARN, field: value})
        model = self.zoo(oracle, tmp_path)
        tokens = random_tokens(model, 2, 40)
        assert_close(model(tokens), oracle(tokens).logits)
        moved = (model(tokens) - pair[1](tokens)).abs().max()
        assert moved > 1e-3

    @pytest.fixture(autouse=True)
    def few_queries_at_once(self, monkeypatch):
        """So that short texts are many pieces, and a ring is not much longer than its window."""
        monkeypatch.setattr(page, "QUERIES", 4)

    def test_every_parameter_is_trained(self, model):
        torch.manual_seed(0)  # of fresh weights, with which every expert is somebody's choice
        super().test_every_parameter_is_trained(model)

    def test_a_token_reads_its_active_experts_and_no_others(self, model):
        cache = model.new_cache(1, 9)
        model(random_tokens(model, 1, 8), cache=cache)
        used = set()
        hooks = [
            expert.register_forward_hook(lambda module, inputs, out: used.add(module))
            for layer in model.layers
            for expert in layer.ffn.experts
        ]
        model(random_tokens(model, 1, 1), torch.tensor([[8]]), cache)
        for hook in hooks:
            hook.remove()
        assert len(used) == len(model.layers) * model.config.num_active_experts

    # The cache, of which the windows' part is a ring --------------------------------------------------------

    def test_a_text_of_twenty_windows(self, model):
        """Written in chunks shorter and longer than the ring, in a cache whose windows do not grow."""
        length = 20 * WINDOW
        tokens, cache = random_tokens(model, 2, length), model.new_cache(2, length, num_undo=3)
        pieces, start = [model(tokens[:, :10], cache=cache)], 10
        for size in (1, 4, 2 * WINDOW, 1, 1, 40, 3, 1):
            positions = torch.arange(start, start + size).expand(2, -1)
            pieces.append(model(tokens[:, start : start + size], positions, cache))
            start += size
        assert_close(torch.cat(pieces, dim=1), model(tokens[:, :start]))
        slots = [layer.k.shape[2] for layer in cache]
        assert slots == [WINDOW + 4 + 1, length + 1, WINDOW + 4 + 1]

    def test_pads_are_not_kept(self, model):
        """Not where a token stands that is still seen: of a ring of 11 slots the last holds position 32."""
        tokens, cache = random_tokens(model, 1, 34), model.new_cache(1, 40)
        model(tokens[:, :33], cache=cache)
        model(tokens[:, :3], torch.full((1, 3), -1), cache)
        assert_close(model(tokens[:, 33:], torch.tensor([[33]]), cache), model(tokens)[:, 33:])

    def test_a_row_that_begins_where_the_ring_has_forgotten_is_refused(self, model):
        cache = model.new_cache(2, 40, num_undo=2)
        model(random_tokens(model, 2, 30), cache=cache)
        with pytest.raises(ValueError, match="larger num_undo"):
            model(random_tokens(model, 2, 1), torch.tensor([[25], [24]]), cache)
        with pytest.raises(ValueError, match="larger num_undo"):
            model(random_tokens(model, 2, 1), torch.tensor([[31], [30]]), cache)

    def test_speculation_at_twenty_windows_equals_plain(self, model):
        """Ragged prompts, and a drafter that is right about every other time."""
        prompts = [random_tokens(model, 1, n, seed=n)[0].tolist() for n in (3, 12, 25)]
        size = 20 * WINDOW - 25
        plain = [list(row) for row in zip(*generate(model, prompts, size))]
        drafter = copy.deepcopy(model)
        drafter.lm_head.weight += (
            0.3 * torch.randn_like(drafter.lm_head.weight) * drafter.lm_head.weight.std()
        )
        made, accepted = [[], [], []], []
        for round in speculate(model, ModelDrafter(drafter), prompts, size, num_draft_tokens=4):
            accepted += [n for n, drafts in zip(round.num_accepted, round.drafts) if drafts]
            for row, tokens in zip(made, round.tokens):
                row += tokens
        assert made == [[token for token in row if token is not None] for row in plain]
        assert 1 < sum(accepted) / len(accepted) < 3, "drafts are accepted, and rejected"


def test_parameter_counts():
    """As the model card's table 1 counts: all but the embedding among the active (3.61 B of 20.91 B)."""
    for name, total, active in [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)]:
        config = load_config(name)[1]
        model = build_model("gpt_oss", config)
        count = sum(p.numel() for p in model.parameters())
        expert = sum(p.numel() for p in model.layers[0].ffn.experts[0].parameters())
        idle = config.num_layers * (config.num_experts - config.num_active_experts) * expert
        assert round(count / 1e9, 2) == total
        assert round((count - idle - model.token_embed.weight.numel()) / 1e9, 2) == active


# As published -----------------------------------------------------------------------------------------------

# config.json of gpt-oss-20b, the sizes and the ids of two tokens made small.
PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 129,
    "experts_per_token": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "output_router_logits": False,
    "pad_token_id": 130,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 9,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 131,
}
SIZES = {"gate_up_proj": (6, 192, 2, 16), "down_proj": (6, 64, 3, 16)}  # blocks: (E, out, in / 32, 16)


@pytest.fixture(scope="module")
def published():
    """(the tensors of a checkpoint with MXFP4, the oracle with what transformers makes of these)."""
    fields = {name: value for name, value in PUBLISHED.items() if name != "quantization_config"}
    pages = {"experts_implementation": "eager", "attn_implementation": "eager"}
    oracle = redraw(GptOssForCausalLM(GptOssConfig(**fields, **pages)))
    state = {name: tensor.detach().bfloat16() for name, tensor in oracle.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(tuple(SIZES))]:
        shape = SIZES[name.rpartition(".")[2]]
        blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 127, shape[:3], generator=generator, dtype=torch.uint8)
        state[name] = convert_moe_packed_tensors(blocks, scales)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    oracle.load_state_dict({name: state[name] for name in oracle.state_dict()})
    return {name: state[name] for name in state if not name.endswith(tuple(SIZES))}, oracle


def write(folder, state, **fields):
    folder.mkdir(exist_ok=True)
    config = {name: value for name, value in {**PUBLISHED, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def test_mxfp4_as_published(published, tmp_path):
    """With all that the config switches on; the second oracle is OpenAI's gpt_oss/torch/weights.py, whose
    order of halves, scales and values is the one of transformers, as is attention of gpt_oss/torch/model.py.
    """
    state, oracle = published
    convert(write(tmp_path, state), progress=False)
    model = load_model(tmp_path, dtype=torch.float32, arranged=False)
    tokens = random_tokens(model, 2, 40)
    with torch.no_grad():
        logits = oracle(tokens).logits
        assert 0.5 < logits.std() < 2
        assert_close(model(tokens), logits)
    experts = model.layers[1].ffn.experts
    theirs = oracle.model.layers[1].mlp.experts
    for dtype in (torch.float32, torch.bfloat16):
        ours = torch.stack([expert.up_proj.dequantized(dtype) for expert in experts])
        assert torch.equal(ours, theirs.gate_up_proj[:, :, 1::2].mT.to(dtype))
        ours = torch.stack([expert.down_proj.dequantized(dtype) for expert in experts])
        assert torch.equal(ours, theirs.down_proj.mT.to(dtype))


def test_every_code_and_every_scale_is_dequantized_as_by_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).expand(1, -1, 255, -1)
    scales = torch.arange(255, dtype=torch.uint8).expand(1, 16, -1)
    for dtype in (torch.float32, torch.bfloat16):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T
        ours = dequantize_mxfp4(blocks[0].flatten(1), scales[0], dtype)
        assert torch.equal(ours, expected)


def test_mxfp4_back_is_the_same_to_the_bit(published, tmp_path):
    state, _ = published
    convert(write(tmp_path, state), progress=False)
    folder = reverse(tmp_path, progress=False)
    again = load_file(folder / "model.safetensors")
    assert again.keys() == state.keys()
    assert all(
        torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in state
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == PUBLISHED["quantization_config"]
    assert config["dtype"] == "bfloat16"


class FreshBytes(TorchDispatchMode):
    """Records the size of every tensor that takes memory of its own; what is mapped or a view takes none."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and not made.is_meta:
                self.sizes |= set() if made.untyped_storage().data_ptr() in known else {made.nbytes}
        return result


def test_a_conversion_never_holds_more_than_a_matrix_in_its_codes(published, tmp_path):
    write(tmp_path, published[0])
    with FreshBytes() as fresh:
        convert(tmp_path, progress=False)
    assert max(fresh.sizes) == 96 * 64 // 2, "the gate of one expert, taken out from between the rows of up"


def test_codes_keep_their_dtype(published, tmp_path):
    convert(write(tmp_path, published[0]), dtype=torch.float32, progress=False)
    files = load_file(tmp_path / "converted/model.safetensors")
    assert files["layers.0.ffn.experts.5.up_proj.weight"].dtype == torch.uint8
    assert files["layers.0.attn.q_proj.weight"].dtype == torch.float32


def test_the_kernel_multiplies_by_the_same_weights(published, tmp_path):
    """Tiles of MXFP4: what is off is the rounding of activations to 8 bits, half a percent."""
    if reason := load_kernel():
        pytest.skip(reason)
    linear = nn.Linear(96, 70)
    layer = MXFP4Linear(linear)
    generator = torch.Generator().manual_seed(0)
    layer.weight.copy_(torch.randint(256, layer.weight.shape, generator=generator, dtype=torch.uint8))
    layer.scale.copy_(torch.randint(110, 130, layer.scale.shape, generator=generator, dtype=torch.uint8))
    for rows in (1, 3, 40):
        x = torch.randn(rows, 96, generator=generator)
        out, exact = tiled(layer)(x), layer(x)
        assert (out - exact).norm() < 0.01 * exact.norm()
        plain = torch.ops.zoo.tiled_linear(x, tiled(layer).weight, 70, 4, True, None, True) + linear.bias
        assert torch.allclose(plain, out, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize(
    "change, fields, message",
    [
        ({"layers.2.mlp.experts.down_proj_scales": None}, {}, "down_proj_scales .* is missing"),
        ({"layers.2.mlp.experts.down_proj_blocks": None}, {}, "down_proj_blocks .* is missing"),
        (
            {"layers.2.mlp.experts.gate_up_proj_scales": torch.zeros(6, 192, 3, dtype=torch.uint8)},
            {},
            r"gate_up_proj_scales has shape \(6, 192, 3\), where the config asks for \(6, 192, 2\)",
        ),
        (
            {"layers.2.mlp.experts.gate_up_proj_scales": torch.full((6, 192, 2), 255, dtype=torch.uint8)},
            {},
            "gate_up_proj_scales: a scale is 255, which means NaN",
        ),
        (
            {"layers.2.mlp.experts.gate_up_proj_scales": torch.ones(6, 192, 2)},
            {},
            "gate_up_proj_scales is stored as torch.float32",
        ),
        (
            {"layers.2.mlp.experts.down_proj": torch.zeros(6, 96, 64)},
            {},
            r"down_proj \(6, 96, 64\) has no place in the model",
        ),
        ({}, {"quantization_config": None}, "blocks .* has no place in the model"),
        ({}, {"intermediate_size": 40}, "has 40 inputs, which are no whole blocks of MXFP4"),
    ],
)
def test_mxfp4_that_does_not_fit(published, tmp_path, change, fields, message):
    state = dict(published[0])
    for name, tensor in change.items():
        state.pop(f"model.{name}", None)
        state |= {} if tensor is None else {f"model.{name}": tensor}
    with pytest.raises(UserError) as error:
        convert(write(tmp_path, state, **fields), progress=False)
    assert re.search(message, "\n".join([str(error.value), *error.value.lines]))
    assert not (tmp_path / "converted").exists()


def test_mxfp4_is_not_quantized_once_more(published, tmp_path):
    write(tmp_path, published[0])
    with pytest.raises(UserError, match="is mxfp4 .* already, and stays so; leave out --quantize"):
        convert(tmp_path, quantization=Quantization("int8"), progress=False)


YARN_OF = PUBLISHED["rope_scaling"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is another than"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types is .* by turns"),
        ({"experts_per_token": 2}, "experts_per_token is 2, where other fields say 4"),
        ({"initial_context_length": 8192}, "initial_context_length is 8192, where other fields say 4096"),
        ({"num_experts_per_tok": 7, "experts_per_token": 7}, "num_experts_per_tok is 7, where there are 6"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"rope_scaling": {**YARN_OF, "truncate": True}}, "truncate is True; models/gpt_oss.py"),
        ({"rope_scaling": {**YARN_OF, "truncate": None}}, "truncate is True, as transformers takes it"),
        ({"rope_scaling": {**YARN_OF, "mscale": 1.0}}, "does not know mscale"),
        ({"rope_scaling": {**YARN_OF, "factor": None}}, "lacks factor"),
        ({"rope_scaling": {**YARN_OF, "factor": "8"}}, "factor is '8', where a number is expected"),
        ({"rope_scaling": {**YARN_OF, "rope_type": "linear"}}, "rope_type 'linear'; .* implements yarn"),
        ({"rope_scaling": {**YARN_OF, "beta_fast": 900.0}}, "implements from 0.0043 up to 651.9 turns"),
        ({"sliding_windows": 3}, "does not know sliding_windows"),
    ],
)
def test_fields_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        from_hf_config({**PUBLISHED, **fields})


def test_both_spellings_of_rope():
    new = {name: value for name, value in PUBLISHED.items() if name not in ("rope_scaling", "rope_theta")}
    expected = from_hf_config(PUBLISHED)
    assert from_hf_config({**new, "rope_parameters": {**YARN_OF, "rope_theta": 150000}}) == expected
    assert from_hf_config(new) == expected, "as transformers takes it where config.json is silent"


# The shape comments -----------------------------------------------------------------------------------------


def shape_configs(module):
    yield module.Config(
        vocab_size=41,
        max_seq_len=31,
        d_model=23,
        num_layers=2,
        num_heads=51,
        num_kv_heads=3,
        head_dim=38,
        window=6,
        d_expert=43,
        num_experts=29,
        num_active_experts=5,
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
        norm_eps=1e-5,
        rope_base=10_000.0,
        rope_scaling=module.RopeScaling(32.0, 64, 32.0, 1.0, 1.3),
    )


def run_windows(model, recorder, B, T, S, s, t):
    """Whole passes, a prompt into a cache, a token and then several behind it; s is a ring's or a text's."""
    tokens = torch.randint(model.config.vocab_size, (B, T))
    slots = {s, 101}

    def running(T, S):
        recorder.running(model.config, B=B, T=T, S=S, s=slots, t=B * T)

    running(T, {T})
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    cache = model.new_cache(B, 100)
    model(tokens, cache=cache)
    running(1, slots)
    model(tokens[:, :1], torch.full((B, 1), T), cache)
    running(T, slots)
    model(tokens, torch.arange(T + 1, 2 * T + 1).expand(B, T), cache)


SHAPES = Case(
    shape_configs,
    run_windows,
    {"B": 7, "T": 13, "S": 24, "s": 6 + page.QUERIES + 1, "t": 91},
    same={("B", "T")},  # t
)
