"""A model with fresh weights, once it is known that its kind can be trained here, and that there is room.

Proof: tests/test_train_loops.py.
"""

import dataclasses

import torch

from models import (
    DECODER,
    build_model,
    config_from_dict,
    config_to_dict,
    create_model,
    inputs_of,
    kind_of,
    load_config,
)
from models.utils.errors import UserError, one_line
from models.utils.machine import available_memory, spoken_bytes

# For each parameter: itself, its gradient, and Adam's two running means, in fp32.
BYTES_PER_PARAMETER = 16
# A module is an object of Python: a million of them take minutes before any tensor is made.
MOST_MODULES = 1000
INPUTS = ("tokens", "images", "source")


def check_kind(options, kind, reads):
    """(the model's name, its Config) of --config; UserError unless it is of the kind that the page trains.

    kind: as kind_of says it; reads: what its forward is given, "tokens", "images" or "source".
    """
    model_name, config = load_config(options.config)
    inputs = [name for name in inputs_of(model_name) if name in INPUTS]
    # A decoder may see images as well, and still be trained on text.
    fits = inputs[:1] == [reads] if kind == DECODER else inputs == [reads]
    if kind_of(model_name) != kind or not fits:
        raise UserError(
            f"--config {options.config}: a {model_name} is a {kind_of(model_name)} that reads "
            f"{' and '.join(inputs) or 'something else'}; {options.page} trains a {kind} that reads {reads}"
        )
    check_memory(options)
    return model_name, config


def fresh_model(options, **fields):
    """The model of --config with weights drawn from --seed; fields: what the data ask for instead."""
    check_memory(options, **fields)
    torch.manual_seed(options.seed)
    return create_model(options.config, **fields).to(options.device)


def check_memory(options, **fields):
    count = count_parameters(options.config, **fields)
    what = f"{count:,} parameters, their gradients and Adam's two means of them"
    what += f", shared by {options.num_shares}" if options.num_shares > 1 else ""
    check_room(
        count * BYTES_PER_PARAMETER // options.num_shares,
        f"--config {options.config}: {what}",
        options.device,
    )


def check_room(num_bytes, what, device):
    """UserError if the device has not so many bytes left for `what`."""
    available = available_memory(device)
    if num_bytes > available:
        raise UserError(
            f"{what} take {spoken_bytes(num_bytes)}, and {device} has {spoken_bytes(available)} free; "
            "choose something smaller"
        )


def count_parameters(name, **fields):
    """How many parameters a config's model has, some fields replaced, without any memory for them."""
    model_name, config = load_config(name)
    where = f"config {name!r}"
    model_name, config = config_from_dict({**config_to_dict(model_name, config), **fields}, where)
    for field, value in dataclasses.asdict(config).items():
        is_modules = field.startswith("num_") and field.endswith(("layers", "experts"))
        most = MOST_MODULES if is_modules else 2**31
        if type(value) is int and value > most:
            raise UserError(f"{where}: {field} is {value}; up to {most} can be trained here")
    try:
        model = build_model(model_name, config, device="meta")
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{where}: no model can be made of it ({one_line(error)})") from None
    return sum(parameter.numel() for parameter in model.parameters())
