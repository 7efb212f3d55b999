"""The proof of models/routed_decoder.py, a page of the test that adds pages (tests/test_strange_pages.py)."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from conversion.convert import convert
from models import build_model, load_config
from tests.decoder_proof import DecoderProof, random_tokens
from tests.shape_cases import Case, run_experts


class TestRoutedDecoder(DecoderProof):
    model_name = "routed_decoder"
    oracle_config, oracle_model = MixtralConfig, MixtralForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 66,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 44,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
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
        "d_ff": {"intermediate_size": 72},
        "num_experts": {"num_local_experts": 4},
        "num_active_experts": {"num_experts_per_tok": 3},
        "norm_eps": {"rms_norm_eps": 0.1},
        "rope_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    def convert(self, folder):
        convert(folder, model="routed_decoder", progress=False)

    def test_a_token_reads_its_active_experts_and_no_others(self, model):
        """The weights of an expert that the router left out may be anything."""
        cache = model.new_cache(1, 9)
        model(random_tokens(model, 1, 8), cache=cache)
        token, position = random_tokens(model, 1, 1), torch.tensor([[8]])
        used = set()
        hooks = [
            expert.register_forward_hook(lambda module, inputs, out: used.add(module) if len(out) else None)
            for layer in model.layers
            for expert in layer.ffn.experts
        ]
        model(token, position, cache)
        for hook in hooks:
            hook.remove()
        assert len(used) == len(model.layers) * model.config.num_active_experts


def test_parameter_count():
    model = build_model(*load_config("routed-decoder"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 46_702_792_704  # Mixtral 8x7B


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    yield module.Config(
        vocab_size=41,
        max_seq_len=31,
        d_model=23,
        num_layers=2,
        num_heads=33,
        num_kv_heads=3,
        head_dim=26,
        d_ff=43,
        num_experts=19,
        num_active_experts=5,
        norm_eps=1e-5,
        rope_base=10_000.0,
    )


SHAPES = Case(
    shape_configs,
    run_experts,
    {"B": 7, "T": 17, "S": 29, "t": 119, "e": 19},
    same={("B", "T")},  # t
    true_too={("(B, T) or None", "(t, T) or None")},  # forward meets positions with T = 1 alone
    by_data={"e"},
)
