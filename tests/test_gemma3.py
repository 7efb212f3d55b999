"""The proof of models/gemma3.py.

`transformers` is the oracle.
"""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from conversion.convert import convert
from conversion.tables import from_hf_config
from models import build_model, load_config, load_model
from models import gemma3 as page
from models.utils.errors import UserError
from runs_ar.generate import generate, prefill
from runs_ss.speculate import ModelDrafter, speculate
from tests import zoo
from tests.decoder_proof import DecoderProof, LargestResults, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw
from tests.shape_cases import Case

ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


def rope(kind, **fields):
    return {"rope_parameters": {**ROPE, kind: {**ROPE[kind], **fields}}}


class TestGemma3(DecoderProof):
    model_name = "gemma3"
    oracle_config, oracle_model = Gemma3TextConfig, Gemma3ForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "intermediate_size": 88,
        "rms_norm_eps": 1e-4,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "rope_parameters": ROPE,
        "query_pre_attn_scalar": 13,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 66},
        "num_layers": {"num_hidden_layers": 3},
        "num_heads": {"num_attention_heads": 12},
        "num_kv_heads": {"num_key_value_heads": 3},
        "head_dim": {"head_dim": 16},
        "d_ff": {"intermediate_size": 72},
        "norm_eps": {"rms_norm_eps": 0.1},
        "window": {"sliding_window": 7},
        "full_every": {"sliding_window_pattern": 4},
        "rope_base": rope("full_attention", rope_theta=100.0),
        "rope_factor": rope("full_attention", factor=5.0),
        "local_rope_base": rope("sliding_attention", rope_theta=30.0),
        "score_scale": {"query_pre_attn_scalar": 20},
    }
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}


# The shape comments -----------------------------------------------------------------------------------------


def shape_configs(module):
    for factor in (1.0, 2.0):
        yield module.Config(
            vocab_size=31,
            max_seq_len=37,
            d_model=17,
            num_layers=2,
            num_heads=15,
            num_kv_heads=5,
            head_dim=26,
            d_ff=41,
            norm_eps=1e-5,
            window=16,
            full_every=2,
            rope_base=10_000.0,
            rope_factor=factor,
            local_rope_base=100.0,
            score_scale=9,
        )


def run_windows(model, recorder, B, T, S, R):
    """As run_decoder, with caches of two sizes: a window's slots are fewer than the text's."""
    num_undo = R - model.config.window
    tokens = torch.randint(model.config.vocab_size, (B, T))
    positions = torch.arange(T).expand(B, T)

    # A window takes a text in two pieces, and the second one's queries have T - 1 keys.
    recorder.running(model.config, B=B, T=T, S=T - 1, R=R)
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    recorder.running(model.config, B=B, T=T, S={T - 1, R, S}, R=R)
    cache = model.new_cache(B, S, num_undo)
    model(tokens, cache=cache)
    recorder.running(model.config, B=B, T=1, S={R, S}, R=R)
    model(tokens[:, :1], T - torch.arange(B)[:, None] % 2, cache)
    recorder.running(model.config, B=B, T=T, S={R, S}, R=R)
    cache = model.new_cache(B, S, num_undo)
    model(tokens, positions, cache)
    model(tokens, positions + T, cache)


SHAPES = Case(shape_configs, run_windows, {"B": 19, "T": 23, "S": 59, "R": 29})
