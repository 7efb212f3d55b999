"""Between Hugging Face's checkpoints and ours: what every file and field of theirs is for us.

A page per model of ours holds a table of tensors (LAYOUT), the lists of config fields of each model_type that
it implements (HF_TYPES), and the way back (to_hf_config). layout.py and config.py say what these are made of.

To add a model: write its page and name it in PAGES; `convert_hf_checkpoint.py --inspect` shows what a table
leaves out. The proof is tests/test_convert_hf_checkpoint.py.
"""

from conversion.config_fields import read_config
from conversion.tables import (
    bert,
    gpt2,
    gpt_neox,
    llama,
    qwen3,
    transformer,
    transformer_lm,
    vision_transformer,
)
from conversion.tensor_table import plan
from models.utils.errors import UserError

PAGES = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "qwen3": qwen3,
    "transformer": transformer,
    "transformer_lm": transformer_lm,
    "vision_transformer": vision_transformer,
}
LAYOUTS = {name: page.LAYOUT for name, page in PAGES.items()}
# Where two pages have a model_type, it is the first one's, unless the other is asked for by name.
HF_TYPES = {}
for page in PAGES.values():
    HF_TYPES = {**HF_TYPES, **page.HF_TYPES, **HF_TYPES}


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
        raise UserError(f"config.json: model_type is {model_type!r}; {supported}")
    return types[model_type]


def from_names(hf_config, names=(), model=None):
    """The fields of ours that config.json and the names of the tensors settle together: BERT's head."""
    return hf_type_of(hf_config, model).from_names(hf_config, names)


def generation_ids(hf_config):
    """What config.json says of generation; of special tokens what transformers takes where it is silent."""
    hf_type = HF_TYPES[hf_config["model_type"]]
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
