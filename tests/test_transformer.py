"""The proof of models/transformer.py: against Marian in `transformers`, torch's own layers, and the papers.

Marian has one kind of positions, no window, no shortened memory and one norm_eps. What goes beyond it is
compared with torch's TransformerEncoderLayer and TransformerDecoderLayer, told by loops what to attend to.
"""

import copy
import dataclasses
import itertools
import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers import MarianConfig, MarianMTModel

from conversion.convert import convert
from conversion.tables import from_hf_config, from_names, to_hf_config, to_hf_state
from models import build_model, config_from_dict, config_to_dict, create_model, load_config, load_model
from models.transformer import alibi_slopes, sinusoids
from models.utils.errors import UserError
from models.utils.files import read_json
from tests.decoder_proof import LargestResults
from tests.model_proof import ModelProof, assert_close, assert_rounded_alike
from tests.shape_cases import Case

PAD = 100


def draw(model):
    """Every parameter anew, biases and norms too, so that logits have a standard deviation near 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "bias" in n)]
    for name, tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator)
        if "embed_positions" in name:
            continue
        if "shared" in name or "embed" in name:
            noise *= 0.8 * tensor.shape[1] ** -0.5
        elif tensor.dim() == 2 and "logits_bias" not in name:
            noise *= 1.5 * tensor.shape[1] ** -0.5
        else:
            noise = 0.3 * noise + (1 if "norm.weight" in name else 0)
        with torch.no_grad():
            tensor.copy_(noise)
    return model.eval()


def texts(pad_id, vocab_size, batch_size, size, seed=0):
    """Sources of different lengths, padded on the right, and targets that begin with the pad token."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(vocab_size - 1, (batch_size, size), generator=generator)
    source += source >= pad_id
    for row in range(batch_size):
        source[row, size - 5 * row :] = pad_id
    source[0, size - 1] = (pad_id + 1) % vocab_size
    target = torch.randint(vocab_size, (batch_size, size - 3), generator=generator)
    target[:, 0] = pad_id
    return source, target


class TestMarian(ModelProof):
    model_name = "transformer"
    oracle_config, oracle_model = MarianConfig, MarianMTModel
    base = {
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "d_model": 60,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 88,
        "decoder_ffn_dim": 88,
        "activation_function": "swish",
        "dropout": 0.2,
        "scale_embedding": True,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": 0,
    }
    changes = {
        "vocab_size": {"vocab_size": 111},
        "max_seq_len": {"max_position_embeddings": 50},
        "d_model": {"d_model": 48},
        "num_encoder_layers": {"encoder_layers": 1},
        "num_decoder_layers": {"decoder_layers": 4},
        "num_heads": {"encoder_attention_heads": 5, "decoder_attention_heads": 5},
        "d_ff": {"encoder_ffn_dim": 72, "decoder_ffn_dim": 72},
        "dropout": {"dropout": 0.0},
        "activation": {"activation_function": "relu"},
        "scale_embedding": {"scale_embedding": False},
        "output_bias": {"add_bias_logits": False},
        "pad_id": {"pad_token_id": 7},
    }
    no_effect = {
        "dropout": "acts in training only, where test_dropout compares it with the oracle",
        "max_seq_len": "is for callers, since sinusoids have no limit",
    }
    not_in_marian = {"norm_eps", "positions", "window", "cross_downsample"}

    def inputs(self, model, batch_size, size, seed=0):
        return texts(PAD, 101, batch_size, size, seed)

    def call_oracle(self, oracle, source, target):
        mask = source != oracle.config.pad_token_id
        return oracle(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits

    def oracle(self, **changes):
        config = self.oracle_config(**{**self.base, **changes}, attn_implementation="eager")
        oracle = draw(self.oracle_model(config))
        if "add_bias_logits" in changes:
            oracle.final_logits_bias.zero_()
        return oracle

    def zoo(self, oracle, folder):
        state = oracle.state_dict()
        if not oracle.final_logits_bias.any():
            del state["final_logits_bias"]
        oracle.save_pretrained(folder, state_dict=state)
        convert(folder, progress=False)
        return load_model(folder)

    def test_every_field_has_a_change(self, model):
        fields = {field.name for field in dataclasses.fields(model.config)}
        assert fields == set(self.changes) | self.not_in_marian

    def test_exact_gelu(self, tmp_path):
        oracle = self.oracle(activation_function="gelu")
        inputs = texts(PAD, 101, 2, 20)
        assert_close(self.zoo(oracle, tmp_path)(*inputs), self.call_oracle(oracle, *inputs))

    def test_all_positions_that_marian_has(self, tmp_path):
        """512 of them: in fp32, angles lose digits as positions grow."""
        oracle = self.oracle(max_position_embeddings=512)
        inputs = texts(PAD, 101, 1, 512)
        assert_close(self.zoo(oracle, tmp_path)(*inputs), self.call_oracle(oracle, *inputs))

    def test_dropout_stands_where_the_oracle_has_it(self, pair):
        """In training mode the same seed drops the same features, since both draw in the same order."""
        oracle, model = pair
        inputs = self.inputs(model, 2, 20)
        try:
            oracle.train(), model.train()
            torch.manual_seed(7)
            expected = self.call_oracle(oracle, *inputs)
            torch.manual_seed(7)
            actual = model(*inputs)
            again = model(*inputs)
        finally:
            oracle.eval(), model.eval()
        assert_close(actual, expected)
        assert not torch.allclose(actual, again, atol=0.1)

    def test_greedy_continuation_equals_the_oracle(self, pair):
        oracle, model = pair
        source, _ = self.inputs(model, 3, 17)
        options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1, "eos_token_id": None}
        expected = oracle.generate(source, attention_mask=source != PAD, forced_eos_token_id=None, **options)
        made = torch.full((3, 1), PAD)
        cache = model.new_cache(model.encode(source), 24)
        for position in range(24):
            logits = model.decode(made[:, -1:], torch.full((3, 1), position), cache)
            made = torch.cat([made, logits.argmax(dim=-1)], dim=1)
        assert made.tolist() == expected.tolist()


# What holds whatever the options ----------------------------------------------------------------------------

VARIANTS = {
    "paper": {"activation": "relu", "output_bias": False, "norm_eps": 0.1},
    "gelu": {"activation": "gelu", "scale_embedding": False},
    "window": {"window": 3},
    "alibi": {"positions": "alibi"},
    "alibi and window": {"positions": "alibi", "window": 4, "num_heads": 5},
    "shortened": {"cross_downsample": 4},
    "alibi and shortened": {"positions": "alibi", "cross_downsample": 3},
    "rope": {"positions": "rope"},
    "rope, window, shortened": {"positions": "rope", "window": 2, "cross_downsample": 2},
}
SMALL = {
    "vocab_size": 101,
    "d_model": 60,
    "num_heads": 6,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "d_ff": 88,
    "dropout": 0.2,
    "pad_id": PAD,
}
CHUNKS = [(10, 15), (15, 16), (16, 17), (17, 29), (29, 30)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def variant(name, **changes):
    return draw(create_model("opus-mt", **{**SMALL, **VARIANTS[name], **changes}))


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return variant(request.param)


@pytest.fixture(params=[name for name in VARIANTS if "rope" not in name], scope="module")
def model_without_rope(request):
    return variant(request.param)


def positions_of(batch_size, start, end):
    return torch.arange(start, end).expand(batch_size, -1)


def test_cached_equals_full(model):
    """A prefill, chunks of several tokens and single tokens give what the whole pass gives."""
    source, target = texts(PAD, 101, 3, 33)
    cache = model.new_cache(model.encode(source), 41)
    pieces = [model.decode(target[:, :10], None, cache)]
    for start, end in CHUNKS:
        pieces.append(model.decode(target[:, start:end], positions_of(3, start, end), cache))
    assert_close(torch.cat(pieces, dim=1), model(source, target))


def test_the_cache_is_as_exact_in_bf16_as_the_whole_pass(model):
    source, target = texts(PAD, 101, 2, 23)
    half = copy.deepcopy(model).bfloat16()
    cache = half.new_cache(half.encode(source), 20)
    pieces = [half.decode(target[:, :10], None, cache)]
    pieces += [half.decode(target[:, n : n + 1], positions_of(2, n, n + 1), cache) for n in range(10, 20)]
    assert_rounded_alike(torch.cat(pieces, dim=1), half(source, target), model(source, target))


def test_going_back_is_calling_with_smaller_positions(model):
    (source, target), (_, draft) = texts(PAD, 101, 2, 23), texts(PAD, 101, 2, 9, seed=1)
    cache = model.new_cache(model.encode(source), 26)
    model.decode(target[:, :10], None, cache)
    model.decode(draft, positions_of(2, 10, 16), cache)
    again = model.decode(target[:, 10:], positions_of(2, 10, 20), cache)
    assert_close(again, model(source, target)[:, 10:])


def test_a_batch_equals_each_row_alone(model):
    """Sources padded on the right; targets of different lengths, each row at a place of its own."""
    source, target = texts(PAD, 101, 3, 23)
    lengths = torch.tensor([11, 4, 7])
    cache = model.new_cache(model.encode(source), 24)
    first = model.decode(target[:, :11], None, cache)
    steps = []
    for n in range(5):
        positions = (lengths + n)[:, None]
        steps.append(model.decode(target.gather(1, positions), positions, cache))
    for row, length in enumerate(lengths.tolist()):
        own = source[row : row + 1, : (source[row] != PAD).sum()]
        alone = model(own, target[row : row + 1, : length + 5])[0]
        assert_close(first[row, :length], alone[:length])
        assert_close(torch.stack([step[row, 0] for step in steps]), alone[length:])


def test_more_padding_changes_nothing(model):
    """Though a window shows some pads nothing but pads: no NaN comes of it, in no dtype."""
    source, target = texts(PAD, 101, 2, 20)
    longer = torch.cat([source, torch.full((2, 30), PAD)], dim=1)
    assert_close(model(longer, target), model(source, target))
    for dtype in torch.bfloat16, torch.float16:
        half = build_model("transformer", model.config, device="cpu")
        half.load_state_dict(model.state_dict())
        logits = half.to(dtype).eval()(longer, target)
        assert logits.dtype == dtype
        assert (logits - model(source, target)).abs().mean() < 0.1


def test_no_look_ahead(model):
    source, target = texts(PAD, 101, 1, 30)
    changed = target.clone()
    changed[0, 17] = (changed[0, 17] + 1) % 101
    before, after = model(source, target), model(source, changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.allclose(before[:, 17:], after[:, 17:])


def test_rows_of_a_cache_can_be_reordered(model):
    """As beam search does: every tensor of a cache has the batch first."""
    source, target = texts(PAD, 101, 3, 20)
    cache = model.new_cache(model.encode(source), 20)
    model.decode(target[:, :9], None, cache)
    order = torch.tensor([2, 0, 0, 1])
    cache = tree_map(lambda tensor: tensor.index_select(0, order), cache)
    logits = model.decode(target[order, 9:17], positions_of(4, 9, 17), cache)
    assert_close(logits, model(source, target)[order, 9:17])


def test_a_cache_that_is_just_long_enough(model):
    source, target = texts(PAD, 101, 2, 15)
    memory = model.encode(source)
    cache = model.new_cache(memory, 12)
    model.decode(target[:, :5], None, cache)
    assert_close(model.decode(target[:, 5:], positions_of(2, 5, 12), cache), model(source, target)[:, 5:])
    assert_close(model.decode(target[:, :12], None, cache), model(source, target)[:, :12])
    with pytest.raises(AssertionError, match="slots"):
        model.decode(texts(PAD, 101, 2, 16)[1], None, model.new_cache(memory, 12))


def test_a_prefill_does_not_depend_on_the_size_of_the_cache(model):
    """Nothing but the cache itself has a dimension of num_slots while a fresh cache is filled."""
    source, target = texts(PAD, 101, 1, 16)
    cache = model.new_cache(model.encode(source), 1009)
    with LargestResults() as results:
        model.hidden(target, None, cache)
    assert not [shape for shape in results.fresh_shapes if 1009 in shape]
    assert (1, 13, 60) in results.fresh_shapes, "the recorder saw the pass"


def test_positions_need_a_cache_with_slots(model):
    source, target = texts(PAD, 101, 1, 9)
    cache = model.new_cache(model.encode(source), 0)
    with pytest.raises(ValueError, match="positions are slots of a cache; this one has none"):
        model.decode(target, positions_of(1, 0, target.shape[1]), cache)


def test_a_step_does_not_project_the_memory_again(model):
    source, target = texts(PAD, 101, 1, 20)
    cache = model.new_cache(model.encode(source), 20)
    with CallsOf([layer.cross_attn.k_proj for layer in model.decoder_layers]) as calls:
        model.decode(target[:, :1], torch.tensor([[0]]), cache)
        assert calls.count == 0
        model(source, target)
        assert calls.count == 2


class CallsOf:
    """Counts the calls of some modules."""

    def __init__(self, modules):
        self.modules, self.count = modules, 0

    def __enter__(self):
        self.hooks = [module.register_forward_hook(self.note) for module in self.modules]
        return self

    def note(self, module, inputs, output):
        self.count += 1

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


class Exported(torch.nn.Module):
    """torch.export wants a module's forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, positions, cache):
        return self.model.decode(tokens, positions, cache)


@pytest.mark.parametrize("name", ["paper", "rope, window, shortened"])
def test_exports(name):
    """torch.export takes the whole pass, and a step with the cache as it is: no `if` looks at the tokens."""
    model = variant(name, num_encoder_layers=1, num_decoder_layers=1)
    source, target = texts(PAD, 101, 2, 12)
    program = torch.export.export(model, (source, target), strict=False).module()
    others = source.flip(0), target.flip(0)
    assert_close(program(*others), model(*others))

    cache = model.new_cache(model.encode(source), 16)
    model.decode(target[:, :8], None, cache)
    step = target[:, 8:9], torch.tensor([[8], [8]]), cache
    program = torch.export.export(Exported(model), step, strict=False).module()
    assert_close(program(*step), model.decode(*step))


def test_every_parameter_is_trained(model):
    fresh = build_model("transformer", model.config, device="cpu")
    fresh.init_weights()
    with torch.enable_grad():
        fresh(*texts(PAD, 101, 2, 12)).square().mean().backward()
    idle = [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys shifts all scores of a query alike, which softmax does not see.
    assert [name for name in idle if not name.endswith("k_proj.bias")] == []


def test_gradient_checkpointing_changes_nothing(model):
    """Layers that forget all but their input compute the rest again, with the same dropout."""
    source, target = texts(PAD, 101, 2, 12)

    def gradients(model):
        torch.manual_seed(3)
        model.train()(source, target).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, thrifty = (build_model("transformer", model.config, device="cpu") for _ in range(2))
    for each in plain, thrifty:
        each.load_state_dict(model.state_dict())
    for layer in [*thrifty.encoder_layers, *thrifty.decoder_layers]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with (
        torch.enable_grad(),
        CallsOf([thrifty.encoder_layers[0].ffn, thrifty.decoder_layers[1].ffn]) as calls,
    ):
        expected, actual = gradients(plain), gradients(thrifty)
    assert calls.count == 4, "each layer ran twice"
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# Beyond Marian: torch's own layers, told by formulas what to attend to --------------------------------------


def test_logits_equal_torchs_own_layers(model_without_rope):
    model = model_without_rope
    source, target = texts(PAD, 101, 3, 23)
    assert_close(model(source, target), torch_logits(model, source, target))


def torch_logits(model, source, target):
    """The model's logits, from torch's encoder and decoder layers and plain loops for the rest."""
    config, T = model.config, target.shape[1]
    lengths = (source != PAD).sum(dim=1).tolist()
    x, y = embedded(model, source), embedded(model, target)
    for layer in model.encoder_layers:
        biases = score_biases(config, lengths, source.shape[1])
        x = torch_layer(config, layer)(x, src_mask=biases)
    memory, memory_pads = means(x, lengths, config.cross_downsample)
    causal = torch.full((T, T), -math.inf).triu(1)
    for layer in model.decoder_layers:
        biases = score_biases(config, [T] * len(lengths), T) + causal
        y = torch_layer(config, layer)(y, memory, tgt_mask=biases, memory_key_padding_mask=memory_pads)
    logits = y @ model.token_embed.weight.T
    return logits + model.lm_head.bias if config.output_bias else logits


@pytest.mark.parametrize("name", [name for name in VARIANTS if "rope" in name])
def test_logits_with_rope_equal_plain_loops(name):
    """RoPE turns the queries and keys of self-attention, by each one's own place, and nothing else."""
    model = variant(name)
    source, target = texts(PAD, 101, 2, 14)
    logits = model(source, target)
    for row in range(2):
        own = source[row : row + 1, : (source[row] != PAD).sum()]
        assert_close(logits[row], looped_logits(model, own, target[row : row + 1]))


def looped_logits(model, source, target):
    """The logits of one text, (T, V)."""
    window = model.config.window or math.inf
    (x,), (y,) = embedded(model, source), embedded(model, target)
    for layer in model.encoder_layers:
        near = [[n for n in range(len(x)) if abs(m - n) <= window] for m in range(len(x))]
        x = layer.attn_norm(x + looped_attention(layer.attn, x, x, near, rope=True))
        x = layer.ffn_norm(x + layer.ffn(x))
    (memory,), _ = means(x[None], [len(x)], model.config.cross_downsample)
    for layer in model.decoder_layers:
        past = [[n for n in range(m + 1) if m - n <= window] for m in range(len(y))]
        y = layer.attn_norm(y + looped_attention(layer.attn, y, y, past, rope=True))
        everything = [range(len(memory))] * len(y)
        y = layer.cross_norm(y + looped_attention(layer.cross_attn, y, memory, everything, rope=False))
        y = layer.ffn_norm(y + layer.ffn(y))
    return model.lm_head(y)


def looped_attention(attn, x, states, places, rope):
    """One head and one query after the other; query m attends to the states at places[m]."""
    maps = (attn.q_proj, x), (attn.k_proj, states), (attn.v_proj, states)
    q, k, v = (linear(values).unflatten(-1, (attn.num_heads, -1)) for linear, values in maps)
    d, out = q.shape[-1], torch.zeros_like(q)
    for h, m in itertools.product(range(attn.num_heads), range(len(x))):
        turns = [m - n if rope else 0 for n in places[m]]
        scores = [turned_product(q[m, h], k[n, h], turn) for n, turn in zip(places[m], turns)]
        probs = (torch.stack(scores) / math.sqrt(d)).softmax(dim=0)
        out[m, h] = sum(p * v[n, h] for p, n in zip(probs, places[m]))
    return attn.o_proj(out.flatten(1))


def turned_product(q, k, distance):
    """The real part of q k* e^(i (m - n) theta), pairs as complex numbers: Su et al. 2021, eq. 12."""
    theta = 10000 ** (-torch.arange(0, len(q), 2) / len(q))
    q, k = (torch.complex(*pairs.chunk(2)) for pairs in (q, k))
    return (q * k.conj() * torch.polar(torch.ones_like(theta), distance * theta)).real.sum()


def embedded(model, tokens):
    config = model.config
    x = model.token_embed.weight[tokens] * (config.d_model**0.5 if config.scale_embedding else 1)
    if config.positions == "sinusoidal":
        interleaved = paper_sinusoids(tokens.shape[1], config.d_model)
        x = x + torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], dim=1).float()
    return x


def paper_sinusoids(num_positions, D):
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = cos(pos / 10000^(2i/D)): section 3.5."""
    table = torch.empty(num_positions, D, dtype=torch.float64)
    for position in range(num_positions):
        for i in range(D // 2):
            angle = position / 10000 ** (2 * i / D)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def score_biases(config, lengths, size):
    """(B H, size, size): what ALiBi adds to each score, minus infinity where it has ended or is too far."""
    H, window = config.num_heads, config.window or size
    slopes = torch.tensor([2 ** (-8 * (h + 1) / H) for h in range(H)])
    biases = torch.full((len(lengths), H, size, size), -math.inf)
    for row, length in enumerate(lengths):
        for i, j in itertools.product(range(size), range(length)):
            # What a pad looks at is of no interest, but it must be something.
            if abs(i - j) <= window or i >= length:
                biases[row, :, i, j] = -slopes * abs(i - j) if config.positions == "alibi" else 0
    return biases.flatten(0, 1)


def means(x, lengths, factor):
    """Each mean of up to `factor` states of a row, in a loop, and which of them are of pads alone."""
    num = -(-x.shape[1] // factor)
    states, pads = torch.zeros(len(lengths), num, x.shape[2]), torch.ones(len(lengths), num, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for n in range(-(-length // factor)):
            states[row, n] = x[row, n * factor : min((n + 1) * factor, length)].mean(dim=0)
            pads[row, n] = False
    return states, pads


def torch_layer(config, layer):
    """torch's own encoder or decoder layer with the weights of ours."""
    is_decoder = "cross_norm" in dict(layer.named_children())
    kind = torch.nn.TransformerDecoderLayer if is_decoder else torch.nn.TransformerEncoderLayer
    activation = getattr(torch.nn.functional, config.activation)
    sizes = (config.d_model, config.num_heads, config.d_ff, 0.0, activation, config.norm_eps)
    theirs = kind(*sizes, batch_first=True, norm_first=False)
    attentions = {"self_attn": layer.attn, **({"multihead_attn": layer.cross_attn} if is_decoder else {})}
    state = {}
    for p in "weight", "bias":
        for name, attn in attentions.items():
            projections = [attn.q_proj, attn.k_proj, attn.v_proj]
            state[f"{name}.in_proj_{p}"] = torch.cat([getattr(linear, p) for linear in projections])
            state[f"{name}.out_proj.{p}"] = getattr(attn.o_proj, p)
        norms = [layer.attn_norm, *([layer.cross_norm] if is_decoder else []), layer.ffn_norm]
        state |= {f"norm{n}.{p}": getattr(norm, p) for n, norm in enumerate(norms, 1)}
        state[f"linear1.{p}"], state[f"linear2.{p}"] = (
            getattr(layer.ffn.up_proj, p),
            getattr(layer.ffn.down_proj, p),
        )
    theirs.load_state_dict(state)
    # In training mode, and without dropout: the fused kernels of evaluation know no masks for each head.
    return theirs.train()


# Positions --------------------------------------------------------------------------------------------------


def test_sinusoids_are_the_papers_in_another_order():
    table = torch.cat(sinusoids(torch.arange(512), 60), dim=-1)
    expected = paper_sinusoids(512, 60)
    assert (table[:, :30] - expected[:, 0::2]).abs().max() < 1e-4
    assert (table[:, 30:] - expected[:, 1::2]).abs().max() < 1e-4


def test_sinusoids_are_those_that_marian_stores():
    config = MarianConfig(**TestMarian.base)
    stored = MarianMTModel(config).model.encoder.embed_positions.weight
    assert (torch.cat(sinusoids(torch.arange(64), 60), dim=-1) - stored).abs().max() < 1e-5


def test_alibi_slopes_are_the_papers():
    """Press et al. 2022, section 3: for 8 heads 1/2, 1/4, ..., 1/256; for 16 the roots between them too."""
    assert alibi_slopes(8, "cpu").flatten().tolist() == [2.0**-h for h in range(1, 9)]
    halves = [2.0 ** (-h / 2) for h in range(1, 17)]
    assert alibi_slopes(16, "cpu").flatten().tolist() == pytest.approx(halves, rel=1e-6)


def test_rope_turns_pairs_as_complex_numbers():
    """One attention whose scores are the real part of q k* e^(i (m - n) theta): Su et al. 2021, eq. 12."""
    model = variant("rope")
    attn, x = model.encoder_layers[0].attn, torch.randn(2, 15, 60)
    d, positions = 10, torch.arange(15)
    q, k = (linear(x).view(2, 15, 6, d).transpose(1, 2) for linear in (attn.q_proj, attn.k_proj))
    q, k = (torch.complex(*pair.chunk(2, dim=-1)) for pair in (q, k))
    theta = 10000 ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones(15, 15, 5), (positions[:, None] - positions)[..., None] * theta)
    scores = torch.einsum("bhmi,bhni,mni->bhmn", q, k.conj(), turn).real / math.sqrt(d)
    v = attn.v_proj(x).view(2, 15, 6, d).transpose(1, 2)
    expected = attn.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 15, 60))

    mask, relative = model.options(torch.ones(2, 1, 1, 15, dtype=torch.bool), positions.expand(2, 15))
    assert_close(attn(x, *attn.keys_values(x), mask, relative), expected)


@pytest.mark.parametrize("positions", ["sinusoidal", "alibi", "rope"])
def test_positions_matter(positions):
    """Two tokens of the source exchange places, and other logits come out."""
    model = variant("paper", positions=positions)
    source, target = texts(PAD, 101, 1, 12)
    exchanged = source.clone()
    exchanged[0, [3, 8]] = source[0, [8, 3]]
    assert (model(source, target) - model(exchanged, target)).abs().max() > 0.05


# Configs and fresh weights ----------------------------------------------------------------------------------

# Table 3 of the paper gives 65 and 213 million. It says "about 37000" tokens (section 5.1), and each thousand
# of them are half a million parameters, or a whole one; 65 would take 40,700 of them, 213 only 35,800.
COUNTS = {"transformer-base": 63_082_496, "transformer-big": 214_245_376, "opus-mt": 73_944_309}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = build_model(*load_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_parameter_count_of_the_paper():
    assert COUNTS["transformer-base"] == pytest.approx(65e6, rel=0.03)
    assert COUNTS["transformer-big"] == pytest.approx(213e6, rel=0.006)
    for name, millions, tokens in (("transformer-base", 65, 40_700), ("transformer-big", 213, 35_800)):
        _, config = load_config(name)
        count = COUNTS[name] + (tokens - 37_000) * config.d_model
        assert count == pytest.approx(millions * 1e6, rel=5e-4)


def test_fresh_weights():
    model = create_model("transformer-base", vocab_size=300, d_model=256, d_ff=400, output_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif name == "token_embed.weight":
            assert parameter.std().item() == pytest.approx(256**-0.5, rel=0.03)
        else:
            # Glorot and Bengio 2010, eq. 16: uniform up to sqrt(6 / (n_in + n_out)).
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max().item() == pytest.approx(bound, rel=1e-3), name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 7}, "num_heads must divide d_model"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, silu"),
        ({"positions": "learned"}, "positions: sinusoidal, alibi or rope"),
        ({"d_model": 63, "num_heads": 9}, "d_model must be even"),
        ({"positions": "rope", "d_model": 60, "num_heads": 12}, "turns pairs"),
        ({"pad_id": 37000}, "pad_id must be a token"),
        ({"pad_id": -1}, "'pad_id' is -1"),
        ({"cross_downsample": 0}, "'cross_downsample' is 0"),
        ({"window": 0}, "'window' is 0"),
    ],
)
def test_a_config_that_does_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        create_model("transformer-base", **{"d_model": 60, "num_heads": 6, **change})


# Marian's checkpoints ---------------------------------------------------------------------------------------

# config.json of Helsinki-NLP/opus-mt-en-de, as it was when special tokens and beams stood there.
PUBLISHED = {
    "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False,
    "add_final_layer_norm": False, "architectures": ["MarianMTModel"], "attention_dropout": 0.0,
    "bad_words_ids": [[58100]], "bos_token_id": 0, "classif_dropout": 0.0, "classifier_dropout": 0.0,
    "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0,
    "decoder_layers": 6, "decoder_start_token_id": 58100, "dropout": 0.1, "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_token_id": 0,
    "forced_eos_token_id": 0, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "init_std": 0.02,
    "is_encoder_decoder": True, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "max_length": 512,
    "max_position_embeddings": 512, "model_type": "marian", "normalize_before": False,
    "normalize_embedding": False, "num_beams": 4, "num_hidden_layers": 6, "pad_token_id": 58100,
    "scale_embedding": True, "static_position_embeddings": True, "transformers_version": "4.9.0.dev0",
    "use_cache": True, "vocab_size": 58101,
}  # fmt: skip
LATER = {"decoder_vocab_size": 58101, "share_encoder_decoder_embeddings": True, "torch_dtype": "float16"}


@pytest.mark.parametrize("more", [{}, LATER])
def test_a_published_config(more):
    theirs = {**PUBLISHED, **more}
    model_name, config = load_config("opus-mt")
    flat = from_hf_config(theirs)[1] | from_names(theirs, {"final_logits_bias"})
    assert config_from_dict(flat, "test") == (model_name, config)


def published(folder, config=PUBLISHED, **extra):
    """A small checkpoint as the old conversion wrote it: one .bin with every copy of the embedding."""
    sizes = {
        "vocab_size": 101,
        "d_model": 60,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "num_hidden_layers": 2,
    }
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 6)
    tokens = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), PAD)
    config = {**config, **sizes, **heads, **tokens, "bad_words_ids": [[PAD]]}
    oracle = draw(MarianMTModel(MarianConfig(**config, attn_implementation="eager")))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**oracle.state_dict(), **extra}, folder / "pytorch_model.bin")
    return oracle


def test_a_checkpoint_as_published(tmp_path):
    oracle = published(tmp_path)
    stored = set(torch.load(tmp_path / "pytorch_model.bin"))
    assert {"lm_head.weight", "model.shared.weight", "model.encoder.embed_positions.weight"} < stored
    convert(tmp_path, progress=False)
    source, target = texts(PAD, 101, 2, 20)
    expected = TestMarian().call_oracle(oracle, source, target)
    assert_close(load_model(tmp_path)(source, target), expected)


def test_what_generation_needs_comes_out_of_config_json(tmp_path):
    published(tmp_path)
    convert(tmp_path, progress=False)
    assert read_json(tmp_path / "converted" / "generation_config.json") == {
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
        "bad_words_ids": [[PAD]],
        "max_length": 512,
        "num_beams": 4,
    }


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
)
def test_a_copy_of_the_embedding_must_be_one(name, tmp_path):
    published(tmp_path, **{name: torch.ones(101, 60)})
    with pytest.raises(UserError, match=f"{name} differs from model.shared.weight"):
        convert(tmp_path, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"activation_function": "tanh"},
            "activation_function is 'tanh'; .* implements silu, swish",
        ),
        ({"decoder_attention_heads": 16}, "one size for encoder_attention_heads 8 and decoder_att"),
        ({"decoder_ffn_dim": 4096}, "one size for encoder_ffn_dim 2048 and decoder_ffn_dim 4096"),
        ({"decoder_vocab_size": 300}, "one vocabulary"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings is False"),
        ({"normalize_before": True}, "normalize_before is True"),
        ({"static_position_embeddings": False}, "static_position_embeddings is False"),
        ({"extra_pos_embeddings": 2}, "does not know extra_pos_embeddings"),
        ({"pad_token_id": None}, "pad_token_id is None"),
    ],
)
def test_a_published_config_that_is_not_implemented(change, message):
    with pytest.raises(UserError, match=message):
        from_hf_config({**PUBLISHED, **change})


@pytest.mark.parametrize("output_bias", [True, False])
def test_what_we_train_loads_in_transformers(output_bias, tmp_path):
    model = variant("paper", norm_eps=1e-5, output_bias=output_bias, pad_id=0)
    config = config_to_dict("transformer", model.config)
    save_file(to_hf_state("transformer", config, model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config("transformer", config)))
    oracle = MarianMTModel.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = texts(0, 101, 2, 20)
    assert_close(model(*inputs), TestMarian().call_oracle(oracle, *inputs))
    assert oracle.config.decoder_start_token_id == 0

    convert(tmp_path, progress=False)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "change", [{"positions": "rope"}, {"window": 3}, {"cross_downsample": 2}, {"norm_eps": 1e-6}]
)
def test_what_marian_lacks_is_not_written(change):
    config = config_to_dict("transformer", create_model("opus-mt", **{**SMALL, **change}).config)
    with pytest.raises(UserError, match=f"Marian.* has {next(iter(change))}"):
        to_hf_config("transformer", config)


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    """The paper's, and one with all that is optional for each of the other positions."""
    for positions in "sinusoidal", "alibi", "rope":
        on = positions != "sinusoidal"
        yield module.Config(
            vocab_size=54,
            max_seq_len=34,
            d_model=30,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_heads=3,
            d_ff=28,
            norm_eps=1e-5,
            dropout=0.1,
            activation="relu",
            positions=positions,
            window=4 if on else None,
            cross_downsample=2 if on else 1,
            scale_embedding=not on,
            output_bias=on,
            pad_id=53,
        )


def run_shapes(model, recorder, B, T, S, d, n, w):
    """Encoding, the whole pass in training and in evaluation, and the decoder's ways with a cache."""
    config, factor = model.config, model.config.cross_downsample
    length = factor * (n - 1) + 1  # the last of the n states is the mean of one
    source, target = torch.randint(config.vocab_size, (B, length)), torch.randint(config.vocab_size, (B, T))
    source[1:3, 5:] = config.pad_id
    slots = torch.arange(S).expand(B, S)
    free = {"d": d, "n": n, "w": config.d_model // 2 if config.positions == "sinusoidal" else d // 2}

    recorder.running(config, B=B, T=length, S=length, **free)
    memory = model.encode(source)
    recorder.running(config, B=B, T={length, T, n}, S={length, T, n}, **free)
    model.train()(source, target).sum().backward()
    model.eval()(source, target)

    recorder.running(config, B=B, T=n, S={S, n}, **free)
    cache = model.new_cache(memory, S)
    recorder.running(config, B=B, T=T, S={T, S, n}, **free)
    model.decode(target, None, cache)
    recorder.running(config, B=B, T=1, S={S, n}, **free)
    model.decode(target[:, :1], T - torch.arange(B)[:, None] % 2, cache)
    recorder.running(config, B=B, T=S - T, S={S, n}, **free)
    model.hidden(target[:, T - S :], slots[:, T:], cache)


SHAPES = Case(
    shape_configs,
    run_shapes,
    {"B": 7, "T": 11, "S": 19, "d": 10, "n": 13, "w": 15},
    same={("H", "d")},
    # In the encoder T = S, since all attend to all; the memory's keys and values are n, for T and for S.
    true_too={
        ("(B, T, D)", "(B, S, D)"),
        ("(B, n)", "(B, S)"),
        ("(B, n)", "(B, T)"),
        ("(B, 1, T, T)", "(B, 1, S, T)"),
        ("(B, 1, T, T)", "(B, 1, T, S)"),
        ("each (B, H, T, d)", "each (B, H, S, d)"),
    },
)
