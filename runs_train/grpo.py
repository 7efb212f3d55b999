r"""Tune a decoder by rewards: it writes, a program says how good that is, and it does more of the better.

    python -m runs_train.grpo --checkpoint tiny-llama-python --data stdlib --reward parses

lets the tiny Llama write the bodies of functions whose first lines it is given, and rewards what Python's
parser accepts. Nobody shows it a right body: it finds out. The run shows the mean reward as it goes, and what
is written before and after. Then: python run.py my-tiny-llama-python-grpo --prompt "def read_lines(path):"

    prompts --generate, a group each--> texts --a program--> rewards, compared within the group: advantages
            --> loss --AdamW--> model       the next group is written by the new model

rewards.py has the prompts and the rewards, and takes a reward of your own; rewarded.py explains what a step
does, and by which formula; training_run.py is the loop. A run that was stopped (Ctrl-C saves it) and is
started again by the same command goes on as if it had never been stopped: to the bit on a CPU.

In the folder --out, by default checkpoints/my-NAME-grpo, a run writes
    training/                             state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   rewards as it went, what it writes before and after

With --lora adapters are trained instead (lora.py), and they are what is written. Paper: Shao et al. 2024.
Proof: tests/test_train_grpo.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.grpo, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import (
    TrainingParser,
    add_lora_options,
    add_machine_options,
    add_step_options,
    add_tuning_options,
    number,
    whole,
)


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train import adapters, rewarded, tuning

    if options.lora:
        adapters.train(options, rewarded.AdapterRun)
    else:
        tuning.train(options, rewarded.Run)


def parse_options(arguments):
    parser = TrainingParser("grpo", __doc__)
    add = parser.group("what")
    add_tuning_options(add, "JSON lines of prompts, or stdlib: the first lines of its functions")
    add(
        "--reward",
        required=True,
        metavar="R",
        help="parses, answer, or a file.py with reward(...): rewards.py",
    )
    add_lora_options(parser.group("adapters"))
    add = add_step_options(parser, 30, lr=1e-4, warmup=5, weight_decay=0.0, draws="texts, order, adapters")
    add("--questions", type=whole(1), default=8, metavar="Q", help="prompts of a batch [%(default)s]")
    add("--group", type=whole(2), default=8, metavar="G", help="continuations of each [%(default)s]")
    add("--new-tokens", type=whole(1), default=48, metavar="N", help="of a continuation [%(default)s]")
    add("--updates", type=whole(1), default=2, metavar="N", help="that learn from one draw [%(default)s]")
    epsilon = "how far a probability may move in them [%(default)s]"
    add("--epsilon", type=number(above=0, most=1), default=0.2, metavar="F", help=epsilon)
    beta = "of KL; a higher one keeps it nearer to the reference, 0 needs none [%(default)s]"
    add("--beta", type=number(least=0), default=0.04, metavar="F", help=beta)
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
