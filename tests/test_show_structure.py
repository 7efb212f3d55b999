"""show_structure.py at the command line: what it prints and writes, and what it says to a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import show_structure
from models import MODEL_NAMES, config_names
from models.utils.errors import UserError

PROJECT = Path(__file__).parents[1]


def printed(capsys, *options):
    show_structure.main([str(option) for option in options])
    return capsys.readouterr().out


def test_without_a_name_everything_is_listed(capsys):
    text = printed(capsys)
    for name in [*config_names(), *MODEL_NAMES, "checkpoints/tiny-llama-python"]:
        assert name in text


def test_table(capsys):
    text = printed(capsys, "llama-3-8b", "--table")
    assert text.isascii() or "→" in text
    row = next(line for line in text.splitlines() if "gate_proj" in line)
    assert (
        " ".join(row.split()) == "gate_proj 4,096 → 14,336 (B, T, 14336) 1,879,048,192 3.76 GB 3.85 T 3.76 G"
    )
    assert "Layer x 32" in text and "8,030,261,248" in text


def test_table_of_other_sizes(capsys):
    text = printed(capsys, "llama-3-8b", "--table", "--batch", 4, "--length", 2048, "--bandwidth", 3350)
    assert "FLOPs of 2,048 tokens" in text
    assert "cache of 4 x 2,048" in text
    assert "tokens/s at 3350 GB/s" in text


def test_json(capsys):
    said = json.loads(printed(capsys, "tiny-gpt2-python", "--json"))
    assert said["model"] == "gpt2" and said["config"]["d_model"] == 192
    structure = said["structure"]
    assert structure["parameters"] == said["facts"]["model"]["parameters"] == said["parameters"]
    assert said["active"] == said["parameters"] and said["experts"] is None
    layer = next(child for child in structure["children"] if child["repeat"] == 5)
    assert [child["label"] for child in layer["children"]].count("add") == 2


def test_other_values_in_the_config(capsys):
    text = printed(capsys, "gpt2", "--set", "num_layers=3", "--set", "d_ff=100", "--table")
    assert "Layer x 3" in text and "768 → 100" in text


def test_a_model_is_drawn_in_a_size(capsys):
    """That of structure_images/, and a line beside the result says so."""
    show_structure.main(["llama", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["name"] == "llama-3-8b"
    assert said.err.startswith("llama in the size llama-3-8b; there are: ") and "llama-3.1-405b" in said.err


def test_what_all_draws_is_what_lies_there(tmp_path, monkeypatch):
    """Each picture and page of a folder, and nothing that a config does not stand for."""
    names = ["gpt2.png", "gpt2.svg", "gpt2-dark.png", "pythia-70m-gpt2.html", "gpt2-xl.html", "notes.png"]
    for name in names:
        (tmp_path / name).write_text("")
    found = sorted(show_structure.images(tmp_path))
    assert found == [
        (("gpt2",), False, False),
        (("gpt2",), True, False),
        (("gpt2-xl",), False, True),
        (("pythia-70m", "gpt2"), False, True),
    ]
    drawn = []
    (tmp_path / "gpt2-rope.png").write_text("")
    (tmp_path / "notes-rope.png").write_text("")
    (tmp_path / "pythia-70m-rope-dark.png").write_text("")
    ropes = show_structure.rope_images(tmp_path)
    assert ropes == [("gpt2", False), ("pythia-70m", True)]
    monkeypatch.setattr(show_structure, "rope_images", list)
    monkeypatch.setattr(show_structure, "thinking_pages", list)
    monkeypatch.setattr(show_structure, "images", lambda: found)
    monkeypatch.setattr(show_structure, "load", lambda name: (name, {"name": name}))
    monkeypatch.setattr(show_structure, "draw", lambda subject, dark: drawn.append((subject[0], dark)))
    monkeypatch.setattr(show_structure, "write_page", lambda subject: drawn.append(subject[0]))
    monkeypatch.setattr(show_structure, "compare", lambda a, b, html, dark: drawn.append((a[0], b[0], html)))
    show_structure.main(["--all"])
    assert drawn == [("gpt2", False), ("gpt2", True), "gpt2-xl", ("pythia-70m", "gpt2", True)]


def test_a_question_is_answered_before_torch_is_imported():
    """Help, the list of names, and typos of names, options and fields."""
    asked = [["--help"], [], ["lama-3-8b"], ["llama-3-8b", "--tabel"], ["gpt2", "--set", "d_modl=3"]]
    program = (
        "import sys, show_structure\n"
        f"for options in {asked}:\n"
        "    try: show_structure.main(options)\n"
        "    except (show_structure.UserError, SystemExit): pass\n"
        "slow = {'torch', 'matplotlib', 'numpy', 'jinja2', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["checkpoints/tiny-bert-python", "tiny-bert-python"])
def test_a_checkpoint_is_what_its_config_is(capsys, name):
    """A folder in Hugging Face's layout, which need not be converted for this."""
    folder = PROJECT / name if "/" in name else name
    said = json.loads(printed(capsys, folder, "--json"))
    assert (said["name"], said["model"], said["config"]["d_model"]) == ("tiny-bert-python", "bert", 256)


def test_a_config_file(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text((PROJECT / "configs/tiny-gpt2-python.json").read_text())
    assert json.loads(printed(capsys, path, "--json"))["name"] == "mine"


@pytest.mark.parametrize("dark", [False, True])
def test_pictures(capsys, tmp_path, dark):
    printed(capsys, "tiny-llama-python", "--out", tmp_path / "small.v1.png", *["--dark"] * dark)
    stem = "small.v1-dark" if dark else "small.v1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.png", f"{stem}.svg"]
    image = Image.open(tmp_path / f"{stem}.png").convert("L")
    assert image.width > 500 and (image.getpixel((5, 5)) < 100) == dark
    assert (tmp_path / f"{stem}.svg").read_text().lstrip().startswith(("<?xml", "<svg"))


def test_a_pictures_name_may_have_dots(capsys, tmp_path):
    printed(capsys, "tiny-llama-python", "--out", tmp_path / "llama-3.1-8b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-3.1-8b.png", "llama-3.1-8b.svg"]


def test_a_page(capsys, tmp_path):
    text = printed(capsys, "tiny-llama-python", "--html", "--out", tmp_path / "small.html")
    assert str(tmp_path / "small.html") in text
    assert "<!doctype html>" in (tmp_path / "small.html").read_text().lower()


@pytest.mark.parametrize("options", [[], ["--html"]])
def test_two_models(capsys, tmp_path, options):
    ending = "html" if options else "png"
    printed(
        capsys,
        "--compare",
        "tiny-gpt2-python",
        "tiny-llama-python",
        "--out",
        tmp_path / f"two.{ending}",
        *options,
    )
    assert (tmp_path / f"two.{ending}").stat().st_size > 1000


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lama-3-8b"], "no model named 'lama-3-8b'.*did you mean 'llama-3-8b'"),
        (["checkpoints/tiny-lama-python"], "did you mean '.*tiny-llama-python'"),
        (["tiny-lama-python"], "did you mean 'tiny-llama-python'"),
        (["gpt_neo"], "did you mean 'gpt_neox'"),
        (["gpt2", "--set", "d_modl=3"], "unknown field 'd_modl'; did you mean 'd_model'"),
        (["gpt2", "--set", "d_model=wide"], "field 'd_model' is 'wide', where a positive int is expected"),
        (
            ["gpt2", "--set", "num_heads=5"],
            r"num_heads must divide d_model \(d_model is 768, num_heads is 5\)",
        ),
        (
            ["gpt2", "--set", f"num_layers={10**9}"],
            "num_layers 1,000,000,000 are too many to build; give 100,000",
        ),
        (["gpt2", "--set", f"d_model={10**30}"], "d_model is a number of more than 20 digits; give at most"),
        (["gpt2", "--set", f"d_model={'9' * 5000}"], r"d_model=9{20}\.\.\.: no number that can be read"),
        (["gpt2", "--set", "d_model=" + "[" * 100_000], r"d_model=\[{20}\.\.\.: no number that can be read"),
        (["gpt2", "--set", "num_heads"], "write it as field=value"),
        (["--set", "d_model=3"], "--set goes with NAME"),
        (["gpt2", "--all"], "NAME, --all, --compare and --tree exclude each other"),
        (["gpt2", "--tree"], "NAME, --all, --compare and --tree exclude each other"),
        (["--tree", "--table"], "--tree makes a picture, or with --html pages; leave out --table"),
        (["--tree", "--html", "--dark"], "--dark is for pictures"),
        (["--tree", "--html", "--out", "README.md"], "--out README.md: is no folder; --tree --html writes"),
        (["--tree", "--html", "--out", "README.md/x"], r"cannot be written \(README.md is no folder\)"),
        (["--all", "--table"], "--all draws pictures"),
        (["--compare", "gpt2", "llama-3-8b", "--json"], "leave out --table, --json and --rope"),
        (["--compare", "gpt2", "lama-3-8b"], "did you mean 'llama-3-8b'"),
        (["--table"], "say which model"),
        (["gpt2", "--table", "--length", "0"], "--length is 0; give more than 0"),
        (["gpt2", "--table", "--batch", str(10**30)], r"--batch is 1e\+30; .*at most 1,000,000,000,000"),
        (["gpt2", "--table", "--bandwidth", "nan"], "--bandwidth is nan; give more than 0"),
        (["gpt2", "--table", "--bandwidth", "inf"], "--bandwidth is inf; give more than 0"),
        (["gpt2", "--out", "README.md/x.png"], r"cannot be written \(README.md is no folder\)"),
        (["gpt2", "--out", ""], "--out .*; (give|see)"),
        ([""], "empty"),
        (["gpt2", "--table", "--json"], "not allowed with"),
        (["gpt2", "--table", "--out", "table.txt"], "--table and --json print .* leave out --out"),
        (["gpt2", "--html", "--dark"], "--dark is for pictures"),
        (["--dark"], "say which model"),
        (["--rope"], "say which model"),
        (["--all", "--rope"], "--all draws pictures"),
        (["gpt2", "--rope"], "models/gpt2.py has no RoPE"),
        (["llama-3-8b", "--rope", "--table"], "not allowed with"),
        (["gpt2", "--out", "tests"], "--out tests: is a folder"),
        (["gpt2", "--tabel"], "unrecognized arguments: --tabel; see: python show_structure.py --help"),
    ],
)
def test_a_mistake_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        show_structure.main(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ["tiny-gpt2-python"],
        ["tiny-gpt2-python", "--html"],
        ["--compare", *2 * ["tiny-gpt2-python"], "--html"],
    ],
)
def test_a_place_that_cannot_be_written(tmp_path, options):
    (tmp_path / "taken").write_text("a file, where a folder is asked for")
    with pytest.raises(UserError, match=r"taken/x.* cannot be written \(.*\); give another --out"):
        show_structure.main([*options, "--out", str(tmp_path / "taken" / "x.html")])


def test_a_config_that_the_model_refuses(tmp_path):
    path = tmp_path / "config.json"
    fields = json.loads((PROJECT / "configs/tiny-gpt2-python.json").read_text())
    path.write_text(json.dumps({**fields, "n_embd": 3}))
    with pytest.raises(UserError, match="config.json: unknown field 'n_embd'"):
        show_structure.main([str(tmp_path)])


@pytest.mark.parametrize("where", ["torch.export.export", "matplotlib.figure.Figure.savefig"])
def test_ctrl_c_while_drawing(where, tmp_path):
    """One line, status 130, and neither half a picture nor a file beside it."""
    program = (
        "import sys, torch, matplotlib.figure, show_structure\n"
        "def interrupted(*args, **kwargs): raise KeyboardInterrupt\n"
        f"{where} = interrupted\n"
        "show_structure.run_main(show_structure.main)"
    )
    command = [sys.executable, "-c", program, "tiny-gpt2-python", "--out", str(tmp_path / "x.png")]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (run.returncode, run.stderr.strip(), run.stdout) == (130, "interrupted", "")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error():
    """python show_structure.py NAME --json | head -c 100"""
    command = [sys.executable, "show_structure.py", "tiny-gpt2-python", "--json"]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(100)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)
