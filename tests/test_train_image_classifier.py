"""The ViT's training page: runs go on exactly, transformers reads the result, the data are what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import run
from conversion.convert import convert
from models import load_model
from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.image_processor import image_processor, load_image_processor, open_image
from runs_train.image_classifier import main
from runs_train.image_data import Batches, Images, every_fifth, prepare, shift_each
from runs_train.image_labels import Run, accuracy
from tests.model_proof import assert_close
from tests.tiny_readmes import row
from tests.training_runs import CONFIGS, small_run, state_of

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny-vit-digits"
SHEET = ROOT / "tests" / "data" / "held_out_digits.png"
DIGIT = ROOT / "tests" / "data" / "digit.png"
CONFIG, FP32 = CONFIGS["image_classifier"], ("--dtype", "float32")


@pytest.fixture
def command(tmp_path):
    return small_run("image_classifier", tmp_path)


def save_images(folder, groups):
    """A folder per label, of coloured images in several sizes and formats."""
    for label, (count, color) in groups.items():
        (folder / label).mkdir(parents=True)
        for n in range(count):
            shade = tuple(min(255, value + 8 * n) for value in color)
            suffix = ("png", "jpg", "bmp")[n % 3]
            Image.new("RGB", (20 + n, 15), shade).save(folder / label / f"{n:02}.{suffix}")
    return folder


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--seed", "--shift", "--label-smoothing"])
def test_a_run_does_not_go_on_with_other_settings(command, option):
    main(command("run", steps=3))
    value = {"--seed": 1, "--shift": 2, "--label-smoothing": 0.2}[option]
    with pytest.raises(UserError, match="that run was started with"):
        main(command("run", option, value, steps=3))


def test_the_loss_is_the_smoothed_cross_entropy(command, tmp_path, monkeypatch):
    """Of the first batch: (1 - e) times the right label's surprise, plus e times the mean of all labels'."""
    seen = {}

    def keep(run, batch):
        seen["loss"] = loss(run, batch)
        seen["logits"] = run.model.eval()(batch[0])
        seen["labels"] = batch[1]
        return seen["loss"]

    loss = Run.loss
    monkeypatch.setattr(Run, "loss", keep)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dropout": 0.0}))
    main(command("run", "--label-smoothing", 0.3, *FP32, "--warmup", 0, steps=1))
    surprise = -seen["logits"].log_softmax(dim=-1)
    right = surprise[range(16), seen["labels"]]
    expected = (0.7 * right + 0.3 * surprise.mean(dim=-1)).mean().item()
    assert seen["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_it_learns_and_transformers_reads_what_it_learned(command, tmp_path, capsys):
    """Two colours are soon told apart, from a folder of files; the names of the folders are the labels."""
    groups = {"red things": (25, (200, 10, 10)), "blue": (15, (10, 10, 200)), "not a label": (0, None)}
    data = save_images(tmp_path / "colours", groups)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_channels": 3}))
    main(command("run", *FP32, "--data", data, steps=40))
    losses = state_of(tmp_path / "run")["losses"]
    assert losses[0] > 0.5 and sum(losses[-5:]) / 5 < 0.3
    assert "100.00% of the held-out images named" in capsys.readouterr().out

    folder = tmp_path / "run"
    run.main(["--checkpoint", str(folder), "--image", str(data / "blue" / "04.jpg"), "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[1].endswith("  blue")

    oracle = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    images = ViTImageProcessorPil.from_pretrained(folder)(
        Image.open(data / "red things" / "03.png"), return_tensors="pt"
    ).pixel_values
    model = load_model(folder, dtype=torch.float32)
    processor = load_image_processor(folder, 3)
    ours = processor(open_image(data / "red things" / "03.png", 3))
    assert torch.equal(ours, images)
    with torch.no_grad():
        assert_close(model(ours), oracle(images).logits)
    assert oracle.config.id2label == {0: "blue", 1: "red things"}
    assert model.config.num_labels == 2, "as many as there are folders, whatever the config says"


# Data -------------------------------------------------------------------------------------------------------


def test_every_fifth_image_of_each_label_is_held_out():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
    # 0 stands at 0, 2, 5, 6, 8; 1 at 1, 3, 4, 7, 9, 10, ..., 14.
    assert every_fifth(labels).nonzero().flatten().tolist() == [8, 9, 14]


def test_digits_are_scikit_learn_s():
    album = prepare("digits", 8, 1)
    data = load_digits()
    assert (len(album.train), len(album.held_out)) == (1442, 355)
    chosen = every_fifth(torch.tensor(data.target))
    for images, of in (album.train, ~chosen), (album.held_out, chosen):
        assert np.abs(images.pixels[:, 0] / 255 * 16 - data.images[of]).max() < 0.04
        assert images.labels.tolist() == data.target[of].tolist()
    normal = image_processor(album.preprocessing, 1).normalize(album.train.pixels)
    assert normal.mean().abs() < 1e-3 and abs(normal.std() - 1) < 1e-3
    # Nothing is learned from the held-out images, not their spread either.
    assert album.preprocessing["image_std"] == [round((album.train.pixels / 255).std(), 4)]


def test_a_batch_follows_from_its_number():
    """A pass shows no image twice, the next one has another order, and who asks again gets the same."""
    pixels = np.arange(22, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), dtype=np.uint8)
    images = Images(pixels, torch.arange(22))
    batches = Batches(images, 5, shift=1, seed=3)
    passes = [[batches.batch(4 * number + n)[1].tolist() for n in range(4)] for number in range(2)]
    for seen in passes:
        assert len({label for batch in seen for label in batch}) == 20
    assert passes[0] != passes[1]
    for n in 6, 0:
        pixels, labels = batches.batch(n)
        assert (pixels[:, 0, 0, 0] == labels.numpy()).all() and labels.tolist() == passes[n // 4][n % 4]
    assert Batches(images, 5, shift=1, seed=4).batch(0)[1].tolist() != passes[0][0]


def test_images_are_shifted_in_all_directions():
    images = np.random.default_rng(0).integers(0, 255, (200, 2, 6, 9), dtype=np.uint8)
    shifted = shift_each(images, 1, torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(images, shifted):
        for dy, dx in np.ndindex(3, 3):
            rolled = np.roll(before, (dy - 1, dx - 1), axis=(1, 2))
            if (rolled[:, 1:-1, 1:-1] == after[:, 1:-1, 1:-1]).all():
                found.add((dy, dx))
                break
        else:
            raise AssertionError("more than a shift by one pixel")
    assert len(found) == 9
    assert (shift_each(images, 0, torch.Generator()) == images).all()
    white = np.full((20, 1, 4, 4), 255, dtype=np.uint8)
    assert (shift_each(white, 2, torch.Generator()) == white).all(), "what comes in repeats the edge"


def test_accuracy_counts_every_image_once():
    """A model that always says 2, on more images than fit into a batch."""
    model = torch.nn.Linear(1, 1)
    model.forward = lambda images: torch.eye(3)[torch.full((len(images),), 2)] * (not model.training)
    images = Images(np.zeros((7, 1, 2, 2), dtype=np.uint8), torch.tensor([2, 0, 2, 1, 2, 0, 2]))
    processor = image_processor({"image_mean": 0.5, "image_std": 0.5}, 1)
    assert accuracy(model, images, processor, batch_size=3) == pytest.approx(4 / 7)


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "vit-b-16"], "images of 1 x 8 x 8 numbers, where --config asks for 3 x 224 x 224"),
        (["--data", "no folder"], "no folder: no such folder; give one that has a subfolder"),
        (["--batch-size", 5000], "--batch-size 5000: there are 1442 images"),
        (["--label-smoothing", 1], "leaves nothing of the label"),
        (["--shift", -1], "--shift"),
        (["--shift", 9], "--shift 9 moves images of 8 pixels out of sight"),
    ],
)
def test_what_makes_no_sense(command, options, message):
    with pytest.raises(UserError, match=message):
        main(command("run", *options))


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"a": (9, (0, 0, 0))}, "there are 1, too small: none"),
        ({"a": (9, (0, 0, 0)), "b": (4, (9, 9, 9))}, "there are 2, too small: b"),
        ({}, "there are 0"),
    ],
)
def test_folders_that_are_too_few_or_too_small(command, tmp_path, groups, message):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=message):
        main(command("run", "--data", save_images(tmp_path / "images", groups)))


def test_a_file_among_the_images_that_is_none(command, tmp_path):
    data = save_images(tmp_path / "images", {"a": (6, (0, 0, 0)), "b": (6, (9, 9, 9))})
    (data / "b" / "05.png").write_text("no image")
    with pytest.raises(UserError, match="05.png: is no image"):
        main(command("run", "--data", data))


# The checkpoint that comes with the project -----------------------------------------------------------------


def sheet():
    """The held-out digits: a row for each of 0 to 9; where there is no digit, the sheet is black."""
    page = np.asarray(Image.open(SHEET))
    squares = page.reshape(10, 8, -1, 8).swapaxes(1, 2)  # (label, place, 8, 8)
    there = squares.any(axis=(2, 3))
    return Images(squares[there][:, None], torch.from_numpy(there.nonzero()[0]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(the model in fp32, its processor), converted here, whatever was converted before."""
    out = tmp_path_factory.mktemp("tiny") / "converted"
    convert(TINY, out=out)
    return load_model(out, dtype=torch.float32), load_image_processor(out, 1)


def test_its_accuracy_on_the_held_out_digits(tiny):
    measured = accuracy(*(tiny[0], sheet(), tiny[1]))
    assert row(TINY.name, "accuracy, held-out images") == f"{measured:.2%} ({round(355 * measured)} of 355)"
    assert measured >= 0.97


def test_the_sheet_is_the_held_out_fifth():
    album, shown = prepare("digits", 8, 1), sheet()
    if album.facts["sha256"] != row(TINY.name, "sha256 of pixels and labels"):
        pytest.skip("this scikit-learn has other digits")
    in_order = album.held_out.labels.argsort(stable=True)
    assert (album.held_out.pixels[in_order] == shown.pixels).all()
    assert album.held_out.labels[in_order].tolist() == shown.labels.tolist()


def test_it_names_the_digit_of_the_readme(capsys):
    """Both what its README shows and what is true: the file is a digit that it was not trained on."""
    run.main(["--checkpoint", str(TINY), "--image", str(DIGIT), "--device", "cpu", "--dtype", "float32"])
    printed = capsys.readouterr().out
    readme = (TINY / "README.md").read_text()
    assert printed.replace(str(DIGIT), "tests/data/digit.png") in readme.replace("\n    ", "\n")
    label = printed.splitlines()[1].split()[-1]
    pixels = np.asarray(Image.open(DIGIT))
    held_out = sheet()
    same = [n for n in range(355) if (held_out.pixels[n, 0] == pixels).all()]
    assert [str(held_out.labels[n].item()) for n in same] == [label]
    assert read_json(TINY / "config.json")["id2label"][label] == label
