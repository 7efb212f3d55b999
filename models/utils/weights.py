"""A model gets its weights: the tensors of a converted folder, mapped, and quantized or moved where asked."""

import torch
from safetensors import SafetensorError, safe_open

from models.utils.errors import UserError
from models.utils.files import one_line, read_json
from models.utils.kernels.onednn import choose_products
from models.utils.quantize import prepare, quantize_layers


def load_weights(model, folder, device="cpu", dtype=None, quantization=None, windows=()):
    """Give a model on the meta device the weights of a converted folder; the arguments are load_model's."""
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
