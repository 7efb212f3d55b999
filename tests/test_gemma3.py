"""The proof of models/gemma3.py, against `transformers`.

The authors' own code was read beside it (google/gemma_pytorch, gemma/model.py), and says the same of: where
the four norms stand; 1 + weight, in fp32, rounded after the product; sqrt(D) rounded to the dtype of the
embeddings; q_norm and k_norm before RoPE; halves of a head turned, with a base for each kind of layer, and
frequencies divided where they are scaled; a window of w tokens, the query's own among them; GELU's tanh form;
a head that is the embedding. One thing differs: they scale q, `transformers` scales the scores, which is the
same but for rounding.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from conversion.convert import convert
from conversion.tables import from_hf_config
from conversion.tables.gemma3 import full_every
from models import build_model, config_from_dict, load_config, load_model
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

    def test_the_norm_is_the_oracles_to_the_bit(self, pair):
        """In bf16, where it matters that 1 + weight is in fp32, and that the product alone is rounded."""
        oracle, model = (copy.deepcopy(model).bfloat16() for model in pair)
        x = torch.randn(2, 9, 48).bfloat16()
        theirs, ours = oracle.model.layers[0].input_layernorm, model.layers[0].attn_norm
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), theirs(x))

    def test_embeddings_are_scaled_by_a_rounded_root(self, pair, monkeypatch):
        """sqrt(48) is 6.928, in bf16 6.938: what reaches the first layer is the oracle's to the bit."""
        oracle, model = (copy.deepcopy(model).bfloat16() for model in pair)
        tokens, seen = random_tokens(model, 2, 9), []
        model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(tokens)
        assert torch.equal(seen[0], oracle.model.embed_tokens(tokens))

    # Rings --------------------------------------------------------------------------------------------------

    def test_twenty_windows_batched_ragged_and_with_rejected_drafts(self, model):
        """Rows that go on, pause and go back, each as chance has it, say what the whole text says."""
        length, num_undo, chance = 165, 5, torch.Generator().manual_seed(0)
        texts = random_tokens(model, 3, length)
        # One slot more: a pad behind the last token needs a place too.
        expected, cache = model(texts), model.new_cache(3, length + 1, num_undo)
        starts = torch.tensor([9, 30, 1])  # the prompts, the second one longer than a ring
        positions = torch.arange(30).expand(3, -1)
        model(texts[:, :30], positions.where(positions < starts[:, None], -1), cache)
        furthest, num_calls = starts.clone(), 0
        while (starts < length).any():
            width = 21 if num_calls % 9 == 8 else num_undo
            counts = torch.randint(0, width + 1, (3,), generator=chance).clamp(max=length - starts)
            places = torch.arange(width)
            positions = (starts[:, None] + places).where(places < counts[:, None], -1)
            tokens = texts.gather(1, positions.clamp(min=0))
            # A draft: from the second token on something else stands there, which is then gone back from.
            is_draft = (torch.rand(3, generator=chance) < 0.5) & (counts <= num_undo) & (counts > 1)
            drafted = torch.where((places > 0) & is_draft[:, None], (tokens + 1) % 101, tokens)
            logits = model(drafted, positions, cache)
            for row in range(3):
                sure, start = (1 if is_draft[row] else counts[row]), starts[row]
                if sure:
                    assert_close(logits[row, :sure], expected[row, start : start + sure])
            furthest = torch.maximum(furthest, starts + counts)
            # And back, now and then further than the draft, as far as num_undo allows.
            starts = starts + torch.where(is_draft, counts.clamp(max=1), counts)
            back = torch.rand(3, generator=chance) < 0.3
            starts = torch.where(back & (starts < length), (furthest - num_undo).clamp(min=1), starts)
            num_calls += 1
            assert num_calls < 400
        assert num_calls > 60

    def test_memory_does_not_grow_with_the_text(self, model):
        """A window of 8 and a quarter more, or a draft; a full layer has a slot for each position."""
        for num_undo, ring in [(0, 10), (2, 10), (7, 15)]:
            for num_slots in (200, 100_000):
                cache = model.new_cache(1, num_slots, num_undo)
                sizes = [layer.k.shape[2] for layer in cache]
                assert sizes == [ring, ring, num_slots, ring, ring]
        assert [layer.v.shape[2] for layer in model.new_cache(1, 5)] == [5] * 5

    def test_a_prompt_longer_than_the_ring_leaves_its_last_tokens(self, model):
        """Whole, and in chunks; an earlier text is forgotten; and the same bits each time."""
        tokens, cache = random_tokens(model, 2, 90), model.new_cache(2, 90)
        model(random_tokens(model, 2, 77, seed=1), cache=cache)
        first = model(tokens[:, :71], cache=cache)
        kept = [tensor.clone() for tensor in tree_leaves(cache)]
        assert torch.equal(model(tokens[:, :71], cache=cache), first)
        assert all(map(torch.equal, kept, tree_leaves(cache)))
        rest = model(tokens[:, 71:], torch.arange(71, 90).expand(2, -1), cache)
        assert_close(torch.cat([first, rest], dim=1), model(tokens))
        model(tokens[:, :50], torch.arange(50).expand(2, -1), cache)
        again = model(tokens[:, 50:], torch.arange(50, 90).expand(2, -1), cache)
        assert_close(again, model(tokens)[:, 50:])

    def test_ragged_prompts_in_chunks(self, model, monkeypatch):
        """As generate() reads prompts that are longer than a chunk, padded on the right."""
        monkeypatch.setattr("runs_ar.generate.PREFILL_CHUNK", 16)
        prompts = [random_tokens(model, 1, n, seed=n)[0].tolist() for n in (61, 5, 33, 16)]
        cache = model.new_cache(4, 70)
        hidden = prefill(model, prompts, cache)
        step = model(torch.full((4, 1), 7), torch.tensor([[61], [5], [33], [16]]), cache)
        for row, prompt in enumerate(prompts):
            alone = model.hidden(torch.tensor([[*prompt, 7]]))
            assert_close(hidden[row], alone[0, -2])
            assert_close(step[row, 0], model.lm_head(alone[0, -1]))

    def test_going_back_too_far_is_refused(self, model):
        """As far as num_undo it goes; where the ring has written over the window, a sentence says so."""
        tokens = random_tokens(model, 2, 60)
        for num_undo in (3, 9):
            cache = model.new_cache(2, 60, num_undo)
            model(tokens[:, :50], cache=cache)
            places = torch.tensor([[50 - num_undo], [50]])
            again = model(tokens.gather(1, places), places, cache)
            for row, place in enumerate(places[:, 0]):
                assert_close(again[row, 0], model(tokens)[row, place])
            with pytest.raises(ValueError, match="goes back to where its window is lost; .* larger num_undo"):
                model(tokens[:, :1], places - 1 - torch.tensor([[0], [num_undo]]), cache)

    def test_going_back_twice_is_refused_too(self, model):
        """Five tokens back, one read; five more back would find what the tokens further on have replaced."""
        tokens, cache = random_tokens(model, 1, 60), model.new_cache(1, 60, num_undo=5)
        model(tokens[:, :50], cache=cache)
        model(tokens[:, 45:46], torch.tensor([[45]]), cache)
        with pytest.raises(ValueError, match="goes back to where its window is lost"):
            model(tokens[:, 41:42], torch.tensor([[41]]), cache)

    def test_going_back_is_free_while_nothing_is_written_over(self, model):
        tokens, cache = random_tokens(model, 2, 60), model.new_cache(2, 60)
        model(tokens[:, :9], cache=cache)
        assert_close(model(tokens[:, 1:9], torch.arange(1, 9).expand(2, -1), cache), model(tokens)[:, 1:9])

    def test_positions_behind_the_cache_are_refused(self, model):
        cache = model.new_cache(1, 12)
        with pytest.raises(AssertionError, match="more tokens than the cache has slots"):
            model(random_tokens(model, 1, 1), torch.tensor([[12]]), cache)

    def test_a_full_row_takes_pads(self, model):
        """A drafter whose context ends has rows that are full, and then feeds them pads."""
        tokens, cache = random_tokens(model, 2, 20), model.new_cache(2, 20)
        positions = torch.arange(20).expand(2, -1)
        model(tokens, positions.where(positions < torch.tensor([[20], [9]]), -1), cache)
        step = model(tokens[:, 9:12], torch.tensor([[-1, -1, -1], [9, 10, 11]]), cache)
        assert_close(step[1], model(tokens)[1, 9:12])

    def test_greedy_equals_transformers_behind_many_windows(self, tmp_path):
        oracle = self.oracle(max_position_embeddings=256)
        model = self.zoo(oracle, tmp_path)
        prompt = random_tokens(model, 1, 161)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompt)  # token 0 is no pad here
        expected = oracle.generate(prompt, max_new_tokens=24, **options)[0, 161:].tolist()
        made = [tokens[0] for tokens in generate(model, [prompt[0].tolist()], max_new_tokens=24)]
        assert made == expected

    def test_a_long_prompt_makes_no_prompt_by_prompt_mask(self, model):
        T = 211
        with LargestResults() as results:
            model.hidden(random_tokens(model, 1, T), cache=model.new_cache(1, T))
        assert not [shape for shape in results.fresh_shapes if shape.count(T) > 1]


def test_drafting_at_twenty_windows_writes_what_plain_decoding_writes():
    """The target's window is 8, the drafter's 5; rows of several lengths, most drafts rejected, some not."""
    target = zoo.small_model("gemma3", max_seq_len=200, window=8)
    nearly = zoo.small_model("gemma3", max_seq_len=200, window=5)
    prompts = [random_tokens(target, 1, n, seed=n)[0].tolist() for n in (11, 3, 24)]
    plain = list(zip(*generate(target, prompts, max_new_tokens=165)))
    accepted = 0
    for drafter, num_drafts in [(nearly, 3), (target, 6)]:
        rounds = list(speculate(target, ModelDrafter(drafter), prompts, 165, num_draft_tokens=num_drafts))
        accepted += sum(sum(each.num_accepted) for each in rounds)
        for row, expected in enumerate(plain):
            assert [token for each in rounds for token in each.tokens[row]] == list(expected)
    assert accepted > 50


# Published configs ------------------------------------------------------------------------------------------

# As the files say it, in the old spelling of 1B and the new one of 270M, with sizes cut and nothing else.
SIZES = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "head_dim": 20, "sliding_window": 8}
ONE_BILLION = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window_pattern": 6,
    "use_cache": True,
    **SIZES,
}
LAYER_TYPES = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
NEW_SPELLING = {
    "_sliding_window_pattern": 6,
    "layer_types": LAYER_TYPES,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "use_bidirectional_attention": False,
}
OLD_NAMES = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern")
PUBLISHED = {
    "1b": ONE_BILLION,
    "270m": {name: x for name, x in ONE_BILLION.items() if name not in OLD_NAMES} | NEW_SPELLING,
    "linear": {**ONE_BILLION, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
}


def save(oracle, folder, config):
    """A checkpoint with the weights of the oracle, and this config.json."""
    oracle.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, progress=False)
    return load_model(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config(tmp_path, name):
    """Five windows and a full layer, and a window again; two bases; 40 tokens are five windows."""
    config = Gemma3TextConfig(**PUBLISHED[name], attn_implementation="eager")
    assert config.layer_types == LAYER_TYPES
    oracle = redraw(Gemma3ForCausalLM(config))
    model = save(oracle, tmp_path, PUBLISHED[name])
    tokens = random_tokens(model, 2, 40)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)
    assert model.config.rope_factor == (8.0 if name == "linear" else 1.0)


def test_the_text_part_of_what_reads_images_too(tmp_path, capsys):
    """Heads and head_dim are left to the defaults, as in 4B; tensors have their old names, then the new."""
    text = {"hidden_size": 40, "intermediate_size": 88, "model_type": "gemma3_text", "num_hidden_layers": 7}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 8, "vocab_size": 101}
    seen = {"hidden_size": 24, "intermediate_size": 32, "model_type": "siglip_vision_model", "patch_size": 7}
    seen |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": seen, "mm_tokens_per_image": 4}
    theirs = Gemma3Config(**copy.deepcopy(config), attn_implementation="eager")
    oracle = Gemma3ForConditionalGeneration(theirs).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model = save(oracle, tmp_path / "old", config)
    assert (model.config.num_heads, model.config.num_kv_heads, model.config.head_dim) == (8, 4, 256)
    assert "tensors of what reads images, where models/gemma3.py reads text alone" in capsys.readouterr().err
    tokens = random_tokens(model, 2, 30)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)

    state = {}
    for name, tensor in load_file(tmp_path / "old" / "model.safetensors").items():
        new = name.replace("language_model.model.", "language_model.")
        state[f"model.{new}"] = tensor
    (tmp_path / "new").mkdir()
    save_file(state, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "new", progress=False)
    again = load_model(tmp_path / "new").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_what_is_not_implemented_is_refused_by_name():
    layers = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    linear = {"rope_type": "linear", "factor": 2.0}
    for change, message in [
        ({"layer_types": layers, "num_hidden_layers": 4}, "layer_types is not 4 layers of which every nth"),
        ({"layer_types": ["full_attention"] * 7}, "full_every must leave layers of both kinds"),
        ({"sliding_window_pattern": 9}, "full_every must leave layers of both kinds"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling has rope_type 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "linear has factor, rope_theta; amiss here: factor",
        ),
        ({"rope_scaling": {**linear, "beta": 1}}, "amiss here: beta"),
        ({"rope_parameters": {"sliding_attention": linear}}, "of sliding_attention has rope_type 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters has rope_type, where",
        ),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config is .1., where an object was expected"),
        ({"sliding_window": None}, "sliding_window is None, where a positive integer was expected"),
    ]:
        with pytest.raises(UserError, match=message):
            config_from_dict(from_hf_config({**ONE_BILLION, **change})[1], "config.json")


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, published",
    [
        ("270m", 268_098_176),
        ("1b", 999_885_952),
        ("4b", 4_300_079_472),
        ("12b", 12_187_325_040),
        ("27b", 27_432_406_640),
    ],
)
def test_parameter_counts(name, published):
    """As the safetensors of the published checkpoints sum up; from 4B on with what reads images.

    That is SigLIP with 416,866,032 parameters, a norm of its 1,152 features, a matrix that makes D of them.
    """
    model = build_model(*load_config(f"gemma-3-{name}"))
    seeing = 416_866_032 + 1152 + 1152 * model.config.d_model if name in ("4b", "12b", "27b") else 0
    assert sum(parameter.numel() for parameter in model.parameters()) + seeing == published


def test_the_numbers_of_the_docstring():
    """The cache of 4B at 32,768 tokens."""
    model = build_model(*load_config("gemma-3-4b")).bfloat16()
    bytes_of = [layer.k.nbytes + layer.v.nbytes for layer in model.new_cache(1, 32_768)]
    full = [size for layer, size in zip(model.layers, bytes_of) if layer.is_full]
    rings = [size for layer, size in zip(model.layers, bytes_of) if not layer.is_full]
    assert (len(full), len(rings)) == (5, 29)
    assert [round(sum(sizes) / 1e6) for sizes in (full, rings)] == [671, 152]
    assert round(34 * full[0] / 1e9, 1) == 4.6
    assert full[0] / 32_768 == 2 * 2048
    assert model.new_cache(1, 32_768)[0].k.shape[2] == 1280


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


def test_layer_types_are_believed_before_the_pattern():
    types = ["sliding_attention", "full_attention"] * 2
    fields = {"num_hidden_layers": 4, "layer_types": types, "sliding_window_pattern": 6}
    assert full_every(fields) == 2
    assert full_every({**fields, "layer_types": None}) == 5  # of four layers none


SHAPES = Case(shape_configs, run_windows, {"B": 19, "T": 23, "S": 59, "R": 29})
