"""The proof that convert_hf_checkpoint.py stops at bad input: a clear message, status 2, no half a file."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
from conversion import hub, weight_files
from conversion.convert import convert
from conversion.tables import HF_TYPES
from models import load_model
from models.utils.errors import UserError, run_main
from tests.published import META_PARAMS, config_of, meta_state, state_of, write, write_meta

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the script in this process, expecting status 2; the message it ends with, on one line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(convert_hf_checkpoint.main)
        message = capsys.readouterr().err
        assert end.value.code == 2 and message.startswith("error: ")
        folder = Path(arguments[0])
        left = [path.name for path in folder.glob("*") if path.name.startswith(("converted", "reversed"))]
        assert left == []
        return message.removeprefix("error: ").rstrip("\n")

    return run


def one_line(message):
    assert "\n" not in message, "one problem is one line"
    return message


# config.json ------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path, fails):
    assert "no such folder" in one_line(fails(tmp_path / "nowhere"))
    assert "checkpoints/tipo: no such folder" in one_line(fails("checkpoints/tipo"))


def test_no_config(tmp_path, fails):
    write(tmp_path, "llama")
    (tmp_path / "config.json").unlink()
    assert "no config.json" in one_line(fails(tmp_path))


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"llama"', "\udcff", "[" * 100_000])
def test_broken_config(text, tmp_path, fails):
    write(tmp_path, "llama")
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    assert "config.json" in one_line(fails(tmp_path))


@pytest.mark.parametrize("model_type", [None, "falcon", 7, ["llama"]])
def test_unknown_model_type_lists_those_supported(model_type, tmp_path, fails):
    write(tmp_path, "llama", config={**config_of("llama"), "model_type": model_type})
    assert f"supported: {', '.join(HF_TYPES)}" in one_line(fails(tmp_path))


REFUSED = [
    ("llama", "hidden_act", "gelu"),
    ("llama", "pretraining_tp", 2),
    ("llama", "rope_interleaved", True),
    ("llama", "is_encoder_decoder", True),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("llama", "rope_scaling", [1]),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "sliding_window", 4096),
    ("llama", "quantization_config", {"bits": 4}),
    ("mistral", "sliding_window", 4096),
    ("mistral", "layer_types", ["full_attention"]),
    ("qwen2", "use_sliding_window", True),
    ("qwen2", "use_mrope", True),
    ("qwen2", "layer_types", ["sliding_attention"] * 3),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_weights", "true"),
    ("gpt2", "scale_attn_weights", 1),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "reorder_and_upcast_attn", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "tie_word_embeddings", False),
    ("gpt2", "attn_pdrop", 0.2),
    ("llama", "vocab_size", "many"),
    ("llama", "hidden_size", 0),
    ("llama", "num_attention_heads", -8),
    ("llama", "num_hidden_layers", True),
    ("llama", "num_key_value_heads", 2.5),
    ("llama", "rms_norm_eps", "1e-5"),
    ("llama", "rope_theta", None),
    ("llama", "attention_bias", "no"),
    ("llama", "num_hidden_layers", 10**12),
    ("llama", "intermediate_size", 10**30),
]


@pytest.mark.parametrize("kind, field, value", REFUSED)
def test_a_field_is_refused_by_its_name(kind, field, value, tmp_path, fails):
    config = {name: v for name, v in config_of(kind).items() if name != "rope_parameters"}
    write(tmp_path, kind, config={**config, field: value})
    message = one_line(fails(tmp_path))
    spoken = {"num_hidden_layers": "layers", "intermediate_size": "config.json"}
    assert field in message or spoken[field] in message
    assert "config.json" in message


def test_mistral_that_is_silent_has_a_window(tmp_path, fails):
    config = config_of("mistral")
    del config["sliding_window"]
    message = one_line(fails(write(tmp_path, "mistral", config=config)))
    assert "sliding_window is 4096 (as transformers takes it" in message


def test_an_unknown_field_may_be_let_pass(tmp_path, fails):
    write(tmp_path, "llama", config={**config_of("llama"), "logit_softcap": 30.0, "flavour": "sweet"})
    message = one_line(fails(tmp_path))
    assert "--allow logit_softcap --allow flavour" in message
    assert "flavour" in fails(tmp_path, "--allow", "logit_softcap")
    assert "--allow flavor: there is no such field" in fails(tmp_path, "--allow", "flavor")
    convert(tmp_path, allow=["flavour", "logit_softcap"])


def test_a_field_with_one_value_cannot_be_let_pass(tmp_path, fails):
    write(tmp_path, "llama", config={**config_of("llama"), "hidden_act": "gelu"})
    assert "hidden_act is 'gelu'" in fails(tmp_path, "--allow", "hidden_act")


def test_what_is_converted_is_not_converted_again(tmp_path, fails):
    folder = convert(write(tmp_path, "llama"), out=tmp_path / "new")
    assert "converted already" in one_line(fails(folder))


# Tensors ----------------------------------------------------------------------------------------------------


def test_a_missing_tensor(tmp_path, fails):
    state = state_of("llama")
    del state["model.layers.1.mlp.up_proj.weight"]
    message = one_line(fails(write(tmp_path, "llama", state=state)))
    assert "model.layers.{n}.mlp.up_proj.weight (40, 32) is missing (n = 1)" in message


def test_a_tensor_too_many(tmp_path, fails):
    state = {**state_of("llama"), "model.layers.0.self_attn.q_norm.weight": torch.ones(10)}
    message = one_line(fails(write(tmp_path, "llama", state=state)))
    assert "model.layers.{n}.self_attn.q_norm.weight (10,) has no place in the model (n = 0)" in message


def test_a_layer_too_many(tmp_path, fails):
    write(tmp_path, "gpt2", config={**config_of("gpt2"), "n_layer": 2})
    assert "transformer.h.{n}.ln_1.weight (24,) has no place in the model (n = 2)" in fails(tmp_path)


def test_a_wrong_shape(tmp_path, fails):
    state = {**state_of("gpt2"), "transformer.h.2.attn.c_attn.weight": torch.ones(24, 71)}
    message = one_line(fails(write(tmp_path, "gpt2", state=state)))
    assert "has shape (24, 71), where the config asks for (24, 72) (n = 2)" in message


def test_a_matrix_that_lies_the_other_way_round(tmp_path, fails):
    state, name = state_of("llama"), "model.layers.1.mlp.up_proj.weight"
    here, there = (tuple(tensor.shape) for tensor in (state[name].T, state[name]))
    message = one_line(fails(write(tmp_path, "llama", state={**state, name: state[name].T.contiguous()})))
    assert f"mlp.up_proj.weight has shape {here}, where the config asks for {there} (n = 1)" in message


def test_an_untied_head_that_nobody_fills(tmp_path, fails):
    state = state_of("llama-3")
    config = {**config_of("llama-3"), "tie_word_embeddings": False}
    assert "lm_head.weight (61, 32) is missing" in one_line(
        fails(write(tmp_path, "llama-3", state=state, config=config))
    )


def test_biases_that_the_config_denies_and_biases_it_claims(tmp_path, fails):
    config = {**config_of("llama"), "attention_bias": True}
    message = fails(write(tmp_path, "llama", config=config))
    assert "model.layers.{n}.self_attn.k_proj.bias (20,) is missing (n = 0..2)" in message
    config = {**config_of("llama-biases"), "mlp_bias": False}
    message = fails(write(tmp_path, "llama-biases", config=config))
    assert "model.layers.{n}.mlp.up_proj.bias (40,) has no place in the model (n = 0..2)" in message


def test_every_problem_is_listed_at_once(tmp_path, fails):
    state = state_of("llama")
    del state["model.norm.weight"], state["model.layers.0.mlp.up_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.ones(3)
    state["extra.weight"] = torch.ones(2, 3)
    state["model.layers.1.self_attn.q_proj.weight"] = torch.ones(80, 32, dtype=torch.int8)
    for arguments in ([], ["--inspect"]):
        lines = fails(write(tmp_path, "llama", state=state), *arguments).splitlines()
        assert lines[0].endswith("5 problems, nothing was written:")
        assert sorted(map(str.strip, lines[1:])) == [
            "extra.weight (2, 3) has no place in the model",
            "model.layers.{n}.mlp.up_proj.weight (40, 32) is missing (n = 0)",
            "model.layers.{n}.mlp.up_proj.weight has shape (3,), where the config asks for (40, 32) (n = 2)",
            "model.layers.{n}.self_attn.q_proj.weight is stored as I8, which is not supported (n = 1)",
            "model.norm.weight (32,) is missing",
        ]


def test_a_long_list_ends(tmp_path, fails):
    state = state_of("llama") | {f"extra_{i}.weight": torch.ones(1) for i in range(50)}
    lines = fails(write(tmp_path, "llama", state=state)).splitlines()
    assert len(lines) == 22 and lines[-1].strip() == "... and 30 more"


def test_a_tensor_stored_under_two_names(tmp_path, fails):
    state = {**state_of("gpt2"), "ln_f.weight": torch.ones(24)}
    assert "ln_f.weight and transformer.ln_f.weight are the same tensor" in one_line(
        fails(write(tmp_path, "gpt2", state=state))
    )


# Files of weights -------------------------------------------------------------------------------------------


def test_no_weights(tmp_path, fails):
    write(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert "no weights" in one_line(fails(tmp_path))


@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "old", "safetensors shards", "bin shards", "old shards"]
)
@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_truncated_weights(form, size, tmp_path, fails):
    write(tmp_path, "llama", form)
    path = sorted(path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
    path.write_bytes(path.read_bytes()[:size])
    assert path.name in one_line(fails(tmp_path))


@pytest.mark.parametrize("form", ["safetensors shards", "bin shards"])
def test_a_shard_that_is_not_there(form, tmp_path, fails):
    write(tmp_path, "llama", form)
    gone = next(tmp_path.glob("*-00002-of-*"))
    gone.unlink()
    message = one_line(fails(tmp_path))
    assert "index.json" in message and gone.name in message


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_tensor_that_the_index_names_and_no_shard_has(tmp_path, fails):
    write(tmp_path, "llama", "safetensors shards")
    rewrite_index(
        tmp_path, lambda weight_map: weight_map.update({"more.weight": "model-00001-of-00003.safetensors"})
    )
    assert "more.weight is not in model-00001-of-00003.safetensors" in one_line(fails(tmp_path))


def test_a_tensor_in_two_shards(tmp_path, fails):
    write(tmp_path, "llama", "safetensors shards")
    last = tmp_path / "model-00003-of-00003.safetensors"
    save_file({**load_file(last), "model.embed_tokens.weight": torch.ones(61, 32)}, last)
    assert "model.embed_tokens.weight is also in model-00001-of-00003" in one_line(fails(tmp_path))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "{outside}/secret.safetensors", "a/b.safetensors", "..", 7, None]
)
def test_an_index_that_points_elsewhere(name, tmp_path, fails):
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file(state_of("llama"), outside / "secret.safetensors")
    save_file(state_of("llama"), tmp_path / "secret.safetensors")
    folder = write(tmp_path / "llama", "llama", "safetensors shards")
    name = name.format(outside=outside) if isinstance(name, str) else name
    rewrite_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    message = one_line(fails(folder))
    assert "index.json" in message and str(name) in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "all"])
def test_an_index_without_a_map(weight_map, tmp_path, fails):
    write(tmp_path, "llama", "safetensors shards")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in one_line(fails(tmp_path))


class RunsCode:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "stream", "bare pickle", "inside a tensor's place"])
def test_a_pickle_that_would_run_code_is_not_run(form, tmp_path, fails):
    mark = tmp_path / "it-ran"
    folder = write(tmp_path / "llama", "llama", "bin")
    path = folder / "pytorch_model.bin"
    content = (
        RunsCode(mark) if form == "bare pickle" else {**state_of("llama"), "lm_head.weight": RunsCode(mark)}
    )
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "stream")
    message = one_line(fails(folder))
    assert "refused" in message and "nothing in it was run" in message and "mkdir" in message
    assert not mark.exists()

    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file does run code where it is trusted"


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {"a": torch.ones(1)}}, {"step": 3}, {5: torch.ones(1)}]
)
def test_a_pickle_of_something_else(content, tmp_path, fails):
    folder = write(tmp_path, "llama", "bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in one_line(fails(folder))


def test_a_zip_of_something_else(tmp_path, fails):
    folder = write(tmp_path, "llama", "bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("readme", "nothing here")
    assert "pytorch_model.bin: cannot be read" in one_line(fails(folder))


# Writing ----------------------------------------------------------------------------------------------------


def test_disk_full(tmp_path, fails, monkeypatch):
    write(tmp_path, "llama")
    written = []

    def write_tensor(file, tensor, spec):
        written.append(spec.name)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "write_tensor", write_tensor)
    message = one_line(fails(tmp_path))
    assert "No space left on device" in message and "--out" in message
    assert len(written) == 5


def test_a_failed_conversion_leaves_the_old_one_whole(tmp_path, monkeypatch):
    convert(write(tmp_path, "llama"))
    before = load_model(tmp_path).state_dict()

    def write_tensor(file, tensor, spec):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_files, "write_tensor", write_tensor)
    with pytest.raises(UserError, match="No space left"):
        convert(tmp_path, dtype=torch.bfloat16)
    after = load_model(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "converted.partial").exists()


def run_script(arguments, prelude):
    """The script in a process of its own, after some lines that arrange an accident."""
    code = f"import convert_hf_checkpoint as script\n{prelude}\nscript.run_main(script.main)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_a_real_limit_on_what_can_be_written(tmp_path):
    write(tmp_path, "llama")
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    done = run_script([tmp_path], prelude)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.startswith("error: ")
        and "File too large" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_killed_and_run_again(tmp_path):
    write(tmp_path, "llama")
    prelude = """
from conversion import weight_files
write_tensor, count = weight_files.write_tensor, []
def kill(file, tensor, spec):
    write_tensor(file, tensor, spec)
    count.append(spec)
    if len(count) == 7:
        import os, signal
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
weight_files.write_tensor = kill
"""
    assert run_script([tmp_path], prelude).returncode == -signal.SIGKILL
    left = tmp_path / "converted.partial" / "model.safetensors"
    assert left.stat().st_size > 10_000, "the kill came in the middle"
    assert not (tmp_path / "converted").exists()
    with pytest.raises(UserError, match="not converted yet"):
        load_model(tmp_path)

    done = run_script([tmp_path], "")
    assert (done.returncode, done.stderr) == (0, "") and "converted" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "converted"}
    load_model(tmp_path)


def test_out_does_not_replace_what_is_there(tmp_path, fails):
    write(tmp_path / "llama", "llama")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("dear")
    for out in (tmp_path / "precious", tmp_path / "precious" / "letter.txt", tmp_path / "llama"):
        assert "--out" in one_line(fails(tmp_path / "llama", "--out", out))
    assert (tmp_path / "precious" / "letter.txt").read_text() == "dear"
    convert(tmp_path / "llama", out=tmp_path / "new" / "place")
    load_model(tmp_path / "new" / "place")


def test_reverse_of_what_was_not_converted(tmp_path, fails):
    assert "not converted yet" in one_line(fails(write(tmp_path, "llama"), "--reverse"))


def test_reverse_of_a_damaged_folder(tmp_path, fails):
    folder = convert(write(tmp_path / "llama", "llama"), out=tmp_path / "new")
    state = load_file(folder / "model.safetensors")
    del state["final_norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert "final_norm.weight (32,) is missing" in one_line(fails(folder, "--reverse"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "float8"],
        ["--max-seq-len", "-1"],
        ["--rope-factor", "nan"],
        ["--rope-factor", "inf"],
        ["--typo"],
        ["x"],
    ],
)
def test_bad_arguments(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", str(write(tmp_path, "llama")), *arguments])
    with pytest.raises(SystemExit) as end:
        run_main(convert_hf_checkpoint.main)
    assert end.value.code == 2 and arguments[0] in capsys.readouterr().err


# Meta's layout ----------------------------------------------------------------------------------------------


def test_meta_asks_for_what_params_json_leaves_out(tmp_path, fails):
    write_meta(tmp_path, params={**META_PARAMS, "use_scaled_rope": True})
    message = one_line(fails(tmp_path))
    assert "--max-seq-len" in message and "--rope-factor" in message
    assert "--max-seq-len" not in fails(tmp_path, "--max-seq-len", "64")
    assert "--rope-factor" not in fails(tmp_path, "--rope-factor", "8")


def test_meta_options_are_for_meta_alone(tmp_path, fails):
    assert "--max-seq-len" in one_line(fails(write(tmp_path / "hf", "llama"), "--max-seq-len", "64"))
    write_meta(tmp_path / "meta")
    assert "--rope-factor" in one_line(fails(tmp_path / "meta", "--max-seq-len", "64", "--rope-factor", "8"))


@pytest.mark.parametrize(
    "change",
    [{"dim": "24"}, {"n_heads": 0}, {"n_layers": None}, {"quantization_args": {}}, {"norm_eps": "x"}],
)
def test_bad_params(change, tmp_path, fails):
    write_meta(tmp_path, params={**META_PARAMS, **change})
    message = one_line(fails(tmp_path, "--max-seq-len", "64"))
    assert "params.json" in message and next(iter(change)) in message


def test_meta_slices_that_do_not_fit(tmp_path, fails):
    write_meta(tmp_path / "a", num_files=3)
    (tmp_path / "a" / "consolidated.01.pth").unlink()
    assert "consolidated.00.pth, consolidated.01.pth" in one_line(
        fails(tmp_path / "a", "--max-seq-len", "64")
    )

    write_meta(tmp_path / "b", num_files=2)
    (tmp_path / "b" / "consolidated.01.pth").unlink()
    assert "where the config asks for" in fails(tmp_path / "b", "--max-seq-len", "64")

    write_meta(tmp_path / "c", num_files=2)
    state = meta_state()
    del state["norm.weight"]
    torch.save(state, tmp_path / "c" / "consolidated.01.pth")
    assert "consolidated.01.pth" in one_line(fails(tmp_path / "c", "--max-seq-len", "64"))
    torch.save({**meta_state(), "norm.weight": torch.ones(5)}, tmp_path / "c" / "consolidated.01.pth")
    assert "does not fit" in one_line(fails(tmp_path / "c", "--max-seq-len", "64"))


# The hub ----------------------------------------------------------------------------------------------------


class FakeHub:
    """A hub with one repository, or one that answers every request with an error."""

    def __init__(self, monkeypatch, tmp_path, files=(), error=None):
        self.files, self.error, self.asked = files, error, None
        monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path / "checkpoints")
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def model_info(self, name):
        if self.error:
            raise self.error
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": file}) for file in self.files]})

    def download(self, name, local_dir, allow_patterns):
        self.asked = [file for file in self.files if any(Path(file).match(p) for p in allow_patterns)]
        write(local_dir, "gpt2")


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers, request, status_code = {}, None, 401


def refused(kind):
    return kind("401 Client Error", response=Response())


@pytest.mark.parametrize(
    "error, words",
    [
        (refused(errors.GatedRepoError), "gated: accept its licence on https://huggingface.co/meta/llama"),
        (refused(errors.RepositoryNotFoundError), "no such repository"),
        (refused(errors.HfHubHTTPError), "the hub refused"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.HTTPError("Name or service not known"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("nothing here"), "cannot be reached"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"),
    ],
)
def test_what_the_hub_may_answer(error, words, tmp_path, monkeypatch, fails):
    FakeHub(monkeypatch, tmp_path, error=error)
    message = one_line(fails("meta/llama"))
    assert words in message
    if isinstance(error, errors.RepositoryNotFoundError):
        assert "hf auth login" in message and "HF_TOKEN" in message


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch, capsys):
    files = [
        "config.json",
        "tokenizer.json",
        "README.md",
        "tf_model.h5",
        "onnx/model.onnx",
        "pytorch_model.bin",
    ]
    files += ["model.safetensors", "original/consolidated.00.pth", "generation_config.json"]
    there = FakeHub(monkeypatch, tmp_path, files)
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", "openai-community/gpt2"])
    run_main(convert_hf_checkpoint.main)
    assert there.asked == ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
    load_model(tmp_path / "checkpoints" / "gpt2")

    there.files = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "x.bin"]
    run_main(convert_hf_checkpoint.main)
    assert there.asked == there.files[:3]
    there.files = [
        "original/params.json",
        "original/consolidated.00.pth",
        "original/tokenizer.model",
        "LICENSE",
    ]
    run_main(convert_hf_checkpoint.main)
    assert there.asked == there.files[:3]


def test_two_repositories_do_not_mix(tmp_path, monkeypatch, fails):
    FakeHub(monkeypatch, tmp_path, ["config.json", "model.safetensors"])
    hub.fetch("openai-community/gpt2")
    hub.fetch("openai-community/gpt2")
    assert "already holds openai-community/gpt2" in one_line(fails("somebody/gpt2"))
