"""The proof of models/qwen3.py."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from conversion.tables.qwen3 import natural_scale
from models import build_model, load_config
from models import qwen3 as page
from models.utils.errors import UserError
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.shape_cases import Case, run_decoder

# As the model card says to switch it on, with sizes at which some pairs are fast, some slow, some between.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 60,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}


class TestQwen3(DecoderProof):
    model_name = "qwen3"
    oracle_config, oracle_model = Qwen3Config, Qwen3ForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 66,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "intermediate_size": 88,
        "rms_norm_eps": 1e-4,
        "rope_parameters": YARN,
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
        "rope_base": {"rope_parameters": {**YARN, "rope_theta": 50.0}},
        "rope_scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "tied_head": {"tie_word_embeddings": True},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}

    @pytest.mark.parametrize(
        "field, value",
        [
            ("factor", 9.0),
            ("beta_fast", 12.0),
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

    def test_yarn_with_one_pair_at_both_ends(self, tmp_path):
        """beta_fast and beta_slow alike: the line from fast to slow is a step."""
        oracle = self.oracle(rope_parameters={**YARN, "beta_fast": 9.6, "beta_slow": 9.6})
        model = self.zoo(oracle, tmp_path)
        tokens = random_tokens(model, 2, 40)
        assert_close(model(tokens), oracle(tokens).logits)

    def test_a_factor_of_one_scales_nothing(self, tmp_path):
        oracle = self.oracle(rope_parameters={**YARN, "factor": 0.8})
        model = self.zoo(oracle, tmp_path)
        tokens = random_tokens(model, 2, 40)
        assert_close(model(tokens), oracle(tokens).logits)

    def test_the_base_config_meets_all_three_kinds_of_pairs(self, model):
        ratio = plain_frequencies(model.config) / page.rope_frequencies(model.config, "cpu")
        assert (ratio == 1).any() and (ratio == 4).any() and ((ratio > 1.01) & (ratio < 3.99)).any()

    def test_other_scalings_are_refused_by_name(self, tmp_path):
        for change, message in [
            ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "rope_type 'llama3'"),
            ({"mscale": 1.0}, "mscale"),
            ({"truncate": False}, "truncate is False"),
            ({"factor": None}, "lacks factor"),
        ]:
            oracle = self.oracle(rope_parameters={**YARN, **change})
            with pytest.raises(UserError, match=message):
                self.zoo(oracle, tmp_path)


def plain_frequencies(config):
    exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
    return 1 / config.rope_base**exponent


def test_the_numbers_of_the_docstring():
    """YaRN for 131,072 tokens, as the model card has it, on the published sizes."""
    config = load_config("qwen3-0.6b")[1]
    scaling = page.RopeScaling(4.0, 32768, 32.0, 1.0, natural_scale(4.0))
    config = page.Config(**{**vars(config), "rope_scaling": scaling})
    assert round(page.pair_that_turns(32.0, config), 1) == 23.6
    assert round(page.pair_that_turns(1.0, config), 1) == 39.7
    assert 2 * config.num_layers * config.num_kv_heads * config.head_dim == 57_344


@pytest.mark.parametrize(
    "name, billions",
    [("0.6b", 0.596), ("1.7b", 1.72), ("4b", 4.02), ("8b", 8.19), ("14b", 14.77), ("32b", 32.76)],
)
def test_parameter_counts(name, billions):
    """As the safetensors of the published checkpoints sum up, to the last figure that is given."""
    model = build_model(*load_config(f"qwen3-{name}"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


# The shape comments -----------------------------------------------------------------------------------------


def shape_configs(module):
    for on in (False, True):
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
            rope_scaling=module.RopeScaling(4.0, 64, 32.0, 1.0, 1.1) if on else None,
            tied_head=on,
        )


SHAPES = Case(shape_configs, run_decoder, {"B": 7, "T": 11, "S": 13})
