"""A model gets its weights: the tensors of a converted folder, mapped, and quantized or moved where asked."""

import torch

from models.utils.errors import UserError
from models.utils.head import keep_logits_in_fp32
from models.utils.kernels.onednn import choose_products
from models.utils.kernels.tiled_linear import tile_mxfp4
from models.utils.lora import attach_trained, merge
from models.utils.machine import give_back
from models.utils.quantize import prepare, quantize_layers
from models.utils.safetensors_files import CODE_NAMES, DTYPE_NAMES, open_safetensors


def load_weights(
    model, folder, device="cpu", dtype=None, quantization=None, windows=(), arranged=True, factors=None
):
    """Give a model on the meta device the weights of a converted folder; the arguments are load_model's.

    factors: of the adapters that it gets besides, see models/utils/lora.py.
    """
    # The model on the meta device has shapes and no memory; the tensors of the files are mapped, not copied.
    files = open_safetensors(folder)
    problems = mismatches(names_of_parameters(model), files.entries)
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems[:5])}; convert the checkpoint again")
    fill(model, {name: files.read(name) for name in files.entries})
    dtypes = {entry.dtype for entry in files.entries.values()}
    if dtype is None and len(dtypes) > 1 and all(isinstance(each, torch.dtype) for each in dtypes):
        dtype = main_dtype(files.entries.values())

    # Quantized from what is mapped, a layer at a time; the rest is copied where device or dtype is another.
    if quantization:
        quantize_layers(model, quantization, device, dtype, windows, after=give_back)
    if factors:
        attach_trained(model, factors)
        merge(model)
    move(model, device, dtype)
    if arranged:
        prepare(model)
        tile_mxfp4(model)
        choose_products(model)
    keep_logits_in_fp32(model)
    return model.eval()


def move(model, device, dtype):
    """model.to(device, dtype), but for parameters whose names end as the page's `in_fp32` says."""
    ends = getattr(model, "in_fp32", ())
    exact = {name: each.data.float() for name, each in model.named_parameters() if name.endswith(ends)}
    model.to(device=device, dtype=dtype)
    for name, numbers in exact.items():
        model.get_parameter(name).data = numbers.to(device)


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


def main_dtype(entries):
    """The dtype of most of the numbers, fp32 without any; a model computes in one, its norms too."""
    shares = {}
    for entry in entries:
        shares[entry.dtype] = shares.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return max(shares, key=shares.get, default=torch.float32)


def mismatches(names_of, entries):
    """What keeps the tensors of `entries` from filling the parameters, one phrase each."""
    missing = [f"{names[0]} is missing" for names in names_of.values() if names[0] not in entries]
    expected = {names[0]: parameter for parameter, names in names_of.items()}
    surplus = [f"{name} has no place in the model" for name in entries if name not in expected]
    wrong = []
    for name, parameter in expected.items():
        shape, dtype = entries[name][:2] if name in entries else (parameter.shape, None)
        if shape != parameter.shape:
            wrong.append(f"{name} has shape {shape} instead of {tuple(parameter.shape)}")
        elif dtype is not None and not fits(dtype, parameter):
            wrong.append(f"{name} is stored as {dtype}, which is not what it needs")
    return missing + surplus + wrong


def fits(dtype, parameter):
    """Whether a dtype in a file, or a header's word for one, can be that of a parameter."""
    if parameter.is_floating_point():
        return dtype in DTYPE_NAMES.values()
    return CODE_NAMES.get(dtype) == parameter.dtype
