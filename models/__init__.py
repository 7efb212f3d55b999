"""The door to the models: from a name or a folder to a config, a fresh model, or a loaded one.

    create_model("gpt2-medium", vocab_size=5000)      fresh weights, for training
    load_model("checkpoints/tiny-llama-python")       a converted checkpoint, for use

Every models/NAME.py has a `Config` and a `Model`; every config file begins with {"model": "NAME", ...
torch, which takes seconds to import, is imported where a model is built, so that configs can be read at once.
"""

import dataclasses
import difflib
import importlib
import inspect
import types
import typing
from contextlib import nullcontext
from pathlib import Path

from models.utils.errors import UserError, one_line
from models.utils.files import read_converted, read_json

MODELS_FOLDER = Path(__file__).parent
CONFIGS_FOLDER = MODELS_FOLDER.parent / "configs"
MODEL_NAMES = sorted(path.stem for path in MODELS_FOLDER.glob("*.py") if path.stem != "__init__")


# Configs ----------------------------------------------------------------------------------------------------


def config_names():
    """The names of the configs that come with the project."""
    return sorted(path.stem for path in CONFIGS_FOLDER.glob("*.json"))


def load_config(name_or_path):
    """(model name, Config) from a name in configs/, or from the path of a JSON file or of a .cfg."""
    path = Path(name_or_path)
    if path.suffix == ".cfg":
        return config_from_cfg(path)
    if path.suffix != ".json":
        path = CONFIGS_FOLDER / f"{name_or_path}.json"
        if not path.is_file():
            raise UserError(f"no config named {name_or_path!r}; {nearest(str(name_or_path), config_names())}")
    # A link is the user's own here, who named the file.
    return config_from_dict(read_json(path.resolve()), path)


def config_from_dict(fields, where):
    """(model name, Config) from flat fields, "model" among them; `where` is what an error names."""
    model_name = fields.get("model")
    if model_name not in MODEL_NAMES:
        raise UserError(f'{where}: "model" is {model_name!r}; {nearest(str(model_name), MODEL_NAMES)}')
    config_class = importlib.import_module(f"models.{model_name}").Config
    # How a checkpoint's weights are stored is no part of the model, see models/utils/quantize.py.
    fields = {name: value for name, value in fields.items() if name not in ("model", "quantization")}
    return model_name, build_dataclass(config_class, fields, where)


def config_from_cfg(path):
    """(model name, Config) of the page that a file puts together, the inverse of its Config.sections()."""
    model_name = "modular_decoder"
    page = importlib.import_module(f"models.{model_name}")
    try:
        model = page.TransformerDecoder.from_config(path, empty_init=True)  # names a fault, with its section
        sections = page.read_section(path, "model")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    parts = {name: sections[name]["@" + name] for name in ("embedding", "head")}
    is_plain = parts == {"embedding": "VocabEmbedding", "head": "LMHead"} and model.lm_head.bias is None
    if not is_plain or "sampler" in sections:
        raise UserError(
            f"{path}: its embedding, head or sampler is not the plain one, which alone a config can say; "
            f"build it with TransformerDecoder.from_config"
        )
    fields = {"vocab_size": model.config.vocab_size, "max_seq_len": model.config.max_seq_len}
    fields |= {"d_model": model.config.d_model, "prenorm": True, "tied_head": False}
    fields |= {name: sections[name] for name in page.Config.__annotations__ if name in sections}
    truths = {name: {"True": True, "False": False}.get(str(value), value) for name, value in fields.items()}
    return model_name, build_dataclass(page.Config, truths, path)


def config_to_dict(model_name, config):
    """The flat fields that config_from_dict reads, as JSON has them: what is several numbers is a list."""
    fields = dataclasses.asdict(config)
    lists = {name: list(value) for name, value in fields.items() if type(value) is tuple}
    return {"model": model_name, **fields, **lists}


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
        name: field_value(name, values[name], hint, f"{where}: field {name!r}")
        for name, hint in hints.items()
    }
    try:
        return cls(**fields)
    except AssertionError as error:
        raise UserError(f"{where}: {error}") from None


def field_value(name, value, hint, where):
    """`value` as a field of type `hint`; an int may stand for a float, nothing else is bent.

    No size is so large that building the model would take the machine's memory before anybody asks for it.
    """
    for option in options_of(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build_dataclass(option, value, where)
        if option is float and type(value) is int and abs(value) < MOST["size"]:
            value = float(value)
        if option == NUMBERS and are_numbers(value):
            return tuple(value)
        if type(value) is not option:
            continue
        if option is float and not (0 <= value < 1 if "dropout" in name else 0 < value < float("inf")):
            span = "a number from 0 to below 1" if "dropout" in name else "a finite number above 0"
            raise UserError(f"{where} is {value!r}, where {span} is expected")
        if option is int and not smallest(name) <= value <= largest(name):
            continue
        return value
    raise UserError(f"{where} is {value!r}, where {type_name(hint)} is expected{limit(name, value)}")


NUMBERS = tuple[int, ...]  # of layers, in JSON a list
MOST = {"layers": 1000, "num": 10**6, "size": 2**31 - 1}


def are_numbers(value):
    return isinstance(value, list | tuple) and all(type(n) is int and 0 <= n <= MOST["size"] for n in value)


def smallest(name):
    """Sizes are positive; the id of a token may be 0."""
    return 0 if name.endswith("_id") else 1


def largest(name):
    """Layers are built one by one; of anything else that is counted no model has millions."""
    if name.endswith("num_layers") or (name.startswith("num_") and name.endswith("_layers")):
        return MOST["layers"]
    return MOST["num" if name.startswith("num_") else "size"]


def limit(name, value):
    return f", at most {largest(name)}" if type(value) is int and value > largest(name) else ""


def options_of(hint):
    """(RopeScaling, NoneType) for `RopeScaling | None`, (int,) for `int`."""
    return (hint,) if hint == NUMBERS else typing.get_args(hint) or (hint,)


def type_name(hint):
    """How an error names the type of a field."""
    spoken = {int: "a positive int", float: "a number", bool: "true or false", types.NoneType: "null"}
    spoken[NUMBERS] = "a list of numbers"
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


def build_model(model_name, config, device="meta", stored=None):
    """The model without meaningful weights; on the meta device without any memory, whatever its size.

    stored: the Quantization of a checkpoint that is to fill it, whose linear layers are other ones.
    """
    import torch

    from models.utils.unfilled import Unfilled

    try:
        with torch.device(device), Unfilled() if device == "meta" else nullcontext():
            model = model_class(model_name)(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        if device != "meta":
            raise
        # Sizes whose product no tensor can have.
        raise UserError(f"no {model_name} of such sizes can be built ({one_line(error)[:90]})") from None
    except ValueError as error:
        raise UserError(f"no {model_name} can be built: {one_line(error)}") from None
    if stored:
        from models.utils.quantize import swap

        swap(model, stored)
    return model


def load_model(folder, device="cpu", dtype=None, quantization=None, windows=(), arranged=True):
    """The model of a converted checkpoint, in eval mode, in the checkpoint's dtype unless told otherwise.

    quantization: of the linear layers, on the way in; a checkpoint that is stored quantized needs none.
    windows: of a text that calibrates int4 (models/utils/calibration.py), read in the checkpoint's own dtype.
    arranged: False leaves the weights in the order of the file, for compile_decoding, which wants another.
    """
    from models.utils.quantize import stored_quantization
    from models.utils.weights import load_weights

    folder, fields = read_converted(folder)
    where = folder / "config.json"
    model_name, config = config_from_dict(fields, where)
    stored = stored_quantization(fields, where)
    if stored and quantization:
        raise UserError(f"{folder}: is {stored} already; quantize the checkpoint that it was made from")
    model = build_model(model_name, config, stored=stored)
    return load_weights(model, folder, device, dtype, quantization, windows, arranged)
