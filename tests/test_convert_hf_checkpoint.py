"""The proof of convert_hf_checkpoint.py: every published form becomes a model with the oracle's logits.

What a bad checkpoint does is in test_convert_bad_input.py.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file

from conversion import weight_files
from conversion.config_fields import INERT, SPELLINGS
from conversion.convert import convert, inspect, reverse
from conversion.meta import MetaOptions
from conversion.tables import HF_TYPES, LAYOUTS, from_hf_config, to_hf_config, to_hf_state
from conversion.tensor_table import TRANSFORMS
from models import config_from_dict, config_names, config_to_dict, load_config, load_model
from models.utils.errors import UserError
from models.utils.files import MARKER
from tests.published import (
    CONFIGS,
    FORMS,
    LLAMA3_ROPE,
    META_D_FF,
    META_PARAMS,
    META_VOCAB,
    config_of,
    meta_logits,
    meta_state,
    oracle,
    state_of,
    write,
    write_meta,
)

TOKENS = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def assert_same_logits(folder, expected):
    model = load_model(folder, dtype=torch.float32)
    difference = (model(TOKENS) - expected).abs().max()
    assert difference <= 1e-5 * max(1, expected.std()), f"differs by {difference:.2e}"


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def stored(folder):
    """All tensors of a folder of safetensors, with or without shards."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )


# From Hugging Face's layout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["safetensors", "old shards"])
def test_every_model_type_has_the_oracles_logits(kind, form, tmp_path):
    convert(write(tmp_path, kind, form))
    assert_same_logits(tmp_path, oracle(kind)(TOKENS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_form_gives_the_same_bytes(kind, tmp_path):
    expected = stored(convert(write(tmp_path / "expected", kind)))
    for form in FORMS[1:]:
        assert_same_tensors(stored(convert(write(tmp_path / form, kind, form))), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_back_and_forth_is_the_same_to_the_bit(kind, tmp_path):
    """reverse writes what transformers saved: its names, its bits, and a config that it reads as the same."""
    oracle(kind).save_pretrained(tmp_path)
    convert(tmp_path)
    folder = reverse(tmp_path)
    assert_same_tensors(stored(folder), load_file(tmp_path / "model.safetensors"))

    model, loading = read_by_transformers(folder)
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    assert torch.equal(model(TOKENS).logits, oracle(kind)(TOKENS).logits)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(model.config, name) for name in ids] == [getattr(CONFIGS[kind], name) for name in ids]

    again = tmp_path / "again"
    convert(folder, out=again)
    assert (again / "config.json").read_text() == (tmp_path / "converted" / "config.json").read_text()


def test_gpt2_as_published(tmp_path):
    """No prefix, the mask as a buffer, and the -10000 of old versions; the head is not stored."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state_of("gpt2").items()}
    for n in range(3):
        state[f"h.{n}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        state[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    convert(write(tmp_path, "gpt2", "bin", state))
    assert_same_logits(tmp_path, oracle("gpt2")(TOKENS).logits)


def test_llama_as_published_by_old_versions(tmp_path):
    state = state_of("llama")
    for n in range(3):
        state[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = oracle("llama").model.rotary_emb.inv_freq
    convert(write(tmp_path, "llama", "bin shards", state))
    assert_same_logits(tmp_path, oracle("llama")(TOKENS).logits)


def test_a_model_saved_without_its_tied_head_and_prefix(tmp_path):
    state = {name.removeprefix("model."): tensor for name, tensor in state_of("llama-3").items()}
    convert(write(tmp_path, "llama-3", state=state))
    assert_same_logits(tmp_path, oracle("llama-3")(TOKENS).logits)


@pytest.mark.parametrize("kind, embedding", [("llama-3", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_tied_head_may_be_stored_twice_but_only_if_equal(kind, embedding, tmp_path):
    state = state_of(kind)
    state["lm_head.weight"] = state[f"{embedding}.weight"].clone()
    convert(write(tmp_path, kind, state=state))
    assert "lm_head.weight" not in stored(tmp_path / "converted")
    assert_same_logits(tmp_path, oracle(kind)(TOKENS).logits)

    state["lm_head.weight"][5, 7] += 0.001
    with pytest.raises(UserError, match=f"lm_head.weight differs from {embedding}.weight.*tied"):
        convert(write(tmp_path, kind, state=state))
    # Of another dtype it is another tensor, though torch.equal compares values alone.
    for name in ("lm_head.weight", f"{embedding}.weight"):
        state[name] = torch.ones_like(state[name])
    state["lm_head.weight"] = state["lm_head.weight"].bfloat16()
    with pytest.raises(UserError, match=f"lm_head.weight differs from {embedding}.weight.*tied"):
        convert(write(tmp_path, kind, state=state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_stay_in_the_dtype_in_which_they_are_stored(dtype, form, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in state_of("gpt2").items()}
    convert(write(tmp_path, "gpt2", form, state))
    assert {tensor.dtype for tensor in stored(tmp_path / "converted").values()} == {dtype}
    assert_same_tensors(stored(reverse(tmp_path)), state)
    assert json.loads((tmp_path / "reversed/config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_dtype_can_be_chosen_and_may_differ_between_tensors(tmp_path):
    state = state_of("llama")
    state |= {name: tensor.bfloat16() for name, tensor in state.items() if "mlp" in name}
    write(tmp_path, "llama", state=state)
    convert(tmp_path)
    kept = stored(tmp_path / "converted")
    assert kept["layers.0.ffn.up_proj.weight"].dtype == torch.bfloat16
    assert kept["layers.0.attn.q_proj.weight"].dtype == torch.float32
    assert_same_tensors(stored(reverse(tmp_path)), state)

    convert(tmp_path, dtype=torch.float16)
    assert_same_tensors(
        stored(tmp_path / "converted"), {name: tensor.half() for name, tensor in kept.items()}
    )


def test_tensors_are_aligned_in_the_files(tmp_path, monkeypatch):
    """Each number stands at a multiple of its size: the header is filled up, wide dtypes come first."""
    state = state_of("llama")
    state |= {name: tensor.bfloat16() for name, tensor in state.items() if "q_proj" in name}
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 10_000)
    kinds = []
    for path in sorted(convert(write(tmp_path, "llama", state=state)).glob("*.safetensors")):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        kinds += [tensor["dtype"] for tensor in sorted(header.values(), key=lambda t: t["data_offsets"])]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"F32", "BF16"}


@pytest.mark.parametrize(
    "stored_as, dtype, value",
    [
        (torch.float32, torch.float16, 70_000.0),
        (torch.bfloat16, torch.float16, 70_000.0),
        (torch.float64, torch.float32, 1e300),
        (torch.float64, torch.bfloat16, -1e300),
    ],
)
def test_a_dtype_is_refused_where_it_would_overflow(stored_as, dtype, value, tmp_path):
    state = {name: tensor.to(stored_as) for name, tensor in state_of("llama").items()}
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    write(tmp_path, "llama", state=state)
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.up_proj\.weight.*too large for"):
        convert(tmp_path, dtype=dtype)
    assert not (tmp_path / "converted").exists()


def test_reverse_can_choose_a_dtype_and_writes_it_into_the_config(tmp_path):
    convert(write(tmp_path, "llama"))
    folder = reverse(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in stored(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert read_by_transformers(folder)[0].dtype == torch.bfloat16


def test_of_mixed_dtypes_the_model_takes_that_of_most_numbers(tmp_path):
    """As published files have it: norms in fp32 beside matrices in bf16."""
    state = {
        name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state_of("llama").items()
    }
    convert(write(tmp_path, "llama", state=state))
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).isfinite().all()


def test_large_output_is_sharded_with_an_index(tmp_path, monkeypatch):
    expected = stored(convert(write(tmp_path / "whole", "llama-3")))
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 10_000)
    folder = convert(write(tmp_path / "cut", "llama-3"))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 3
    assert names == [f"model-{n + 1:05}-of-{len(names):05}.safetensors" for n in range(len(names))]
    assert all(path.stat().st_size < 12_000 for path in folder.glob("*.safetensors"))
    assert_same_tensors(stored(folder), expected)
    assert_same_logits(folder, oracle("llama-3")(TOKENS).logits)

    model, _ = read_by_transformers(reverse(folder.parent))
    assert torch.equal(model(TOKENS).logits, oracle("llama-3")(TOKENS).logits)


def test_what_running_needs_comes_along(tmp_path):
    write(tmp_path, "gpt2")
    kept = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"]
    kept += ["additional_chat_templates/tools.jinja"]
    for name in [*kept, "README.md", "training_args.bin"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder = convert(tmp_path)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {"config.json", "model.safetensors", "generation_config.json", MARKER, *kept}
    assert all((folder / name).read_text() == name for name in kept)


def test_special_tokens_are_kept_where_config_json_alone_names_them(tmp_path):
    folder = convert(write(tmp_path, "llama", config={**config_of("llama"), "eos_token_id": [7, 9]}))
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [7, 9],
    }
    back = json.loads((reverse(tmp_path) / "config.json").read_text())
    assert (back["bos_token_id"], back["eos_token_id"]) == (1, [7, 9])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    folder = convert(tmp_path)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_the_name_of_the_folder_means_nothing(tmp_path):
    convert(write(tmp_path / "llama-3.2-1b", "gpt2"))
    assert_same_logits(tmp_path / "llama-3.2-1b", oracle("gpt2")(TOKENS).logits)


# Configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_defaults_are_those_of_transformers(model_type):
    """What a silent config.json means is what the class of transformers says, field by field."""
    hf_type, theirs = HF_TYPES[model_type], transformers.AutoConfig.for_model(model_type)
    values = {name: values[0] for name, values in hf_type.must_equal.items()} | hf_type.silence
    values |= {name: value for name, value in hf_type.defaults.items() if not name.startswith("rope")}
    fields = {field: getattr(type(theirs), field) for field in values if hasattr(type(theirs), field)}
    # A class has None where each config gets an empty list of its own.
    fields |= {field: getattr(theirs, field) for field in fields if type(values[field]) is list}
    fields["layer_types"] = values.get("layer_types")
    assert {name: values[name] for name in fields if name in values} == {
        n: fields[n] for n in fields if n in values
    }
    if hf_type.model != "gemma3":  # which has two, and tests them on its own
        assert hf_type.defaults.get("rope_theta", theirs.default_theta) == theirs.default_theta
    for name in ("bos_token_id", "eos_token_id"):
        assert hf_type.token_ids.get(name) == getattr(theirs, name, None)


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_every_field_of_transformers_has_its_place(model_type):
    hf_type = HF_TYPES[model_type]
    known = {"model_type", *hf_type.defaults, *hf_type.must_equal, *INERT, *hf_type.inert, hf_type.part}
    assert set(transformers.AutoConfig.for_model(model_type).to_dict()) <= known


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_silent_config_means_what_transformers_takes(kind):
    """Each used field left out, one at a time: ours then equals what transformers fills in."""
    complete = config_of(kind)
    complete.pop("layer_types", None)
    for name in HF_TYPES[complete["model_type"]].defaults:
        silent = {field: value for field, value in complete.items() if field != name}
        try:
            filled = json.loads(type(CONFIGS[kind])(**silent).to_json_string())
        except StrictDataclassClassValidationError:
            continue  # 64 heads, where GPT-NeoX's config is silent, do not divide a small model's width
        assert from_hf_config(silent) == from_hf_config(filled), name


def test_old_and_new_forms_of_rope():
    base = {**config_of("llama")}
    base.pop("rope_parameters")
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_type"}
    forms = [
        {"rope_theta": 5e5, "rope_scaling": {**scaling, "rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}},
        {"rope_theta": 500000, "rope_scaling": {**scaling, "type": "llama3", "rope_type": "llama3"}},
        {"rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}},
        {"rope_theta": 1.0, "rope_scaling": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {**scaling, "type": "llama3"},
            "rope_parameters": {"rope_theta": 1.0},
        },
    ]
    expected = from_hf_config(config_of("llama-3") | {"tie_word_embeddings": False})
    assert expected[1]["rope_base"] == 5e5 and expected[1]["rope_scaling"]["original_max_seq_len"] == 16
    for form in forms:
        assert from_hf_config({**base, **form}) == expected
    plain = [{}, {"rope_scaling": None}, {"rope_scaling": {"type": "default"}}, {"rope_parameters": None}]
    for form in plain:
        assert from_hf_config({**base, **form})[1]["rope_scaling"] is None


def test_fields_that_say_that_something_is_off():
    """Published Qwen2 configs size a window that they do not use, and spell out what is off."""
    off = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "use_mrope": False}
    theirs = {**config_of("qwen2"), **off, "layer_types": ["full_attention"] * 3}
    assert from_hf_config(theirs) == from_hf_config(config_of("qwen2"))


@pytest.mark.parametrize("name", config_names())
def test_every_config_of_ours_has_one_of_theirs(name):
    model_name, config = load_config(name)
    flat = config_to_dict(model_name, config)
    if name == "modular-sparse-experts":
        pytest.skip("transformers has no decoder of sparse attention and experts")
    theirs = to_hf_config(model_name, flat)
    assert from_hf_config(theirs, model=model_name) == (model_name, flat)
    parsed = transformers.AutoConfig.for_model(**theirs)
    assert from_hf_config(json.loads(parsed.to_json_string()), model=model_name) == (model_name, flat)


def test_published_configs_are_read():
    """Fields that the published files carry and that this test spells as they stand there."""
    smollm2 = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip
    gpt2_xl = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1600, "n_head": 25,
        "n_layer": 48, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }  # fmt: skip
    for theirs, name in ((smollm2, "smollm2-135m"), (gpt2_xl, "gpt2-xl")):
        model_name, config = from_hf_config(theirs)
        assert config_from_dict(config, "test")[1] == load_config(name)[1]


@pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_rates_may_differ(field, tmp_path):
    """They act in training alone; the highest is ours."""
    folder = convert(write(tmp_path, "gpt2", config={**config_of("gpt2"), field: 0.3}))
    assert json.loads((folder / "config.json").read_text())["dropout"] == 0.3
    assert_same_logits(folder, oracle("gpt2")(TOKENS).logits)


@pytest.mark.parametrize("activation", SPELLINGS)
def test_spellings_of_an_activation_are_one_function(activation):
    x = torch.linspace(-8, 8, 1001)
    expected = transformers.activations.ACT2FN[activation](x)
    for name in SPELLINGS[activation]:
        assert torch.allclose(transformers.activations.ACT2FN[name](x), expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    "kind, field, spelling",
    [("llama", "hidden_act", "swish"), ("gpt2", "activation_function", "gelu_pytorch_tanh")],
)
def test_another_spelling_is_taken(kind, field, spelling, tmp_path):
    convert(write(tmp_path, kind, config={**config_of(kind), field: spelling}))
    assert_same_logits(tmp_path, oracle(kind)(TOKENS).logits)


# Tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_and_its_inverse_cancel(name):
    config = {"head_dim": 6, "num_heads": 4, "patch_size": 3, "rotary_dim": 6, "d_latent": 18}
    shape = {"squares_to_rows": (24, 4, 3, 3), "row_to_vector": (1, 36)}.get(name, (24, 36))
    shape = (3, 8, 2, 16) if name.endswith("+blocks") else shape
    theirs = torch.arange(math.prod(shape)).view(shape)
    theirs = theirs % 255 if name.endswith("+scales") else theirs  # 255 is no scale
    forward, inverse = TRANSFORMS[name]
    assert torch.equal(inverse(forward(theirs, config), config), theirs)


def test_pairs_become_halves():
    rows = torch.arange(12)[:, None]
    (moved,) = TRANSFORMS["pairs_to_halves"].forward(rows, {"head_dim": 6})
    assert moved.flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_to_hf_state_refuses_what_has_no_place(tmp_path):
    convert(write(tmp_path, "gpt2"))
    config = json.loads((tmp_path / "converted/config.json").read_text())
    state = load_model(tmp_path).state_dict()
    assert_same_tensors(to_hf_state("gpt2", config, state), state_of("gpt2"))
    with pytest.raises(UserError, match="_orig_mod.token_embed.weight"):
        to_hf_state("gpt2", config, {"_orig_mod.token_embed.weight": torch.zeros(1)})


def test_a_parameter_of_ours_that_no_row_fills_is_shown(tmp_path, capsys, monkeypatch):
    """As it happens while a new page's table is being written."""
    layout = LAYOUTS["gpt2"]
    rows = [row for row in layout.rows if not row.ours.startswith("final_norm")]
    monkeypatch.setitem(LAYOUTS, "gpt2", replace(layout, rows=rows))
    with pytest.raises(UserError) as error:
        inspect(write(tmp_path, "gpt2"))
    assert "our final_norm.bias (24,) has no row in conversion/tables/gpt2.py" in str(error.value)
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert ["?", "final_norm.weight", "(24,)"] in table
    assert ["transformer.ln_f.weight", "(24,) float32", "?"] in table


def test_inspect_shows_both_sides(tmp_path, capsys):
    state = state_of("gpt2")
    state["transformer.h.1.attn.bias"] = torch.ones(1, 1, 64, 64)
    inspect(write(tmp_path, "gpt2", state=state))
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [
        "transformer.h.{n}.attn.c_attn.weight", "(24, 72) float32",
        "layers.{n}.attn.q_proj.weight", "(24, 24)", "transpose+split", "0..2",
    ] in table  # fmt: skip
    assert ["layers.{n}.attn.k_proj.weight", "(24, 24)"] in table
    assert ["transformer.ln_f.bias", "(24,) float32", "final_norm.bias", "(24,)"] in table
    assert any(row[-2:] == ["skipped: the causal mask, a triangle of ones", "1"] for row in table)
    assert len(table) < 30, "the layers are folded"
    assert not (tmp_path / "converted").exists()


# From Meta's layout -----------------------------------------------------------------------------------------

CONTEXT = MetaOptions(max_seq_len=64)


@pytest.mark.parametrize("num_files, embedding_cut", [(1, 0), (2, 0), (2, 1)])
def test_meta_checkpoints_have_the_logits_of_metas_code(num_files, embedding_cut, tmp_path):
    write_meta(tmp_path, num_files=num_files, embedding_cut=embedding_cut)
    convert(tmp_path, meta=CONTEXT)
    assert_same_logits(tmp_path, meta_logits(meta_state(), META_PARAMS, TOKENS))


def test_meta_checkpoint_to_transformers(tmp_path):
    """Reversing makes Meta's files readable for transformers."""
    convert(write_meta(tmp_path), meta=CONTEXT)
    model, _ = read_by_transformers(reverse(tmp_path))
    expected = meta_logits(meta_state(), META_PARAMS, TOKENS)
    assert (model(TOKENS).logits - expected).abs().max() <= 1e-5 * max(1, expected.std())


def test_meta_says_less_and_the_weights_say_more(tmp_path):
    """Llama 2's params.json: no vocabulary, no rope_theta, heads of one kind; d_ff is w1's."""
    state = meta_state()
    for n in range(2):
        for name in ("wk", "wv"):
            state[f"layers.{n}.attention.{name}.weight"] = torch.randn(24, 24) * 0.3
    state["rope.freqs"] = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    params = {"dim": 24, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 256}
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text("ranks")
    write_meta(tmp_path / "original", state, params)
    folder = convert(tmp_path, meta=CONTEXT)
    config = json.loads((folder / "config.json").read_text())
    assert (config["d_ff"], config["vocab_size"], config["num_kv_heads"]) == (META_D_FF, META_VOCAB, 4)
    assert (config["max_seq_len"], config["rope_base"], config["rope_scaling"]) == (64, 10000.0, None)
    assert (folder / "tokenizer.model").read_text() == "ranks"
    assert_same_logits(folder, meta_logits(state, params, TOKENS))


def test_meta_rope_scaling_comes_from_options(tmp_path):
    write_meta(tmp_path, params={**META_PARAMS, "rope_theta": 5e5, "use_scaled_rope": True})
    config = json.loads((convert(tmp_path, meta=MetaOptions(131072, 32.0)) / "config.json").read_text())
    published = config_to_dict(*load_config("llama-3.2-1b"))
    assert {name: config[name] for name in ("max_seq_len", "rope_base", "rope_scaling")} == {
        name: published[name] for name in ("max_seq_len", "rope_base", "rope_scaling")
    }


@pytest.mark.parametrize("head", ["left out", "stored twice", "its own"])
def test_meta_head_is_tied_if_the_weights_say_so(head, tmp_path):
    state = meta_state()
    if head == "left out":
        del state["output.weight"]
    elif head == "stored twice":
        state["output.weight"] = state["tok_embeddings.weight"].clone()
    folder = convert(write_meta(tmp_path, state, num_files=2), meta=CONTEXT)
    assert json.loads((folder / "config.json").read_text())["tied_head"] is (head != "its own")
    assert ("lm_head.weight" in stored(folder)) is (head == "its own")
    assert_same_logits(folder, meta_logits(state, META_PARAMS, TOKENS))
