"""How fast the models of the zoo are, beside `transformers`, llama.cpp and the memory's own limit.

    python benchmark.py                                         124 M weights as Llama and as GPT-2
    python benchmark.py --quick                                 a first impression, within two minutes
    python benchmark.py tinyllama-1.1b --weights bfloat16 int8 int4
    python benchmark.py gpt2 --subjects eager transformers --batches 8 32
    python benchmark.py --subjects served compiled+served llama.cpp --weights bfloat16 --requests 8
    python benchmark.py llama-124m --subjects eager speculative --weights float32
    python benchmark.py bert-base-uncased vit-b-16              16 texts of 128 tokens, 8 images

Any name in configs/ will do but those of encoder-decoders. Weights are random and the same for all; before
anything is timed, each subject must say what fp32 says (in `transformers`, where it is installed). Then all
take turns, each in a process of its own, so that a machine that warms up or is busy elsewhere slows all of
them; ratios of medians are what counts, not single figures. The memory's bandwidth is measured in the same
turns.

A decoded token reads every weight of the layers and of the head once: bytes of weights / bandwidth is the
shortest time that it can take. Medians are printed; benchmark.json has every sample, benchmark.png (and .svg)
the bars. What this page is made of stands in benchmarks/.
"""

import importlib.util
import itertools
import json
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import PEERS, WEIGHTS, ZOO, check_kind, is_one_pass, measure, why_not
from benchmarks.picture import draw
from benchmarks.report import make_report, table
from benchmarks.turns import Process
from models import load_config
from models.utils.command_line import Parser
from models.utils.errors import UserError, run_main
from models.utils.files import one_line, write_atomically
from models.utils.machine import choose_device

LARGEST = 100_000  # of all numbers that are asked for
QUICK = {
    "configs": ["llama-124m"],
    "weights": ["bfloat16", "int4"],
    "prefill_tokens": 128,
    "new_tokens": 24,
    "rounds": 3,
}


def main(argv=None):
    args = parse_arguments(argv)
    check_folder(args.out)
    skipped = skip_what_is_missing(args)
    subjects, bandwidth = [], []
    with Process("memory", "memory", threads=args.threads, device=args.device) as memory:
        machine = memory.call("load")["result"]

        def read_memory():
            # The best of a turn's readings: a limit is what the memory can do.
            bandwidth.append(max(memory.call("run")["result"]))

        for config in args.configs:
            subjects += measure(config, args, machine["threads"], read_memory)

    report = make_report(args, subjects, bandwidth, machine, skipped)
    print("\n".join(table(report)))
    with write_atomically(args.out / "benchmark.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind in ("png", "svg"):
        with write_atomically(args.out / f"benchmark.{kind}") as path:
            draw(report, path, kind)
    print(f"\nwrote benchmark.json, benchmark.png and benchmark.svg into {args.out}")


def parse_arguments(argv):
    parser = Parser("python benchmark.py", __doc__)
    add = parser.add_argument
    add("configs", nargs="*", default=["llama-124m", "gpt2"], help="names in configs/")
    add("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="int8 and int4 go with bf16")
    subjects = ["eager", "compiled", *PEERS]
    add("--subjects", nargs="+", choices=[*ZOO, *PEERS], default=subjects, help=f"default: {subjects}")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="before decoding; default: %(default)s")
    add("--new-tokens", type=int, default=128, metavar="N", help="to decode; default: %(default)s")
    add("--prefill-tokens", type=int, default=512, metavar="N", help="of a long prompt; default: %(default)s")
    batches = "prompts at once, ragged, as in 8 32; BERT has 16 texts if nothing is said, ViT 8 images"
    add("--batches", type=int, nargs="+", default=[], metavar="B", help=batches)
    requests = "requests at once, of 8 to 256 tokens, for 16 to 128 more each (the zoo: one after another)"
    add("--requests", type=int, metavar="N", help=requests)
    add("--num-draft-tokens", type=int, default=4, metavar="N", help="a round; default: %(default)s")
    add("--agreement", type=float, default=0.8, metavar="P", help="of drafter and target; default: 0.8")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each subject; default: %(default)s")
    add("--threads", type=int, metavar="N", help="default: as many as torch takes by itself")
    add("--device", default="cpu", help="cpu (default) or cuda, where llama.cpp is left out")
    add("--quick", action="store_true", help="fewer weights, tokens and rounds")
    add("--out", default="benchmark_results", metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    args.command = " ".join(["python benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    args.configs, args.out = list(dict.fromkeys(args.configs)), Path(args.out)
    check_arguments(args)
    args.device = str(choose_device(args.device))
    return args


def check_arguments(args):
    counts = ["prompt_tokens", "new_tokens", "prefill_tokens", "num_draft_tokens", "rounds", "threads"]
    values = [(name, getattr(args, name)) for name in [*counts, "requests"]]
    values += [("batches", size) for size in args.batches]
    for option, value in values:
        # The first new token comes with the prompt, so that another is needed to decode.
        smallest = 2 if option in ("prompt_tokens", "new_tokens", "batches", "requests") else 1
        if value is not None and not smallest <= value <= LARGEST:
            name = option.replace("_", "-")
            raise UserError(f"--{name} is {value}; give a number from {smallest} to {LARGEST:,}")
    if not 0 <= args.agreement <= 1:
        raise UserError(f"--agreement is {args.agreement}; give 0 to 1")
    for name in args.configs:
        check_kind(name)
        _, config = load_config(name)
        if not is_one_pass(name) and config.max_seq_len < args.prompt_tokens + args.new_tokens:
            raise UserError(
                f"{name}: --prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are more "
                f"than its context of {config.max_seq_len}; give less"
            )


def check_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({one_line(error)}); give another") from None


def skip_what_is_missing(args):
    """Take out of args.subjects what cannot be measured here; a line for each, and for what a model lacks."""
    packages = (("transformers", "transformers"), ("llama.cpp", "llama_cpp"), ("llama.cpp", "gguf"))
    missing = {
        name: f"{package} is not installed; pip install '.[benchmark]'"
        for name, package in packages
        if importlib.util.find_spec(package) is None
    }
    if args.device != "cpu":
        missing["llama.cpp"] = f"it is measured on a CPU only, not on {args.device}"
    skipped = [f"{name} is left out ({missing[name]})" for name in args.subjects if name in missing]
    args.subjects = [name for name in args.subjects if name not in missing]
    if not args.subjects:
        raise UserError(f"nothing is left to measure: {'; '.join(skipped)}")
    for config, name in itertools.product(args.configs, args.subjects):
        if why := why_not(config, name):
            skipped.append(f"{config}: {name} is left out ({why})")
    print("\n".join(skipped), end="\n" if skipped else "")
    return skipped


if __name__ == "__main__":
    # A request to end, as by timeout or kill, goes the way of Ctrl-C: nothing is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_main(main)
