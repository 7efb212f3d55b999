"""The proof of runs_ss/terminal.py and pair.py: run.py with drafts, on tiny random checkpoints."""

import json
import re
import shutil
import sys

import pytest

import run
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_ss import terminal
from runs_ss.pair import check_pair, meaning
from runs_ss.terminal import COLOURS, RESET
from tests import tiny_checkpoints, tiny_marian

GREEDY = ("--temperature", 0)
PROMPT = ("--prompt", "def redraw(", "--max-new-tokens", 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder: a Llama, a GPT-2 with the same tokenizer, a Llama whose tokenizer has other pieces."""
    place = tmp_path_factory.mktemp("speculate")
    for name, model in [("llama", "llama"), ("gpt2", "gpt2"), ("other", "llama")]:
        tiny_checkpoints.save_checkpoint(place / name, model, chat=True)
    text = "\n".join(f"{n} little numbers and {n * n} larger ones, {n**3} in all" for n in range(400))
    model = tiny_marian.train(
        text, vocab_size=tiny_checkpoints.VOCAB_SIZE, model_type="bpe", byte_fallback=True, bos_id=1,
        eos_id=2, unk_id=0, pad_id=-1, control_symbols=tiny_checkpoints.CHAT_SYMBOLS,
    )  # fmt: skip
    (place / "other" / "tokenizer.model").write_bytes(model)
    for name, seed in [("marian", 2), ("marian-draft", 4)]:
        tiny_marian.save_checkpoint(place / name, seed, tokenizer="opus", eos_bias=0.5)
    return {path.name: path for path in place.iterdir()}


@pytest.fixture
def start(folders, capsys):
    """start(checkpoint, *options) -> what a run printed."""

    def start(name, *options):
        capsys.readouterr()
        run.main(["--checkpoint", str(folders.get(name, name)), "--device", "cpu", *map(str, options)])
        return capsys.readouterr()

    return start


# The text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [1, 4, 8])
def test_the_text_is_the_target_s(folders, start, num_draft_tokens):
    number = ("--num-draft-tokens", num_draft_tokens)
    for options in [(*PROMPT, *GREEDY), ("--max-new-tokens", 500, *GREEDY)]:  # the second fills the context
        expected = start("llama", *options).out
        for drafter in [("--draft", folders["gpt2"]), ("--draft", folders["llama"]), ("--lookup",)]:
            assert start("llama", *options, *drafter, *number).out == expected


def test_a_stop_string_ends_it_at_the_same_place(folders, start):
    whole = start("llama", *PROMPT, *GREEDY).out
    stop = whole[len(whole) // 2 :][:3]
    options = (*PROMPT, *GREEDY, "--stop", stop, "--json")
    expected = json.loads(start("llama", *options).out)
    result = json.loads(start("llama", *options, "--draft", folders["llama"], "--num-draft-tokens", 8).out)
    names = ("text", "tokens", "finish_reason")
    assert [result[name] for name in names] == [expected[name] for name in names]
    assert result["finish_reason"] == "stop string"


def test_the_seed_decides(folders, start):
    options = (*PROMPT, "--temperature", 1.5, "--draft", folders["gpt2"], "--seed")
    first, again, other = (start("llama", *options, seed).out for seed in (3, 3, 4))
    assert first == again != other


def test_an_end_token_ends_it(folders, start, tmp_path):
    tokens = json.loads(start("llama", *PROMPT, *GREEDY, "--json").out)["tokens"]
    folder = shutil.copytree(folders["llama"], tmp_path / "copy")
    (folder / "converted" / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[6]}))
    result = json.loads(start(folder, *PROMPT, *GREEDY, "--json", "--draft", folder).out)
    assert result["tokens"] == tokens[: tokens.index(tokens[6]) + 1]
    assert result["finish_reason"] == "end of text"


# What is said about it --------------------------------------------------------------------------------------


def test_the_report(folders, start):
    errors = start("llama", *PROMPT, *GREEDY, "--draft", folders["llama"]).err
    # 39 tokens behind the first, five a round.
    assert (
        "[100% of the drafts accepted (31 of 31 that were judged, 31 made), 4.88 tokens per target pass]"
        in errors
    )
    assert re.search(r"\[a draft step [\d.]+ ms, a verification [\d.]+ ms, a plain step [\d.]+ ms\]", errors)
    assert re.search(r"\[drafting (pays|does not pay) with 4 draft tokens: [\d.]+ times .*\]", errors)
    assert "gpt2" in start("llama", *PROMPT, "--draft", folders["gpt2"]).err, "the draft's memory is not told"


def test_json_has_the_figures(folders, start):
    options = (*PROMPT, *GREEDY, "--draft", folders["gpt2"], "--num-draft-tokens", 3)
    result = json.loads(start("llama", *options, "--json").out)
    drafts = result["drafts"]
    assert result["num_draft_tokens"] == 3 and len(result["tokens"]) == 40
    assert 0 <= drafts["num_accepted"] <= drafts["num_judged"] <= drafts["num_drafted"]
    assert drafts["num_judged"] - drafts["num_accepted"] <= drafts["target_passes"]
    assert drafts["tokens_per_target_pass"] == 39 / drafts["target_passes"]
    for name in ("draft_step", "verification", "plain_step"):
        assert drafts[f"seconds_per_{name}"] > 0
    assert drafts["speedup"] > 0 < drafts["expected_speedup"]


def test_an_interrupted_run_reports_too(folders, start, monkeypatch, capsys):
    painted = []

    def paint(self, piece):
        painted.append(piece)
        if len(painted) == 20:
            raise KeyboardInterrupt
        return piece

    monkeypatch.setattr(terminal.Speculation, "paint", paint)
    with pytest.raises(SystemExit):
        start("llama", *PROMPT, *GREEDY, "--draft", folders["llama"])
    errors = capsys.readouterr().err
    assert "end: interrupted" in errors and "of the drafts accepted" in errors


# --show-drafts ----------------------------------------------------------------------------------------------


def test_colours_in_a_terminal_and_none_in_a_pipe(folders, start, monkeypatch, capsys):
    options = (*PROMPT, *GREEDY, "--show-drafts", "--draft", folders["gpt2"])
    plain = start("llama", *PROMPT, *GREEDY)
    piped = start("llama", *options)
    assert piped.out == plain.out and "\033" not in piped.err

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for drafter, kinds in [("gpt2", {"rejected", "resampled", "own"}), ("llama", {"accepted", "own"})]:
        shown = start("llama", *options[:-1], folders[drafter])
        assert {kind for kind, colour in COLOURS.items() if colour in shown.out} == kinds
        assert all(colour in shown.err for colour in COLOURS.values()), "there is no legend"
        # Without what was rejected, and without the colours, it is the same text.
        without = re.sub(re.escape(COLOURS["rejected"]) + ".*?" + re.escape(RESET), "", shown.out)
        assert re.sub("\033\\[[0-9;]*m", "", without) == plain.out
    assert "\033" not in start("llama", *options, "--json").out


def test_what_was_rejected_is_shown(folders, start, monkeypatch):
    """The drafts of a drafter that is known: its whole text, with a target that wants another."""
    drafted = json.loads(start("gpt2", *PROMPT, *GREEDY, "--json").out)
    wanted = json.loads(start("llama", *PROMPT, *GREEDY, "--json").out)
    assert drafted["tokens"][0] != wanted["tokens"][0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = start(
        "llama", *PROMPT, *GREEDY, "--show-drafts", "--draft", folders["gpt2"], "--num-draft-tokens", 1
    )
    result = json.loads(
        start("llama", *PROMPT, *GREEDY, "--draft", folders["gpt2"], "--num-draft-tokens", 1, "--json").out
    )
    num_rejected = result["drafts"]["num_judged"] - result["drafts"]["num_accepted"]
    # A special token has no text to be shown.
    assert 0 < shown.out.count(COLOURS["rejected"]) <= num_rejected


# An encoder-decoder -----------------------------------------------------------------------------------------


TEXT = ("--prompt", ">>fra<< Where is the next station?")


def test_translations_are_the_target_s(folders, start):
    expected = start("marian", *TEXT, "--beams", 1).out
    for drafter in [("--draft", folders["marian-draft"]), ("--draft", folders["marian"]), ("--lookup",)]:
        for number in (1, 6):
            output = start("marian", *TEXT, *drafter, "--num-draft-tokens", number)
            assert output.out == expected
            assert "seed" in output.err, "beams were searched"
    output = start("marian", *TEXT, "--draft", folders["marian"])
    assert "[100% of the drafts accepted" in output.err and "[drafting " in output.err
    result = json.loads(start("marian", *TEXT, "--draft", folders["marian"], "--json").out)
    assert result["text"] + "\n" == expected and result["num_draft_tokens"] == 4
    assert result["drafts"]["num_accepted"] == result["drafts"]["num_judged"] > 0
    assert result["drafts"]["num_accepted"] + result["drafts"]["target_passes"] >= len(result["tokens"])


def test_a_translation_in_colours(folders, start, monkeypatch):
    options = (*TEXT, "--draft", folders["marian-draft"], "--show-drafts", "--num-draft-tokens", 2)
    expected = start("marian", *options).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = start("marian", *options).out
    assert COLOURS["resampled"] in shown
    without = re.sub(re.escape(COLOURS["rejected"]) + ".*?" + re.escape(RESET), "", shown)
    assert re.sub("\033\\[[0-9;]*m", "", without) == expected


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--draft", "gpt2", "--lookup"], "--draft and --lookup both guess ahead"),
        (["--show-drafts"], "--show-drafts goes with --draft CHECKPOINT, --lookup or --multi-token"),
        (["--num-draft-tokens", 2], "--num-draft-tokens goes with"),
        (["--lookup", "--num-draft-tokens", 0], "num_draft_tokens is 0; give 1 to 95"),
        (["--lookup", "--num-draft-tokens", 96], "num_draft_tokens is 96; give 1 to 95"),
        (["--lookup", "--num-draft-tokens", "x"], "--num-draft-tokens.*int"),
        (["--lookup", "--chat"], "--chat takes no drafts"),
        (["--draft", "gpt2", "--score", __file__], "--score takes no drafts"),
        (["--lookup", "--beams", 2], "--beams: for a model that translates"),
        (["--lookup", "--prompt", "x " * 200], "context"),
        (["--draft", "/no/such/folder"], "/no/such/folder: no such checkpoint"),
        (["--draft", "marian"], "is an encoder-decoder, which cannot draft for a decoder"),
        (["--multi-token"], "has no layer that looks a token further ahead; use --draft or --lookup"),
        (["--multi-token", "--lookup"], "--lookup and --multi-token both guess ahead"),
        (["--draft", "other"], "its tokenizer is not that of .*token .* is .*, not"),
    ],
    ids=str,
)
def test_bad_options(folders, start, options, message):
    options = [folders.get(option, option) for option in options]
    with pytest.raises(UserError, match=message) as error:
        start("llama", *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--draft", "marian", "--beams", 3], "--draft drafts, --beams 3 searches; give one of them"),
        (["--draft", "llama"], "is a decoder, which cannot draft for an encoder-decoder"),
        (["--lookup", "--num-draft-tokens", 64], "num_draft_tokens is 64; give 1 to 63"),
    ],
    ids=str,
)
def test_bad_options_of_a_translation(folders, start, options, message):
    options = [folders.get(option, option) for option in options]
    with pytest.raises(UserError, match=message):
        start("marian", *TEXT, *options)


def test_tokenizers_are_compared_by_what_their_tokens_are(folders, tmp_path):
    """Not by their sizes, not by their files, and special tokens too."""
    llama, other = load_tokenizer(folders["llama"]), load_tokenizer(folders["other"])
    assert llama.vocab_size == other.vocab_size
    config = type("Config", (), {"vocab_size": llama.vocab_size})
    check_pair(config, llama, config, load_tokenizer(folders["gpt2"]))
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        check_pair(config, llama, config, other)

    larger = type("Config", (), {"vocab_size": llama.vocab_size + 64})
    with pytest.raises(UserError, match=f"knows {larger.vocab_size} tokens, the target {llama.vocab_size}"):
        check_pair(config, llama, larger, llama)

    # One token more, of the same matrix.
    folder = shutil.copytree(folders["llama"] / "converted", tmp_path / "more")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(llama.vocab_size): {"content": "<|more|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    with pytest.raises(UserError, match=f"{llama.vocab_size + 1} tokens, not {llama.vocab_size}"):
        check_pair(config, llama, config, load_tokenizer(folder))
    # A special token here, a plain one there.
    plain_id = next(id for id in range(llama.vocab_size) if (meaning(llama, id) or b"").strip().isalpha())
    special = load_tokenizer(folders["llama"])
    special.special_ids, special.special_tokens = {plain_id}, {"<|x|>": plain_id}
    with pytest.raises(UserError, match="token"):
        check_pair(config, llama, config, special)
