"""The proof of models/gpt_oss.py."""

import copy

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from models import build_model, load_config
from models import gpt_oss as page
from runs_ar.generate import generate
from runs_ss.speculate import ModelDrafter, speculate
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
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

    def test_going_back_is_calling_with_smaller_positions(self, model):
        """After a rejected draft; the ring keeps as many tokens more as num_undo says."""
        tokens, draft = random_tokens(model, 2, 40), random_tokens(model, 2, 6, seed=1)
        cache = model.new_cache(2, 46, num_undo=6)
        model(tokens[:, :30], cache=cache)
        model(draft, torch.arange(30, 36).expand(2, -1), cache)
        again = model(tokens[:, 30:], torch.arange(30, 40).expand(2, -1), cache)
        assert_close(again, model(tokens)[:, 30:])

    def test_ragged_batch_equals_alone(self, model):
        """Rows of different lengths; a pad's position is -1, and it is not kept."""
        lengths, tokens = torch.tensor([31, 4, 17]), random_tokens(model, 3, 40)
        cache = model.new_cache(3, 44)
        places = torch.arange(31).expand(3, -1)
        first = model(tokens[:, :31], places.where(places < lengths[:, None], -1), cache)
        steps = []
        for n in range(5):
            positions = (lengths + n)[:, None]
            steps.append(model(tokens.gather(1, positions), positions, cache))
        for row, length in enumerate(lengths.tolist()):
            alone = model(tokens[row : row + 1, : length + 5])[0]
            assert_close(first[row, :length], alone[:length])
            assert_close(torch.stack([step[row, 0] for step in steps]), alone[length:])

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


def run_windows(model, recorder, B, T, S, W, t):
    """Whole passes, a prompt into a cache, a token and then several behind it; W is a ring's or a text's."""
    tokens = torch.randint(model.config.vocab_size, (B, T))
    slots = {W, 4 * T + 1}

    def running(T, S):
        recorder.running(model.config, B=B, T=T, S=S, W=slots, t=B * T)

    running(T, {T})
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    cache = model.new_cache(B, 4 * T, num_undo=W - 1 - model.config.window)
    model(tokens, cache=cache)
    running(1, {W + 1, 4 * T + 1})
    model(tokens[:, :1], torch.full((B, 1), T), cache)
    running(T, {W + T, 4 * T + 1})
    model(tokens, torch.arange(T + 1, 2 * T + 1).expand(B, T), cache)


SHAPES = Case(
    shape_configs,
    run_windows,
    {"B": 7, "T": 13, "S": 24, "W": 11, "t": 91},
    same={("B", "T")},  # t
)
