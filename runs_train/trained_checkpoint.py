"""What a run leaves behind: the model in Hugging Face's layout, its loss curve, a README with its figures.

Proof: tests/test_train_language_model.py.
"""

import json
import math
import shlex
from contextlib import contextmanager

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict
from models.utils.files import remove, write_atomically


def save_checkpoint(folder, model_name, model, files, token_ids):
    """Write a model in bf16, and beside it `files`: name -> bytes, or an object that is written as JSON.

    token_ids: what config.json says besides the model's own fields: {"eos_token_id": 2, ...}.
    The model keeps the rounded weights, in fp32: what is measured after is what is stored.
    """
    # It goes first and comes last: a folder without it is no checkpoint.
    remove(folder / "config.json")
    # What an earlier run's weights were converted to is out of date.
    remove(folder / "converted")

    config = config_to_dict(model_name, model.config)
    state = to_hf_state(model_name, config, model.to(torch.bfloat16).state_dict())
    with write_atomically(folder / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    model.float()

    hf_config = {**to_hf_config(model_name, config), **token_ids, "dtype": "bfloat16"}
    for name, content in {**files, "config.json": hf_config}.items():
        as_bytes = content if isinstance(content, bytes) else json_text(content).encode()
        with write_atomically(folder / name) as path:
            path.write_bytes(as_bytes)


def json_text(content):
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def picture(path, title):
    """Axes for the curves of a run, which become the picture `path`."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    yield axes
    # Outside, and of all axes, should a second pair share the picture.
    figure.legend(loc="outside lower center", ncols=2)
    with write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def draw_losses(axes, losses, least_top=0.0):
    """The training loss, at most a hundred points, each the mean of as many steps."""
    width = math.ceil(len(losses) / 100)
    groups = [losses[n : n + width] for n in range(0, len(losses), width)]
    means = [sum(group) / len(group) for group in groups]
    middles = [n * width + len(group) / 2 for n, group in enumerate(groups)]
    axes.plot(middles, means, linewidth=1, label=f"training data, mean of {width} steps")
    # The first steps come down from far above; the picture is for what follows.
    axes.set_ylim(top=1.1 * max(means[len(means) // 20], least_top))


def write_readme(folder, page, argv, rows, notes):
    """The command, a table of what is known, and the picture."""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = f"""# {folder.name}

    python -m runs_train.{page} {shlex.join(argv)}

| | |
|---|---|
{table}

{notes}

![loss](loss.png)
"""
    with write_atomically(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def time_row(run):
    """How long the run took, and on what."""
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    return f"{run.seconds / 60:.0f} minutes on {run.options.device}, {threads} thread{plural}"
