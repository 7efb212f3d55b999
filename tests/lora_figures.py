"""What LoRA takes: memory beside training all weights, time beside `peft` and `transformers`.

    python -m tests.lora_figures memory          runs sft, lora and lora --quantize int4, each for a few steps
    python -m tests.lora_figures speed           steps of ours and of theirs, in turns

Both use random weights of the size of --config; what the numbers are has no part in it. The figures of
runs_train/README.md were made by these commands.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict, create_model, load_config
from models.utils.command_line import CHECKPOINTS
from models.utils.lora import attach

ROOT = Path(__file__).parent.parent
RANK, ALPHA = 8, 16.0
WAYS = {"all weights": ["sft"], "LoRA": ["lora"], "QLoRA, int4": ["lora", "--quantize", "int4"]}


def write_checkpoint(config_name, folder):
    """Random weights in Hugging Face's layout, in bf16, with the tokenizer of tiny-llama-python."""
    torch.manual_seed(0)
    name, model = load_config(config_name)[0], create_model(config_name)
    config = config_to_dict(name, model.config)
    folder.mkdir()
    state = to_hf_state(name, config, model.bfloat16().state_dict())
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(name, config)))
    for file in "tokenizer.model", "tokenizer_config.json":
        (folder / file).write_bytes((CHECKPOINTS / "tiny-llama-python" / file).read_bytes())


def memory(args, root):
    """The peak memory that each run's own README states."""
    lines = (json.dumps({"prompt": f"{n} " * 60, "completion": f"{n} " * 60}) for n in range(60))
    (root / "data").write_text("\n".join(lines))
    for way, words in WAYS.items():
        out = root / way.split()[0]
        command = [sys.executable, "-m", f"runs_train.{words[0]}", "--checkpoint", root / "base", *words[1:]]
        command += [
            "--data",
            root / "data",
            "--out",
            out,
            "--steps",
            args.steps,
            "--batch-tokens",
            args.tokens,
        ]
        command += ["--dtype", args.dtype, "--eval-every", args.steps]
        result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr)
        found = re.search(r"\| peak memory \| (.+) \|", (out / "README.md").read_text())
        print(f"{way:12}  peak {found[1]}", flush=True)


def speed(args, root):
    """The fastest and the median step of each, their turns one after the other.

    In bf16 both hold their matrices in it, their adapters in fp32, and multiply under autocast.
    """
    import peft
    import transformers

    dtype = getattr(torch, args.dtype)
    _, config = load_config(args.config)
    tokens = torch.randint(config.vocab_size, (args.rows, args.tokens // args.rows))
    torch.manual_seed(0)
    ours = create_model(args.config).train()
    for layer in attach(ours, RANK, ALPHA).values():
        layer.base.to(dtype)  # as runs_train/adapters.py has it
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype).train()
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    forwards = {"ours": ours, "peft": lambda tokens: theirs(tokens, use_cache=False).logits}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for name, model in (("ours", ours), ("peft", theirs))
    }
    counts = {
        name: sum(p.numel() for g in o.param_groups for p in g["params"]) for name, o in optimizers.items()
    }
    print(f"trained: {counts}")
    seconds = {name: [] for name in forwards}
    for _ in range(args.turns):
        for name, forward in forwards.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                logits = forward(tokens)[:, :-1]
            F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: fastest step {min(times[1:]):.3f} s, median {statistics.median(times[1:]):.3f} s")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("--config", default="llama-124m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch [%(default)s]")
    parser.add_argument("--rows", type=int, default=4, help="of the batch of `speed` [%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="of `memory` [%(default)s]")
    parser.add_argument("--turns", type=int, default=8, help="of `speed` [%(default)s]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.config, Path(folder) / "base")
        (memory if args.what == "memory" else speed)(args, Path(folder))


if __name__ == "__main__":
    main()
