"""The proof of models/utils/lora.py and conversion/adapter.py: the formula, and `peft`, both ways."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from conversion.adapter import CONFIG, WEIGHTS, peft_files, read_adapter
from conversion.checkpoint import open_checkpoint
from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict
from models.utils.errors import UserError
from models.utils.lora import LoraLinear, adapters, attach, attach_trained, linear_layers, merge, shape_of
from models.utils.quantize import Int4Linear, Quantization, quantize_layer, quantize_layers
from tests.zoo import every_decoder, small_model

RANK, ALPHA = 4, 10.0


def close(ours, theirs):
    tolerance = 1e-5 * max(1, theirs.std().item())
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def tuned(model, names=(), seed=1):
    """The same model with adapters that change something."""
    layers = attach(model, RANK, ALPHA, names=names)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.B.data = 0.05 * torch.randn(layer.B.shape, generator=generator)
    return model.eval()


def tokens_for(model):
    return torch.randint(model.config.vocab_size - 1, (2, 12), generator=torch.Generator().manual_seed(0))


# The layer --------------------------------------------------------------------------------------------------


def test_the_formula():
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5)
    layer, x = LoraLinear(base, rank=2, alpha=3.0), torch.randn(4, 6)
    assert torch.equal(layer(x), base(x))  # it begins as it was
    layer.B.data.normal_()
    weight = base.weight + 3.0 / 2 * layer.B @ layer.A
    torch.testing.assert_close(layer(x), F.linear(x, weight, base.bias))


def test_dropout_is_on_the_adapter_s_way_alone():
    base = torch.nn.Linear(6, 5)
    layer, x = LoraLinear(base, rank=2, alpha=2.0, dropout=0.5), torch.ones(200, 6)
    assert torch.equal(layer.train()(x), base(x))
    layer.B.data.fill_(1.0)
    layer.A.data.fill_(1.0)
    added = layer(x) - base(x)
    # Each of 6 inputs is dropped or doubled; both rows of A read the same ones.
    assert {round(value) for value in added.flatten().tolist()} == {0, 4, 8, 12, 16, 20, 24}
    torch.testing.assert_close(layer.eval()(x) - base(x), torch.full((200, 5), 12.0))


@pytest.mark.parametrize("kind, group_size", [("int4", 32), ("int8", None)])
def test_a_quantized_base_hands_gradients_on(kind, group_size):
    """As the matrix that its codes stand for would."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48)
    layer_class = Int4Linear if kind == "int4" else type(small_quantized("int8"))
    base = quantize_layer(plain, layer_class, group_size)
    layer = LoraLinear(base, rank=3, alpha=6.0)
    layer.B.data.normal_()
    assert shape_of(base) == (48, 64)
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    ours = [x.grad, layer.A.grad, layer.B.grad]

    x, A, B = (t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B))
    weight = base.dequantized().detach() + 2.0 * B @ A
    F.linear(x, weight, plain.bias).square().sum().backward()
    for mine, theirs in zip(ours, (x.grad, A.grad, B.grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def small_quantized(kind):
    from models.utils.quantize import Int8Linear

    return quantize_layer(torch.nn.Linear(16, 16), Int8Linear)


def test_nothing_dequantized_is_kept_for_the_backward_pass():
    """Or QLoRA would hold the whole model in full."""
    base = quantize_layer(torch.nn.Linear(64, 48), Int4Linear, 32)
    layer, kept = LoraLinear(base, rank=3, alpha=6.0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(5, 64, requires_grad=True))
    assert kept and not {(48, 64), (64, 48)} & set(kept)


# Whole models -----------------------------------------------------------------------------------------------


@every_decoder
def test_only_adapters_are_trained_and_merging_keeps_the_logits(model_name):
    model = small_model(model_name)
    tokens = tokens_for(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        plain = model(tokens)
    layers = attach(model, RANK, ALPHA)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in layers for part in "AB"}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # B begins with zeros, so that A has no gradient before the second step
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert all(layer.base.weight.grad is None for layer in layers.values())
        optimizer.step()
    for name, layer in layers.items():
        assert layer.B.abs().max() > 0 and torch.equal(layer.base.weight, before[f"{name}.weight"])
    with torch.no_grad():
        beside = model(tokens)
        assert (beside - plain).abs().max() > 1e-3
        merge(model)
        close(model(tokens), beside)
    assert not adapters(model) and {n for n, _ in model.named_parameters()} == set(before)


def test_layers_are_chosen_by_their_names():
    model = small_model("llama")
    everything = linear_layers(model)
    assert len(everything) == 7 * model.config.num_layers and "lm_head" not in everything
    chosen = linear_layers(model, ("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "v_proj"} and len(chosen) == 4
    with pytest.raises(
        UserError, match="no linear layer is called 'query'; this model has: down_proj, gate_"
    ):
        linear_layers(model, ("q_proj", "query"))


def test_beside_codes_an_adapter_stays_and_is_not_merged():
    model = small_model("llama", d_model=32, head_dim=8, d_ff=64)
    tokens = tokens_for(model)
    quantize_layers(model, Quantization("int4", 32))
    tuned(model)
    with torch.no_grad():
        beside = model(tokens)
        merge(model)
        assert torch.equal(model(tokens), beside) and len(adapters(model)) == 7 * model.config.num_layers


# PEFT -------------------------------------------------------------------------------------------------------


def published(model, folder):
    """The model as transformers reads it, in `folder`, and converted beside."""
    name = type(model).__module__.removeprefix("models.")
    config = config_to_dict(name, model.config)
    (folder / "converted").mkdir(parents=True)
    save_file(to_hf_state(name, config, model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(name, config)))
    names = [name for name, _ in model.named_parameters()]  # a tied one once
    state = model.state_dict()
    save_file({name: state[name] for name in names}, folder / "converted" / "model.safetensors")
    (folder / "converted" / "config.json").write_text(json.dumps(config))
    return config


def write(factors, config, folder):
    (folder / "adapter").mkdir()
    files = peft_files(factors, config, folder / "converted", RANK, ALPHA, 0.0)
    for name, content in files.items():
        (folder / "adapter" / name).write_bytes(content)
    return folder / "adapter"


def factors_of(model):
    return {name: (layer.A, layer.B) for name, layer in adapters(model).items()}


def oracle_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# YaRN within the bounds in which models/gpt_oss.py and transformers agree; queries that go through a latent.
SIZES = {"gpt_oss": {"original_max_seq_len": 4096}, "deepseek_v3": {"d_query": 12}}
# To PEFT 0.21 the names of a feed-forward mean the experts beside it, which transformers 5 holds in one
# tensor: of dense layers and shared experts it drops the adapters, with a warning. All others are compared.
COMPARED = {"deepseek_v3": ("q_down_proj", "q_up_proj", "kv_down_proj", "o_proj")}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@every_decoder
@pytest.mark.parametrize("names", [(), ("q_proj", "o_proj")])
def test_peft_has_the_same_logits(tmp_path, model_name, names):
    names, sizes = names or COMPARED.get(model_name, ()), SIZES.get(model_name, {})
    model = small_model(model_name, **sizes)
    if any(name not in {layer.rpartition(".")[2] for layer in linear_layers(model)} for name in names):
        pytest.skip("has no layer of this name")
    config, tokens = published(model, tmp_path), tokens_for(model)
    with torch.no_grad():
        ours = tuned(model, names)(tokens)
        theirs = peft.PeftModel.from_pretrained(
            oracle_of(tmp_path), write(factors_of(model), config, tmp_path)
        )
        close(ours, theirs.eval()(tokens).logits)
        # And read back it is the same.
        again = small_model(model_name, **sizes)
        attach_trained(again, read_adapter(tmp_path / "adapter", config, tmp_path / "converted").factors)
        close(again(tokens), ours)


PEFTS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "ranks by name": {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"q_proj": 2},
    },
    "by the root of the rank": {"target_modules": ["o_proj"], "use_rslora": True},
    "of some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}  # fmt: skip
GPT2_PEFTS = {
    "fused": {"target_modules": ["c_attn"]},
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "model_name, options",
    [("llama", name) for name in PEFTS] + [("gpt2", name) for name in GPT2_PEFTS] + [("gpt_neox", "neox")],
)
def test_adapters_of_peft_are_read(tmp_path, model_name, options):
    fields = {**PEFTS, **GPT2_PEFTS, "neox": {"target_modules": ["query_key_value", "dense"]}}[options]
    model = small_model(model_name)
    config, tokens = published(model, tmp_path), tokens_for(model)
    settings = peft.LoraConfig(r=5, lora_alpha=7, init_lora_weights=True, **fields)
    theirs = peft.get_peft_model(oracle_of(tmp_path), settings).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        theirs.save_pretrained(tmp_path / "adapter")
        attach_trained(model, read_adapter(tmp_path / "adapter", config).factors)
        close(model(tokens), theirs(tokens).logits)


@pytest.fixture
def stored(tmp_path):
    """(the converted folder of a small llama, an adapter of it, tokens, the logits of both)."""
    model = small_model("llama", d_model=32, head_dim=8, d_ff=64)
    config, tokens = published(model, tmp_path), tokens_for(model)
    with torch.no_grad():
        logits = tuned(model)(tokens)
    return tmp_path / "converted", write(factors_of(model), config, tmp_path), tokens, logits


def test_a_checkpoint_is_loaded_with_its_adapter(stored):
    folder, adapter, tokens, logits = stored
    model = open_checkpoint(folder, device="cpu", adapter=adapter).load()
    with torch.no_grad():
        close(model(tokens), logits)
    assert not adapters(model)
    plain = open_checkpoint(folder, device="cpu").load()
    assert (plain(tokens) - logits).abs().max() > 1e-2
    # Beside a quantized base it stays in full.
    how = {"device": "cpu", "quantization": Quantization("int4", 32)}
    quantized = open_checkpoint(folder, **how, adapter=adapter).load()
    assert len(adapters(quantized)) == 14 and isinstance(quantized.layers[0].attn.q_proj.base, Int4Linear)
    # What the codes take from the logits the adapter does not make worse.
    bare = open_checkpoint(folder, **how).load()
    with torch.no_grad():
        error = (quantized(tokens) - logits).std()
        assert error < 2 * (bare(tokens) - plain(tokens)).std()


def test_an_adapter_of_another_model_is_refused(stored, tmp_path):
    folder, adapter, _, _ = stored
    other = small_model("llama", seed=5, d_model=32, head_dim=8, d_ff=64)
    published(other, tmp_path / "other")
    with pytest.raises(UserError, match="adapter: was trained on another model than .*converted holds"):
        open_checkpoint(tmp_path / "other" / "converted", adapter=adapter)
    narrow = config_to_dict("llama", small_model("llama").config)
    with pytest.raises(UserError, match=r"has A \(4, .*\) and B .*is the adapter one of another model"):
        read_adapter(adapter, narrow)
    gpt2 = config_to_dict("gpt2", small_model("gpt2").config)
    with pytest.raises(UserError, match="has no place in this model; is the adapter one of another"):
        read_adapter(adapter, gpt2)


CHANGES = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is what is read here"),
    "magnitudes": ({"use_dora": True}, "use_dora is True, which is more than plain LoRA"),
    "biases": ({"bias": "all"}, "bias is 'all', which is more"),
    "a head": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .* which is more"),
    "what is not known yet": ({"use_xlora": 3}, "use_xlora is 3, which is more"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base as well"),
    "another rank": ({"r": 5}, "r 5 and alpha 10.0 for model.layers.0.* whose matrices are of rank 4"),
    "ranks that are none": ({"rank_pattern": [3]}, r"rank_pattern is \[3\], where an object was expected"),
    "a pattern that takes years": ({"rank_pattern": {"(.*)*x": 3}}, "is more than the end of a name"),
    "a word for alpha": ({"lora_alpha": "x"}, "r 4 and alpha 'x' for"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_more_than_lora_is_refused(stored, name):
    folder, adapter, _, _ = stored
    change, message = CHANGES[name]
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(folder, adapter=adapter)
    assert "\n" not in str(error.value)


def test_files_that_are_no_adapter(stored, tmp_path):
    folder, adapter, _, _ = stored
    with pytest.raises(UserError, match="--adapter .*nowhere: no such folder"):
        open_checkpoint(folder, adapter=tmp_path / "nowhere")
    with pytest.raises(
        UserError, match="holds an adapter, no model; give the model, and this with --adapter"
    ):
        open_checkpoint(adapter)
    whole = load_file(adapter / WEIGHTS)
    first = next(name for name in whole if "lora_B" in name)
    save_file({name: tensor for name, tensor in whole.items() if name != first}, adapter / WEIGHTS)
    with pytest.raises(UserError, match=r"has A \(4, .*\) and B \(0,\), for a matrix"):
        open_checkpoint(folder, adapter=adapter)
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(UserError, match="holds no adapter"):
        open_checkpoint(folder, adapter=adapter)
    (adapter / WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        open_checkpoint(folder, adapter=adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no such file"):
        open_checkpoint(folder, adapter=adapter)
