"""The training of decoders: they learn, transformers reads the result, the data are what they say."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from conversion.convert import convert
from models import create_model, load_model
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_ar.score import negative_log_likelihood
from runs_train import next_token, text_data, training_run
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.expert_balance import Routers, balance
from runs_train.language_model import main, parse_options
from runs_train.training_run import learning_rate, make_optimizer
from tests.training_runs import TEXT, small_run, state_of, tokens_of

FP32 = ("--dtype", "float32")
CONFIGS = {
    "llama": {
        "model": "llama", "vocab_size": 300, "max_seq_len": 32, "d_model": 24, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 40, "norm_eps": 1e-5, "rope_base": 10000.0,
        "rope_scaling": None, "qkv_bias": False, "o_bias": False, "ffn_bias": False, "tied_head": True,
    },
    "gpt_neox": {
        "model": "gpt_neox", "vocab_size": 300, "max_seq_len": 32, "d_model": 24, "num_layers": 2,
        "num_heads": 3, "d_ff": 40, "norm_eps": 1e-5, "rotary_dim": 2, "rope_base": 10000.0,
        "parallel_residual": True, "gelu_approximation": "none", "attn_bias": True, "tied_head": True,
    },
    # Dropout draws random numbers in every step; a run that goes on must draw the same ones.
    "gpt2": {
        "model": "gpt2", "vocab_size": 300, "max_seq_len": 32, "d_model": 24, "num_layers": 2, "num_heads": 4,
        "d_ff": 48, "norm_eps": 1e-5, "dropout": 0.2,
    },
    "qwen3_moe": {
        "model": "qwen3_moe", "vocab_size": 300, "max_seq_len": 32, "d_model": 24, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 40, "d_expert": 20, "num_experts": 4,
        "num_active_experts": 2, "normalize_weights": True, "dense_layers": [0], "norm_eps": 1e-5,
        "rope_base": 10000.0, "rope_scaling": None, "tied_head": True,
    },
}  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """(name of the model, name of the folder, options) to the arguments of a small run."""
    return commands(tmp_path)


def commands(root):
    def arguments(name, folder, *options, steps=8):
        return small_run("language_model", root, CONFIGS[name])(folder, *options, steps=steps)

    return arguments


# Runs -------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(command, tmp_path):
    """Batches of 2 twice, or of 4 once: the same windows, the same mean."""
    main(command("llama", "twice", *FP32, "--accumulate", "2"))
    main(command("llama", "once", *FP32, "--batch-size", "4"))
    twice, once = state_of(tmp_path / "twice")["losses"], state_of(tmp_path / "once")["losses"]
    assert twice == pytest.approx(once, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(command, tmp_path):
    main(command("gpt2", "plain", *FP32))
    main(command("gpt2", "checkpointed", *FP32, "--gradient-checkpointing"))
    plain, checkpointed = state_of(tmp_path / "plain"), state_of(tmp_path / "checkpointed")
    assert plain["losses"] == pytest.approx(checkpointed["losses"], rel=1e-5)


def test_compiling_leaves_the_names_alone(command, tmp_path, monkeypatch):
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: torch_compile(model, backend="eager"))
    monkeypatch.setattr(training_run.shutil, "which", lambda name: name)
    main(command("llama", "compiled", "--compile", *FP32, steps=3))
    main(command("llama", "plain", *FP32, steps=3))
    compiled, plain = state_of(tmp_path / "compiled"), state_of(tmp_path / "plain")
    assert list(compiled["model"]) == list(plain["model"])
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_without_a_compiler_it_goes_on_without(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_run.shutil, "which", lambda name: None)
    main(command("llama", "run", "--compile", steps=3))
    assert "needs a C++ compiler" in capsys.readouterr().err


SONG = "for bottle in range(99, 0, -1):\n    print(bottle, 'of beer')\n"


def test_it_learns_and_shows_it(command, tmp_path, capsys):
    """A text that repeats itself is soon known by heart; fresh weights know nothing of it."""
    (tmp_path / "song.txt").write_text(SONG * 200)
    options = ["--data", tmp_path / "song.txt", "--vocab-size", 300, "--prompt", "for bottle in"]
    main(command("llama", "run", *options, "--eval-every", 75, steps=150))
    losses = state_of(tmp_path / "run")["losses"]
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert sum(losses[-5:]) / 5 < 1
    # A sample at each measurement: the first one babbles, the last one sings.
    first, last = capsys.readouterr().err.split("held-out bits per byte")[1:]
    assert "for bottle in range(99" in last and "for bottle in range(99" not in first
    assert all("    | for bottle in" in shown for shown in (first, last))


def test_what_it_writes_is_nothing_for_a_terminal(command, tmp_path, monkeypatch, capsys):
    """A text may hold escape sequences, and a model learns them."""
    escape = []
    monkeypatch.setattr(next_token, "generate", lambda *_, **__: ([token] for token in escape))
    tokenizer = text_data.sentencepiece.SentencePieceProcessor
    main(command("llama", "run", steps=3))
    (path,) = (tmp_path / "run" / "training").glob("tokens-*/tokenizer.model")
    escape += tokenizer(model_file=str(path)).encode("\x1b[2J\a")
    main(command("llama", "again", "--tokenizer", path, steps=3))
    shown = capsys.readouterr().err
    assert "?[2J?" in shown and "\x1b" not in shown


# Experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_active", [1, 2, 4])
def test_the_balance_is_that_of_transformers(num_active):
    logits = torch.randn(50, 8, requires_grad=True)
    ours, theirs = balance(logits, num_active), load_balancing_loss_func((logits,), 8, num_active)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_the_balance_by_hand():
    """The example of the docstring."""
    logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).log()
    assert balance(logits, 1).item() == pytest.approx(1.6)
    assert balance(torch.zeros(4, 8), 8).item() == pytest.approx(8)


def test_routers_are_held_back_and_the_loss_that_is_shown_is_not_changed():
    torch.manual_seed(0)
    model = create_model("tiny-moe-python", d_model=32, vocab_size=50, num_experts=8, d_expert=16)
    routers, tokens = Routers(model), torch.randint(50, (2, 20))
    model.eval()(tokens)
    assert routers.gradient() == 0.0, "what is measured does not train"
    seen = []
    for layer in model.layers:
        layer.ffn.router.register_forward_hook(lambda router, inputs, logits: seen.append(logits))
    model.train()(tokens)
    term = routers.gradient()
    assert term.item() == 0.0 and routers.gradient() == 0.0
    expected = sum(load_balancing_loss_func((logits,), 8, 4) for logits in seen) / 2
    weights = [layer.ffn.router.weight for layer in model.layers]
    found = torch.autograd.grad(term, weights, retain_graph=True)
    for ours, theirs in zip(found, torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(ours, 0.01 * theirs)


def test_a_decoder_without_experts_has_no_such_term():
    model = create_model("tiny-llama-python-draft", d_model=32, vocab_size=50, head_dim=8)
    routers = Routers(model)
    model(torch.randint(50, (2, 20)))
    assert routers.gradient() == 0.0


def test_a_router_that_knows_one_expert_learns_of_the_others():
    logits = torch.nn.Parameter(0.1 * torch.randn(200, 8) + torch.tensor([3.0] + [0.0] * 7))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = balance(logits, 2).item()
    for _ in range(100):
        optimizer.zero_grad()
        balance(logits, 2).backward()
        optimizer.step()
    assert before > 4 and balance(logits, 2).item() < 2.2, "2 is the least, where all are chosen alike"


# Parts of a step --------------------------------------------------------------------------------------------


def test_the_learning_rate():
    arguments = "--config x --data x --steps 100 --warmup 10 --lr 0.5"
    options = parse_options(arguments.split())
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25) and 0 < rates[99] < 0.001
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


def test_decay_is_for_matrices():
    options = parse_options(["--config", "x", "--data", "x", "--weight-decay", "0.3"])
    model = create_model("gpt2", vocab_size=11, d_model=8, num_layers=1, num_heads=2, d_ff=16)
    groups = make_optimizer(model, options, betas=(0.9, 0.95)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "norm" in name else 0.3), name


# What a run leaves behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_result(command, tmp_path, name):
    main(command(name, "run"))
    folder = tmp_path / "run"
    state = state_of(folder)["model"]
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    convert(folder)
    ours = load_model(folder)
    for parameter_name, parameter in ours.named_parameters():
        assert torch.equal(parameter, state[parameter_name].bfloat16())
    tokens = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(tokens), theirs.float()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == load_tokenizer(folder).eos_id == 2
    assert theirs.config.bos_token_id == load_tokenizer(folder).bos_id == 1


def test_the_readme_says_what_is_stored(command, tmp_path):
    arguments = command("llama", "run")
    main(arguments)
    folder = tmp_path / "run"
    convert(folder)
    readme = (folder / "README.md").read_text()
    facts = json.loads((tokens_of(folder) / "data.json").read_text())
    assert facts["file_list_sha256"] in readme and f"--config {arguments[1]}" in readme
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = load_tokenizer(folder)
    held_out = np.fromfile(tokens_of(folder) / "held_out.bin", dtype=np.uint16)
    model = load_model(folder, dtype=torch.float32)
    measured = bits_per_byte(model, held_out, bytes_of_tokens(tokenizer), context=32, stride=16)
    assert f"{measured:.4f} |" in readme


def test_a_new_model_takes_the_place_of_the_old(command, tmp_path):
    main(command("llama", "run"))
    convert(tmp_path / "run")
    main(command("llama", "run", "--seed", "1", "--restart"))
    assert not (tmp_path / "run" / "converted").exists()
    convert(tmp_path / "run")
    embed = load_model(tmp_path / "run").token_embed.weight
    assert torch.equal(embed, state_of(tmp_path / "run")["model"]["token_embed.weight"].bfloat16())


# Evaluation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model in fp32, its tokenizer, the tokens of both parts) of a run."""
    root = tmp_path_factory.mktemp("trained")
    main(commands(root)("llama", "run"))
    convert(root / "run")
    tokens = tokens_of(root / "run")
    train, held_out = (np.fromfile(tokens / f"{part}.bin", dtype=np.uint16) for part in ("train", "held_out"))
    return load_model(root / "run", dtype=torch.float32), load_tokenizer(root / "run"), train, held_out


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
@pytest.mark.parametrize("num_tokens", [2, 20, 33, 34, 64, 65, 100])
def test_bits_per_byte_are_those_of_the_runner(trained, stride, num_tokens):
    model, tokenizer, _, held_out = trained
    held_out = held_out[:num_tokens]
    measured = bits_per_byte(model, held_out, bytes_of_tokens(tokenizer), 32, stride, batch_size=3)
    nats, _ = negative_log_likelihood(model, held_out.tolist(), 32, stride)
    assert measured == pytest.approx(
        nats / math.log(2) / len(tokenizer.decode(held_out.tolist()).encode()), rel=1e-5
    )


def test_bits_per_byte_of_a_sample_are_close_to_those_of_all(trained):
    model, tokenizer, _, held_out = trained
    calls = []
    hook = model.register_forward_hook(lambda model, inputs, logits: calls.append(len(inputs[0])))
    bytes_of = bytes_of_tokens(tokenizer)
    whole = bits_per_byte(model, held_out, bytes_of, 32, 32)
    num_windows, calls[:] = sum(calls), []
    sample = bits_per_byte(model, held_out, bytes_of, 32, 32, max_windows=num_windows // 2)
    hook.remove()
    assert sum(calls) <= num_windows // 2 + 1
    assert sample == pytest.approx(whole, rel=0.1)


def test_bytes_of_tokens_count_every_byte(trained):
    _, tokenizer, _, held_out = trained
    num_bytes = bytes_of_tokens(tokenizer)[held_out.astype(np.int64)].sum()
    assert num_bytes == len(tokenizer.decode(held_out.tolist()).encode())


# Data -------------------------------------------------------------------------------------------------------


def test_held_out_files_are_chosen_by_name(tmp_path):
    for n in range(200):
        path = tmp_path / f"folder{n % 7}" / f"file{n}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {n}")
    train, held_out = text_data.split_documents(tmp_path)
    assert len(train) + len(held_out) == 200 and 8 <= len(held_out) <= 32
    assert not {d.name for d in train} & {d.name for d in held_out}

    # Other files may come and go, and the folder may lie elsewhere.
    for document in train[::2]:
        (tmp_path / document.name).unlink()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert text_data.split_documents(moved)[1] == held_out


def test_what_is_no_text_is_left_out(tmp_path):
    texts = {f"{n}.txt": f"text {n}\r\n" for n in range(40)}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"text")
    train, held_out = text_data.split_documents(tmp_path)
    assert {document.name: document.text for document in train + held_out} == texts


def test_the_standard_library_is_all_modules_but_tests():
    train, held_out = text_data.split_documents("stdlib")
    names = {document.name for document in train + held_out}
    assert {"abc.py", "json/decoder.py", "unittest/case.py", "encodings/utf_8.py"} <= names
    strange = [name for name in names if {"test", "tests", "idle_test"} & set(name.split("/"))]
    assert not strange and not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert len(held_out) / len(names) == pytest.approx(0.1, abs=0.05)


def test_the_tokens_are_the_text(trained):
    _, tokenizer, train, held_out = trained
    texts = []
    for tokens in (train, held_out):
        assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
        texts.append(tokenizer.decode(tokens[1:-1].tolist()))
        assert tokenizer.encode(texts[-1], bos=True) == tokens[:-1].tolist()
    assert "".join(texts) == TEXT
    assert len(texts[1]) / len(TEXT) == pytest.approx(0.1, abs=0.01)


@pytest.fixture(scope="module")
def code_tokenizer():
    content = text_data.train_tokenizer([text_data.Document("text.py", TEXT + "year = 1111\n" * 100)], 500)
    return text_data.sentencepiece.SentencePieceProcessor(model_proto=content)


CODE = st.lists(
    st.sampled_from(
        ["    ", " ", "\t", "\n", "\r\n", "def f(x):", "é", "日本", "🎉", "\x0c", "# ", "1234", "  \n"]
    )
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(CODE, st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=["Cs"]))))
def test_the_tokenizer_gives_every_text_back(code_tokenizer, text):
    ids = code_tokenizer.encode(text)
    assert code_tokenizer.decode(ids) == text
    assert code_tokenizer.unk_id() not in ids


def test_indentation_is_one_token(code_tokenizer):
    pieces = code_tokenizer.encode("        return 1111", out_type=str)
    assert pieces[0] == "▁" * 8 or pieces[0] == "▁" * 7
    assert pieces[-4:] == list("1111")


def test_tokens_are_made_once(tmp_path):
    """The same data serve again; other data, or another vocabulary, are beside them."""
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    corpus = text_data.prepare(text, tmp_path, 400)
    assert isinstance(corpus.train, np.memmap)
    made = (corpus.folder / "train.bin").stat().st_mtime_ns
    again = text_data.prepare(text, tmp_path, 400)
    assert again.folder == corpus.folder and (again.folder / "train.bin").stat().st_mtime_ns == made

    smaller = text_data.prepare(text, tmp_path, 350)
    assert smaller.train.max() < 350 and len(smaller.train) > len(corpus.train)
    text.write_text(TEXT + "x = 1\n")
    longer = text_data.prepare(text, tmp_path, 350)
    assert longer.facts["file_list_sha256"] != smaller.facts["file_list_sha256"]
    assert len({corpus.folder, smaller.folder, longer.folder}) == 3
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == made


def test_a_tokenizer_of_another_run(command, tmp_path):
    main(command("llama", "first", steps=3))
    tokenizer = tmp_path / "first" / "tokenizer.model"
    main(command("llama", "second", "--tokenizer", tokenizer, "--vocab-size", 4096, steps=3))
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["vocab_size"] == 400


@pytest.mark.parametrize("num_tokens", [64, 95, 96, 97, 1000])
def test_every_window_is_read_once_in_a_pass(num_tokens):
    context, batch_size = 32, 3
    windows = text_data.Windows(np.arange(num_tokens, dtype=np.uint16), context, batch_size, seed=5)
    rows = torch.cat([windows.batch(n) for n in range(5 * windows.per_pass)])
    assert torch.equal(rows, rows[:, :1] + torch.arange(context + 1))
    passes = rows[:, 0].split(windows.per_pass)
    for starts in passes:
        assert (starts.sort().values.diff() == context).all() and len(starts) == windows.per_pass
    if num_tokens == 1000:
        orders = {tuple(starts.argsort().tolist()) for starts in passes}
        offsets = {starts.min().item() for starts in passes}
        assert len(orders) == len(passes) and len(offsets) > 1

    # A batch is a function of its number: asked for out of turn it is the same.
    again = text_data.Windows(np.arange(num_tokens, dtype=np.uint16), context, batch_size, seed=5)
    assert torch.equal(again.batch(4), rows[4 * batch_size : 5 * batch_size])


# Mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such data": (["--data", "nowhere"], "--data nowhere: no such file or folder"),
    "an empty folder": (["--data", "empty"], "--data empty: 0 text files"),
    "binary data": (["--data", "binary"], "--data binary: not UTF-8 text"),
    "a single line": (["--data", "line"], "--data line: no line ends"),
    "too short": (["--data", "short", "--vocab-size", "261"], "too few for a context of 32"),
    "too large a vocabulary": (["--vocab-size", "60000"], "--vocab-size 60000 does not suit"),
    "more than 16 bits": (["--vocab-size", "70000"], "not a whole number from 260 to 65536"),
    "no tokenizer": (["--tokenizer", "nowhere"], "nowhere: "),
    "a broken tokenizer": (["--tokenizer", "binary"], "binary: no sentencepiece model"),
    "longer than the model": (["--context", "64"], "--context 64 is longer than the model's max_seq_len, 32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(command, tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    (tmp_path / "line").write_text("one line " * 1000)
    (tmp_path / "short").write_text("a\nb\nc\n")
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        main(command("llama", "run", *options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_data_do_not_go_on(command, tmp_path):
    main(command("llama", "run"))
    arguments = command("llama", "run")
    (tmp_path / "data").write_text(TEXT + "x = 1\n")
    with pytest.raises(UserError, match="that run was started with file_list_sha256"):
        main(arguments)
