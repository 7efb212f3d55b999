"""Fine-tuning through adapters: nothing but them is trained and kept, and all of them are read again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint import open_checkpoint
from models.utils.errors import UserError
from models.utils.lora import adapters
from models.utils.quantize import Int4Linear, Quantization
from models.utils.training_notes import unfinished_run
from run import main as run
from runs_ar.chat import Conversation
from runs_train import adapters as page
from runs_train import fine_tuning
from runs_train.lora import main, parse_options
from tests.training_runs import CONFIGS, small_run, state_of

LINES = "".join(json.dumps({"prompt": f"Say it, {n}.", "completion": "Good day."}) + "\n" for n in range(40))
WIDE = CONFIGS["lora"] | {"dropout": 0.0, "d_model": 64, "d_ff": 128}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int4"])
def finished(request, tmp_path_factory):
    """(how, the folder of a run that learned to say one thing)."""
    root = tmp_path_factory.mktemp(request.param)
    how = ["--quantize", "int4"] if request.param == "int4" else []
    how += ["--dtype", "bfloat16" if request.param == "bfloat16" else "float32"]
    arguments = small_run("lora", root, config=WIDE, data=LINES)
    options = ["--eval-every", "30", "--rank", "16", "--alpha", "32", "--dropout", "0"]
    main(arguments("run", *how, *options, steps=60))
    return request.param, root / "run"


def test_it_learns_what_is_said(finished):
    """Though the head stays what it was, random, and cannot be very sure of anything."""
    how, folder = finished
    (_, before), *_, (_, after) = state_of(folder)["evaluations"]
    assert after < before - 1, (before, after)
    assert set(state_of(folder)["answers"][1]) != set(state_of(folder)["answers"][0])


def test_what_is_kept_is_small(finished):
    """Two matrices for each layer and their means; of the model nothing."""
    how, folder = finished
    stored, state = load_file(folder / "adapter_model.safetensors"), state_of(folder)
    # GPT-2's q, k and v are one matrix there, whose adapter has the rank of three.
    assert len(stored) == 2 * 4 * 2 and len(state["trained"]) == 2 * 6 * 2
    assert not {"model", "config.json"} & set(state) and not (folder / "config.json").exists()
    assert all(tensor.dtype == torch.float32 for tensor in state["trained"].values())
    assert (folder / "chat_template.jinja").is_file() and "Good day." in (folder / "README.md").read_text()
    assert unfinished_run(folder) is None or (folder / "adapter_config.json").is_file()


def test_run_py_says_what_the_run_said(finished):
    """Merged, or beside the codes that it was trained beside."""
    how, folder = finished
    quantization = Quantization("int4", 32) if how == "int4" else None
    base = open_checkpoint(
        folder.parent / "base", device="cpu", dtype=torch.float32, quantization=quantization, adapter=folder
    )
    model = base.load()
    assert bool(adapters(model)) == (how == "int4")
    options = parse_options(small_run("lora", folder.parent, config=WIDE, data=LINES)("run"))
    options.device = torch.device("cpu")
    corpus = fine_tuning.read_corpus(options.data)
    samples = fine_tuning.Run.choose_samples
    holder = type("Holder", (), {"tokenizer": base.tokenizer, "context": 64})
    questions = [question for question, _, _ in samples(holder, corpus.held_out)]
    said = [
        "".join(Conversation(model, base.tokenizer).answer(q, max_new_tokens=48)).strip() for q in questions
    ]
    if how != "bfloat16":  # which rounds otherwise there
        assert [" ".join(text.split()) for text in said] == state_of(folder)["answers"][1]


def test_the_command_runs_it(finished, capsys, monkeypatch):
    how, folder = finished
    lines = iter(["Say it, 7.", None])

    def asked(prompt=""):
        if (line := next(lines)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", asked)
    command = [
        str(folder.parent / "base"),
        "--adapter",
        str(folder),
        "--chat",
        "--device",
        "cpu",
        "--temperature",
        "0",
    ]
    run([*command, "--dtype", "float32"])
    assert len(capsys.readouterr().out.strip()) > 0
    with pytest.raises(
        UserError, match="holds an adapter, no model; give the model, and this with --adapter"
    ):
        run([str(folder), "--chat"])
    if how == "int4":
        with pytest.raises(
            UserError, match="--adapter stays beside a quantized base, which --compile does not"
        ):
            run([*command, "--quantize", "int4", "--compile"])


def test_the_base_is_held_as_it_is_multiplied(tmp_path, monkeypatch):
    """In bf16 half the bytes, in int4 codes; what is trained is in fp32 always."""
    seen = {}
    monkeypatch.setattr(page, "save", lambda run, folder: seen.update(model=run.model))
    monkeypatch.setattr(page.tuning, "report", lambda run, folder: None)
    for how in ["--dtype", "bfloat16"], ["--dtype", "float32"], ["--quantize", "int4"]:
        main(small_run("lora", tmp_path)("run", "--restart", *how, steps=3))
        layers = adapters(seen["model"]).values()
        assert (
            {layer.A.dtype for layer in layers} == {torch.float32} == {seen["model"].token_embed.weight.dtype}
        )
        if how[0] == "--dtype":
            assert {layer.base.weight.dtype for layer in layers} == {getattr(torch, how[1])}
        else:
            assert all(isinstance(layer.base, Int4Linear) for layer in layers)


MISTAKES = {
    "no rank": (["--rank", "0"], "--rank: '0' is not a whole number from 1"),
    "no such layer": (
        ["--targets", "q_proj,query"],
        "no linear layer is called 'query'; this model has: down",
    ),
    "all dropped": (["--dropout", "1"], "--dropout: '1' is not a number from 0 to 0.99"),
    "a group of int8": (["--quantize", "int8", "--group-size", "32"], "a group size goes with int4"),
    "a group alone": (["--group-size", "32"], "--group-size goes with --quantize int4"),
    "an unknown checkpoint": (["--checkpoint", "tiny-lama"], "tiny-lama: no such checkpoint"),
    "an image model": (["--checkpoint", "tiny-vit-digits"], "a one-pass model; lora trains a decoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        main(small_run("lora", tmp_path)("run", *options))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option, value", [("--rank", "3"), ("--alpha", "5"), ("--targets", "q_proj")])
def test_a_run_goes_on_only_as_it_began(tmp_path, option, value):
    command = small_run("lora", tmp_path)
    main(command("run", steps=3))
    with pytest.raises(UserError, match=f"that run was started with {option[2:]} "):
        main(command("run", option, value, steps=3))


def test_a_state_of_other_adapters(tmp_path):
    command = small_run("lora", tmp_path)
    main(command("run", steps=3))
    path = tmp_path / "run" / "training" / "state.pt"
    state = torch.load(path, weights_only=True)
    state["trained"].popitem()
    torch.save(state, path)
    with pytest.raises(UserError, match="state.pt: is no state of this run .*--restart"):
        main(command("run", steps=3))
