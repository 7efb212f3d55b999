"""What was measured: as JSON with every sample, and as a table for a person."""

import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

import psutil

from models.utils.machine import instructions, spoken_bytes

PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "numpy")
SETTINGS = "prompt_tokens new_tokens prefill_tokens num_draft_tokens agreement rounds batches requests"


def make_report(args, subjects, bandwidth, machine, skipped):
    """Everything as one dict; times are seconds, sizes bytes. Each phase has its samples and quartiles."""
    return {
        "command": args.command,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {**machine, **this_machine()},
        "versions": versions(),
        "settings": {name: getattr(args, name) for name in SETTINGS.split()},
        "skipped": skipped,
        "bandwidth": quartiles(bandwidth),
        "subjects": [
            {
                "config": subject.config,
                "weights": subject.weights,
                "subject": subject.name,
                **subject.figures,
                "phases": {phase: quartiles(samples) for phase, samples in subject.samples.items()},
            }
            for subject in subjects
        ],
    }


def quartiles(samples):
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
    return {"median": median, "low": low, "high": high, "samples": samples}


def this_machine():
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "instructions": instructions(),
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


# The table --------------------------------------------------------------------------------------------------

HEADS = ["weights", "subject", "ms/token", "quartiles", "limit", "x trf", "x l.cpp"]
HEADS += ["first ms", "prefill ms", "x trf", "load s", "start s", "peak"]


def table(report):
    """Lines for a terminal: a block for each model, one for its batches, and what the columns mean."""
    settings, bandwidth = report["settings"], report["bandwidth"]["median"]
    machine = report["machine"]
    decoding = any("decode" in entry["phases"] for entry in report["subjects"])
    asked = (
        f"{settings['prompt_tokens']} tokens and {settings['new_tokens']} new ones; prefill of "
        f"{settings['prefill_tokens']}; "
    )
    legend = LEGEND if decoding else [line for line in LEGEND if line.startswith("x trf")]
    lines = [
        f"{machine['processor']} ({' '.join(machine['instructions'])}), {machine['threads']} threads, "
        f"reading {bandwidth / 1e9:.1f} GB/s; "
        f"{asked if decoding else ''}medians of {settings['rounds']} rounds"
    ]
    for config in dict.fromkeys(entry["config"] for entry in report["subjects"]):
        entries = [entry for entry in report["subjects"] if entry["config"] == config]
        decoders = [row(entry, entries, bandwidth) for entry in entries if "decode" in entry["phases"]]
        if decoders:
            lines += ["", config, *aligned([HEADS, *decoders])]
        batches = [phase for phase in entries[0]["phases"] if phase.startswith("batch")]
        if batches:
            entries = [entry for entry in entries if batches[0] in entry["phases"]]
            has_llama_cpp = any(entry["subject"] == "llama.cpp" for entry in entries)
            peers = {"transformers": "x trf"} | ({"llama.cpp": "x l.cpp"} if has_llama_cpp else {})
            heads = ["weights", "subject"] + [head for phase in batches for head in (phase, *peers.values())]
            rows = [batch_row(entry, entries, batches, peers) for entry in entries]
            what = "ragged prompts, tokens/s of all rows" if decoders else f"{entries[0]['answers']} a second"
            lines += ["", f"{config}, {what}", *aligned([heads, *rows])]
    return [*lines, "", *legend]


LEGEND = """
limit: how much of the speed that the memory allows, were each weight read once for a token, is reached
x trf, x l.cpp: how many times as fast as transformers (int8 and int4: as its bf16) and as llama.cpp
first, prefill: time to the first token of the short and the long prompt
load: from files that the system has in its cache, imports aside; start: load and the very first token
peak: memory of the process, with the libraries' code
""".strip().splitlines()


def row(entry, entries, bandwidth):
    """The cells of a subject; a dash where it did not take part."""
    phases = entry["phases"]
    decode = phases["decode"]
    limit = entry["bytes_per_token"] / bandwidth / decode["median"]
    cells = [
        entry["weights"],
        entry["subject"],
        f"{decode['median'] * 1e3:.2f}",
        f"{decode['low'] * 1e3:.2f} .. {decode['high'] * 1e3:.2f}",
        f"{limit:.0%}",
        ratio(entry, peer_of(entry, entries, "transformers"), "decode"),
        ratio(entry, peer_of(entry, entries, "llama.cpp"), "decode"),
        f"{phases['first token']['median'] * 1e3:.1f}",
        f"{phases['prefill']['median'] * 1e3:.0f}" if "prefill" in phases else "-",
        ratio(entry, peer_of(entry, entries, "transformers"), "prefill"),
        f"{entry['seconds_to_load']:.2f}",
        f"{entry['seconds_to_load'] + entry['seconds_to_first_token_ever']:.2f}",
        spoken_bytes(entry["peak_memory"]),
    ]
    if entry.get("acceptance") is not None:
        cells[1] += f" ({entry['acceptance']:.0%} accepted)"
    return cells


def batch_row(entry, entries, batches, peers):
    cells = [entry["weights"], entry["subject"]]
    for phase in batches:
        speed = 1 / entry["phases"][phase]["median"]
        cells.append(f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}")
        cells += [ratio(entry, peer_of(entry, entries, name), phase) for name in peers]
    return cells


def peer_of(entry, entries, name):
    """The subject of another program that an entry is compared with, or None."""
    quantized = entry["weights"] in ("int8", "int4")
    weights = "bfloat16" if name == "transformers" and quantized else entry["weights"]
    found = [other for other in entries if (other["subject"], other["weights"]) == (name, weights)]
    return found[0] if found else None


def ratio(entry, peer, phase):
    """How many times as fast as its peer an entry is."""
    if peer is None or peer is entry or not (phase in entry["phases"] and phase in peer["phases"]):
        return "-"
    return f"{peer['phases'][phase]['median'] / entry['phases'][phase]['median']:.2f}"


def aligned(rows):
    """Lines with columns of even width: words to the left, figures to the right."""
    widths = [max(len(cells[n]) for cells in rows) for n in range(len(rows[0]))]
    lines = []
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        padded[:2] = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
        lines.append("  ".join(padded).rstrip())
    return lines
