"""The proof that convert_hf_checkpoint.py stops at bad input: a clear message, status 2, no half a file."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
from conversion import hub, weight_files
from conversion.convert import convert, reverse
from conversion.tables import HF_TYPES
from models import load_model
from models.utils.errors import UserError, run_main
from models.utils.files import MARKER
from tests.published import META_PARAMS, config_of, meta_state, state_of, write, write_meta
from tests.tiny_marian import save_checkpoint

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
    ("gpt2", "attn_pdrop", "0.2"),
    ("llama", "rms_norm_eps", 0),
    ("llama", "rms_norm_eps", -1e-5),
    ("llama", "rms_norm_eps", float("inf")),
    ("llama", "rms_norm_eps", 10**400),
    ("llama", "rope_theta", -1.0),
    ("llama", "rope_theta", 0),
    ("gpt2", "resid_pdrop", 5),
    ("gpt2", "embd_pdrop", -0.1),
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
    ours = {"num_hidden_layers": "layers", "rms_norm_eps": "norm_eps", "rope_theta": "rope_base"}
    assert field in message or ours.get(field, "dropout") in message
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
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "converted"}


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
    (left,) = tmp_path.glob(".converted.*.partial/converted/model.safetensors")
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


# What is the user's -----------------------------------------------------------------------------------------


def test_a_link_called_converted_is_not_followed(tmp_path, monkeypatch, capsys):
    """An unpacked checkpoint may bring one."""
    folder = write(tmp_path / "llama", "llama")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    for name, arguments in (("converted", []), ("reversed", ["--reverse"])):
        (folder / name).symlink_to(precious)
        monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", str(folder), *arguments])
        with pytest.raises(SystemExit):
            run_main(convert_hf_checkpoint.main)
        assert f"{name}: is a link" in capsys.readouterr().err
        assert (folder / name).is_symlink() and (precious / "letter.txt").read_text() == "dear"
        (folder / name).unlink()
        if name == "converted":
            convert(folder)


def test_notes_in_a_converted_folder_and_backups_beside_it_stay(tmp_path):
    write(tmp_path, "llama")
    backup = convert(tmp_path).rename(tmp_path / "converted.old")
    (tmp_path / "converted.partial").mkdir()
    folder = convert(tmp_path)
    assert (backup / "config.json").exists() and (tmp_path / "converted.partial").exists()

    (folder / "notes.md").write_text("dear")
    with pytest.raises(UserError, match=r"converted: holds notes\.md, which this program did not write"):
        convert(tmp_path, dtype=torch.bfloat16)
    assert (folder / "notes.md").read_text() == "dear"


@pytest.mark.parametrize("name", ["converted", "reversed"])
def test_a_file_of_that_name_stays(name, tmp_path, monkeypatch):
    """Which is said before any work is done."""
    write(tmp_path, "llama")
    if name == "reversed":
        convert(tmp_path)
    (tmp_path / name).write_text("dear")
    monkeypatch.setattr("conversion.convert.write_moves", None)
    with pytest.raises(UserError, match=f"{name}: is there and no folder"):
        convert(tmp_path) if name == "converted" else reverse(tmp_path)
    assert (tmp_path / name).read_text() == "dear"


def test_a_folder_from_before_there_were_markers_is_replaced_if_it_is_nothing_else(tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = convert(tmp_path)
    (folder / MARKER).unlink()
    convert(tmp_path, dtype=torch.bfloat16)
    assert (folder / MARKER).exists()

    (folder / MARKER).unlink()
    for change in (lambda: (folder / "letter.txt").write_text("dear"), lambda: write(folder, "llama")):
        shutil.copytree(folder, tmp_path / "kept")
        change()
        with pytest.raises(UserError, match="did not write"):
            convert(tmp_path)
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)


def test_a_place_below_a_file_is_none(tmp_path, fails):
    folder = write(tmp_path / "llama", "llama")
    (tmp_path / "file").write_text("dear")
    for out in ("file", "file/new", "file/new/deep"):
        assert "--out" in one_line(fails(folder, "--out", tmp_path / out))
    assert (tmp_path / "file").read_text() == "dear"


def test_options_that_say_nothing(tmp_path, fails):
    folder = write(tmp_path, "llama")
    assert "--out says nothing to --inspect" in one_line(fails(folder, "--inspect", "--out", "x"))
    assert "--dtype says nothing to --inspect" in one_line(fails(folder, "--inspect", "--dtype", "float16"))
    assert "--model says nothing to --reverse" in one_line(fails(folder, "--reverse", "--model", "llama"))
    assert "--dtype says nothing to --gguf" in one_line(fails(folder, "--gguf", "F16", "--dtype", "float16"))
    assert "Q5_K" in one_line(fails(folder, "--gguf", "Q5_K"))
    for option in ("--out", "--model", "--calibrate"):
        assert option in one_line(fails(folder, option, ""))


def test_what_is_not_read_yet_says_so(tmp_path, fails):
    assert "x.gguf: no such file" in one_line(fails(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_text("GGUF")
    assert "holds GGUF files; convert one of them" in one_line(fails(tmp_path))
    assert "ends in the middle" in one_line(fails(tmp_path / "x.gguf"))
    write(tmp_path, "llama", config={**config_of("llama"), "quantization_config": {"bits": 4}})
    message = one_line(fails(tmp_path))
    assert "quantized checkpoints are not read" in message and "--allow" not in message


# Files that are none of the checkpoint's --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"]
)
def test_links_out_of_the_folder_are_not_followed(name, tmp_path, fails):
    folder = write(tmp_path / "llama", "llama")
    secret = tmp_path / "secret"
    secret.mkdir()
    place = folder / name
    if "/" in name:
        (secret / "config.json").write_text("{}")
        place.parent.symlink_to(secret)
    else:
        place.rename(secret / name) if place.exists() else (secret / name).write_text("{}")
        place.symlink_to(secret / name)
    assert "is a link that leads out of its folder" in one_line(fails(folder))


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_devices_and_pipes_are_not_copied(target, tmp_path, fails):
    folder = write(tmp_path / "llama", "llama")
    os.mkfifo(tmp_path / "pipe")
    (folder / "tokenizer.json").symlink_to(tmp_path / target)
    assert "tokenizer.json: is no regular file" in one_line(fails(folder))


def test_a_companion_of_a_terabyte_is_not_copied(tmp_path, fails):
    with open(write(tmp_path, "llama") / "vocab.txt", "wb") as file:
        file.truncate(10**12)
    assert "vocab.txt: has more than" in one_line(fails(tmp_path))


# Tensors that are none --------------------------------------------------------------------------------------

STRANGE = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1][:2]]),
    "expanded": lambda tensor: torch.zeros(1).expand(tensor.shape),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_pickle_of_tensors_that_are_not_plain(kind, tmp_path, fails):
    name, state = "model.embed_tokens.weight", state_of("llama")
    state[name] = STRANGE[kind](state[name])
    torch.save(state, write(tmp_path, "llama", "bin") / "pytorch_model.bin")
    assert "pytorch_model.bin" in one_line(fails(tmp_path))


def test_a_compressed_pickle_is_not_opened(tmp_path, fails):
    """A few bytes of it could become more than there is memory."""
    path = write(tmp_path, "llama", "bin") / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + bytes(1000))
    assert "is a compressed archive" in one_line(fails(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_no_parameter_has(dtype, tmp_path, fails):
    state = state_of("llama")
    state["model.norm.weight"] = torch.ones(32).to(dtype)
    write(tmp_path, "llama", state=state)
    assert "model.norm.weight is stored as" in one_line(fails(tmp_path))

    (tmp_path / "model.safetensors").unlink()
    folder = convert(write(tmp_path, "llama"))
    state = load_file(folder / "model.safetensors")
    save_file({**state, "final_norm.weight": torch.ones(32).to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"final_norm\.weight is stored as"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_are_no_numbers_stop_the_conversion(value, form, tmp_path, fails):
    state = state_of("gpt2")
    state["transformer.h.1.mlp.c_fc.weight"][3, 2:4] = value
    message = one_line(fails(write(tmp_path, "gpt2", form, state)))
    assert "transformer.h.1.mlp.c_fc.weight: 2 of its 960 numbers are NaN or infinite" in message


def test_names_from_a_file_reach_the_terminal_harmless(tmp_path, fails):
    """An escape sequence, a line end that forges a message, and a name of megabytes."""
    state = state_of("llama")
    bad = ["\x1b[2J", "a\nerror: all is well", "y" * 2_000_000]
    write(tmp_path, "llama", state=state | {name: torch.ones(1) for name in bad})
    for arguments in ([], ["--inspect"]):
        message = fails(tmp_path, *arguments)
        assert "\x1b" not in message and len(message.splitlines()) == 4 and len(message) < 5000
        assert "a\\nerror: all is well" in message


# Numbers that would take the machine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value", [("num_labels", 2**31), ("num_labels", 10**9), ("id2label", {"a": "b"})]
)
def test_labels_by_the_billion(field, value, tmp_path, fails, capsys):
    config = transformers.BertConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields = {name: v for name, v in fields.items() if name not in ("id2label", "label2id")}
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    capsys.readouterr()  # transformers' progress
    assert field in one_line(fails(tmp_path))


def test_llama3_scaling_between_equal_factors(tmp_path, fails):
    config = config_of("llama-3")
    config["rope_parameters"]["low_freq_factor"] = config["rope_parameters"]["high_freq_factor"]
    assert "low_freq_factor must be below" in one_line(fails(write(tmp_path, "llama-3", config=config)))


def test_a_converted_config_cannot_ask_for_a_billion_layers(tmp_path):
    folder = convert(write(tmp_path, "llama"))
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("num_layers", 10**9), ("d_ff", 10**30), ("head_dim", 2**30)):
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(UserError, match=f"{field}|no llama of such sizes|has shape"):
            load_model(folder)


# Tables that follow from the config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name, tensor",
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", 500.0 ** (-torch.arange(0, 10, 2) / 10)),
        ("llama", "model.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", torch.tensor([1.0, 0.5])),
    ],
)
def test_stored_frequencies_that_are_others(kind, name, tensor, tmp_path, fails):
    write(tmp_path, kind, state=state_of(kind) | {name: tensor})
    assert "inv_freq does not hold RoPE's frequencies" in one_line(fails(tmp_path))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_stored_positions_that_are_others(half, tmp_path, fails, capsys):
    """transformers computes with the table that is stored, so a file with another one means another model."""
    save_checkpoint(tmp_path)
    oracle = transformers.MarianMTModel.from_pretrained(tmp_path)
    name = f"model.{half}.embed_positions.weight"
    table, state = oracle.state_dict()[name], load_file(tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        save_file({**state, name: table.to(dtype)}, tmp_path / "model.safetensors")
        shutil.rmtree(convert(tmp_path))
    save_file({**state, name: table.roll(1, 0)}, tmp_path / "model.safetensors")
    capsys.readouterr()  # transformers' progress
    assert f"{name} does not hold sines and cosines" in one_line(fails(tmp_path))
