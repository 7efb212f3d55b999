"""The proof of models/vision_transformer.py."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from conversion.convert import convert, reverse
from conversion.tables import from_hf_config, to_hf_config
from models import build_model, create_model, load_config, load_model
from models.utils.errors import UserError
from models.utils.files import read_json
from tests.model_proof import ModelProof, assert_close
from tests.shape_cases import Case


def dropout(p):
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def random_images(model, batch_size, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, model.config.num_channels, height, width, generator=generator)


@torch.no_grad()
def redraw(model):
    """Draw every parameter anew (defaults of 0 and 1 hide mistakes), so that outputs have a std near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("cls_token", "position_embeddings")):
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.3 * noise + (not name.endswith("bias")))
    return model.eval()


class TestVisionTransformer(ModelProof):
    model_name = "vision_transformer"
    oracle_config = ViTConfig
    base = {
        "image_size": 30,
        "patch_size": 6,
        "num_channels": 2,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 56,
        "layer_norm_eps": 1e-4,
        "qkv_bias": True,
        "num_labels": 27,
        **dropout(0.2),
    }
    changes = {
        "image_size": {"image_size": 42},
        "patch_size": {"patch_size": 10},
        "num_channels": {"num_channels": 3},
        "d_model": {"hidden_size": 30},
        "num_layers": {"num_hidden_layers": 1},
        "num_heads": {"num_attention_heads": 4},
        "d_ff": {"intermediate_size": 36},
        "norm_eps": {"layer_norm_eps": 0.1},
        "qkv_bias": {"qkv_bias": False},
        "dropout": dropout(0.0),
        "pooler": {"bare": True},
        "num_labels": {"num_labels": 11},
    }
    no_effect = {"dropout": "acts in training only, where test_dropout compares it with the oracle"}

    def oracle(self, bare=False, **changes):
        config = self.oracle_config(**{**self.base, **changes}, attn_implementation="eager")
        return redraw(ViTModel(config) if bare else ViTForImageClassification(config))

    def inputs(self, model, batch_size, size, seed=0):
        """Images that are neither square nor of the size of training, nor a whole number of patches."""
        return (random_images(model, batch_size, size, size + 7, seed),)

    def call_oracle(self, oracle, images):
        out = oracle(images, interpolate_pos_encoding=True)
        return out.pooler_output if isinstance(oracle, ViTModel) else out.logits

    # Sizes of images ----------------------------------------------------------------------------------------

    def test_images_of_the_size_of_training(self, pair):
        oracle, model = pair
        images = random_images(model, 3, 30, 30)
        assert_close(model(images), oracle(images).logits)

    @pytest.mark.parametrize(
        "height, width", [(30, 30), (60, 60), (12, 75), (75, 12), (6, 6), (35, 29), (18, 50)]
    )
    def test_positions_stretch_as_the_oracle_s(self, pair, height, width):
        """(12, 75) and (75, 12) have as many patches, arranged otherwise; (35, 29) leaves pixels over."""
        oracle, model = pair
        embeddings = oracle.vit.embeddings
        tokens = torch.empty(1, 1 + (height // 6) * (width // 6), 40)
        expected = embeddings.interpolate_pos_encoding(tokens, height, width)
        assert_close(model.positions(height // 6, width // 6), expected)

    def test_as_many_patches_in_another_shape_are_other_positions(self, pair):
        """1 x 25 patches are not the 5 x 5 of training, whose table has as many rows."""
        oracle, model = pair
        images = random_images(model, 2, 6, 150)
        assert_close(model(images), self.call_oracle(oracle, images))
        assert (model.positions(1, 25) - model.positions(5, 5)).abs().max() > 0.1

    # The parts ----------------------------------------------------------------------------------------------

    def test_patches_are_the_paper_s(self, model):
        """Section 3.1: squares, row by row, each flattened, here channel by channel; the rest is lost."""
        images, seen = random_images(model, 2, 15, 20), []
        handle = model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.hidden(images)
        handle.remove()
        places = [(y, x) for y in (0, 6) for x in (0, 6, 12)]
        cut = [images[:, :, y : y + 6, x : x + 6].flatten(1) for y, x in places]
        assert torch.equal(seen[0], torch.stack(cut, dim=1))

    def test_hidden_states_equal_the_oracle(self, pair):
        oracle, model = pair
        (images,) = self.inputs(model, 2, 24)
        expected = oracle.vit(images, interpolate_pos_encoding=True).last_hidden_state
        assert_close(model.hidden(images), expected)

    def test_in_a_batch_and_alone(self, model):
        (images,) = self.inputs(model, 5, 33)
        together = model(images)
        for n in range(5):
            assert_close(model(images[n : n + 1]), together[n : n + 1])

    def test_dropout_stands_where_the_oracle_has_it(self, pair):
        """In training mode the same seed drops the same features, since both draw in the same order."""
        oracle, model = pair
        (images,) = self.inputs(model, 2, 30)
        try:
            oracle.train(), model.train()
            torch.manual_seed(7)
            expected = self.call_oracle(oracle, images)
            torch.manual_seed(7)
            actual = model(images)
        finally:
            oracle.eval(), model.eval()
        assert_close(actual, expected)
        assert not torch.allclose(actual, model(images), atol=0.1)

    @pytest.mark.parametrize("size", [30, 24])
    def test_exports(self, model, size):
        """torch.export, on which compilation and the diagrams build, for both sides of the position table."""
        (images,) = (random_images(model, 2, size, size),)
        program = torch.export.export(model, (images,), strict=False)
        assert_close(program.module()(images), model(images))

    # Checkpoints --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("pooler", [True, False])
    @pytest.mark.parametrize("prefix", ["", "vit."])
    def test_a_model_without_a_classifier(self, tmp_path, pooler, prefix):
        """google/vit-*-in21k have a pooler, facebook/dino-* have none; some files keep the prefix."""
        oracle = redraw(ViTModel(ViTConfig(**self.base), add_pooling_layer=pooler))
        oracle.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        saved = load_file(path)
        save_file({prefix + name: tensor for name, tensor in saved.items()}, path)
        convert(tmp_path, progress=False)
        model = load_model(tmp_path)
        assert (model.config.pooler, model.config.num_labels) == (pooler, None)

        images = random_images(model, 3, 30, 30)
        expected = oracle(images)
        assert_close(model(images), expected.pooler_output if pooler else expected.last_hidden_state)
        assert_close(model.hidden(images), expected.last_hidden_state)
        folder = reverse(tmp_path, progress=False)
        assert load_file(folder / "model.safetensors").keys() == saved.keys()
        again = ViTModel.from_pretrained(folder, add_pooling_layer=pooler)
        assert torch.equal(again.eval()(images).last_hidden_state, expected.last_hidden_state)

    def test_transformers_reads_what_reverse_writes(self, pair, tmp_path):
        oracle, model = pair
        oracle.config.id2label = {n: f"kind of animal {n}" for n in range(27)}
        self.zoo(oracle, tmp_path)
        again, report = ViTForImageClassification.from_pretrained(
            reverse(tmp_path, progress=False), output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report.values())
        images = random_images(model, 2, 30, 30)
        assert torch.equal(again.eval()(images).logits, oracle(images).logits)
        assert again.config.id2label == oracle.config.id2label
        assert read_json(tmp_path / "converted" / "labels.json")["labels"][26] == "kind of animal 26"


# Configs ----------------------------------------------------------------------------------------------------

# Dosovitskiy et al. 2021, table 1, has 86M, 307M and 632M. Google's H/14 is the one of pre-training, with a
# pooler (1,639,680 of these) and without a classifier.
COUNTS = {"vit-b-16": 86_567_656, "vit-l-16": 304_326_632, "vit-h-14": 632_404_480}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model_name, config = load_config(name)
    count = sum(parameter.numel() for parameter in build_model(model_name, config).parameters())
    assert count == COUNTS[name]
    theirs = ViTConfig(**to_hf_config(model_name, vars(config)))
    with torch.device("meta"):
        oracle = ViTForImageClassification(theirs) if config.num_labels else ViTModel(theirs)
    assert count == sum(parameter.numel() for parameter in oracle.parameters())


def test_fresh_weights():
    model = create_model("vit-b-16", num_layers=1, image_size=64, d_model=240, d_ff=480)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif name in ("class_token", "pos_embed"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            limit = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * limit < parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02), name


# As google/vit-base-patch16-224 has it, the labels left out.
PUBLISHED = {
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "encoder_stride": 16,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
    "id2label": {str(n): f"LABEL_{n}" for n in range(1000)},
    "label2id": {f"LABEL_{n}": n for n in range(1000)},
}


def test_a_published_config():
    """What Google's file says is configs/vit-b-16.json, and so is what transformers takes for granted."""
    model_name, config = load_config("vit-b-16")
    expected = {"model": model_name, **vars(config)}
    assert from_hf_config(PUBLISHED) == (model_name, expected)
    silent = {"model_type": "vit", "id2label": PUBLISHED["id2label"]}
    assert from_hf_config(silent) == (model_name, expected)
    assert from_hf_config({**PUBLISHED, "pooler_act": "tanh", "pooler_output_size": 768})[1] == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"pooler_act": "relu"}, "pooler_act is 'relu'"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "no head for ViTForMaskedImageModeling"),
        ({"image_size": [224, 224]}, "a positive integer was expected"),
        ({"use_mean_pooling": True}, "does not know use_mean_pooling"),
        ({"patch_size": 0}, "a positive integer was expected"),
    ],
)
def test_a_config_that_is_not_implemented(change, message):
    with pytest.raises(UserError, match=message):
        from_hf_config({**PUBLISHED, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size": 15}, "patch_size must divide image_size"),
        ({"num_heads": 7}, "num_heads must divide d_model"),
        ({"pooler": True}, "and no pooler"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        create_model("vit-b-16", **change)


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    """With a classifier, with a pooler, and with neither."""
    for pooler, num_labels in (False, 23), (True, None), (False, None):
        yield module.Config(
            image_size=85,
            patch_size=5,
            num_channels=37,
            d_model=38,
            num_layers=7,
            num_heads=19,
            d_ff=29,
            norm_eps=1e-5,
            qkv_bias=pooler,
            dropout=0.1,
            pooler=pooler,
            num_labels=num_labels,
        )


def run_shapes(model, recorder, B, h_px, w_px, g, **free):
    """Images that stretch the position table and leave pixels over; then those of its own size."""
    config = model.config
    images = torch.randn(B, config.num_channels, h_px, w_px)
    recorder.running(config, B=B, h_px=h_px, w_px=w_px, g=g, **free)
    model.train()(images).sum().backward()
    model.eval()(images)
    recorder.running(config, B=1, h_px=h_px, w_px=w_px, g=g, **free)
    model(images[:1])

    size = config.image_size
    free |= {"h": g, "w": g, "P": g * g, "T": g * g + 1}
    recorder.running(config, B=B, h_px=size, w_px=size, g=g, **free)
    model(torch.randn(B, config.num_channels, size, size))


SHAPES = Case(
    shape_configs,
    run_shapes,
    # Y, the labels, is Config's letter, and has no size where there is no classifier.
    {"B": 11, "h_px": 67, "w_px": 18, "h": 13, "w": 3, "g": 17, "P": 39, "T": 40, "d": 2, "Y": 23},
    same={("H", "d"), ("h", "w")},
)
