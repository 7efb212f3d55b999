"""The proof of models/deepseek_v3.py."""

import copy
import functools
import json
import math
import re
from pathlib import Path

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

from conversion.convert import convert, reverse
from models import build_model, load_config, load_model
from models import deepseek_v3 as page
from models.utils.errors import UserError
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw, weight_std
from tests.shape_cases import Case, WithExperts, run_experts

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
        return self.oracle_of(kinds[0](**{**self.base, **changes}), kinds[1])

    def oracle_of(self, config, kind=DeepseekV3ForCausalLM):
        config._attn_implementation = "eager"
        oracle = kind(config)
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

    @pytest.mark.parametrize(
        "field, value",
        [
            ("factor", 9.0),
            ("beta_fast", 12.0),
            ("beta_slow", 0.2),
            ("original_max_position_embeddings", 200),
            ("attention_factor", 1.5),
            ("mscale", 1.5),
            ("mscale_all_dim", 0.5),
            ("mscale_all_dim", 0.0),
        ],
    )
    def test_every_field_of_yarn(self, pair, tmp_path, field, value):
        oracle = self.oracle(rope_parameters={**YARN, field: value})
        model = self.zoo(oracle, tmp_path)
        tokens = random_tokens(model, 2, 40)
        assert_close(model(tokens), oracle(tokens).logits)
        moved = (model(tokens) - pair[1](tokens)).abs().max()
        assert moved > 1e-3

    def test_the_base_config_meets_all_three_kinds_of_pairs(self, model):
        exponent = torch.arange(0, 20, 2) / 20
        ratio = 1 / 100**exponent / page.rope_frequencies(model.config, "cpu")
        assert (ratio == 1).any() and (ratio == 40).any() and ((ratio > 1.01) & (ratio < 39.9)).any()

    def test_the_bias_chooses_and_does_not_weigh(self, model):
        """Another bias for all experts alike changes nothing, one for a single expert the choice alone."""
        experts, tokens = copy.deepcopy(model.layers[1].ffn), torch.randn(50, 66)
        weights, chosen = experts.route(tokens)
        experts.router_bias += 0.25
        assert all(map(torch.equal, experts.route(tokens), (weights, chosen)))
        experts.router_bias[3] += 10
        assert (experts.route(tokens)[1] == 3).any(dim=1).all() and not (chosen == 3).any(dim=1).all()
        assert experts.route(tokens)[0].sum(dim=1).allclose(torch.tensor(2.5))

    # Latent attention ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("num_queries", [1, 7])
    def test_the_two_forms_are_equal(self, model, num_queries):
        """Expanded and absorbed, for the same queries and the same cache, of which a mask hides a part."""
        attn, config = model.layers[0].attn, model.config
        torch.manual_seed(0)
        q = torch.randn(3, config.num_heads, num_queries, config.head_dim)
        q_rope = torch.randn(3, config.num_heads, num_queries, config.rotary_dim)
        latent = torch.randn(3, 1, 19, config.d_latent + config.rotary_dim)
        positions = torch.tensor([[0], [4], [11]]) + torch.arange(num_queries)
        inputs = q, q_rope, latent, page.causal_mask(positions, 19)
        assert_close(attn.absorbed(*inputs), attn.expanded(*inputs))

    def test_steps_are_absorbed_and_prompts_expanded(self, model, monkeypatch):
        """Behind what is cached as well: 24 (10 + 8) / (2 * 24 - 10 - 8) = 14.4 queries break even."""
        called = []
        for form in ("absorbed", "expanded"):
            whole = getattr(page.Attention, form)

            def noted(*inputs, form=form, whole=whole):
                called.append(form)
                return whole(*inputs)

            monkeypatch.setattr(page.Attention, form, noted)
        tokens, cache, forms = random_tokens(model, 1, 50), model.new_cache(1, 50), []
        for start, end in [(0, 3), (3, 4), (4, 18), (18, 33)]:
            model(tokens[:, start:end], torch.arange(start, end)[None] if start else None, cache)
            forms.append(called[-1])
        assert forms == ["expanded", "absorbed", "absorbed", "expanded"]

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

    def test_the_layer_ahead_equals_the_formula(self, three):
        """The report's equations 21 to 23, with the norms by their definition."""
        model, config = three[2], three[2].config
        tokens = random_tokens(model, 2, 30)
        hidden, ahead = model.hidden(tokens[:, :-1]), model.ahead

        def norm(x, weight):
            return weight * x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()

        follower = model.token_embed.weight[tokens[:, 1:]]
        joined = norm(follower, ahead.token_norm.weight), norm(hidden, ahead.hidden_norm.weight)
        x = torch.cat(joined, dim=-1) @ ahead.join_proj.weight.T
        positions = torch.arange(29).expand(2, -1)
        x = ahead.layer(x, page.rope(positions, config), None, positions, None)
        assert_close(model.hidden_ahead(hidden, tokens[:, 1:]), norm(x, ahead.final_norm.weight))

    def test_the_layer_ahead_with_a_cache(self, three):
        """A prompt, a few tokens at given places, then one: as in a single pass."""
        model = three[2]
        tokens = random_tokens(model, 2, 30)
        hidden, followers = model.hidden(tokens[:, :-1]), tokens[:, 1:]
        cache, pieces = model.new_layer_cache(2, 40), []
        for start, end in [(0, 10), (10, 14), (14, 15), (15, 29)]:
            positions = torch.arange(start, end).expand(2, -1) if start else None
            pieces.append(model.hidden_ahead(hidden[:, start:end], followers[:, start:end], positions, cache))
        assert_close(torch.cat(pieces, dim=1), model.hidden_ahead(hidden, followers))
        with pytest.raises(ValueError, match="give the cache too"):
            model.hidden_ahead(hidden, followers, torch.arange(29).expand(2, -1))

    def test_the_layer_ahead_goes_back_to_the_same_bits(self, three, tmp_path):
        """But for the embedding and the head, which published files repeat beside it."""
        self.zoo(three[0], tmp_path)
        before = load_file(tmp_path / "model.safetensors")
        after = load_file(reverse(tmp_path, progress=False) / "model.safetensors")
        repeated = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
        assert before.keys() - after.keys() == repeated and after.keys() <= before.keys()
        assert all(torch.equal(before[name], after[name]) for name in after)
        assert (
            json.loads((tmp_path / "reversed" / "config.json").read_text())["num_nextn_predict_layers"] == 1
        )

    def test_a_file_without_the_layer_that_its_config_names(self, tmp_path):
        """As transformers saves it."""
        oracle = self.oracle(num_nextn_predict_layers=1)
        oracle.save_pretrained(tmp_path)
        convert(tmp_path, progress=False)
        assert not load_model(tmp_path).config.multi_token

    # Bad input ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"rope_parameters": {**YARN, "rope_type": "linear"}}, "rope_type 'linear'"),
            ({"rope_parameters": {**YARN, "low_freq_factor": 1.0}}, "low_freq_factor"),
            ({"rope_parameters": {**YARN, "truncate": False}}, "truncate is False"),
            ({"rope_parameters": {**YARN, "mscale": "1"}}, "mscale is '1', where a number"),
            ({"rope_parameters": {**YARN, "factor": None}}, "lacks factor"),
            ({"num_key_value_heads": 3}, "num_key_value_heads is 3, num_attention_heads 6"),
            ({"topk_method": "greedy"}, "topk_method is 'greedy'.*implements 'noaux_tc'"),
            ({"scoring_func": "softmax"}, "scoring_func is 'softmax'.*implements 'sigmoid'"),
            ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
            ({"rope_interleave": False}, "rope_interleave is False"),
            ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
            ({"attention_bias": True}, "attention_bias is True"),
            ({"topk_group": 5}, "num_active_groups exceeds num_groups"),
            ({"n_group": 8, "topk_group": 5}, "a group has one expert"),
            ({"n_group": 3}, "num_groups must divide num_experts"),
            ({"num_experts_per_tok": 5}, "num_active_experts exceeds the experts of num_active"),
            ({"v_head_dim": 40}, "value_dim exceeds head_dim"),
            ({"qk_rope_head_dim": 7}, "rotary_dim must be even"),
            ({"index_topk": 2048}, "does not know index_topk"),
            ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
            ({"model_type": "deepseek_v2"} | V2 | {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ],
        ids=str,
    )
    def test_what_the_page_does_not_do_is_refused_by_name(self, pair, tmp_path, change, message):
        pair[0].save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message) as error:
            convert(tmp_path, progress=False)
        assert "\n" not in str(error.value)

    def test_experts_that_do_not_fit(self, pair, tmp_path):
        """One missing, one too many, one with another shape: each by its name."""
        pair[0].save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        tensors[name.format(8)] = tensors.pop(name.format(7))
        tensors[name.format(2)] = tensors[name.format(2)][:, :-1].clone()
        save_file(tensors, path)
        with pytest.raises(UserError, match="3 problems") as error:
            convert(tmp_path, progress=False)
        for number, what in [(7, "is missing"), (8, "has no place"), (2, "has shape")]:
            name = r"experts\.{e}\.down_proj.weight"
            assert re.search(rf"{name} .*{what}.*n = 1, e = {number}", str(error.value))


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


class TestDeepseekV2(MlaProof):
    """Softmax and groups, of which the best expert counts; the fields are proved above."""

    oracle_config, oracle_model = DeepseekV2Config, DeepseekV2ForCausalLM
    base = {
        **TestDeepseekV2Lite.base,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 28,
        "routed_scaling_factor": 1.6,
    }
    test_every_field_has_a_change = None

    def test_the_groups_matter(self, pair, tmp_path):
        """Experts of other groups would often be chosen, and so would groups by their two best."""
        pair[0].save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        tokens = random_tokens(pair[1], 2, 40)
        for change in ({"topk_method": "greedy"}, {"topk_group": 3}, {"n_group": 2, "topk_group": 1}):
            (tmp_path / "config.json").write_text(json.dumps(config | change))
            convert(tmp_path, progress=False)
            assert (load_model(tmp_path)(tokens) - pair[1](tokens)).abs().max() > 1e-2
        experts = pair[1].layers[1].ffn
        ranks = torch.rand(200, 4, 2)
        differing = page.best_groups(ranks, 2, 1) != page.best_groups(ranks, 2, 2)
        assert differing.any() and experts.config.num_groups == 4


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


# As published -----------------------------------------------------------------------------------------------

# DeepSeek-V3's config.json, but for its sizes and for its weights in fp8.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kv_lora_rank": 24,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 20,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 8,
    "vocab_size": 101,
}


@torch.no_grad()
def test_the_published_config(tmp_path):
    """Its old spelling of YaRN and all that it switches on, and the fields that transformers never reads."""
    theirs = {name: value for name, value in PUBLISHED.items() if name != "auto_map"}
    oracle = TestDeepseekV3().oracle_of(DeepseekV3Config(**theirs, experts_implementation="eager"))
    oracle.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    convert(tmp_path, progress=False)
    model, tokens = load_model(tmp_path), torch.arange(90)[None]
    assert_close(model(tokens), oracle(tokens).logits)
    assert model.config.rope_scaling == load_config("deepseek-v3")[1].rope_scaling


@functools.cache
def published(name):
    return build_model(*load_config(name))


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("deepseek-v3", 671.03, 36.63),
        ("deepseek-v2", 235.74, 20.85),
        ("deepseek-v2-lite", 15.71, 2.45),
        ("youtu-llm-2b", 1.96, 1.96),
    ],
)
def test_parameter_counts(name, total, active):
    """As published, without the layer ahead: 671 B with 36.6 B for a token (a row of the embedding aside),
    236 B with 21, 15.7 B with 2.4, 1.96 B.
    """
    model, config = published(name), published(name).config
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith("ahead.")
    }
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (config.num_experts - config.num_active_experts) // config.num_experts
    read = sum(sizes.values()) - idle - sizes["token_embed.weight"] * (not config.tied_head)
    assert [round(count / 1e9, 2) for count in (sum(sizes.values()), read)] == [total, active]


def test_the_layer_ahead_of_the_published_model():
    """README_WEIGHTS.md of the published files says 11.5 B of its own; README.md says 14 B and 685 B in all,
    since the files repeat the embedding and the head for it.
    """
    model = published("deepseek-v3")
    ahead, every = (sum(p.numel() for p in module.parameters()) for module in (model.ahead, model))
    repeated = model.token_embed.weight.numel() + model.lm_head.weight.numel()
    assert ahead == 11_610_068_224
    assert every == 671_026_419_200 + ahead
    assert round((every + repeated) / 1e9, 1) == 684.5


def test_the_numbers_of_the_docstrings():
    config = load_config("deepseek-v3")[1]
    H, d, R, v, r = 128, 128, 64, 128, 512
    assert (config.num_heads, config.head_dim, config.rotary_dim, config.value_dim, config.d_latent) == (
        H,
        d,
        R,
        v,
        r,
    )
    assert r + R == 576 and 2 * H * d == 32_768 and 2 * 8 * d == 2_048
    assert int(r * (d + v) / (2 * r - d - v)) == 170
    sharper = page.score_scale(config) * math.sqrt(d + R)
    assert round(sharper, 2) == 1.87


def test_the_cache_at_its_published_size():
    """576 numbers a token and layer, and no more."""
    cache = published("deepseek-v3").new_cache(2, 10)
    assert len(cache) == 61 and sum(part.latent.numel() for part in cache) == 2 * 10 * 61 * 576


def test_the_table_of_caches():
    """models/README.md, of which the last line is what the model really allocates."""
    layers, full, shared = published("deepseek-v3").config.num_layers, 2 * 128 * 128, 2 * 8 * 128
    windowed = layers - layers // 6
    in_windows = (layers - windowed) * shared + windowed * shared * 1024 // 32_768
    latent = sum(part.latent.nbytes for part in published("deepseek-v3").bfloat16().new_cache(1, 1))
    expected = [2 * layers * full, 2 * layers * shared, 2 * in_windows, latent]
    text = (Path(__file__).parent.parent / "models" / "README.md").read_text(encoding="utf-8")
    section = text.split("## What a token costs in the cache")[1].split("\n## ")[0]
    assert re.findall(r"\| ([\d,]+) \|$", section, re.M) == [f"{count:,}" for count in expected]


# The shape comments -----------------------------------------------------------------------------------------


def shape_configs(module):
    for on in (False, True):
        yield module.Config(
            vocab_size=67,
            max_seq_len=71,
            d_model=47,
            num_layers=2,
            num_heads=37,
            d_query=53 if on else None,
            d_latent=73,
            head_dim=11,
            rotary_dim=38,
            value_dim=13,
            d_ff=83,
            d_expert=43,
            num_experts=48,
            num_active_experts=9,
            num_shared_experts=1,
            num_groups=6,
            num_active_groups=5,
            sigmoid_scores=on,
            normalize_weights=on,
            weight_scale=2.5,
            dense_layers=(0,) if on else (0, 1),
            multi_token=on,
            norm_eps=1e-5,
            rope_base=10_000.0,
            rope_scaling=module.RopeScaling(4.0, 64, 32.0, 1.0, 1.1, 0.7) if on else None,
            tied_head=on,
        )


def run_shapes(model, recorder, B, T, S, **letters):
    run_experts(model, recorder, B, T, S, **letters)
    if model.ahead is not None:
        recorder, config, width = WithExperts(recorder, letters), model.config, model.config.d_model
        tokens, hidden = torch.randint(config.vocab_size, (B, T)), torch.randn(B, T, width)
        recorder.running(config, B=B, T=T, S=T)
        model.hidden_ahead(hidden, tokens)
        recorder.running(config, B=B, T=T, S=S)
        model.hidden_ahead(hidden, tokens, torch.arange(T).expand(B, T), model.new_layer_cache(B, S))


SHAPES = Case(
    shape_configs,
    run_shapes,
    {"B": 7, "T": 17, "S": 29, "t": 119, "f": 43},
    same={("B", "T")},  # t
    true_too={("(B, T) or None", "(t, T) or None")},  # forward meets positions with T = 1 alone
    by_data={"f"},
)
