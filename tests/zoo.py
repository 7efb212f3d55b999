"""What there is to test: every model, config and checkpoint, found by looking, and small models of each kind.

    @every_decoder
    def test_something(model_name):
        model = small_model(model_name)

Nothing here is a list of models, so a page that is added is tested wherever `every_...` stands.
"""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from conversion.tables import from_hf_config
from models import (
    CONFIGS_FOLDER,
    DECODER,
    ENCODER_DECODER,
    MODEL_NAMES,
    ONE_PASS,
    build_model,
    config_from_dict,
    config_names,
    config_to_dict,
    inputs_of,
    kind_of,
    load_config,
)
from models.utils.command_line import CHECKPOINTS

ROOT = Path(__file__).parent.parent


# What there is ----------------------------------------------------------------------------------------------


def of_kind(*kinds):
    return [name for name in MODEL_NAMES if kind_of(name) in kinds]


DECODERS, ENCODER_DECODERS, ONE_PASS_MODELS = of_kind(DECODER), of_kind(ENCODER_DECODER), of_kind(ONE_PASS)
CHECKPOINT_NAMES = sorted(path.parent.name for path in CHECKPOINTS.glob("tiny-*/config.json"))

every_model = pytest.mark.parametrize("model_name", MODEL_NAMES)
every_decoder = pytest.mark.parametrize("model_name", DECODERS)
every_encoder_decoder = pytest.mark.parametrize("model_name", ENCODER_DECODERS)
every_one_pass = pytest.mark.parametrize("model_name", ONE_PASS_MODELS)
every_config = pytest.mark.parametrize("config_name", config_names())
every_checkpoint = pytest.mark.parametrize("checkpoint_name", CHECKPOINT_NAMES)


@cache
def model_of_checkpoint(checkpoint_name):
    """The name of the model that a checkpoint in Hugging Face's layout is read by."""
    return from_hf_config(json.loads((CHECKPOINTS / checkpoint_name / "config.json").read_text()))[0]


def checkpoints_of(*model_names):
    """The checkpoints that come with the project and hold one of these models."""
    return [name for name in CHECKPOINT_NAMES if model_of_checkpoint(name) in model_names]


@cache
def configs_of(model_name):
    """The names of a model's files in configs/: the tiny ones first, which are quick to build."""
    names = [path.stem for path in CONFIGS_FOLDER.glob("*.json") if load_config(path.stem)[0] == model_name]
    assert names, f"configs/ has no config of models/{model_name}.py; add one"
    return sorted(names, key=lambda name: (not name.startswith("tiny-"), name))


def one_config_each(*preferred):
    """{model name: the name of one of its configs}; preferred: those that a test would rather have."""
    return {name: configs_of(name)[0] for name in MODEL_NAMES} | {
        load_config(name)[0]: name for name in preferred
    }


def affordable_subjects(**sizes):
    """{model name: (one of its configs, changes of its fields)}, of which a test may build the real model.

    That is a checkpoint of the project's own, as it is, or else a published size made small; sizes: with
    these values for its fields, where the model has them.
    """
    subjects = {}
    for model_name in MODEL_NAMES:
        configs = configs_of(model_name)
        own = [name for name in configs if name.startswith("tiny-")]
        if own:
            subjects[model_name] = (own[0], {})
        else:
            fields = small_fields(config_to_dict(*load_config(configs[0])))
            subjects[model_name] = (configs[0], resized(fields, sizes))
    return subjects


# Small models -----------------------------------------------------------------------------------------------

# Sizes that differ where the architecture lets them; what is not named here is cut to at most LARGEST.
SMALL = {
    "vocab_size": 61,
    "max_seq_len": 64,
    "d_model": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "d_ff": 40,
    "d_expert": 28,
    "rotary_dim": 4,
    "d_state": 7,
    "full_every": 2,
    "num_experts": 5,
    "num_active_experts": 2,
    "num_groups": 1,
    "num_active_groups": 1,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
    "original_max_seq_len": 16,
}
# The same in the words of .cfg files, for the sections of a config; in_dim is that of a norm of q or k.
WORDS = {"num_query_groups": "num_kv_heads", "hidden_dim": "d_ff", "in_dim": "head_dim"}
SMALL |= {theirs: SMALL[ours] for theirs, ours in WORDS.items()}
LARGEST = 8


def small_fields(fields):
    """A config's fields with small sizes; what they switch on and off stays."""
    small = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            value = small_fields(value)
        elif type(value) is int:
            is_depth = re.fullmatch(r"num_(\w+_)?layers", name)
            value = 2 if is_depth else SMALL.get(name, min(value, LARGEST))
            value = SMALL["vocab_size"] - 1 if name.endswith("_id") else value
        elif isinstance(value, tuple | list):  # numbers of layers, of which a second one differs
            value = [number for number in value if number < 1]
        small[name] = value
    return small


def small_configs(model_name, **sizes):
    """The configs that a model's files become when their sizes are small, each different one once."""
    configs = []
    for name in configs_of(model_name):
        fields = small_fields(config_to_dict(*load_config(name)))
        fields = resized(fields, sizes)
        if "vocab_size" in sizes:
            fields |= {field: sizes["vocab_size"] - 1 for field in fields if field.endswith("_id")}
        config = config_from_dict(fields, f"the small {name}")[1]
        if config not in configs:
            configs.append(config)
    return configs


def resized(fields, sizes):
    """The fields with other sizes, where a config has them; the same size in a section of it, too."""
    new = {}
    for name, value in fields.items():
        size = sizes.get(name, sizes.get(WORDS.get(name), value))
        new[name] = resized(value, sizes) if isinstance(value, dict) else size
    return new


def small_config(model_name, **sizes):
    """The first of them. sizes: other values for these fields, where the model has them."""
    return small_configs(model_name, **sizes)[0]


def small_model(model_name, seed=0, config=None, **sizes):
    """A model of small_config, in eval mode, every parameter drawn anew: norms and biases hide nothing."""
    torch.manual_seed(seed)
    config = config or small_config(model_name, **sizes)
    model = build_model(model_name, config, device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5))
            else:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model


def small_inputs(model, batch_size=2, length=12, seed=0):
    """What the whole pass of a model is called with: tokens, images, or a source and a target."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    names = inputs_of(type(model).__module__.removeprefix("models."))
    if "images" in names:
        size = (batch_size, config.num_channels, config.image_size, config.image_size)
        return (torch.rand(size, generator=generator),)
    # The last id may be a pad, which is no text.
    num_texts = 2 if "source" in names else 1
    return tuple(
        torch.randint(config.vocab_size - 1, (batch_size, length), generator=generator)
        for _ in range(num_texts)
    )


def fields_of(model_name, config):
    """A config's fields with everything as JSON has it."""
    return json.loads(json.dumps({"model": model_name, **dataclasses.asdict(config)}))
