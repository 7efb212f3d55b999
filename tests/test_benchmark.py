"""benchmark.py runs and refuses; what it prints is the machine's business, so no figure is tested."""

import re
import sys

import pytest
import torch

import benchmark
from models.utils.errors import UserError


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    monkeypatch.setattr(benchmark, "memory_bandwidth", lambda: 1e10)
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)


SMALL = ["--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "1"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_phases_are_measured(monkeypatch, capsys, dtype):
    run(monkeypatch, "tiny-llama-python-draft", "--dtype", dtype, *SMALL)
    out = capsys.readouterr().out
    for phase in ("prefill", "decode"):
        line = next(line for line in out.splitlines() if phase in line)
        zoo, peer, ratio = (float(figure) for figure in re.findall(r"\d+\.\d+", line)[-3:])
        assert ratio == pytest.approx(peer / zoo, rel=0.1, abs=0.02)


def test_nothing_is_timed_when_the_two_sides_differ(monkeypatch):
    """The comparison of tokens is worth something: a model with other weights is noticed."""
    twin = benchmark.transformers_twin

    def other(name, model):
        peer = twin(name, model)
        peer.model.norm.weight.data *= -1
        return peer

    monkeypatch.setattr(benchmark, "transformers_twin", other)
    with pytest.raises(UserError, match="differently"):
        run(monkeypatch, "tiny-llama-python-draft", *SMALL)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpt-2"], "no config named 'gpt-2'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "-1"], "-1"),
    ],
)
def test_bad_input(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *arguments)
