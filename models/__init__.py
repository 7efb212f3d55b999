"""The door to the models: from a name or a folder to a config, a fresh model, or a loaded one.

    create_model("gpt2-medium", vocab_size=5000)      fresh weights, for training
    load_model("checkpoints/tiny-llama-python")       a converted checkpoint, for use

Every models/NAME.py has a `Config` and a `Model`; every config file begins with {"model": "NAME", ...
"""

import dataclasses
import difflib
import importlib
import inspect
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.utils.errors import UserError
from models.utils.files import converted_folder, one_line, read_json
from models.utils.kernels.onednn import choose_products
from models.utils.quantize import prepare, quantize_layers, stored_quantization, swap

MODELS_FOLDER = Path(__file__).parent
CONFIGS_FOLDER = MODELS_FOLDER.parent / "configs"
MODEL_NAMES = sorted(path.stem for path in MODELS_FOLDER.glob("*.py") if path.stem != "__init__")


# Configs ----------------------------------------------------------------------------------------------------


def config_names():
    """The names of the configs that come with the project."""
    return sorted(path.stem for path in CONFIGS_FOLDER.glob("*.json"))


def load_config(name_or_path):
    """(model name, Config) from a name in configs/ or from the path of a JSON file."""
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = CONFIGS_FOLDER / f"{name_or_path}.json"
        if not path.is_file():
            raise UserError(f"no config named {name_or_path!r}; {nearest(str(name_or_path), config_names())}")
    return config_from_dict(read_json(path), path)


def config_from_dict(fields, where):
    """(model name, Config) from flat fields, "model" among them; `where` is what an error names."""
    model_name = fields.get("model")
    if model_name not in MODEL_NAMES:
        raise UserError(f'{where}: "model" is {model_name!r}; {nearest(str(model_name), MODEL_NAMES)}')
    config_class = importlib.import_module(f"models.{model_name}").Config
    # How a checkpoint's weights are stored is no part of the model, see models/utils/quantize.py.
    fields = {name: value for name, value in fields.items() if name not in ("model", "quantization")}
    return model_name, build_dataclass(config_class, fields, where)


def config_to_dict(model_name, config):
    """The flat fields that config_from_dict reads."""
    return {"model": model_name, **dataclasses.asdict(config)}


def build_dataclass(cls, values, where):
    """A config dataclass from a dict, every field present, known and of its type."""
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"{where}: unknown field {name!r}; {nearest(name, list(hints))}")
    for name in hints:
        if name not in values:
            raise UserError(f"{where}: field {name!r} is missing; {type_name(hints[name])} is expected")
    fields = {
        # Sizes are positive; the id of a token may be 0.
        name: checked(values[name], hint, f"{where}: field {name!r}", 0 if name.endswith("_id") else 1)
        for name, hint in hints.items()
    }
    try:
        return cls(**fields)
    except AssertionError as error:
        raise UserError(f"{where}: {error}") from None


def checked(value, hint, where, smallest):
    """`value` as a field of type `hint`; an int may stand for a float, nothing else is bent."""
    for option in options_of(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build_dataclass(option, value, where)
        if option is float and type(value) is int:
            return float(value)
        # NaN, which JSON files may hold, differs from itself.
        if type(value) is option and value == value and not (option is int and value < smallest):
            return value
    raise UserError(f"{where} is {value!r}, where {type_name(hint)} is expected")


def options_of(hint):
    """(RopeScaling, NoneType) for `RopeScaling | None`, (int,) for `int`."""
    return typing.get_args(hint) or (hint,)


def type_name(hint):
    """How an error names the type of a field."""
    spoken = {int: "a positive int", float: "a number", bool: "true or false", types.NoneType: "null"}
    return " or ".join(spoken.get(option, option.__name__) for option in options_of(hint))


def nearest(name, names):
    """The end of an error about a misspelt name: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


# Kinds ------------------------------------------------------------------------------------------------------

DECODER, ENCODER_DECODER, ONE_PASS = "decoder", "encoder-decoder", "one-pass model"


def model_class(model_name):
    return importlib.import_module(f"models.{model_name}").Model


def kind_of(model_name):
    """What can be done with a model, read off what its class offers (no list is kept).

    DECODER writes text: new_cache(batch_size, num_slots). ENCODER_DECODER writes it from a source: encode and
    decode. ONE_PASS answers in a single call; inputs_of says whether it reads tokens or images.
    """
    model = model_class(model_name)
    if hasattr(model, "encode") and hasattr(model, "decode"):
        return ENCODER_DECODER
    return DECODER if hasattr(model, "new_cache") else ONE_PASS


def inputs_of(model_name):
    """The names of what a model's forward is given: ["tokens", "positions", "cache"], ["images"], ..."""
    return list(inspect.signature(model_class(model_name).forward).parameters)[1:]


# Models -----------------------------------------------------------------------------------------------------


def create_model(name, **overrides):
    """A model with fresh weights (fp32, CPU, training mode): a config of configs/, some fields replaced."""
    model_name, config = load_config(name)
    fields = config_to_dict(model_name, config)
    unknown = [field for field in overrides if field not in fields]
    if unknown:
        raise UserError(f"config {name!r}: unknown field {unknown[0]!r}; {nearest(unknown[0], list(fields))}")
    model_name, config = config_from_dict({**fields, **overrides}, f"config {name!r}")

    model = build_model(model_name, config, device="cpu")
    model.init_weights()
    return model


def build_model(model_name, config, device="meta"):
    """The model without meaningful weights; on the meta device without any memory, whatever its size."""
    with torch.device(device):
        return model_class(model_name)(config)


def load_model(folder, device="cpu", dtype=None, quantization=None, windows=()):
    """The model of a converted checkpoint, in eval mode, in the checkpoint's dtype unless told otherwise.

    quantization: of the linear layers, on the way in; a checkpoint that is stored quantized needs none.
    windows: of a text that calibrates int4 (models/utils/calibration.py), read in the checkpoint's own dtype.
    """
    folder = converted_folder(folder)
    fields = read_json(folder / "config.json")
    model_name, config = config_from_dict(fields, folder / "config.json")
    stored = stored_quantization(fields, folder / "config.json")
    if stored and quantization:
        raise UserError(f"{folder}: is {stored} already; quantize the checkpoint that it was made from")
    model = build_model(model_name, config)
    if stored:
        swap(model, stored)

    # The model on the meta device has shapes and no memory; the tensors of the files are mapped, not copied.
    tensors = dict(read_tensors(folder))
    problems = mismatches(names_of_parameters(model), tensors)
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems[:5])}; convert the checkpoint again")
    fill(model, tensors)

    # Quantized from what is mapped, a layer at a time; the rest is copied where device or dtype is another.
    if quantization:
        quantize_layers(model, quantization, device, dtype, windows)
    model.to(device=device, dtype=dtype)
    prepare(model)
    choose_products(model)
    return model.eval()


def names_of_parameters(model):
    """{parameter: its names}; a tied one has several."""
    names_of = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    return names_of


def fill(model, tensors):
    """Make tensors the parameters of a model, by a parameter's first name; all its names share one."""
    for old, names in names_of_parameters(model).items():
        parameter = torch.nn.Parameter(tensors[names[0]], old.requires_grad)
        for name in names:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, parameter)


def weight_files(folder):
    """The safetensors files of a converted folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def read_tensors(folder):
    """(name, tensor) for every tensor of a converted folder, mapped from its file."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); convert the checkpoint again"
            ) from None


def mismatches(names_of, tensors):
    """What keeps `tensors` from filling the parameters, one phrase each."""
    missing = [f"{names[0]} is missing" for names in names_of.values() if names[0] not in tensors]
    expected = {names[0]: parameter.shape for parameter, names in names_of.items()}
    surplus = [f"{name} has no place in the model" for name in tensors if name not in expected]
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + surplus + wrong
