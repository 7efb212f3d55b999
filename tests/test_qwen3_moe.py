"""The proof of models/qwen3_moe.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from conversion.convert import convert
from models import build_model, load_config, load_model
from models.utils.errors import UserError
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw
from tests.shape_cases import Case, run_experts

# As the model card says to switch it on, with sizes at which some pairs are fast, some slow, some between.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 60,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}


class TestQwen3Moe(DecoderProof):
    model_name = "qwen3_moe"
    oracle_config, oracle_model = Qwen3MoeConfig, Qwen3MoeForCausalLM
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "hidden_size": 66,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "intermediate_size": 88,
        "moe_intermediate_size": 44,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-4,
        "rope_parameters": YARN,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "experts_implementation": "eager",
    }
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"hidden_size": 48},
        "num_layers": {"num_hidden_layers": 2},
        "num_heads": {"num_attention_heads": 22},
        "num_kv_heads": {"num_key_value_heads": 3},
        "head_dim": {"head_dim": 16},
        "d_ff": {"intermediate_size": 72},
        "d_expert": {"moe_intermediate_size": 56},
        "num_experts": {"num_experts": 4},
        "num_active_experts": {"num_experts_per_tok": 3},
        "normalize_weights": {"norm_topk_prob": False},
        "dense_layers": {"mlp_only_layers": [], "decoder_sparse_step": 2},
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

    @pytest.mark.parametrize(
        "layers, step, dense",
        [([], 1, ()), ([2], 1, (2,)), ([], 2, (0, 2)), ([1], 2, (0, 1, 2)), (None, 3, (0, 1))],
    )
    def test_which_layers_have_experts(self, tmp_path, layers, step, dense):
        oracle = self.oracle(mlp_only_layers=layers, decoder_sparse_step=step)
        model = self.zoo(oracle, tmp_path)
        assert model.config.dense_layers == dense
        tokens = random_tokens(model, 2, 20)
        assert_close(model(tokens), oracle(tokens).logits)

    def test_a_token_reads_its_active_experts_and_no_others(self, model):
        """The weights of an expert that the router left out may be anything."""
        cache = model.new_cache(1, 9)
        model(random_tokens(model, 1, 8), cache=cache)
        used = set()
        experts = [expert for layer in (model.layers[0], model.layers[2]) for expert in layer.ffn.experts]
        hooks = [expert.register_forward_hook(lambda module, *_: used.add(module)) for expert in experts]
        model(random_tokens(model, 1, 1), torch.tensor([[8]]), cache)
        for hook in hooks:
            hook.remove()
        assert len(used) == 2 * model.config.num_active_experts

    def test_the_experts_of_a_batch_are_those_of_each_token(self, model):
        """Grouped by expert, each token gets what it would get alone, at its own place."""
        ffn, x = model.layers[0].ffn, torch.randn(3, 7, model.config.d_model)
        alone = torch.stack(
            [torch.cat([ffn(x[b : b + 1, t : t + 1]) for t in range(7)], 1)[0] for b in range(3)]
        )
        torch.testing.assert_close(ffn(x), alone)


def test_probabilities_are_in_fp32():
    """In bf16 the numbers that a softmax adds up are rounded first; the weights are rounded last alone."""
    ffn = build_model(*load_config("tiny-moe-python"), device="cpu").layers[0].ffn
    ffn.bfloat16().router.weight.data.normal_()
    tokens = torch.randn(40, 128).bfloat16()
    probs = ffn.router(tokens).float().softmax(dim=-1)
    expected, chosen = probs.topk(4)
    weights, numbers = ffn.route(tokens)
    assert weights.dtype == torch.bfloat16 and torch.equal(numbers, chosen)
    assert torch.equal(weights, (expected / expected.sum(dim=-1, keepdim=True)).bfloat16())


# As published -----------------------------------------------------------------------------------------------

# config.json of Qwen3-30B-A3B, the sizes made small.
PUBLISHED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 131,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the oracle, a folder as published: this config.json, and a tensor for each expert and matrix)."""
    folder = tmp_path_factory.mktemp("published") / "qwen3-moe"
    config = Qwen3MoeConfig(**PUBLISHED, attn_implementation="eager", experts_implementation="eager")
    oracle = redraw(Qwen3MoeForCausalLM(config))
    oracle.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return oracle, folder


def test_the_published_config(published):
    oracle, folder = published
    convert(folder, progress=False)
    model = load_model(folder)
    tokens = random_tokens(model, 2, 50)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)


@pytest.mark.parametrize(
    "name, all_of_them, active",
    [
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("qwen3-235b-a22b", 235.09, 22.19),
        ("minimind-3-moe", 0.198, 0.064),
        ("tiny-moe-python", 0.002991, 0.000926),
    ],
)
def test_parameter_counts(name, all_of_them, active):
    """As the model cards have them: 30.5 B and 3.3 B, 235 B and 22 B, 198 M and 64 M."""
    model = build_model(*load_config(name))
    counts = {path: parameter.numel() for path, parameter in model.named_parameters()}
    idle = sum(count for path, count in counts.items() if ".experts." in path)
    idle *= 1 - model.config.num_active_experts / model.config.num_experts
    total = sum(counts.values())
    assert total / 1e9 == pytest.approx(all_of_them, rel=3e-3)
    assert (total - idle) / 1e9 == pytest.approx(active, rel=3e-3)


def test_the_numbers_of_the_docstring():
    """A token reads all but the experts it leaves out, and of the embedding a row."""
    model = build_model(*load_config("qwen3-30b-a3b"))
    config = model.config
    expert = sum(parameter.numel() for parameter in model.layers[0].ffn.experts[0].parameters())
    idle = config.num_layers * (config.num_experts - config.num_active_experts) * expert
    total = sum(parameter.numel() for parameter in model.parameters())
    read = total - idle - model.token_embed.weight.numel()
    assert (round(total / 1e9, 1), round(read / 1e9, 1)) == (30.5, 3.0)
    assert config.num_active_experts * config.d_expert == config.d_ff


# Bad input --------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def broken(published, folder, change=lambda state: None, **fields):
    """The published folder again, its tensors changed or other fields in its config.json."""
    folder.mkdir()
    state = load_file(published[1] / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    return folder


def fails(folder):
    """What the command says: the error's first line, and the list below it."""
    with pytest.raises(UserError) as caught:
        convert(folder, progress=False)
    return str(caught.value)


def test_an_expert_that_is_missing(published, tmp_path):
    folder = broken(published, tmp_path / "x", lambda state: state.pop(EXPERT))
    message = "model.layers.{n}.mlp.experts.{e}.up_proj.weight (48, 64) is missing (n = 1, e = 3)"
    assert message in fails(folder)


def test_an_expert_too_many(published, tmp_path):
    name = EXPERT.replace("experts.3", "experts.16")
    folder = broken(published, tmp_path / "x", lambda state: state.update({name: state[EXPERT].clone()}))
    message = "experts.{e}.up_proj.weight (48, 64) has no place in the model (n = 1, e = 16)"
    assert message in fails(folder)


def stack(state, keep):
    """As transformers holds experts in memory: one tensor for all of a layer, gate above up."""
    for n in range(PUBLISHED["num_hidden_layers"]):
        parts = {
            part: [f"model.layers.{n}.mlp.experts.{e}.{part}_proj.weight" for e in range(16)]
            for part in ("gate", "up", "down")
        }
        stacks = {part: torch.stack([state[name] for name in names]) for part, names in parts.items()}
        path = f"model.layers.{n}.mlp.experts"
        state[f"{path}.gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], dim=1)
        state[f"{path}.down_proj"] = stacks["down"]
        if not keep:
            for name in (name for names in parts.values() for name in names):
                del state[name]


@pytest.mark.parametrize("keep", [False, True])
def test_experts_in_one_tensor(published, tmp_path, keep):
    folder = broken(published, tmp_path / "x", lambda state: stack(state, keep))
    message = fails(folder)
    assert (
        "model.layers.{n}.mlp.experts.gate_up_proj (16, 96, 64) has no place in the model (n = 0..2)"
        in message
    )
    assert (
        "model.layers.{n}.mlp.experts.down_proj (16, 64, 48) has no place in the model (n = 0..2)" in message
    )
    missing = "model.layers.{n}.mlp.experts.{e}.up_proj.weight (48, 64) is missing (n = 0..2, e = 0..15)"
    assert (missing in message) != keep


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mlp_only_layers": [3]}, r"mlp_only_layers is \[3\], where numbers of layers were expected"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers is"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, where a list was expected"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, where a positive integer was expected"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17, where there are 16 experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"shared_expert_intermediate_size": 64}, "does not know shared_expert_intermediate_size"),
    ],
)
def test_fields_that_are_refused(published, tmp_path, fields, message):
    folder = broken(published, tmp_path / "x", **fields)
    with pytest.raises(UserError, match=message):
        convert(folder, progress=False)


# The shape comments -----------------------------------------------------------------------------------------


def shape_configs(module):
    for on in (False, True):
        yield module.Config(
            vocab_size=41,
            max_seq_len=31,
            d_model=23,
            num_layers=2,
            num_heads=33,
            num_kv_heads=3,
            head_dim=26,
            d_ff=53,
            d_expert=43,
            num_experts=19,
            num_active_experts=5,
            normalize_weights=on,
            dense_layers=(1,) if on else (),
            norm_eps=1e-5,
            rope_base=10_000.0,
            rope_scaling=module.RopeScaling(4.0, 64, 32.0, 1.0, 1.1) if on else None,
            tied_head=on,
        )


SHAPES = Case(
    shape_configs,
    run_experts,
    {"B": 7, "T": 17, "S": 29, "t": 119, "f": 43},
    same={("B", "T")},  # t
    true_too={("(B, T) or None", "(t, T) or None")},  # forward meets positions with T = 1 alone
    by_data={"f"},
)
