"""The proof of models/normed_decoder.py, a page of the test that adds pages (tests/test_strange_pages.py)."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from conversion.convert import convert
from models import build_model, load_config
from tests.decoder_proof import DecoderProof
from tests.shape_cases import Case, run_decoder


class TestNormedDecoder(DecoderProof):
    model_name = "normed_decoder"
    oracle_config, oracle_model = Qwen3Config, Qwen3ForCausalLM
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": False,
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
        "rope_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        "tied_head": {"tie_word_embeddings": True},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    def convert(self, folder):
        convert(folder, model="normed_decoder", progress=False)


def test_parameter_count():
    model = build_model(*load_config("normed-decoder"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 596_049_920  # Qwen3 0.6B


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    """With a head of its own and without."""
    for tied_head in False, True:
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
            tied_head=tied_head,
        )


SHAPES = Case(shape_configs, run_decoder, {"B": 7, "T": 11, "S": 13})
