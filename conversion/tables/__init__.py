"""Between Hugging Face's checkpoints and ours: what every file and field of theirs is for us.

A table per page of models/ holds its tensors (LAYOUT), the lists of config fields of each model_type that
the page implements (HF_TYPES), and the way back (to_hf_config). tensor_table.py and config_fields.py say what
these are made of.

To add a model, write its table into this folder, where it is found; `convert_hf_checkpoint.py --inspect`
shows what it leaves out. The proof is tests/test_convert_hf_checkpoint.py.
"""

import importlib
from pathlib import Path

from conversion.config_fields import read_config
from conversion.tensor_table import plan
from models.utils.errors import UserError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
PAGES = {name: importlib.import_module(f"conversion.tables.{name}") for name in NAMES}
LAYOUTS = {name: page.LAYOUT for name, page in PAGES.items()}


def default_types(pages):
    """{model_type: the HFType that reads it} where no model of ours is asked for by name."""
    types = {}
    for page in pages.values():
        for model_type, hf_type in page.HF_TYPES.items():
            if hf_type.by_name_only:
                continue
            if model_type in types:
                raise ValueError(
                    f"the tables of {types[model_type].model} and {hf_type.model} both take {model_type!r}; "
                    "by_name_only=True says which of them has to be asked for"
                )
            types[model_type] = hf_type
    return types


HF_TYPES = default_types(PAGES)


def from_hf_config(hf_config, allow=(), model=None):
    """(our model's name, our flat config) from a config.json of Hugging Face.

    allow: fields that no list knows and that the caller takes to be harmless.
    model: the model of ours to read it for, where more than one can.
    """
    hf_type = hf_type_of(hf_config, model)
    return hf_type.model, {**read_config(hf_type, hf_config, allow), **from_names(hf_config, model=model)}


def hf_type_of(hf_config, model=None):
    types, reader = (PAGES[model].HF_TYPES, f" by models/{model}.py") if model else (HF_TYPES, "")
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in types:
        supported = f"supported{reader}: {', '.join(types)}"
        by_name = [name for name, page in PAGES.items() if model_type in list(page.HF_TYPES)]
        if by_name and not model:
            supported = f"convert it with convert_hf_checkpoint.py and --model {by_name[0]}"
        raise UserError(f"config.json: model_type is {model_type!r}; {supported}")
    return types[model_type]


def from_names(hf_config, names=(), model=None):
    """The fields of ours that config.json and the names of the tensors settle together: BERT's head."""
    return hf_type_of(hf_config, model).from_names(hf_config, names)


def generation_ids(hf_config, model=None):
    """What config.json says of generation; of special tokens what transformers takes where it is silent."""
    hf_type = hf_type_of(hf_config, model)
    given = hf_type.token_ids | hf_config
    return {name: given[name] for name in hf_type.generation if given.get(name) is not None}


def to_hf_config(model_name, config):
    """Our flat config as a config.json for transformers, in the form that old versions read as well."""
    return PAGES[model_name].to_hf_config(config)


def to_hf_state(model_name, config, state):
    """Tensors under our names as tensors under the names that transformers saves, a tied head left out."""
    layout = LAYOUTS[model_name]
    names = [name for name in state if name not in layout.tied(config)]
    steps = plan(layout, config, names)
    strange = set(names).difference(*(step.ours for step in steps))
    if strange:
        raise UserError(f"Hugging Face's layout has no place for {', '.join(sorted(strange))}")
    # safetensors writes no views, which a transposed tensor is.
    theirs = {
        step.theirs: step.transform.inverse([state[name] for name in step.ours], config).contiguous()
        for step in steps
    }
    return {layout.saved_name(name, config): tensor for name, tensor in theirs.items()}
