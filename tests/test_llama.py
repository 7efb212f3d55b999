"""The proof of models/llama.py."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models import build_model, config_from_dict, create_model, load_config, transformer_lm
from models import llama as page
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw
from tests.shape_cases import Case, run_decoder

SCALING = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}


class TestLlama(DecoderProof):
    model_name = "llama"
    oracle_config, oracle_model = LlamaConfig, LlamaForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 66,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 88,
        "rms_norm_eps": 1e-4,
        "rope_parameters": SCALING,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 48},
        "num_layers": {"num_hidden_layers": 1},
        "num_heads": {"num_attention_heads": 22},
        "num_kv_heads": {"num_key_value_heads": 3},
        "head_dim": {"head_dim": 16},
        "d_ff": {"intermediate_size": 72},
        "norm_eps": {"rms_norm_eps": 0.1},
        "rope_base": {"rope_parameters": {**SCALING, "rope_theta": 50.0}},
        "rope_scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "qkv_bias": {"attention_bias": False},
        "o_bias": {"attention_bias": False},
        "ffn_bias": {"mlp_bias": False},
        "tied_head": {"tie_word_embeddings": True},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    @pytest.mark.parametrize(
        "field, value",
        [
            ("factor", 9.0),
            ("low_freq_factor", 0.5),
            ("high_freq_factor", 6.0),
            ("original_max_position_embeddings", 60),
        ],
    )
    def test_every_field_of_rope_scaling(self, pair, tmp_path, field, value):
        oracle = self.oracle(rope_parameters={**SCALING, field: value})
        model = self.zoo(oracle, tmp_path)
        tokens = random_tokens(model, 2, 40)
        assert_close(model(tokens), oracle(tokens).logits)
        moved = (model(tokens) - pair[1](tokens)).abs().max()
        assert moved > 1e-3

    def test_the_base_config_meets_all_three_kinds_of_frequencies(self, model):
        """Some pairs keep their frequency, some are slowed in full, some lie between."""
        scaled = page.rope_frequencies(model.config, "cpu")
        plain = page.rope_frequencies(config_without_scaling(model.config), "cpu")
        ratio = plain / scaled
        assert (ratio == 1).any() and (ratio == 4).any() and ((ratio > 1.01) & (ratio < 3.99)).any()

    def test_qwen2_has_biases_on_q_k_and_v_alone(self, tmp_path):
        names = ("attention_bias", "mlp_bias", "rope_parameters")
        fields = {name: value for name, value in self.base.items() if name not in names}
        oracle = redraw(Qwen2ForCausalLM(Qwen2Config(**fields, attn_implementation="eager")))
        model = self.zoo(oracle, tmp_path)
        assert model.config.qkv_bias and not model.config.o_bias
        tokens = random_tokens(model, 2, 20)
        assert_close(model(tokens), oracle(tokens).logits)

    def test_attention_is_the_four_lines_of_its_docstring(self, model, monkeypatch):
        tokens = random_tokens(model, 2, 20)
        positions = torch.arange(12, 20).expand(2, -1)

        def logits():
            cache = model.new_cache(2, 23)
            return model(tokens[:, :12], cache=cache), model(tokens[:, 12:], positions, cache)

        def four_lines(q, k, v, mask, is_causal, enable_gqa):
            H, K, d, T = q.shape[1], k.shape[1], q.shape[3], q.shape[2]
            if is_causal:
                mask = torch.ones(T, T, dtype=torch.bool).tril()
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
            scores = (q @ k.mT / math.sqrt(d)).masked_fill(~mask, -math.inf)
            probs = scores.softmax(dim=-1)
            return probs @ v

        expected = logits()
        monkeypatch.setattr(page.F, "scaled_dot_product_attention", four_lines)
        for actual, wanted in zip(logits(), expected, strict=True):
            assert_close(actual, wanted)

    def test_the_docstring_says_these_lines(self):
        for line in (
            "k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)",
            "scores = (q @ k.mT / math.sqrt(d)).masked_fill(~mask, -math.inf)",
            "probs = scores.softmax(dim=-1)",
            "out = probs @ v",
        ):
            assert line in page.Attention.__doc__

    def test_a_long_prompt_makes_no_prompt_by_prompt_mask(self, model):
        from tests.decoder_proof import LargestResults

        T = 211
        with LargestResults() as results:
            model.hidden(random_tokens(model, 1, T), cache=model.new_cache(1, T))
        assert not [shape for shape in results.fresh_shapes if shape.count(T) > 1]

    def test_angles_are_exact_in_bf16_too(self, model):
        positions = torch.tensor([[0, 255, 256, 257, 100_001]])
        cos, sin = page.rope(positions, model.config)
        assert cos.dtype == sin.dtype == torch.float32
        assert (cos[0, 0, 2] != cos[0, 0, 3]).all()
        half = build_model("llama", model.config, device="cpu").bfloat16()
        half.load_state_dict(model.state_dict())
        tokens = random_tokens(model, 1, 5)
        assert half(tokens).dtype == torch.bfloat16
        agreement = torch.nn.functional.cosine_similarity(half(tokens).float(), model(tokens), dim=-1)
        assert agreement.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [page, transformer_lm], ids=["llama", "transformer_lm"])
def test_the_norm_is_the_oracles_to_the_bit(page, dtype):
    """It divides in fp32, rounds to the dtype of x, and is multiplied by the weight then."""
    ours, theirs = page.RMSNorm(70, 1e-5), LlamaRMSNorm(70, 1e-5)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator).to(dtype) for size in (70, (50, 70)))
    for norm in ours, theirs:
        norm.weight.data = weight
    assert torch.equal(ours(4 * x), theirs(4 * x)) and ours(x).dtype == dtype


def config_without_scaling(config):
    return page.Config(**{**vars(config), "rope_scaling": None})


# Counts as published, or as `transformers` counts the published config.json.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = build_model(*load_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_fresh_weights():
    model = create_model(
        "smollm2-135m", num_layers=2, vocab_size=300, d_model=300, tied_head=False, qkv_bias=True
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name


def test_a_config_that_cannot_be():
    fields = vars(load_config("smollm2-135m")[1])
    with pytest.raises(Exception, match="num_kv_heads must divide num_heads"):
        config_from_dict({"model": "llama", **fields, "num_kv_heads": 4}, "here")
    with pytest.raises(Exception, match="head_dim must be even"):
        config_from_dict({"model": "llama", **fields, "head_dim": 63}, "here")


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
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


SHAPES = Case(shape_configs, run_decoder, {"B": 7, "T": 11, "S": 13})
