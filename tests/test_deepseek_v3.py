"""The proof of models/deepseek_v3.py."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from models import build_model, load_config, load_model
from models import deepseek_v3 as page
from models.utils.errors import UserError
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw, weight_std
from tests.shape_cases import Case, run_decoder

# As published, with sizes at which some pairs are fast, some slow, some between.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 40.0,
    "original_max_position_embeddings": 60,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


# The softmax is DeepSeek-V2's, which transformers has as a model of its own.
V2 = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False}


class MlaProof(DecoderProof):
    model_name = "deepseek_v3"
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}
    idle = {**DecoderProof.idle, "router_bias": "training moves it by what it counts, not by a gradient"}

    def oracle(self, **changes):
        kinds = self.oracle_config, self.oracle_model
        if changes == V2:
            kinds = DeepseekV2Config, DeepseekV2ForCausalLM
        config = kinds[0](**{**self.base, **changes}, attn_implementation="eager")
        oracle = kinds[1](config)
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
        return redraw(oracle)

    def zoo(self, oracle, folder):
        """transformers saves no layer that looks ahead; it stands in published files, and is added here."""
        oracle.save_pretrained(folder)
        if getattr(oracle.config, "num_mtp_layers", 0):
            path = folder / "model.safetensors"
            save_file(
                {**load_file(path), **ahead_tensors(oracle, ahead_oracle(oracle))}, path, {"format": "pt"}
            )
        self.convert(folder)
        return load_model(folder)


def ahead_oracle(oracle):
    """transformers' own module for multi-token prediction on top of a model, redrawn."""
    ahead = MtpModel(oracle, 1).eval()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in ahead.layers.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        matrix = tensor.dim() > 1
        tensor.copy_(noise * weight_std(name, tensor) if matrix else 0.3 * noise + ("norm" in name))
    return ahead


def ahead_tensors(oracle, ahead):
    """Its tensors under the names of published files, which also repeat the embedding and the head."""
    end, tensors = f"model.layers.{oracle.config.num_hidden_layers}", {}
    for name, tensor in ahead.state_dict().items():
        name = name.removeprefix("layers.0.").removeprefix("mtp_block.")
        name = name.replace("post_norm", "shared_head.norm").replace(
            "shared_head.weight", "shared_head.head.weight"
        )
        parts = {name: tensor}
        if name.startswith("mlp.experts."):
            kinds = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
            parts = {
                f"mlp.experts.{e}.{kind}.weight": part
                for e, expert in enumerate(tensor)
                for kind, part in zip(kinds, expert.chunk(len(kinds)))
            }
        tensors |= {f"{end}.{name}": part.clone() for name, part in parts.items()}
    return tensors


class TestDeepseekV3(MlaProof):
    oracle_config, oracle_model = DeepseekV3Config, DeepseekV3ForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 66,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "q_lora_rank": 28,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 20,
        "v_head_dim": 8,
        "intermediate_size": 88,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-4,
        "rope_parameters": YARN,
        "num_nextn_predict_layers": 0,
        "experts_implementation": "eager",
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 48},
        "num_layers": {"num_hidden_layers": 3},
        "num_heads": {"num_attention_heads": 5, "num_key_value_heads": 5},
        "d_query": {"q_lora_rank": None},
        "d_latent": {"kv_lora_rank": 18},
        "head_dim": {"qk_nope_head_dim": 14},
        "rotary_dim": {"qk_rope_head_dim": 12},
        "value_dim": {"v_head_dim": 9},
        "d_ff": {"intermediate_size": 72},
        "d_expert": {"moe_intermediate_size": 40},
        "num_experts": {"n_routed_experts": 12},
        "num_active_experts": {"num_experts_per_tok": 2},
        "num_shared_experts": {"n_shared_experts": 1},
        "num_groups": {"n_group": 2},
        "num_active_groups": {"topk_group": 3},
        "sigmoid_scores": V2,
        "normalize_weights": {"norm_topk_prob": False},
        "weight_scale": {"routed_scaling_factor": 1.5},
        "dense_layers": {"first_k_dense_replace": 0},
        "multi_token": {"num_nextn_predict_layers": 1},
        "norm_eps": {"rms_norm_eps": 0.1},
        "rope_base": {"rope_parameters": {**YARN, "rope_theta": 50.0}},
        "rope_scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "tied_head": {"tie_word_embeddings": True},
    }

    # Multi-token prediction ---------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    def three(self, tmp_path_factory):
        """(the oracle, its layer ahead, our model with both)."""
        oracle = self.oracle(num_nextn_predict_layers=1)
        return oracle, ahead_oracle(oracle), self.zoo(oracle, tmp_path_factory.mktemp("ahead") / "base")

    def test_the_layer_ahead_equals_the_oracle(self, three):
        """That one turns by the positions of the tokens, ours by those of the states: RoPE sees distances."""
        oracle, ahead, model = three
        tokens = random_tokens(model, 2, 30)
        hidden = oracle.model(tokens[:, :-1]).last_hidden_state
        positions = torch.arange(1, 30).expand(2, -1)
        cache = MtpCache(config=oracle.config.get_mtp_config())
        expected = ahead.forward_layer(0, hidden, positions, cache, input_ids=tokens[:, 1:])
        assert_close(model.lm_head(model.hidden_ahead(hidden, tokens[:, 1:])), oracle.lm_head(expected))


class TestDeepseekV2Lite(MlaProof):
    """Softmax, no groups, queries straight from x, mscale 0.707; the fields are proved above."""

    oracle_config, oracle_model = DeepseekV2Config, DeepseekV2ForCausalLM
    base = {
        **TestDeepseekV3.base,
        **V2,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    }
    test_every_field_has_a_change = None


class TestYoutu(MlaProof):
    """No experts, no YaRN, a tied head; the fields are proved above."""

    oracle_config, oracle_model = YoutuConfig, YoutuForCausalLM
    base = {
        **{
            name: TestDeepseekV3.base[name]
            for name in (
                *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"),
                *("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank"),
                *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "rms_norm_eps"),
            )
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    test_every_field_has_a_change = None
