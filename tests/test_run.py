"""The proof of run.py and the pages it calls, on tiny random checkpoints.

Most tests call main() in this process; a process of its own costs seconds and is kept for what needs one.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import run
from conversion import checkpoint, find
from models import load_model
from models.utils import machine
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from models.utils.weights import load_weights
from runs_ar import score
from tests import tiny_checkpoints
from tests.tiny_checkpoints import BOS, EOS, MAX_SEQ_LEN

ROOT = Path(__file__).parent.parent
GREEDY = ["--temperature", "0"]
SAMPLES = {"eos_token_id": EOS, "do_sample": True, "temperature": 0.9, "top_k": 50}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(the oracle, the folder): adds a BOS token, chats, samples by itself."""
    folder = tmp_path_factory.mktemp("run") / "tiny-llama"
    return tiny_checkpoints.save_checkpoint(folder, "llama", chat=True, generation=SAMPLES), folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(the oracle, the folder): adds no BOS token, does not chat, is greedy by itself."""
    folder = tmp_path_factory.mktemp("run") / "tiny-gpt2"
    return tiny_checkpoints.save_checkpoint(folder, "gpt2", add_bos=False), folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint whose context is never full while a test waits."""
    folder = tmp_path_factory.mktemp("run") / "endless"
    generation = {"eos_token_id": [], "do_sample": True}
    # This template marks the end of a turn with no token that could be sampled.
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    options = {"generation": generation, "max_seq_len": 20_000}
    tiny_checkpoints.save_checkpoint(folder, "llama", chat=template, **options)
    checkpoint.convert(folder)
    return folder


@pytest.fixture
def start(capsys):
    """start(folder, *options) -> what a run printed."""

    def start(folder, *options):
        capsys.readouterr()
        run.main(["--checkpoint", str(folder), "--device", "cpu", *map(str, options)])
        return capsys.readouterr()

    return start


def result_of(output):
    (line,) = output.out.splitlines()
    return json.loads(line)


# Continue a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_prints_the_prompt_and_the_oracle_s_continuation(name, request, start):
    oracle, folder = request.getfixturevalue(name)
    output = start(folder, "--prompt", "def redraw(", "--max-new-tokens", 30, *GREEDY)
    tokenizer = load_tokenizer(folder)
    prompt = torch.tensor([tokenizer.encode("def redraw(")])
    assert (prompt[0, 0] == BOS) == (name == "llama")
    expected = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert output.out == tokenizer.decode(expected[0].tolist()) + "\n"
    assert "tokens/s" in output.err and "first token after" in output.err and "peak memory" in output.err
    assert "of weights (float32)" in output.err


def test_config_json_is_opened_once(llama, start):
    options = ["--prompt", "def", "--max-new-tokens", "2"]
    start(llama[1], *options)  # converted, if it was not
    program = (
        "import os, sys, run\n"
        "opened = []\n"
        "note = lambda event, args: event == 'open' and opened.append(os.path.basename(str(args[0])))\n"
        "sys.addaudithook(note)\n"
        f"run.main(['--checkpoint', *{[str(llama[1]), *options]}])\n"
        "print(opened.count('config.json'))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "1", run.stderr


def test_a_checkpoint_is_converted_first_and_only_once(llama, tmp_path, start):
    folder = tmp_path / "copy"
    shutil.copytree(llama[1], folder, ignore=shutil.ignore_patterns("converted"))
    line = f"{folder} is not converted yet; converting it first\n"
    assert start(folder, "--max-new-tokens", 2).err.startswith(line)
    assert line not in start(folder, "--max-new-tokens", 2).err
    assert start(folder / "converted", "--max-new-tokens", 2).out.startswith("def")


def test_json_is_one_object_with_everything(llama, start):
    output = start(llama[1], "--prompt", "import ", "--max-new-tokens", 20, "--seed", 3, "--json")
    result = result_of(output)
    tokenizer = load_tokenizer(llama[1])
    whole = tokenizer.decode(tokenizer.encode("import ") + result["tokens"])
    assert result["prompt"] + result["text"] == whole
    assert len(result["tokens"]) == result["timings"]["num_tokens"] == 20
    assert result["finish_reason"] == "max_new_tokens"
    assert (result["seed"], result["temperature"], result["top_k"]) == (3, 0.9, 50)
    assert result["timings"]["tokens_per_second"] > 0 < result["timings"]["seconds_to_first_token"]
    assert result["timings"]["peak_memory_bytes"] > 50e6


def test_the_seed_decides_and_is_told(llama, start):
    options = ("--json", "--max-new-tokens", 20)
    first = result_of(start(llama[1], *options))
    again = result_of(start(llama[1], *options, "--seed", first["seed"]))
    other = result_of(start(llama[1], *options, "--seed", first["seed"] + 1))
    assert first["text"] == again["text"] != other["text"]
    assert first["seed"] != result_of(start(llama[1], *options))["seed"]


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("llama", [], (0.9, 50, 1.0, 0.0)),
        ("llama", ["--temperature", "0.5", "--min-p", "0.1"], (0.5, 50, 1.0, 0.1)),
        ("llama", ["--top-k", "0", "--top-p", "0.8"], (0.9, 0, 0.8, 0.0)),
        ("gpt2", [], (0.0, 0, 1.0, 0.0)),
        ("gpt2", ["--top-p", "0.8"], (1.0, 0, 0.8, 0.0)),
        ("gpt2", ["--top-k", "5", "--temperature", "0.7"], (0.7, 5, 1.0, 0.0)),
    ],
    ids=str,
)
def test_options_replace_the_checkpoint_s_own(name, options, expected, request, start):
    result = result_of(start(request.getfixturevalue(name)[1], "--json", "--max-new-tokens", 1, *options))
    assert tuple(result[name] for name in ("temperature", "top_k", "top_p", "min_p")) == expected


def test_every_reason_to_end(llama, start, tmp_path):
    options = ("--seed", 1, "--json", "--max-new-tokens")
    whole = result_of(start(llama[1], *options, 500))
    assert whole["finish_reason"] == "context full"
    assert len(whole["tokens"]) + len(load_tokenizer(llama[1]).encode("def")) == MAX_SEQ_LEN

    stop = whole["text"][10:13]
    stopped = result_of(start(llama[1], *options, 500, "--stop", "never", "--stop", stop))
    assert stopped["finish_reason"] == "stop string"
    assert stopped["text"] == whole["text"][: whole["text"].find(stop)]

    shutil.copytree(llama[1], tmp_path / "copy")
    generation = tmp_path / "copy" / "converted" / "generation_config.json"
    generation.write_text(json.dumps(SAMPLES | {"eos_token_id": [EOS, whole["tokens"][7]]}))
    ended = result_of(start(tmp_path / "copy", *options, 500))
    assert ended["finish_reason"] == "end of text"
    assert ended["tokens"] == whole["tokens"][: len(ended["tokens"])] and len(ended["tokens"]) <= 8


def test_a_text_that_is_piped_in_is_the_prompt(gpt2, start, tmp_path, monkeypatch):
    for content, prompt in [(b"class A:\n    x\n", "class A:\n    x"), (b"x = \n\n", "x = \n"), (b"", "def")]:
        (tmp_path / "prompt").write_bytes(content)
        with open(tmp_path / "prompt") as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert result_of(start(gpt2[1], "--json", "--max-new-tokens", 1))["prompt"] == prompt
            assert (
                result_of(start(gpt2[1], "--json", "--max-new-tokens", 1, "--prompt", "q"))["prompt"] == "q"
            )
    with open(os.devnull) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert result_of(start(gpt2[1], "--json", "--max-new-tokens", 1))["prompt"] == "def"


def test_other_dtypes(llama, start, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        checkpoint,
        "load_weights",
        lambda *args, **how: loaded.append(load_weights(*args, **how)) or loaded[-1],
    )
    for dtype in ("bfloat16", "float16"):
        output = start(llama[1], "--dtype", dtype, "--max-new-tokens", 5)
        assert f"({dtype})" in output.err
        assert str(loaded[-1].lm_head.weight.dtype) == f"torch.{dtype}"


# Score ------------------------------------------------------------------------------------------------------

TEXT = "def redraw(model):\n    # Größe, 大小, 🙂\n    return model\n" * 3


def oracle_loss(oracle, tokens, window, stride):
    """Nats of every token but the first, by the definition: one pass for each, over what it may see."""
    nats = 0.0
    for target in range(1, len(tokens)):
        start = stride * max(0, math.ceil((target - window) / stride))
        logits = oracle(torch.tensor([tokens[start:target]])).logits[0, -1]
        nats += F.cross_entropy(logits, torch.tensor(tokens[target])).item()
    return nats


@pytest.mark.parametrize("window, stride", [(96, 48), (96, 96), (50, 7), (17, 17), (20, 1), (1, 1)])
def test_score_equals_the_oracle_s_cross_entropy(gpt2, start, tmp_path, window, stride):
    oracle, folder = gpt2
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    tokens = load_tokenizer(folder).encode(TEXT)
    assert len(tokens) > 100
    output = start(folder, "--score", tmp_path / "text", "--window", window, "--stride", stride, "--json")
    result = result_of(output)
    with torch.no_grad():
        nats = oracle_loss(oracle, tokens, window, stride)
    assert result["num_tokens"] == len(tokens) - 1 and result["num_bytes"] == len(TEXT.encode())
    assert result["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_score_in_one_window_is_the_oracle_s_own_loss(llama, start, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "POSITIONS_PER_HEAD", 7)
    oracle, folder = llama
    text = TEXT[:60]
    (tmp_path / "text").write_text(text, encoding="utf-8")
    tokens = torch.tensor([load_tokenizer(folder).encode(text)])
    assert tokens[0, 0] == BOS and tokens.shape[1] <= MAX_SEQ_LEN
    result = result_of(start(folder, "--score", tmp_path / "text", "--json"))
    with torch.no_grad():
        loss = oracle(tokens, labels=tokens).loss.item()
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["bos"] is True and (result["window"], result["stride"]) == (96, 48)


def test_score_for_people(llama, gpt2, start, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    output = start(llama[1], "--score", tmp_path / "text")
    assert "perplexity" in output.out and "bits per byte" in output.out
    assert f"{len(TEXT.encode())} bytes" in output.out and "a BOS token" in output.out
    assert "100%" in output.err
    assert "no BOS token" in start(gpt2[1], "--score", tmp_path / "text").out


# Chat -------------------------------------------------------------------------------------------------------


def test_chat_answers_line_by_line_and_ends_with_the_input(llama, start, tmp_path, monkeypatch):
    (tmp_path / "lines").write_text("Hi\n\nwhy?\n")
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr(sys, "stdin", file)
        output = start(llama[1], "--chat", "--max-new-tokens", 8, *GREEDY)
    tokenizer, oracle = load_tokenizer(llama[1]), llama[0]
    end = tokenizer.special_tokens["<|end|>"]
    messages, expected = [], []
    for question in ("Hi", "why?"):
        messages.append({"role": "user", "content": question})
        prompt = torch.tensor([tokenizer.encode_chat(messages)])
        made = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
            pad_token_id=0, eos_token_id=[EOS, end],
        )  # fmt: skip
        answer = tokenizer.decode(made[0, prompt.shape[1] :].tolist())
        expected += answer.strip().splitlines()
        messages.append({"role": "assistant", "content": answer.strip()})
    assert [line.strip() for line in output.out.splitlines()] == [line.strip() for line in expected]
    assert output.err.count("tokens/s") == 2


def test_a_question_that_is_too_long_does_not_end_the_conversation(llama, start, tmp_path, monkeypatch):
    (tmp_path / "lines").write_text("é" * 100 + "\nHi\n")
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr(sys, "stdin", file)
        output = start(llama[1], "--chat", "--max-new-tokens", 4)
    assert output.err.count("error: the prompt has") == 1
    assert output.err.count("[4 tokens, ") == output.err.count("peak memory") == 1


# What is wrong is said in one line, before anything is loaded -----------------------------------------------


def test_wrong_input_is_one_line(llama, gpt2, tmp_path, start, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("checked too late"))
    start_of = {"llama": llama[1], "gpt2": gpt2[1]}
    for folder in start_of.values():
        checkpoint.find_checkpoint(folder)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"PNG\0\1\2")
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "one").write_text("")
    for name, options, message in [
        ("llama", ["--prompt", ""], "--prompt is empty"),
        ("llama", ["--system", "x"], "--system goes with --chat"),
        ("llama", ["--prompt", "é" * 60], "the prompt has 1.. tokens, the model's context only 96"),
        ("llama", ["--prompt", "\udcff"], "surrogate"),
        ("llama", ["--temperature", "-1"], "temperature is -1"),
        ("llama", ["--temperature", "nan"], "temperature is nan"),
        ("llama", ["--temperature", "inf"], "temperature is inf"),
        ("llama", ["--top-k", "-1"], "top_k is -1"),
        ("llama", ["--top-p", "nan"], "top_p is nan"),
        ("llama", ["--top-p", "1.5"], "top_p is 1.5"),
        ("llama", ["--min-p", "-0.5"], "min_p is -0.5"),
        ("llama", ["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ("llama", ["--max-new-tokens", "many"], "--max-new-tokens: invalid int"),
        ("llama", ["--seed", "-1"], "--seed is -1"),
        ("llama", ["--seed", str(2**70)], "--seed is "),
        ("llama", ["--stop", ""], "--stop is empty"),
        ("llama", ["--chat", "--draft", ""], "--draft is empty"),
        ("llama", ["--device", "quantum"], "device 'quantum' is not on this machine"),
        ("llama", ["--device", "cuda:99"], "device 'cuda:99' is not on this machine"),
        ("llama", ["--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        ("llama", ["--unknown"], "unrecognized arguments: --unknown"),
        ("llama", ["--chat", "--prompt", "x"], "not allowed with argument"),
        ("llama", ["--chat", "--json"], "--json prints one object"),
        ("gpt2", ["--chat"], "no chat template"),
        ("llama", ["--score", str(tmp_path / "empty")], "is empty"),
        ("llama", ["--score", str(tmp_path / "missing")], "No such file"),
        ("llama", ["--score", str(tmp_path)], "cannot be read"),
        ("llama", ["--score", str(tmp_path / "binary")], "is a binary file"),
        ("llama", ["--score", str(tmp_path / "latin")], "no UTF-8 text"),
        ("llama", ["--score", __file__, "--window", "97"], "--window is 97; give 1 to 96"),
        ("llama", ["--score", __file__, "--window", "0"], "--window is 0"),
        ("llama", ["--score", __file__, "--stride", "0"], "--stride is 0"),
        ("llama", ["--score", __file__, "--stride", "97"], "--stride is 97"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            start(start_of[name], *options)
        assert "\n" not in str(error.value)


def test_wrong_checkpoints(llama, gpt2, tmp_path, start, monkeypatch):
    def message(folder, *options):
        with pytest.raises(UserError) as error:
            start(folder, *options)
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setattr(find, "CHECKPOINTS", tmp_path)
    assert "there are: none yet" in message("checkpoints/mine")
    assert "python convert_hf_checkpoint.py openai-community/gpt2" in message("gpt2")
    assert "python convert_hf_checkpoint.py openai-community/gpt2" in message("openai-community/gpt2")
    shutil.copytree(gpt2[1], tmp_path / "gpt2-large")
    (tmp_path / "else" / "gpt2-xl").mkdir(parents=True)
    assert "did you mean gpt2-large?" in message("openai-community/gpt2-lage")
    assert "did you mean gpt2-large?" in message("gpt2larg")
    assert f"did you mean {tmp_path / 'else' / 'gpt2-xl'}?" in message(tmp_path / "else" / "gpt2xl")

    (tmp_path / "gpt2-large" / "converted" / "tokenizer.model").unlink(missing_ok=True)
    (tmp_path / "gpt2-large" / "tokenizer.model").unlink()
    assert "no tokenizer" in message(tmp_path / "gpt2-large")
    (tmp_path / "nothing").mkdir()
    assert "config.json" in message(tmp_path / "nothing")


def test_nan_is_no_score(llama, tmp_path, start):
    folder = shutil.copytree(checkpoint.find_checkpoint(llama[1]), tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["final_norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors")
    for words in (["--score", __file__], ["--score", __file__, "--json"], ["--prompt", "def"]):
        with pytest.raises(UserError, match="NaN"):
            start(folder, *words)


def test_what_does_not_fit_is_not_loaded(llama, start, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("loaded what does not fit"))
    checkpoint.find_checkpoint(llama[1])
    monkeypatch.setattr(checkpoint, "available_memory", lambda device: 100_000)
    with pytest.raises(UserError, match=r"164 kB of weights .* do not fit into the 100 kB"):
        start(llama[1], "--max-new-tokens", 5)
    with pytest.raises(UserError, match="cache for 84 tokens do not fit"):
        monkeypatch.setattr(checkpoint, "available_memory", lambda device: 170_000)
        start(llama[1], "--max-new-tokens", 80)


def test_the_memory_that_is_announced_is_the_memory_that_is_taken(llama, start, capsys):
    opened = checkpoint.open_checkpoint(llama[1], "cpu", torch.bfloat16)
    opened.check_memory(50)
    model = load_model(opened.folder, "cpu", torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = sum(tensor.nbytes for layer in model.new_cache(1, 50) for tensor in layer)
    weights, cache = machine.spoken_bytes(weights), machine.spoken_bytes(cache)
    assert f"{weights} of weights (bfloat16) and {cache} of cache" in capsys.readouterr().err


def test_what_the_machine_has():
    assert machine.choose_device().type in ("cuda", "mps", "cpu")
    if Path("/proc/meminfo").exists():
        assert 50e6 < machine.available_memory(torch.device("cpu")) < 1e14
    block = torch.ones(50_000_000)
    assert machine.peak_memory(torch.device("cpu")) > block.nbytes
    assert machine.spoken_bytes(0) == "0 bytes" and machine.spoken_bytes(1_234_567) == "1.23 MB"


# Processes of their own -------------------------------------------------------------------------------------


def process(*options, **streams):
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    command = [sys.executable, "run.py", "--device", "cpu", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, **streams)


def test_ctrl_c_ends_with_what_was_made_so_far(endless):
    child = process("--checkpoint", endless, "--max-new-tokens", 10_000, "--prompt", "class ")
    made = child.stdout.read(40)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert (made + rest).startswith(b"class ") and (made + rest).endswith(b"\n")
    assert b"Traceback" not in errors and b"end: interrupted" in errors and b"tokens/s" in errors


def test_ctrl_c_interrupts_an_answer_and_the_conversation_goes_on(endless):
    child = process("--checkpoint", endless, "--chat", "--max-new-tokens", 1500, stdin=subprocess.PIPE)
    child.stdin.write(b"Hi\n")
    child.stdin.flush()
    child.stdout.read(30)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(b"and then?\n", timeout=120)
    assert child.returncode == 0 and b"Traceback" not in errors
    assert output.count(b"[interrupted]\n") == 1 and len(output.split(b"[interrupted]\n")[1]) > 1000
    assert errors.count(b"peak memory") == 2 and b"1500 tokens, " in errors


def test_a_reader_that_goes_away_and_an_error_are_quiet(endless):
    child = process("--checkpoint", endless, "--max-new-tokens", 10_000)
    child.stdout.read(10)
    child.stdout.close()
    broken = process("--checkpoint", endless, "--top-k", "x")
    _, errors = broken.communicate(timeout=60)
    assert broken.returncode == 2
    assert errors == b"error: argument --top-k: invalid int value: 'x'; see: python run.py --help\n"
    assert child.wait(timeout=60) == 141 and b"Traceback" not in child.stderr.read()
