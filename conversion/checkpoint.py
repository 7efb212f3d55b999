"""A checkpoint, opened once and handed on to whoever runs it, drafts with it, measures or serves it.

    checkpoint = open_checkpoint("tiny-llama-python")      a name under checkpoints/, or any folder
    checkpoint.config, checkpoint.kind, checkpoint.tokenizer
    model = checkpoint.load(num_slots=200)

config.json is read once and the model built once, on the meta device, where it has shapes and no memory. What
weights and cache will take is told and compared with what is free before any of it is taken.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from conversion.adapter import CONFIG, Adapter, read_adapter
from conversion.convert import calibration_windows, convert
from conversion.find import converted_from, find_folder, usual_place
from conversion.weight_files import open_weights
from models import build_model, config_from_dict, inputs_of, kind_of
from models.utils.errors import UserError, report
from models.utils.files import NotConverted, plain_file, read_converted
from models.utils.machine import available_memory, choose_device, choose_dtype, spoken_bytes
from models.utils.quantize import Quantization, parts_of, plan_layers, spoken, stored_quantization
from models.utils.tokenizer import load_tokenizer
from models.utils.training_notes import unfinished_run
from models.utils.weights import load_weights, main_dtype


@dataclass
class Checkpoint:
    """A converted checkpoint and how it is to be loaded."""

    folder: Path
    model_name: str  # of models/
    config: object
    fields: dict  # all of its config.json
    stored: Quantization | None  # how its weights are stored
    device: torch.device
    dtype: torch.dtype  # of the weights that are no codes
    quantization: Quantization | None  # of the linear layers, while loading
    widths: tuple  # how many tokens a compiled step reads per row; none: nothing is compiled
    windows: tuple  # of the text that calibrates int4
    adapter: Adapter | None = None  # which is merged into the weights where these are no codes

    @cached_property
    def kind(self):
        """DECODER, ENCODER_DECODER or ONE_PASS."""
        return kind_of(self.model_name)

    @cached_property
    def inputs(self):
        """What the model is given, by the names of its forward's arguments."""
        return inputs_of(self.model_name)

    @cached_property
    def tokenizer(self):
        tokenizer = load_tokenizer(self.folder, self.fields)
        if self.adapter and self.adapter.chat_template:
            tokenizer.chat_template = self.adapter.chat_template  # with which it was trained
        return tokenizer

    @cached_property
    def model(self):
        """Without weights, on the meta device, until `load` gives it some."""
        return build_model(self.model_name, self.config, stored=self.stored).to(self.dtype)

    def example(self, name):
        """The path of an example that came with the checkpoint, example.txt or example.png; None without."""
        places = (self.folder / name, self.folder.parent / name)
        return next((plain_file(path) for path in places if path.is_file()), None)

    def load(self, num_slots=0):
        """The model with its weights on the device; num_slots: of the cache that it will be asked for."""
        self.check_memory(num_slots)
        model = self.read()
        if self.widths:
            model.new_cache(1, num_slots)  # compiles, before anybody's clock starts
        return model

    def read(self):
        """The same for who has a memory of his own."""
        model = load_weights(
            self.model,
            self.folder,
            self.device,
            self.dtype,
            self.quantization,
            self.windows,
            arranged=not self.widths,
            factors=self.adapter and self.adapter.factors,
        )
        if self.widths:
            from models.utils.compile import compile_decoding  # slow to import

            model = compile_decoding(model, self.widths, report)
        return model

    def weight_bytes(self):
        """(bytes of the weights in memory, how they are held: "bfloat16, linear layers in int4 ...")."""
        parameters = dict(self.model.named_parameters())
        held, plan = str(self.dtype).removeprefix("torch."), {}
        if self.quantization:
            plan, notes = plan_layers(self.model, self.quantization)
            held += f", {spoken(self.quantization, notes)}"
        elif self.stored:
            held += f", {spoken(self.stored, [])}"
        parts = [parts_of(plan, name, p.shape, p.dtype) for name, p in parameters.items()]
        sizes = [shape_and_dtype for part in parts for shape_and_dtype in part.values()]
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes), held

    def check_memory(self, num_slots):
        """Say how much memory weights and cache will take; UserError if there is not enough."""
        weights, held = self.weight_bytes()
        needs, cache = f"{spoken_bytes(weights)} of weights ({held})", 0
        if num_slots:
            cache = sum(tensor.nbytes for tensor in tensors_of(self.model.new_cache(1, num_slots)))
            needs += f" and {spoken_bytes(cache)} of cache for {num_slots} tokens"
        report(f"{self.folder}: {needs}, on {self.device}")
        available = available_memory(self.device)
        if weights + cache > available:
            raise UserError(
                f"{self.folder}: {needs} do not fit into the {spoken_bytes(available)} that {self.device} "
                "has free; try --dtype bfloat16, fewer --max-new-tokens, or a smaller checkpoint"
            )


def open_checkpoint(
    name, device=None, dtype=None, quantization=None, widths=(), calibration=None, adapter=None
):
    """The Checkpoint called `name`, which is converted first if that was not done yet.

    dtype: of the weights; None: as stored, or fp32 on a CPU that is slow at that. quantization: of the linear
    layers, while loading.
    calibration: the path of a text for int4. widths: how many tokens per row are fed at once behind what is
    cached; where they are given, such steps are compiled.
    adapter: a folder of PEFT's, trained on this checkpoint.
    """
    folder, fields = read_or_convert(find_folder(name))
    where = folder / "config.json"
    model_name, config = config_from_dict(fields, where)
    stored = stored_quantization(fields, where)
    if stored and quantization:
        raise UserError(f"{folder}: is {stored} already; run it without --quantize")
    adapter = adapter and read_adapter(adapter, fields, folder)
    if adapter and widths and (stored or quantization):
        raise UserError(
            "--adapter stays beside a quantized base, which --compile does not know; leave one out"
        )
    device = device if isinstance(device, torch.device) else choose_device(device)
    windows = calibration_windows(calibration, folder, model_name, config)
    dtype = dtype or fast_dtype(folder, device, keep=stored or quantization)
    return Checkpoint(
        folder, model_name, config, fields, stored, device, dtype, quantization, widths, windows, adapter
    )


def fast_dtype(folder, device, keep=False):
    """What the weights are stored in, or fp32 on a CPU that is slow at that; `keep`: never fp32."""
    entries = open_weights(folder).entries.values()
    # Of the codes of quantized layers the header's own word is kept.
    floats = [entry for entry in entries if isinstance(entry.dtype, torch.dtype)]
    stored = main_dtype(floats)
    if keep:
        return stored
    fp32_bytes = sum(4 * torch.Size(entry.shape).numel() for entry in floats)
    dtype, why = choose_dtype(stored, device, fp32_bytes, available_memory(device))
    if why:
        report(why)
    return dtype


def read_or_convert(folder):
    """(the converted folder, the fields of its config.json) of a checkpoint's folder, or of a GGUF file."""
    if folder.is_file():
        if not converted_from(folder):
            report(f"{folder} is not converted yet; converting it first")
            convert(folder)
        return read_converted(usual_place(folder))
    try:
        return read_converted(folder)
    except NotConverted:
        if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: holds an adapter, no model; give the model, and this with --adapter"
            ) from None
        if line := unfinished_run(folder):
            raise UserError(line) from None
        report(f"{folder} is not converted yet; converting it first")
        convert(folder)
    return read_converted(folder)


def find_checkpoint(name):
    """The converted folder of a checkpoint, which is converted first if that was not done yet."""
    return read_or_convert(find_folder(name))[0]


def tensors_of(cache):
    """All tensors of a cache: lists and named tuples of them, as deep as a page nests them."""
    if isinstance(cache, torch.Tensor):
        return [cache]
    return [tensor for part in cache if part is not None for tensor in tensors_of(part)]
