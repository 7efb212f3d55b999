"""Adapters (models/utils/lora.py) as PEFT stores them: a folder beside the model that they belong to.

    adapter_config.json          {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [...], ...}
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, K), ....lora_B.weight (N, r)

Their modules are Hugging Face's, so the names go through the model's table (conversion/tables/). Where theirs
is one matrix and ours are three, the change is that of

    [ B_q  0    0  ]   [ A_q ]
    [ 0    B_k  0  ] x [ A_k ]      three adapters of rank r as one of rank 3 r; rank_pattern says so
    [ 0    0    B_v]   [ A_v ]

and one of theirs becomes three of ours that share A. Nothing is rounded either way. (Beside transformers 5,
PEFT 0.21 takes DeepSeek's dense and shared feed-forward for its experts, and leaves their adapters out.)

Whose numbers an adapter was trained beside, PEFT does not say. What this page writes does, by a hash in the
file's metadata, and beside another model it is refused; of other people's adapters names and shapes must do.
Proof: tests/test_lora.py, against `peft`.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from conversion.match import wanted_shapes
from conversion.tables import LAYOUTS
from conversion.tensor_table import plan
from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.safetensors_files import SafetensorsFile, open_safetensors
from models.utils.tokenizers.settings import read_chat_template

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_sha256"  # in the metadata of the weights
USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
# What concerns training alone, or repeats what the tensors' names say.
INERT = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core", "megatron_config", "qalora_group_size", "runtime_config"),
}
# Others change the base's weights before the first step.
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", None)
OFF = (None, False, [], {}, "none")


class Adapter(NamedTuple):
    """A trained adapter, in our names."""

    folder: Path
    factors: dict  # {name of a linear layer: (A (r, K), B (N, r), scale)}, in fp32
    chat_template: str | None  # with which it was trained, where the folder has it


# Reading ----------------------------------------------------------------------------------------------------


def read_adapter(folder, config, base=None):
    """The Adapter in a folder of PEFT's, for a model of this config: flat, as a converted folder has it.

    base: the converted folder of the model; UserError if the adapter was trained on another one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--adapter {folder}: no such folder; give one that holds {CONFIG}")
    settings = read_settings(folder / CONFIG)
    file = SafetensorsFile(folder / WEIGHTS)
    check_base(file, base)
    steps = their_modules(config)
    factors = {}
    for module, (A, B) in pairs_of(file, steps, folder).items():
        scale = scale_of(settings, module, len(A), folder / CONFIG)
        for name, part in zip(steps[module].ours, to_ours(steps[module], A, B, config)):
            factors[name.removesuffix(".weight")] = (A, part.contiguous(), scale)
    return Adapter(folder, factors, read_chat_template(folder, None))


def read_settings(path):
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {settings.get('peft_type')!r}; LORA is what is read here")
    for name, value in settings.items():
        if name not in USED | INERT and value not in OFF:
            raise UserError(
                f"{path}: {name} is {value!r}, which is more than plain LoRA; it is not read here"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise UserError(f"{path}: {name} is {settings[name]!r}, where an object was expected")
    if settings.get("init_lora_weights") not in BEGINNINGS:
        raise UserError(
            f"{path}: init_lora_weights {settings['init_lora_weights']!r} changed the base as well; "
            "merge it with peft, and convert the result"
        )
    return settings


def scale_of(settings, module, rank, path):
    """alpha / r of a module, whose name may have some of its own."""
    said = of_module(settings.get("rank_pattern"), module, settings.get("r"), path)
    alpha = of_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha"), path)
    if said != rank or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(
            f"{path}: r {said!r} and alpha {alpha!r} for {module}, whose matrices are of rank {rank}"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def of_module(patterns, module, otherwise, path):
    """The value of the first pattern that is the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        # To PEFT they are regular expressions, and a stranger's may take years to compare.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(
                f"{path}: the pattern {pattern!r} is more than the end of a name; it is not read here"
            )
        if f".{module}".endswith(f".{pattern}"):
            return value
    return otherwise


def check_base(file, base):
    said = (file.file.metadata() or {}).get(BASE)
    if said and base and (found := fingerprint(base)) and said != found:
        raise UserError(
            f"--adapter {file.path.parent}: was trained on another model than {base} holds; "
            "run it with its own"
        )


def pairs_of(file, steps, folder):
    """{their module: (A, B)}, every tensor of the file in its place and of a shape that fits there."""
    pairs = {}
    for name in file.entries:
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not found or found[1] not in steps:
            raise UserError(
                f"{folder}: {name} has no place in this model; is the adapter one of another model?"
            )
        pairs.setdefault(found[1], {})[found[2]] = file.read(name).float()
    for module, pair in pairs.items():
        N, K = steps[module].shape
        A, B = pair.get("A", torch.empty(0)), pair.get("B", torch.empty(0))
        if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or len(A) != B.shape[1]:
            raise UserError(
                f"{folder}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, for a matrix of "
                f"{N} x {K} in this model; is the adapter one of another model?"
            )
    if not pairs:
        raise UserError(f"{folder / WEIGHTS}: holds no adapter")
    return {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}


# Between the two --------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A matrix of theirs and the one or three of ours that it becomes."""

    ours: tuple  # names of our weights
    sizes: tuple  # N of each of them
    shape: tuple  # (N, K) of theirs
    transform: NamedTuple
    is_transposed: bool  # theirs is a Conv1D, whose weight is (K, N); its adapter has A and B as a Linear has


def their_modules(config):
    """{their name: Module} of everything that is a matrix on both sides."""
    wanted = wanted_shapes(config, "the model")
    modules = {}
    for step in plan(LAYOUTS[config["model"]], config, wanted):
        shapes = [wanted[name] for name in step.ours]
        if step.theirs.endswith(".weight") and all(len(shape) == 2 for shape in shapes):
            sizes = tuple(N for N, _ in shapes)
            modules[step.theirs.removesuffix(".weight")] = Module(
                step.ours,
                sizes,
                (sum(sizes), shapes[0][1]),
                step.transform,
                "transpose" in step.row.transform,
            )
    return modules


def to_ours(module, A, B, config):
    """Their B as those of ours, (N, r) each; all share A, since a table splits and reorders rows."""
    parts = module.transform.forward(B.T if module.is_transposed else B, config)
    check_rows(module, A, list(parts), B, config)
    return parts


def to_theirs(module, factors, config):
    """(A, B) of one of theirs, from the (A, B) or None of each of ours."""
    A = torch.cat([pair[0] for pair in factors if pair])  # one below the other
    parts, start = [], 0
    for N, pair in zip(module.sizes, factors):
        part = A.new_zeros(N, len(A))
        if pair:
            rank = len(pair[0])
            part[:, start : start + rank] = pair[1]
            start += rank
        parts.append(part)
    B = module.transform.inverse(parts, config)
    B = (B.T if module.is_transposed else B).contiguous()
    check_rows(module, A, parts, B, config)
    return A, B


def check_rows(module, A, parts, B, config):
    """A table's transform is carried out on B alone; that must be what it does to B A."""
    theirs = module.transform.inverse([part @ A for part in parts], config)
    if not torch.allclose(theirs.T if module.is_transposed else theirs, B @ A, atol=1e-6):
        raise UserError(
            f"{module.ours[0]} stands in another order in PEFT's layout; leave it without adapter"
        )


# Writing ----------------------------------------------------------------------------------------------------


def peft_files(factors, config, base, rank, alpha, dropout):
    """{name: content} of the two files; factors: {name: (A, B)}, all of one rank and alpha.

    base: the converted folder of the model; the checkpoint's name is noted, and its weights' hash.
    """
    tensors, modules, left = {}, {}, set(factors)
    for name, module in their_modules(config).items():
        ours = [weight.removesuffix(".weight") for weight in module.ours]
        if left.intersection(ours):
            A, B = to_theirs(module, [factors.get(each) for each in ours], config)
            tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
            modules[name] = (len(A), module.is_transposed)
            left -= set(ours)
    if left:
        raise UserError(f"PEFT has no place for an adapter of {min(left)}; give --targets without it")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry at most: of several the library writes now this first, now that.
    metadata = {BASE: found} if (found := fingerprint(base)) else {"format": "pt"}
    name = base.parent if base.name == "converted" else base
    settings = {"base_model_name_or_path": str(name), **settings_of(modules, rank, alpha, dropout)}
    text = json.dumps(settings, indent=2) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata)}


def settings_of(modules, rank, alpha, dropout):
    """adapter_config.json's content; modules: {their name: (rank there, whether it is a Conv1D)}."""
    # "self_attn.q_proj": the last word of a name may mean another matrix as well.
    ends = {re.sub(r"^.*?\.\d+\.", "", name): width for name, (width, _) in modules.items()}
    wide = {end: width for end, width in ends.items() if width != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(ends),
        "rank_pattern": wide,
        # alpha / r stays what it was.
        "alpha_pattern": {end: alpha * width / rank for end, width in wide.items()},
        "fan_in_fan_out": any(is_transposed for _, is_transposed in modules.values()),
        "bias": "none",
        "inference_mode": True,
    }


def fingerprint(folder):
    """A hash that tells a converted model from others: of the first row of each tensor, in bf16.

    None where the weights are stored quantized, and no longer the numbers that they were.
    """
    files, digest = open_safetensors(folder), hashlib.sha256()
    for name in sorted(files.entries):
        if not isinstance(files.entries[name].dtype, torch.dtype):
            return None
        row = files.read(name)[:1].bfloat16().contiguous()
        digest.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
