"""What a run leaves behind: the model in Hugging Face's layout, its loss curve, a README with its figures.

Proof: tests/test_train_language_model.py.
"""

import json
import math
import shlex
from contextlib import contextmanager

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import save_file

from conversion.convert import written_before_markers
from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict
from models.utils.errors import one_line
from models.utils.files import refuse_to_replace, remove
from runs_train.folder import ALWAYS, remove_other_results, remove_results, write_result

# The colours of the models' diagrams: what is trained on, what is held out, and what is said of them.
BLUE, ORANGE, TEXT, MUTED, LIGHT = "#5289bd", "#cc8440", "#1f2429", "#5c6570", "#e3e6ea"


def save_checkpoint(folder, model_name, model, files, token_ids):
    """Write a model in bf16, and beside it `files`: name -> bytes, or an object that is written as JSON.

    token_ids: what config.json says besides the model's own fields: {"eos_token_id": 2, ...}.
    The model keeps the rounded weights, in fp32: what is measured after is what is stored.
    """
    # It goes first and comes last: a folder without it is no checkpoint.
    remove_results(folder, ["config.json"])
    remove_other_results(folder, [*ALWAYS, *files])
    # What an earlier run's weights were converted to is out of date.
    refuse_to_replace(folder / "converted", written_before_markers)
    remove(folder / "converted")

    config = config_to_dict(model_name, model.config)
    state = to_hf_state(model_name, config, model.to(torch.bfloat16).state_dict())
    with write_result(folder, "model.safetensors") as path:
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(one_line(error)) from None
    model.float()

    hf_config = {**to_hf_config(model_name, config), **token_ids, "dtype": "bfloat16"}
    for name, content in {**files, "config.json": hf_config}.items():
        as_bytes = content if isinstance(content, bytes) else json_text(content).encode()
        with write_result(folder, name) as path:
            path.write_bytes(as_bytes)


def json_text(content):
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# The picture ------------------------------------------------------------------------------------------------


@contextmanager
def picture(folder, title, panels=1):
    """Axes one below the other, over the same steps, which become loss.png."""
    figure = Figure(figsize=(7, 2.2 + 1.8 * panels), layout="constrained")
    all_axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    all_axes[0].set_title(title, loc="left", color=TEXT, fontsize=11, pad=10)
    all_axes[-1].set_xlabel("step", color=MUTED)
    for axes in all_axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LIGHT)
        axes.grid(axis="y", color=LIGHT, linewidth=0.8)
        axes.tick_params(colors=MUTED, length=0, labelsize=9)
        axes.yaxis.label.set_color(MUTED)
        axes.margins(x=0.02)
    yield all_axes
    for axes in all_axes:
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=9)
    with write_result(folder, "loss.png") as path:
        figure.savefig(path, format="png", dpi=150)


def draw_losses(axes, losses, least_top=0.0):
    """The training loss, at most a hundred points, each the mean of as many steps."""
    width = math.ceil(len(losses) / 100)
    groups = [losses[n : n + width] for n in range(0, len(losses), width)]
    means = [sum(group) / len(group) for group in groups]
    middles = [n * width + len(group) / 2 for n, group in enumerate(groups)]
    label = "training data" + (f", mean of {width} steps" if width > 1 else "")
    axes.plot(middles, means, color=BLUE, linewidth=1.5, label=label)
    # The first steps come down from far above; the picture is for what follows.
    axes.set_ylim(top=1.1 * max(means[len(means) // 20], least_top))


def draw_measured(axes, evaluations, label):
    """What was measured on held-out data: (step, figure) pairs."""
    axes.plot(*zip(*evaluations), color=ORANGE, linewidth=1.5, marker="o", markersize=3.5, label=label)


def percent(evaluations):
    return [(step, 100 * share) for step, share in evaluations]


# The story --------------------------------------------------------------------------------------------------


def write_readme(folder, options, rows, notes):
    """The command, a table of what is known, and the picture."""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = f"""# {folder.name}

    {options.start} {shlex.join(options.arguments)}

| | |
|---|---|
{table}

{notes}

![loss](loss.png)
"""
    with write_result(folder, "README.md") as path:
        path.write_text(text, encoding="utf-8")


def time_row(run):
    """How long the run took, on what, and in which dtype."""
    threads = torch.get_num_threads()
    where = f"{run.options.device}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{run.seconds / 60:.0f} minutes on {where}, in {run.options.dtype}"
