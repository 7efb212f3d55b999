"""The proof of models/__init__.py: configs that say what is wrong with them, checkpoints that load whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models import config_from_dict, config_names, config_to_dict, create_model, load_config, load_model
from models.utils.errors import UserError
from models.utils.machine import instructions

LLAMA = {
    "model": "llama", "vocab_size": 50, "max_seq_len": 16, "d_model": 8, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 4, "d_ff": 12, "norm_eps": 1e-5, "rope_base": 100.0, "rope_scaling": None,
    "qkv_bias": False, "o_bias": False, "ffn_bias": False, "tied_head": True,
}  # fmt: skip
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8}


# Configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config_names())
def test_every_config_of_the_project_can_be_read_and_written(name):
    model_name, config = load_config(name)
    path = models.CONFIGS_FOLDER / f"{name}.json"
    assert config_to_dict(model_name, config) == json.loads(path.read_text())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_modl": 8}, "unknown field 'd_modl'; did you mean 'd_model'"),
        ({"d_model": None}, "'d_model' is None, where a positive int is expected"),
        ({"d_model": 8.0}, "'d_model' is 8.0, where a positive int is expected"),
        ({"d_model": True}, "'d_model' is True, where a positive int is expected"),
        ({"d_model": -8}, "'d_model' is -8, where a positive int is expected"),
        ({"d_model": 0}, "'d_model' is 0, where a positive int is expected"),
        ({"norm_eps": True}, "'norm_eps' is True, where a number is expected"),
        ({"norm_eps": "1e-5"}, "'norm_eps' is '1e-5', where a number is expected"),
        ({"norm_eps": float("nan")}, "'norm_eps' is nan, where a finite number above 0 is expected"),
        ({"norm_eps": float("inf")}, "'norm_eps' is inf, where a finite number above 0 is expected"),
        ({"norm_eps": 0.0}, "'norm_eps' is 0.0, where a finite number above 0 is expected"),
        ({"rope_base": -10000}, "'rope_base' is -10000.0, where a finite number above 0 is expected"),
        ({"rope_base": 10**400}, "where a number is expected"),
        ({"num_layers": 10**9}, "'num_layers' is 1000000000, where a positive int is expected, at most 1000"),
        ({"num_heads": 10**7}, "at most 1000000"),
        ({"d_ff": 10**30}, "at most 2147483647"),
        (
            {"d_model": 2**31 - 1, "vocab_size": 2**31 - 1, "d_ff": 2**31 - 1, "max_seq_len": 2**31},
            "max_seq_len",
        ),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 1.0}}, "low_freq_factor must be below high"),
        ({"rope_scaling": {**SCALING, "factor": 0.0}}, "a finite number above 0 is expected"),
        ({"tied_head": 1}, "'tied_head' is 1, where true or false is expected"),
        ({"rope_scaling": 8.0}, "'rope_scaling' is 8.0, where RopeScaling or null is expected"),
        ({"rope_scaling": {**SCALING, "factr": 1.0}}, "'rope_scaling': unknown field 'factr'; did you mean"),
        ({"rope_scaling": {"factor": 8.0}}, "'rope_scaling': field 'low_freq_factor' is missing"),
        ({"model": "lama"}, "\"model\" is 'lama'; did you mean 'llama'"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_kv_heads must divide num_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"model": ["llama"]}, "\"model\" is ['llama']"),
    ],
)
def test_a_config_that_is_wrong_says_where(change, message):
    with pytest.raises(UserError, match="^here: ") as error:
        config_from_dict({**LLAMA, **change}, "here")
    assert message in str(error.value)


def test_a_missing_field_is_named():
    for field in LLAMA:
        with pytest.raises(UserError, match=field):
            config_from_dict({name: value for name, value in LLAMA.items() if name != field}, "here")


def test_an_int_may_stand_for_a_float_and_nested_groups_are_built():
    _, config = config_from_dict({**LLAMA, "rope_base": 100, "rope_scaling": SCALING}, "here")
    assert type(config.rope_base) is float and config.rope_scaling.factor == 8.0
    assert config_to_dict("llama", config)["rope_scaling"] == SCALING


def test_misspelt_names_suggest_the_nearest():
    with pytest.raises(UserError, match="did you mean 'llama-3-8b'"):
        load_config("llama-3-8B")
    with pytest.raises(UserError, match="unknown field 'vocab'; did you mean 'vocab_size'"):
        create_model("gpt2", vocab=10)
    with pytest.raises(UserError, match="no such file"):
        load_config("nowhere/config.json")


# Loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A converted checkpoint with fresh weights."""
    model_name, config = config_from_dict(LLAMA, "here")
    model = models.build_model(model_name, config, device="cpu")
    model.init_weights()
    write(tmp_path, {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def test_a_model_loads_in_eval_mode_with_its_own_dtype_and_one_tied_tensor(folder):
    model = load_model(folder)
    assert not model.training and model.lm_head.weight is model.token_embed.weight
    tensors = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items() if name in tensors
    )
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_fp32_matrices_are_laid_out_by_columns_where_that_is_faster(folder):
    """With AVX-512: see models/utils/kernels/onednn.py."""
    weight = load_model(folder).layers[0].attn.q_proj.weight
    by_columns = weight.T.is_contiguous() and not weight.is_contiguous()
    assert by_columns == ("avx512" in instructions())
    assert load_model(folder, dtype=torch.bfloat16).layers[0].attn.q_proj.weight.is_contiguous()


def test_shards_load_like_one_file(folder):
    whole = load_model(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 2}.safetensors"
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_model(folder).state_dict().items())


def test_a_checkpoint_that_does_not_fit_lists_what_does_not(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_norm.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors["layers.0.attn.k_proj.weight"] = torch.zeros(8, 8)
    write(folder, tensors)
    with pytest.raises(UserError) as error:
        load_model(folder)
    for words in ("final_norm.weight is missing", "stranger has no place", "k_proj.weight has shape (8, 8)"):
        assert words in str(error.value)


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nothing")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match="model.safetensors: .*convert the checkpoint again"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="convert the checkpoint again"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"not converted yet; run: python convert_hf_checkpoint\.py"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        load_model(folder)


def test_building_a_model_without_memory_does_not_bring_the_compiler():
    """It takes most of a second, and leaves a folder in TMPDIR."""
    program = """
import sys
from models import MODEL_NAMES, build_model, config_names, load_config
built = set()
for name in config_names():
    model_name, config = load_config(name)
    if model_name not in built:
        model = build_model(model_name, config)
        assert all(parameter.is_meta for parameter in model.parameters())
        built.add(model_name)
assert built == set(MODEL_NAMES), built
assert "torch._dynamo" not in sys.modules
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_list_of_numbers():
    """It is written as JSON has it, and read as what a frozen config can hold."""
    fields = config_to_dict(*load_config("tiny-moe-python"))
    assert config_from_dict({**fields, "dense_layers": [0, 1]}, "x")[1].dense_layers == (0, 1)
    for value in ([True], [-1], [0.5], ["a"], 3, None, [2**40]):
        with pytest.raises(UserError, match="'dense_layers' is .*, where a list of numbers is expected"):
            config_from_dict({**fields, "dense_layers": value}, "x")
