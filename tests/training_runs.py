"""Small runs of every training page. The pages are found by looking; each must have its small run here."""

import importlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import build_model, config_from_dict
from models.utils.command_line import CHECKPOINTS
from runs_train import text_data
from runs_train.dates_data import all_days, write_days
from runs_train.training_run import TrainingRun

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.stem for path in (ROOT / "runs_train").glob("*.py") if "def parse_options(" in path.read_text()
)
# Those that begin with fresh weights of a --config; the others tune a --checkpoint.
FRESH_PAGES = [
    page for page in PAGES if "add_folder_options(" in (ROOT / f"runs_train/{page}.py").read_text()
]
TEXT = Path(text_data.__file__).read_text(encoding="utf-8")
ROWS = list(write_days(all_days()[::90], 2, seed=0))

# Dropout draws random numbers in every step; a run that goes on must draw the same ones.
CONFIGS = {
    "language_model": {
        "model": "gpt2", "vocab_size": 300, "max_seq_len": 32, "d_model": 24, "num_layers": 2, "num_heads": 4,
        "d_ff": 48, "norm_eps": 1e-5, "dropout": 0.2,
    },
    "masked_language_model": {
        "model": "bert", "vocab_size": 300, "max_seq_len": 24, "num_segments": 2, "d_model": 16,
        "num_layers": 2, "num_heads": 2, "d_ff": 32, "norm_eps": 1e-12, "activation": "gelu", "dropout": 0.2,
        "pooler": False, "head": "masked_lm", "num_labels": None,
    },
    "seq2seq": {
        "model": "transformer", "vocab_size": 63, "max_seq_len": 40, "d_model": 16, "num_encoder_layers": 1,
        "num_decoder_layers": 2, "num_heads": 2, "d_ff": 24, "norm_eps": 1e-5, "dropout": 0.1,
        "activation": "relu", "positions": "sinusoidal", "window": None, "cross_downsample": 1,
        "scale_embedding": True, "output_bias": True, "pad_id": 62,
    },
    "image_classifier": {
        "model": "vision_transformer", "image_size": 8, "patch_size": 4, "num_channels": 1, "d_model": 16,
        "num_layers": 2, "num_heads": 2, "d_ff": 24, "norm_eps": 1e-6, "qkv_bias": True, "dropout": 0.2,
        "pooler": False, "num_labels": 1000,
    },
    # Of the vocabulary of tiny-llama-python, whose tokenizer they get.
    "sft": {
        "model": "gpt2", "vocab_size": 4096, "max_seq_len": 64, "d_model": 16, "num_layers": 2,
        "num_heads": 2, "d_ff": 32, "norm_eps": 1e-5, "dropout": 0.2,
    },
    "lora": {
        "model": "gpt2", "vocab_size": 4096, "max_seq_len": 64, "d_model": 32, "num_layers": 2,
        "num_heads": 2, "d_ff": 64, "norm_eps": 1e-5, "dropout": 0.2,
    },
    "dpo": {
        "model": "llama", "vocab_size": 4096, "max_seq_len": 64, "d_model": 16, "num_layers": 2,
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "d_ff": 32, "norm_eps": 1e-5, "rope_base": 1e4,
        "rope_scaling": None, "qkv_bias": False, "o_bias": False, "ffn_bias": False, "tied_head": True,
    },
}  # fmt: skip
CONFIGS["grpo"] = CONFIGS["dpo"]
CHATS = "".join(
    json.dumps({"prompt": f"What comes after {n}?", "completion": f"{n + 1}, and then {n + 2}."}) + "\n"
    for n in range(30)
)
PAIRS = "".join(
    json.dumps({"prompt": f"What comes after {n}?", "chosen": f"{n + 1}.", "rejected": f"{n}, or so."}) + "\n"
    for n in range(30)
)
PROMPTS = "".join(json.dumps({"prompt": f"Count: {n}", "answer": n + 1}) + "\n" for n in range(30))
REWARD = ROOT / "tests" / "data" / "letters.py"
# (what the file of data holds, or None where the data are a word; the options of the page's own)
DATA = {
    "language_model": (TEXT, ["--vocab-size", 400, "--batch-size", 2, "--lr", 0.01]),
    "masked_language_model": (TEXT, ["--vocab-size", 300, "--batch-tokens", 200, "--lr", 0.01]),
    "seq2seq": ("".join("\t".join(row) + "\n" for row in ROWS[::6]), ["--batch-size", 4]),
    "image_classifier": (None, ["--batch-size", 16, "--lr", 0.01]),
    "sft": (CHATS, ["--batch-tokens", 200, "--lr", 0.01]),
    "dpo": (PAIRS, ["--batch-tokens", 200, "--lr", 0.01]),
    "grpo": (
        PROMPTS,
        ["--reward", REWARD, "--questions", 2, "--group", 4, "--new-tokens", 8, "--updates", 4, "--lr", 0.01],
    ),
    "lora": (CHATS, ["--batch-tokens", 200, "--lr", 0.01, "--dropout", 0.1]),
}


def small_run(page, root, config=None, data=None):
    """(name of the folder, options) to the arguments of a small run inside `root`.

    config, data: other ones than the page's own here; root/config.json and root/data hold them.
    """
    content, own = DATA[page]
    (root / "config.json").write_text(json.dumps(config or CONFIGS[page]))
    what = ["--config", root / "config.json"]
    if page not in FRESH_PAGES:
        what = ["--checkpoint", small_base(root / "base", config or CONFIGS[page])]
    if content:
        (root / "data").write_text(data or content, encoding="utf-8")

    def arguments(folder, *options, steps=8):
        arguments = [*what, "--data", root / "data" if content else "digits"]
        arguments += ["--out", root / folder, "--steps", steps, "--warmup", 2, "--eval-every", 3]
        arguments += ["--save-every", 4, "--device", "cpu", *own, *options]
        return [str(argument) for argument in arguments]

    return arguments


def small_base(folder, config):
    """A converted checkpoint with random weights and the tokenizer of tiny-llama-python."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = build_model(*config_from_dict(config, "the base"), device="cpu")
    model.init_weights()
    # A tied matrix is named once.
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in "tokenizer.model", "tokenizer_config.json":
        (folder / name).write_bytes((CHECKPOINTS / "tiny-llama-python" / name).read_bytes())
    return folder


def main_of(page):
    return importlib.import_module(f"runs_train.{page}").main


def state_of(folder):
    return torch.load(folder / "training" / "state.pt", weights_only=True)


def weights_of(folder):
    """The file that a run leaves in the end."""
    (path,) = folder.glob("*model.safetensors")
    return path


def tokens_of(folder):
    """The folder in which a run keeps its tokens."""
    (tokens,) = (folder / "training").glob("tokens-*")
    return tokens


def goes_on_to_the_bit(train, root, monkeypatch, interrupt):
    """train(folder): 8 steps in root/folder, measured after steps 3, 6 and 8.

    interrupt(monkeypatch) breaks the run off; it returns how many steps are done then.
    """
    train("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        done = interrupt(patch)
        train("parts")
    assert state_of(root / "parts")["step"] == done
    assert not (root / "parts" / "config.json").exists()
    train("parts")

    whole, parts = state_of(root / "whole"), state_of(root / "parts")
    assert len(whole["losses"]) == 8 and whole["losses"] == parts["losses"]
    # What is tuned is measured before the first step too.
    assert [step for step, *_ in whole["evaluations"] if step] == [3, 6, 8]
    assert whole["evaluations"] == parts["evaluations"]
    weights = [weights_of(root / folder).read_bytes() for folder in ("whole", "parts")]
    assert weights[0] == weights[1]


def signal_in(monkeypatch, method, step, number=signal.SIGINT):
    """Send this process a signal in the method of the run, once it has done what it does in that step."""
    original = getattr(TrainingRun, method)

    def interrupted(run, *arguments):
        here = run.step + 1 == step
        result = original(run, *arguments)
        if here:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(TrainingRun, method, interrupted)


# When Ctrl-C comes, and how many steps are done then.
def in_the_gradients(monkeypatch):
    """Random numbers are drawn and gradients made: the step is forgotten."""
    signal_in(monkeypatch, "find_gradients", 5)
    return 4


def in_the_update(monkeypatch):
    """Half of an update is worth nothing: the step is finished."""
    signal_in(monkeypatch, "update", 5)
    return 5


def before_the_evaluation(monkeypatch):
    """The step is done, what should follow it is not: it is made up for."""
    signal_in(monkeypatch, "train_step", 6, signal.SIGTERM)
    return 6
