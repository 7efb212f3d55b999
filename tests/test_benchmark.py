"""benchmark.py measures, compares, refuses and cleans up; what the figures are is the machine's business."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import benchmark
from benchmarks import measure, weights
from benchmarks.checks import Expected, check, check_rows
from benchmarks.picture import COLORS, draw
from benchmarks.report import quartiles, table
from benchmarks.transformers_peer import Transformers
from benchmarks.turns import Process
from benchmarks.weights import Writer
from benchmarks.zoo import AgreeingDrafter, Compiled, Eager, Encoder, Served, Speculative
from conversion.checkpoint import find_checkpoint
from models import create_model, load_config
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.sampling import GREEDY

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = "tiny-llama-python-draft"
SMALL = ["--prompt-tokens", "12", "--new-tokens", "6", "--prefill-tokens", "20", "--rounds", "2"]


# A whole run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(report, printed lines, folder) of one run of all kinds of subjects."""
    folder = tmp_path_factory.mktemp("results")
    arguments = [TINY, *SMALL, "--weights", "float32", "int4", "--batches", "3", "--out", str(folder)]
    arguments += ["--subjects", "eager", "speculative", "transformers", "llama.cpp"]
    command = [sys.executable, "benchmark.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "benchmark.json").read_text()), done.stdout.splitlines(), folder


def llama_cpp_is_there():
    return (
        benchmark.skip_what_is_missing(benchmark.parse_arguments(["--subjects", "eager", "llama.cpp"])) == []
    )


def test_every_subject_has_every_sample(run):
    report, _, _ = run
    kinds = {(entry["weights"], entry["subject"]): entry for entry in report["subjects"]}
    zoo = {(weights, name) for weights in ("float32", "int4") for name in ("eager", "speculative")}
    peers = {("float32", "transformers"), ("bfloat16", "transformers")}
    llama_cpp = {(weights, "llama.cpp") for weights in ("float32", "int4") if llama_cpp_is_there()}
    assert set(kinds) == zoo | peers | llama_cpp
    for (_, name), entry in kinds.items():
        phases = {"first token", "decode", "prefill", "batch 3"}
        phases -= {"prefill", "batch 3"} if name == "speculative" else set()
        assert set(entry["phases"]) == phases
        for phase in entry["phases"].values():
            assert len(phase["samples"]) == 2 and min(phase["samples"]) > 0
            assert phase["median"] == pytest.approx(np.median(phase["samples"]))
        assert 0 < entry["memory_before_loading"] <= entry["peak_memory"]
        assert 0 < entry["seconds_to_load"] < 60 and 0 < entry["seconds_to_first_token_ever"] < 60
        assert ("acceptance" in entry) == (name == "speculative")


def test_what_goes_with_the_figures(run):
    report, lines, folder = run
    assert report["command"].startswith(f"python benchmark.py {TINY} --prompt-tokens 12")
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["cores"] == os.cpu_count() and report["machine"]["threads"] >= 1
    assert report["settings"]["new_tokens"] == 6
    # Read once in every round of the three phases.
    assert len(report["bandwidth"]["samples"]) == 6 and report["bandwidth"]["median"] > 1e8
    for entry in report["subjects"]:
        if entry["weights"] == "float32":
            assert entry["same_tokens"] == entry["checked_tokens"] == 6
    assert not list(folder.glob("*.partial"))


def test_a_token_reads_every_matrix_once(run):
    config = load_config(TINY)[1]
    D, f, d = config.d_model, config.d_ff, config.head_dim
    attention = 2 * D * config.num_heads * d + 2 * D * config.num_kv_heads * d
    matrices = config.vocab_size * D + config.num_layers * (attention + 3 * D * f)
    norms = D * (2 * config.num_layers + 1)
    for entry in run[0]["subjects"]:
        if entry["weights"] == "float32":
            assert entry["bytes_per_token"] == 4 * (matrices + norms)
        elif entry["weights"] == "bfloat16":
            assert entry["bytes_per_token"] == 2 * (matrices + norms)
        elif entry["subject"] == "llama.cpp":
            assert entry["bytes_per_token"] == matrices * 18 // 32 + 4 * norms
        else:
            # Codes of half a byte, and for 32 of them scale and zero in bf16. The head is the embedding's.
            head = config.vocab_size * D
            assert entry["bytes_per_token"] == (matrices - head) * (16 + 4) // 32 + 2 * head + 2 * norms


def test_the_table_shows_medians_and_ratios():
    """Of figures made up: 1 MB a token at 100 MB/s is 10 ms."""

    def entry(subject, weights, milliseconds, num_bytes):
        seconds = {"decode": milliseconds, "first token": 40, "prefill": 3 * milliseconds, "batch 3": 5}
        quartiles = ("low", "median", "high")
        return {
            "config": "a model",
            "weights": weights,
            "subject": subject,
            "bytes_per_token": num_bytes,
            "seconds_to_load": 0.5,
            "seconds_to_first_token_ever": 0.25,
            "peak_memory": 2_000_000,
            "phases": {phase: dict.fromkeys(quartiles, ms / 1e3) for phase, ms in seconds.items()},
        }

    settings = {"prompt_tokens": 12, "new_tokens": 6, "prefill_tokens": 20, "rounds": 2}
    machine = {"processor": "a processor", "threads": 2, "instructions": ["avx2", "avx512"]}
    subjects = [
        entry("transformers", "bfloat16", 60, 4e6),
        entry("eager", "int4", 20, 1e6),
        entry("llama.cpp", "int4", 25, 1e6),
    ]
    report = {"settings": settings, "machine": machine, "bandwidth": {"median": 1e8}, "subjects": subjects}
    first, _, _, heads, *rows = table(report)
    assert first.startswith(
        "a processor (avx2 avx512), 2 threads, reading 0.1 GB/s; 12 tokens and 6 new ones"
    )
    assert "ms/token" in heads
    assert rows[0].split()[:6] == ["bfloat16", "transformers", "60.00", "60.00", "..", "60.00"]
    figures = ["50%", "3.00", "1.25", "40.0", "60", "3.00", "0.50", "0.75", "2", "MB"]
    assert rows[1].split() == ["int4", "eager", "20.00", "20.00", "..", "20.00", *figures]
    # The second block is that of the batches, with tokens a second of all rows and the ratio to transformers.
    (batch,) = [line.split() for line in rows[4:] if line.startswith("int4      eager")]
    assert batch == ["int4", "eager", "200", "1.00", "1.00"]


def test_the_table_of_a_run_is_that_of_its_report(run):
    report, lines, _ = run
    assert lines[: len(table(report))] == table(report) or set(table(report)) <= set(lines)


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory):
    """(report, printed lines, folder) of one run of both kinds of models that answer in one pass."""
    folder = tmp_path_factory.mktemp("one_pass")
    arguments = ["tiny-bert-python", "tiny-vit-digits", "--weights", "float32", "--rounds", "2"]
    command = [sys.executable, "benchmark.py", *arguments, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "benchmark.json").read_text()), done.stdout.splitlines(), folder


def test_encoders_are_measured_on_batches(one_pass):
    report, lines, folder = one_pass
    for config, answers, size in (("tiny-bert-python", "texts", 16), ("tiny-vit-digits", "images", 8)):
        entries = [entry for entry in report["subjects"] if entry["config"] == config]
        assert [entry["subject"] for entry in entries] == ["eager", "transformers"]
        for entry in entries:
            assert entry["answers"] == answers and entry["logits_error"] < 1e-4
            assert list(entry["phases"]) == [f"batch {size}"]
            assert len(entry["phases"][f"batch {size}"]["samples"]) == 2
        ours, theirs = (entry["phases"][f"batch {size}"]["median"] for entry in entries)
        place = lines.index(f"{config}, {answers} a second")
        cells = lines[place + 2].split()
        assert cells[:2] == ["float32", "eager"] and cells[3] == f"{theirs / ours:.2f}"
        assert float(cells[2]) == pytest.approx(1 / ours, rel=0.01)
    assert "new ones" not in lines[0] and not any(line.startswith("limit") for line in lines)
    assert Image.open(folder / "benchmark.png").format == "PNG"


def test_without_transformers_the_zoo_itself_is_the_reference(monkeypatch, tmp_path):
    writer = Writer("tiny-vit-digits", tmp_path, None)
    writer.write(["float32"], {}, draft=False)
    assert writer.one_pass_reference([3]) == []
    expected = np.load(tmp_path / "reference.npy")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "benchmarks.transformers_peer", None)  # an import would fail
    assert writer.one_pass_reference([3]) == []
    logits = np.load(tmp_path / "reference.npy")
    assert logits.shape == (1, 10) and np.allclose(logits, expected, atol=1e-5)


def test_what_encoders_are_given():
    args = benchmark.parse_arguments(["bert-base-uncased", "vit-b-16"])
    (texts,) = measure.plan_tasks("bert-base-uncased", args).values()
    assert len(texts.prompts) == 16 and {len(text) for text in texts.prompts} == {128}
    assert measure.plan_tasks("vit-b-16", args) == {"batch 8": measure.Task([[n] for n in range(8)], 1)}
    plan = measure.plan_subjects("vit-b-16", benchmark.parse_arguments(["vit-b-16", "--weights", "int8"]))
    assert plan == [("bfloat16", "transformers"), ("int8", "eager")]
    args = benchmark.parse_arguments(["vit-b-16", "--batches", "2", "5"])
    assert list(measure.plan_tasks("vit-b-16", args)) == ["batch 2", "batch 5"]


def test_an_encoder_answers_for_the_whole_batch(fresh_encoder):
    """An image is drawn from its number; BERT's text is its tokens. The first input's logits are checked."""
    encoder, model, prompts, inputs = fresh_encoder
    assert torch.equal(encoder.inputs(prompts), inputs)
    with torch.inference_mode():
        logits = model(inputs)[0]
    expected = logits[0] if logits.dim() == 2 else logits  # of the first token
    assert encoder.logits(prompts[0]) == pytest.approx(expected.tolist(), abs=1e-5)
    asked = []
    encoder.answers = asked.append
    result = encoder.run(prompts, 1)
    assert result["tokens"] == [[], []] and len(result["times"]) == 1
    assert len(asked) == 1 and torch.equal(asked[0], inputs)


@pytest.fixture(params=["tiny-bert-python", "tiny-vit-digits"])
def fresh_encoder(request):
    encoder = Encoder("a folder", None, "cpu", "float32")
    encoder.model = model = create_model(request.param).eval()
    if request.param == "tiny-bert-python":
        prompts = [[1, 2, 3], [4, 5, 6]]
        return encoder, model, prompts, torch.tensor(prompts)
    images = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 7)]
    return encoder, model, [[5], [7]], torch.stack(images)


def test_the_picture_is_made(run):
    _, _, folder = run
    assert Image.open(folder / "benchmark.png").format == "PNG"
    assert "<svg" in (folder / "benchmark.svg").read_text()


def test_bars_are_as_high_as_speeds_and_lines_as_limits(tmp_path):
    def entry(name, seconds):
        decode = {"median": seconds, "low": seconds, "high": seconds}
        sizes = {"config": "a model", "weights": "int4", "bytes_per_token": 1e6}
        return {**sizes, "subject": name, "phases": {"decode": decode}}

    subjects = [entry("eager", 0.02), entry("compiled", 0.01), entry("llama.cpp", 0.04)]
    machine = {"processor": "a processor", "threads": 2}
    draw(
        {"subjects": subjects, "bandwidth": {"median": 2e8}, "machine": machine},
        tmp_path / "x.png.partial",
        "png",
    )
    picture = np.asarray(Image.open(tmp_path / "x.png.partial").convert("RGB")).astype(int)

    def rows_of(color):
        """The pixel rows of the tallest bar of a color; below it, its square in the legend may stand."""
        wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        found = abs(picture - wanted).max(axis=-1) < 12
        rows = np.flatnonzero(found[:, found.sum(axis=0).argmax()])
        return np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1)[0]

    eager, compiled = rows_of(COLORS["eager"]), rows_of(COLORS["compiled"])
    assert len(compiled) / len(eager) == pytest.approx(2, rel=0.03)
    assert len(eager) / len(rows_of(COLORS["llama.cpp"])) == pytest.approx(2, rel=0.05)
    # The limit, 200 tokens/s, is a line twice as high as the bar of 100.
    dark = (picture < 100).all(axis=-1)
    limit = np.flatnonzero(dark.sum(axis=1) > picture.shape[1] * 0.4)
    assert (compiled[-1] - limit.mean()) / len(compiled) == pytest.approx(2, rel=0.03)


# The check before anything is timed -------------------------------------------------------------------------


def test_nothing_is_timed_when_a_peer_has_other_weights(monkeypatch, tmp_path):
    write = measure.write_weights

    def damaged(config, plan, folder, args, prompt):
        expected = write(config, plan, folder, args, prompt)
        path = folder / "hf-float32" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] *= -1
        save_file(tensors, path, {"format": "pt"})
        return expected

    monkeypatch.setattr(measure, "write_weights", damaged)
    arguments = [TINY, *SMALL, "--weights", "float32", "--subjects", "transformers", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="transformers: its logits differ"):
        benchmark.main(arguments)
    assert not list(tmp_path.iterdir())


def expected_text():
    """Ten tokens said by margins of a standard deviation and more; token 3 is nearly the second."""
    logits = np.random.default_rng(0).normal(size=(3, 10))
    logits[:, 7] = 5.0
    logits[1, 3] = 4.9999
    return Expected([7, 7, 7], logits, {})


@pytest.mark.parametrize(
    "tokens, noise, message",
    [
        ([7, 7, 7], 0, None),
        ([7, 3, 9], 0, None),  # where fp32 is nearly undecided
        ([7, 7, 3], 0, "token 3 of its text is 3, fp32's is 7"),
        ([7, 7, 7], 1e-3, "its logits differ from fp32's"),
        ([7, 7, 7], np.nan, "its logits differ from fp32's by nan"),
    ],
)
def test_what_the_check_lets_pass(tokens, noise, message):
    expected = expected_text()
    subject = measure.Subject("a config", "float32", "eager", None)
    logits = expected.logits[0] + noise * np.arange(10)
    if message is None:
        assert check(subject, tokens, logits, expected)["checked_tokens"] == 3
    else:
        with pytest.raises(UserError, match=message):
            check(subject, tokens, logits, expected)


def test_rounding_may_tip_the_choice_of_experts_but_fp32_is_forgiven_nothing():
    expected, tokens = expected_text(), [7, 7, 3]
    expected.logits[2, 3] = -20.0
    for config, kind, message in (
        ("qwen3-30b-a3b", "bfloat16", None),
        ("qwen3-30b-a3b", "float32", "token 3 of its text is 3"),
        ("llama-124m", "bfloat16", "token 3 of its text is 3"),
    ):
        subject = measure.Subject(config, kind, "eager", None)
        if message is None:
            assert check(subject, tokens, expected.logits[0], expected)["same_tokens"] == 2
        else:
            with pytest.raises(UserError, match=message):
                check(subject, tokens, expected.logits[0], expected)


def test_rows_of_a_batch_must_begin_alike_in_fp32():
    fp32, other, bf16 = (
        measure.Subject("a config", weights, name, None)
        for weights, name in (("float32", "eager"), ("float32", "transformers"), ("bfloat16", "eager"))
    )
    check_rows({fp32: [[1, 2], [3, 4]], other: [[1, 2], [3, 5]], bf16: [[1, 2], [9, 9]]})
    with pytest.raises(UserError, match="transformers and eager do not continue a batch of prompts alike"):
        check_rows({fp32: [[1, 2], [3, 4]], other: [[1, 2], [9, 4]]})


# Subjects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0])
def test_a_drafter_agrees_as_often_as_it_is_told_to(agreement):
    target, draft = (find_checkpoint(f"checkpoints/tiny-llama-python{end}") for end in ("", "-draft"))
    settings = {"folder": target, "threads": None, "device": "cpu", "dtype": "float32"}
    plain, speculative = Eager(**settings), Speculative(draft, 4, agreement, **settings)
    plain.load(), speculative.load()
    prompt = [5, 6, 7, 8, 9, 10]
    said = speculative.run([prompt], 120)
    assert said["tokens"] == plain.run([prompt], 120)["tokens"]
    assert len(said["times"]) == 120
    assert said["acceptance"] == pytest.approx(agreement, abs=0.08 if 0 < agreement < 1 else 0)


def test_what_the_drafter_says():
    drafter = AgreeingDrafter(create_model(TINY).eval(), list(range(100)), agreement=1.0)
    drafter.start([list(range(10))], 100, 4)
    assert drafter.draft([list(range(10))], 4, GREEDY, None).tokens.tolist() == [[10, 11, 12, 13]]
    assert drafter.draft([list(range(98))], 4, GREEDY, None).tokens.tolist() == [[98, 99, 0, 0]]
    drafter.agreement = 0.0
    assert drafter.draft([list(range(20))], 2, GREEDY, None).tokens.tolist() == [[21, 22]]


def test_the_compiled_subject_says_what_the_eager_one_says():
    settings = {"folder": find_checkpoint(f"checkpoints/{TINY}"), "threads": None, "device": "cpu"}
    eager, compiled = Eager(**settings, dtype="float32"), Compiled(**settings, dtype="float32")
    assert eager.load() == compiled.load()
    prompt = [5, 6, 7, 8, 9, 10]
    assert compiled.run([prompt], 40)["tokens"] == eager.run([prompt], 40)["tokens"]
    assert np.allclose(compiled.logits(prompt), eager.logits(prompt), atol=1e-4)
    whole_pass = eager.model(torch.tensor([prompt]))[0, -1].detach()
    assert np.allclose(eager.logits(prompt), whole_pass, atol=1e-4)


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux how long a process ran")
def test_a_process_that_waits_takes_no_processor_time_and_one_that_died_is_named():
    folder = find_checkpoint(f"checkpoints/{TINY}")
    settings = {"folder": str(folder), "threads": 2, "device": "cpu", "dtype": "float32"}
    with Process("eager", "the eager one", **settings) as process:
        process.call("load")
        assert len(process.call("run", prompts=[[1, 2, 3]], new_tokens=20)["result"]["times"]) == 20
        time.sleep(measure.SECONDS_TO_SETTLE)
        before = processor_seconds(process.process.pid)
        time.sleep(0.5)
        assert processor_seconds(process.process.pid) - before <= 0.1
        with pytest.raises(UserError, match="the eager one: the prompt is empty"):
            process.call("run", prompts=[[]], new_tokens=20)
        with pytest.raises(RuntimeError, match="Traceback"):
            process.call("run", prompts=None, new_tokens=20)
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match="the eager one: its process was killed, probably for want of mem"
        ):
            process.call("run", prompts=[[1, 2, 3]], new_tokens=20)


def test_quartiles():
    samples = [3.0, 1.0, 4.0, 1.5, 9.0]
    found = quartiles(samples)
    expected = np.percentile(samples, [25, 50, 75])
    assert [found[name] for name in ("low", "median", "high")] == pytest.approx(expected)
    assert quartiles([2.0])["median"] == quartiles([2.0])["high"] == 2.0


# Interruptions ----------------------------------------------------------------------------------------------


def workers(parent):
    """The process ids of a benchmark's subjects."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    return [int(pid) for pid, ppid, words in rows if int(ppid) == parent and "benchmarks.worker" in words]


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_when_a_run_is_broken_off(tmp_path, sent, status):
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "benchmark.py", TINY, "--subjects", "eager", "--rounds", "1000"]
    command += ["--weights", "float32", "bfloat16", "--out", str(results)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        # At one time or another: while files are written, or while two subjects are loaded or measured.
        wanted = {signal.SIGINT: 3, signal.SIGTERM: 2, signal.SIGKILL: 2}[sent]
        wait_until(lambda: len(workers(running.pid)) >= wanted)
        children = workers(running.pid)
        running.send_signal(sent)
        assert running.wait(timeout=120) == status
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    finally:
        running.kill()
    assert list(results.iterdir()) == []
    # After SIGKILL another process clears up.
    wait_until(lambda: not list(scratch.iterdir()))
    assert "Traceback" not in running.stderr.read()


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpt-2"], "no config named 'gpt-2'; did you mean 'gpt2'"),
        (["opus-mt"], "opus-mt is an encoder-decoder; give a decoder or a model that answers in one pass"),
        (
            ["vit-b-16", "--subjects", "compiled"],
            "nothing is left to measure .no compiled: it ans",
        ),
        (["--rounds", "0"], "--rounds is 0; give a number from 1 to 100,000"),
        (["--rounds", str(10**30)], "--rounds is 10*; give a number from 1 to 100,000"),
        (["--threads", str(10**30)], "--threads is 10*; give a number from 1"),
        (["--batches", str(10**30)], "--batches is 10*; give a number from 2"),
        (["--prefill-tokens", str(10**30)], "--prefill-tokens is 10*; give a number from 1"),
        (["--out", ""], "--out is empty"),
        (["--out", f"{__file__}/results"], "--out .* cannot be written .*; give another"),
        ([""], "an argument is empty"),
        (["--device", ""], "--device is empty"),
        (["--threads", "-1"], "--threads is -1"),
        (["--new-tokens", "1"], "--new-tokens is 1; give a number from 2"),
        (["--batches", "8", "1"], "--batches is 1; give a number from 2"),
        (["--agreement", "1.5"], "--agreement is 1.5; give 0 to 1"),
        (["--prompt-tokens", "1000"], "gpt2: --prompt-tokens 1000 and --new-tokens 128 are more than its"),
        (["--weights", "fp8"], "invalid choice: 'fp8'"),
        (["--subjects", "vllm"], "invalid choice: 'vllm'"),
        (["--device", "tpu"], "device 'tpu' is not on this machine"),
        (["--out", __file__], "--out .* cannot be written .*; give another"),
        (
            ["transformer-lm-15m", "--subjects", "llama.cpp", "--new-tokens", "9"],
            "nothing is left to measure",
        ),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    config = ["gpt2"] if arguments[0] == "--prompt-tokens" else []
    # The last --out counts.
    with pytest.raises(UserError, match=message):
        benchmark.main(["--out", str(tmp_path), *config, *arguments])


def test_what_is_not_installed_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    args = benchmark.parse_arguments([])
    skipped = benchmark.skip_what_is_missing(args)
    assert args.subjects == ["eager", "compiled"]
    assert capsys.readouterr().out.splitlines() == skipped
    assert [line.partition(" is left out")[0] for line in skipped] == ["transformers", "llama.cpp"]
    assert "pip install '.[benchmark]'" in skipped[1]
    with pytest.raises(UserError, match="nothing is left to measure: transformers is left out"):
        benchmark.skip_what_is_missing(benchmark.parse_arguments(["--subjects", "transformers"]))


def test_what_a_model_cannot_be_measured_as_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: True)
    args = benchmark.parse_arguments(["gpt2", "vit-b-16", "--subjects", "eager", "compiled", "transformers"])
    said = ["vit-b-16: compiled is left out (it answers in one pass)"]
    assert benchmark.skip_what_is_missing(args) == said == capsys.readouterr().out.splitlines()
    assert {name for _, name in measure.plan_subjects("vit-b-16", args)} == {"eager", "transformers"}
    assert {name for _, name in measure.plan_subjects("gpt2", args)} == {"eager", "compiled", "transformers"}


def test_a_drafter_is_smaller_in_what_its_model_has():
    for config in ("gpt2", "llama-124m", "pythia-160m", "transformer-lm-15m"):
        model_name, fields = load_config(config)
        drafter = create_model(config, **weights.draft_fields(model_name, fields)).config
        assert drafter.vocab_size == fields.vocab_size and 3 * drafter.d_model <= fields.d_model
        assert getattr(drafter, "tied_head", True)


def test_subjects_that_do_not_fit_together_are_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda device: 10**9)
    with pytest.raises(UserError, match="gpt2: 2 subjects together need 1.* GB of memory, 1 GB are free"):
        measure.check_room("gpt2", [("float32", "eager"), ("float32", "transformers")], CPU)
    monkeypatch.setattr(measure, "available_memory", lambda device: None)
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**8}))
    with pytest.raises(UserError, match="gpt2: the weights need 1.99 GB in .*TMPDIR"):
        measure.check_room("gpt2", [("float32", "eager")], CPU)


def test_quick_is_a_default_that_can_be_overruled():
    args = benchmark.parse_arguments(["--quick"])
    assert (args.rounds, args.configs) == (3, ["llama-124m"])
    args = benchmark.parse_arguments(["gpt2", "--quick", "--rounds", "9"])
    assert (args.rounds, args.configs, args.new_tokens) == (9, ["gpt2"], 24)


# Requests that come at once ---------------------------------------------------------------------------------


def test_requests_at_once_get_what_they_get_one_after_another():
    """By the engine, by generate in turn, and by transformers, which pads them and goes on to the longest."""
    name, settings = "tiny-llama-python-draft", {"threads": None, "device": "cpu", "dtype": "float32"}
    prompts, counts = [[1, 5, 9], [1, 7], [1, *range(20, 60)]], [4, 9, 2]
    rows = []
    for kind, folder in (
        (Eager, find_checkpoint(name)),
        (Served, find_checkpoint(name)),
        (Transformers, CHECKPOINTS / name),
    ):
        subject = kind(folder, **settings)
        subject.load()
        result = subject.run(prompts, counts)
        assert [len(row) for row in result["tokens"]] == counts and result["times"][-1] > 0
        rows.append(result["tokens"])
    assert rows[0] == rows[1] == rows[2]


def test_requests_are_of_many_lengths():
    args = benchmark.parse_arguments([TINY, "--requests", "32", "--batches", "4"])
    tasks = measure.plan_tasks(TINY, args)
    task = tasks["batch of 32 requests"]
    assert 8 <= min(map(len, task.prompts)) < max(map(len, task.prompts)) <= 256
    assert 16 <= min(task.new_tokens) < max(task.new_tokens) <= 128
    assert task.num_tokens() == sum(task.new_tokens)
    assert tasks["batch 4"].num_tokens() == 4 * args.new_tokens
