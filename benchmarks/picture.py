"""The speeds as bars, with the memory's limit as a line across each."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

SPOKEN = {"float32": "fp32", "bfloat16": "bf16", "eager": "zoo", "speculative": "zoo, speculative"}
COLORS = {  # of those that are drawn; "served", for many texts at once, is in the table alone
    "transformers": "#c9cdd3",
    "llama.cpp": "#e3b878",
    "eager": "#a9c8e8",
    "compiled": "#3573b1",
    "speculative": "#9ad0b4",
    "compiled+speculative": "#2c8a63",
}


def draw(report, path, kind):
    """A panel for each model, a group of bars for each kind of weights; kind: "png" or "svg"."""
    configs = list(dict.fromkeys(entry["config"] for entry in report["subjects"]))
    names = [name for name in COLORS if any(entry["subject"] == name for entry in report["subjects"])]
    figure = Figure(figsize=(max(7, 4.8 * len(configs)), 4.4), layout="constrained", facecolor="white")
    for place, config in enumerate(configs, start=1):
        axes = figure.add_subplot(1, len(configs), place)
        entries = [e for e in report["subjects"] if e["config"] == config and e["subject"] in names]
        panel(axes, entries, names, report["bandwidth"]["median"])
        axes.set_title(config, loc="left", fontsize=11, fontweight="bold")
        if place == 1 or "decode" not in entries[0]["phases"]:
            axes.set_ylabel(spoken_speed(entries[0]))

    handles = [Patch(color=COLORS[name], label=SPOKEN.get(name, name)) for name in names]
    if any(phase_of(entry) == "decode" for entry in report["subjects"]):
        handles.append(Line2D([], [], color="#333333", linewidth=1.2, label="limit of the memory"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    machine, gigabytes = report["machine"], report["bandwidth"]["median"] / 1e9
    title = f"{machine['processor']}, {machine['threads']} threads, reading {gigabytes:.0f} GB/s"
    figure.suptitle(title, fontsize=9, color="#666666", x=0.01, ha="left")
    # The kind is said, since the name may end in .partial.
    figure.savefig(path, dpi=160, format=kind)


def phase_of(entry):
    """The phase that is drawn: a model that does not decode has batches alone."""
    return "decode" if "decode" in entry["phases"] else next(iter(entry["phases"]))


def spoken_speed(entry):
    phase = phase_of(entry)
    return "tokens per second, one text" if phase == "decode" else f"{entry['answers']} per second, {phase}"


def panel(axes, entries, names, bandwidth):
    weights = list(dict.fromkeys(entry["weights"] for entry in entries))
    width = 0.84 / len(names)
    highest, labels = 0, []
    for entry in entries:
        rank = names.index(entry["subject"])
        # Groups stand at 0, 1, 2, ...; a subject has the same place in each.
        x = weights.index(entry["weights"]) + (rank - (len(names) - 1) / 2) * width
        times = entry["phases"][phase_of(entry)]
        speed = 1 / times["median"]
        spread = [[speed - 1 / times["high"]], [1 / times["low"] - speed]]
        axes.bar(x, speed, width * 0.9, color=COLORS[entry["subject"]])
        axes.errorbar(x, speed, spread, color="#555555", linewidth=0.8, capsize=1.5)
        color = "white" if "compiled" in entry["subject"] else "#333333"
        labels.append((x, f"{speed:.0f}" if speed >= 20 else f"{speed:.3g}", color))
        highest = max(highest, speed)
        if phase_of(entry) == "decode":
            limit = bandwidth / entry["bytes_per_token"]
            axes.hlines(limit, x - width / 2, x + width / 2, color="#333333", linewidth=1.2)
            highest = max(highest, limit)

    for x, text, color in labels:  # at the foot of a bar, where no line crosses them
        axes.text(x, highest / 100, text, ha="center", va="bottom", fontsize=7, color=color)

    axes.set_xticks(range(len(weights)), [SPOKEN.get(kind, kind) for kind in weights])
    axes.set_ylim(0, highest * 1.08)
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
