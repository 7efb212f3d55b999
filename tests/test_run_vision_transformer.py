"""A ViT at the terminal: preprocessing, labels and attention are the oracle's; mistakes get one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from sklearn import datasets
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.image_utils import load_image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import run
from conversion.convert import convert
from models import load_model
from models.utils.errors import UserError
from models.utils.image_processor import image_processor, open_image
from runs_encoder.attention_picture import attention, patches_seen, rollout
from runs_encoder.vision_transformer import grid
from tests.model_proof import assert_close
from tests.test_vision_transformer import redraw

CHINA = Path(datasets.__file__).parent / "images" / "china.jpg"  # 640 x 427
FLOWER = CHINA.with_name("flower.jpg")
HOPPER = Path(cbook._get_data_path("sample_data")) / "grace_hopper.jpg"  # 512 x 600
ANIMALS = ["cat", "dog", "tabby, tabby cat", "whale", "giraffe", "pig", "crane"]
# As google/vit-base-patch16-224 has it, at another size.
PREPROCESSING = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "image_processor_type": "ViTImageProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 24, "width": 24},
}


def write_checkpoint(folder, model=ViTForImageClassification, preprocessing=PREPROCESSING, **changes):
    """A small random checkpoint, as a reader finds one; the oracle is returned."""
    config = {
        "image_size": 24, "patch_size": 6, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 40, "attn_implementation": "eager",
        "id2label": dict(enumerate(ANIMALS)), "label2id": {name: n for n, name in enumerate(ANIMALS)},
    }  # fmt: skip
    oracle = redraw(model(ViTConfig(**{**config, **changes})))
    oracle.save_pretrained(folder)
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the oracle, the folder, which is converted)"""
    folder = tmp_path_factory.mktemp("vit") / "tiny-vit"
    oracle = write_checkpoint(folder)
    convert(folder, progress=False)
    return oracle, folder


@pytest.fixture
def start(capsys):
    """start(folder, *options) -> what a run printed."""

    def start(folder, *options):
        capsys.readouterr()
        run.main(["--checkpoint", str(folder), "--device", "cpu", *map(str, options)])
        return capsys.readouterr()

    return start


def pixel_values(image, fields=PREPROCESSING):
    return ViTImageProcessorPil(**fields)(image, return_tensors="pt").pixel_values


# Preprocessing ----------------------------------------------------------------------------------------------


def of_mode(mode):
    """A photograph in another mode; where it can be, part of it is transparent."""
    image = Image.open(CHINA).crop((100, 50, 253, 167))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode == "P with a transparent colour":
        image = image.convert("P")
        image.info["transparency"] = int(np.bincount(np.asarray(image).flat).argmax())
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": 224},
        {"size": {"height": 31, "width": 50}},
        *({"resample": filter} for filter in range(6)),
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
        {"image_mean": None, "image_std": None, "resample": None, "do_convert_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHINA, FLOWER, HOPPER], ids=lambda path: path.stem)
def test_preprocessing_is_the_oracle_s_to_the_bit(path, change):
    fields = {**PREPROCESSING, **change}
    expected = pixel_values(Image.open(path), {k: v for k, v in fields.items() if v is not None})
    actual = image_processor(fields, 3)(open_image(path, 3))
    assert torch.equal(actual, expected.float()) and actual.dtype == torch.float32


@pytest.mark.parametrize("fields", [{}, {"size": 224}])
def test_a_file_that_says_little_means_what_it_means_to_the_oracle(fields):
    expected = ViTImageProcessorPil(**fields)(Image.open(FLOWER), return_tensors="pt").pixel_values
    assert torch.equal(image_processor(fields, 3)(open_image(FLOWER, 3)), expected)


@pytest.mark.parametrize(
    "mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "P with a transparent colour"]
)
def test_every_mode_becomes_the_channels_of_the_model(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    of_mode(mode).save(path)
    expected = pixel_values(Image.open(path), PREPROCESSING | {"do_convert_rgb": True})
    assert torch.equal(image_processor(PREPROCESSING, 3)(open_image(path, 3)), expected)

    grey = {**PREPROCESSING, "image_mean": [0.3], "image_std": 0.2}
    one = image_processor(grey, 1)(open_image(path, 1))
    assert one.shape == (1, 1, 24, 24)
    # The same grey as of the coloured image.
    expected = pixel_values(open_image(path, 3).convert("L"), {**grey, "image_std": [0.2]})
    assert (one - expected).abs().max() <= 1.01 / 255 / 0.2


def test_sixteen_bits_keep_their_range(tmp_path):
    values = np.arange(0, 65280, 255, dtype=np.uint16).reshape(16, 16)  # no byte like its neighbour
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png", 1)), values >> 8)
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png", 3))[..., 1], values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_on_its_side(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(CHINA).resize((40, 23))
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.asarray(open_image(tmp_path / "turned.png", 3)),
        np.asarray(load_image(str(tmp_path / "turned.png"))),
    )


# What it prints ---------------------------------------------------------------------------------------------


def expected_guesses(oracle, path):
    with torch.no_grad():
        probabilities = oracle(pixel_values(Image.open(path))).logits.softmax(-1)[0]
    best = probabilities.topk(5)
    return [(ANIMALS[id], p) for id, p in zip(best.indices.tolist(), best.values.tolist())]


def test_it_prints_the_oracle_s_five_best_labels(checkpoint, start):
    oracle, folder = checkpoint
    output = start(folder, "--image", CHINA, "--image", HOPPER)
    lines = []
    for path in CHINA, HOPPER:
        lines += [str(path), *(f"  {p:>7.2%}  {label}" for label, p in expected_guesses(oracle, path))]
    assert output.out.splitlines() == lines
    assert "of weights (float32)" in output.err and "2 images in" in output.err


def test_json_is_one_array(checkpoint, start):
    oracle, folder = checkpoint
    (line,) = start(folder, "--image", FLOWER, "--json").out.splitlines()
    (result,) = json.loads(line)
    assert result["image"] == str(FLOWER)
    assert [ANIMALS[guess["id"]] for guess in result["labels"]] == [g["label"] for g in result["labels"]]
    for guess, (label, p) in zip(result["labels"], expected_guesses(oracle, FLOWER)):
        assert guess["label"] == label and guess["probability"] == pytest.approx(p, abs=1e-5)


def test_in_bf16(checkpoint, start):
    (result,) = json.loads(start(checkpoint[1], "--image", CHINA, "--json", "--dtype", "bfloat16").out)
    assert sum(guess["probability"] for guess in result["labels"]) <= 1.0001


def test_images_of_another_size_than_in_training(tmp_path, start):
    """preprocessor_config.json decides the size; the position table is stretched."""
    fields = {**PREPROCESSING, "size": {"height": 36, "width": 60}}
    oracle = write_checkpoint(tmp_path, preprocessing=fields)
    (result,) = json.loads(start(tmp_path, "--image", CHINA, "--json").out)
    images = pixel_values(Image.open(CHINA), fields)
    with torch.no_grad():
        expected = oracle(images, interpolate_pos_encoding=True).logits.softmax(-1)[0]
    for guess in result["labels"]:
        assert guess["probability"] == pytest.approx(expected[guess["id"]].item(), abs=1e-5)


def test_labels_that_may_all_be_true(tmp_path, start):
    oracle = write_checkpoint(tmp_path, problem_type="multi_label_classification")
    (result,) = json.loads(start(tmp_path, "--image", HOPPER, "--json").out)
    with torch.no_grad():
        expected = oracle(pixel_values(Image.open(HOPPER))).logits.sigmoid()[0].sort(descending=True)
    found = [guess["probability"] for guess in result["labels"]]
    assert found == pytest.approx(expected.values[:5].tolist(), abs=1e-5)


def test_a_model_without_labels_gives_its_vector(tmp_path, start):
    oracle = write_checkpoint(tmp_path, model=ViTModel)
    with torch.no_grad():
        expected = oracle(pixel_values(Image.open(HOPPER))).pooler_output[0]
    (result,) = json.loads(start(tmp_path, "--image", HOPPER, "--json").out)
    assert_close(torch.tensor(result["vector"]), expected)
    output = start(tmp_path, "--image", HOPPER, "--attention", tmp_path / "seen.png").out
    assert output.splitlines()[1].startswith(f"  no classifier; 32 numbers: {expected[0]:+.3f} ")
    assert (tmp_path / "seen.png").is_file()


# Attention --------------------------------------------------------------------------------------------------


def test_attention_is_the_oracle_s(checkpoint):
    oracle, folder = checkpoint
    model = load_model(folder)
    images = torch.cat([pixel_values(Image.open(path)) for path in (CHINA, HOPPER)])
    out, probs = attention(model, images)
    with torch.no_grad():
        expected = torch.stack(oracle(images, output_attentions=True).attentions)
        assert_close(probs, expected)
        assert_close(probs.sum(dim=-1), torch.ones(3, 2, 4, 17))
        assert torch.equal(out, model(images))
    assert not any(module._forward_hooks for module in model.modules()), "nothing listens any more"


def test_rollout_follows_every_path_through_the_layers(checkpoint):
    """Two layers, three tokens: a token's share is summed over all paths, each step half a stay."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(2, 5, 3, 3, generator=generator).softmax(dim=-1)
    first, second = (0.5 * layer.mean(dim=0) + 0.5 * torch.eye(3) for layer in probs)
    found = rollout(probs)
    for to in range(3):
        for start in range(3):
            paths = sum(second[to, between] * first[between, start] for between in range(3))
            assert found[to, start] == pytest.approx(paths.item(), abs=1e-6)
    assert_close(found.sum(dim=-1), torch.ones(3))


def test_patches_stand_where_they_are_seen(checkpoint):
    """A change of one patch alone changes the keys of one token, and there light falls on the picture."""
    model, keys = load_model(checkpoint[1]), []
    images = torch.zeros(2, 3, 24, 36)  # 4 rows of 6 patches
    images[1, :, 6:12, 24:30] = 1
    model.layers[0].attn.k_proj.register_forward_hook(lambda module, inputs, out: keys.append(out))
    model(images)
    changed = (keys[0][0] != keys[0][1]).any(dim=-1).float()
    expected = np.zeros((4, 6))
    expected[1, 4] = 1
    assert np.array_equal(patches_seen(changed, grid(images, model.config)), expected)
    # The least that any patch was seen is dark, the most is light; the class token counts for neither.
    row = torch.tensor([0.5, 0.1, 0.0, 0.0, 0.0, 0.0, 0.4])
    assert np.allclose(patches_seen(row, (2, 3)), [[0.25, 0, 0], [0, 0, 1]])


def test_it_draws_a_picture(checkpoint, start, tmp_path):
    output = start(checkpoint[1], "--image", CHINA, "--attention", tmp_path / "new folder" / "seen.png")
    assert output.out.startswith(str(CHINA))
    picture = np.asarray(Image.open(tmp_path / "new folder" / "seen.png").convert("RGB"))
    assert picture.shape[1] > 1000 and picture.std() > 20


# Mistakes ---------------------------------------------------------------------------------------------------


def bad_file(folder, name):
    """Files that are no image, or not a whole one, or far too large a one."""
    path = folder / name
    if name == "text.png":
        path.write_text("This is no image.")
    elif name == "empty.png":
        path.write_bytes(b"")
    elif name == "half.jpg":
        content = CHINA.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif name == "float.tif":
        Image.fromarray(np.ones((5, 5), dtype=np.float32)).save(path)
    elif name == "bomb.png":
        Image.new("1", (12_000, 12_000)).save(path)
    elif name == "folder.png":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "name, message",
    [
        ("text.png", "is no image of a kind that is read here"),
        ("empty.png", "is no image of a kind that is read here"),
        ("half.jpg", "cannot be read .*truncated"),
        ("float.tif", "numbers of 32 bits"),
        ("bomb.png", "is too large"),
        ("folder.png", "no such file"),
        ("missing.png", "no such file"),
    ],
)
def test_a_file_that_is_no_good(checkpoint, start, tmp_path, name, message):
    path = bad_file(tmp_path, name)
    with pytest.raises(UserError, match=message) as error:
        start(checkpoint[1], "--image", CHINA, "--image", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to look at; give --image"),
        (["--image", CHINA, "--prompt", "a cat?"], "--prompt: a Vision Transformer reads images alone"),
        (["--image", CHINA, "--chat"], "--chat: a Vision"),
        (["--image", CHINA, "--temperature=0"], "--temperature: a Vision"),
        (["--image", CHINA, "--image", CHINA, "--attention", "x.png"], "of one image; 2 were given"),
        (["--image", CHINA, "--attention", "/dev/null/x.png"], "cannot be written .* the name of a PNG"),
    ],
)
def test_options_that_make_no_sense(checkpoint, start, options, message):
    with pytest.raises(UserError, match=message):
        start(checkpoint[1], *options)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_kinds_of_images_that_are_read(kind, tmp_path):
    Image.open(CHINA).save(tmp_path / "image", kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert open_image(tmp_path / "image", 3).size == (640, 427)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PDF", "JPEG2000", "ICO", "PCX"])
def test_no_other_kind_is_read(kind, tmp_path):
    """Of some of them Pillow is not the reader: it starts Ghostscript for an EPS, whatever its name."""
    Image.open(CHINA).convert("RGB").save(tmp_path / "image.png", kind)
    with pytest.raises(UserError, match="is no image of a kind that is read here"):
        open_image(tmp_path / "image.png", 3)


def test_an_image_that_nobody_makes_smaller_is_not_too_large():
    processor = image_processor({**PREPROCESSING, "do_resize": False}, 3)
    with pytest.raises(UserError, match="too large"):
        processor(Image.new("RGB", (5000, 10)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_mean": [float("nan"), 0, 0]}, "nan stands where a number"),
        ({"image_std": [10**400, 1, 1]}, "int too large"),
        ({"size": 4097}, "size is 4097"),
        ({"size": {"shortest_edge": 24}}, "size is {'shortest_edge': 24}"),
        ({"size": 0}, "size is 0"),
        ({"size": "24"}, "size is '24'"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": {"height": 24, "width": None}}, "size is"),
        ({"resample": 9}, "9 is not a valid Resampling"),
        ({"image_mean": [0.5]}, "1 numbers, the model 3 channels"),
        ({"image_std": [0.5, 0.5, 0]}, "0 stands where a number above 0"),
        ({"image_mean": ["a", 0, 0]}, "'a' stands where a number"),
        ({"rescale_factor": True}, "True stands where"),
        ({"do_center_crop": True}, "do_center_crop is True, a step"),
        ({"do_sharpen": True}, "does not know do_sharpen"),
        ({"size": 5}, "smaller than a patch of 6 pixels"),
        ({"size": 1000}, "27,556 patches"),
    ],
)
def test_preprocessing_that_is_not_understood(checkpoint, start, tmp_path, change, message):
    folder = checkpoint[1] / "converted"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, **change}))
    for file in folder.glob("*"):
        if file.name != "preprocessor_config.json":
            shutil.copyfile(file, tmp_path / file.name)
    with pytest.raises(UserError, match=message):
        start(tmp_path, "--image", CHINA)


def test_a_checkpoint_without_preprocessing(tmp_path, start):
    write_checkpoint(tmp_path, preprocessing=None)
    with pytest.raises(UserError, match="preprocessor_config.json: no such file; put it into"):
        start(tmp_path, "--image", CHINA)


def test_a_channel_count_that_no_image_has(tmp_path, start):
    fields = {**PREPROCESSING, "image_mean": 0.5, "image_std": 0.5}
    write_checkpoint(tmp_path, preprocessing=fields, num_channels=2)
    with pytest.raises(UserError, match="reads 2 channels; images have 1, 3, 4"):
        start(tmp_path, "--image", CHINA)


def test_an_image_for_a_model_of_text(start):
    with pytest.raises(UserError, match="--image: .* a model that reads text"):
        start(run.DEFAULT_CHECKPOINT, "--image", CHINA)
