"""The proof of models/gpt2.py."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models import build_model, create_model, load_config
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.shape_cases import Case, run_decoder


def dropout(p):
    return {"resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": p}


class TestGPT2(DecoderProof):
    model_name = "gpt2"
    oracle_config, oracle_model = GPT2Config, GPT2LMHeadModel
    base = {
        "vocab_size": 101,
        "n_positions": 64,
        "n_embd": 60,
        "n_layer": 3,
        "n_head": 6,
        "n_inner": 88,
        "layer_norm_epsilon": 1e-4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **dropout(0.2),
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"n_positions": 50},
        "d_model": {"n_embd": 48},
        "num_layers": {"n_layer": 1},
        "num_heads": {"n_head": 5},
        "d_ff": {"n_inner": None},
        "norm_eps": {"layer_norm_epsilon": 0.1},
        "dropout": dropout(0.0),
    }
    no_effect = {"dropout": "acts in training only, where test_dropout compares it with the oracle"}

    def test_dropout_stands_where_the_oracle_has_it(self, pair):
        """In training mode the same seed drops the same features, since both draw in the same order."""
        oracle, model = pair
        tokens = random_tokens(model, 2, 20)
        try:
            oracle.train(), model.train()
            torch.manual_seed(7)
            expected = oracle(tokens).logits
            torch.manual_seed(7)
            actual = model(tokens)
        finally:
            oracle.eval(), model.eval()
        assert_close(actual, expected)
        assert not torch.allclose(actual, model(tokens), atol=0.1)

    def test_positions_end_with_the_table(self, model):
        with pytest.raises(ValueError, match="65 tokens are more than the 64 of the position table"):
            model(random_tokens(model, 1, 65))


# Radford et al. 2019 give 117M, 345M, 762M, 1542M; these are the counts of the released weights.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = build_model(*load_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_fresh_weights():
    model = create_model("gpt2", num_layers=8, vocab_size=300, d_model=300)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03), name
        else:
            assert parameter.std().item() == pytest.approx(0.01 if "pos" in name else 0.02, rel=0.03), name


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    yield module.Config(
        vocab_size=40,
        max_seq_len=26,
        d_model=15,
        num_layers=2,
        num_heads=3,
        d_ff=17,
        norm_eps=1e-5,
        dropout=0.1,
    )


SHAPES = Case(shape_configs, run_decoder, {"B": 7, "T": 11, "S": 19, "d": 5}, same={("H", "d")})
