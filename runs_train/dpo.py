r"""Tune a decoder on preferences: of two answers to a question it learns to give the better one.

    python -m runs_train.sft --checkpoint tiny-llama-python --data stdlib
    python -m runs_train.dpo --checkpoint my-tiny-llama-python-sft --data stdlib

The first command teaches the tiny Llama to answer "What does operator.is_not do?", the second that what is
said should be true of this function, not of its neighbour in the module. Then:
python run.py my-tiny-llama-python-sft-dpo --chat

    pairs --chat template--> two rows of tokens, of which the last answer counts
          --> log-probabilities, less those of the reference --> loss --AdamW--> model

What others need for this, a model of rewards and reinforcement learning against it, is here one line of loss
(preferences.py has it, and says where it comes from): the model's own probabilities are the rewards. The
reference is the model before the first step; it is asked once, and then not needed again.

preference_data.py explains the data, training_run.py the loop. A run that was stopped (Ctrl-C saves it) and
is started again by the same command goes on as if it had never been stopped: to the bit on a CPU.

In the folder --out, by default checkpoints/my-NAME-dpo, a run writes
    training/                             state.pt, from which the same command goes on; reference.safetensors
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, answers before and after

With --lora adapters are trained instead (lora.py), and they are what is written. Paper: Rafailov et al. 2023.
Proof: tests/test_train_dpo.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.dpo, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import (
    TrainingParser,
    add_chat_options,
    add_lora_options,
    add_machine_options,
    add_step_options,
    number,
)


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train import adapters, preferences, tuning

    if options.lora:
        adapters.train(options, preferences.AdapterRun)
    else:
        tuning.train(options, preferences.Run)


def parse_options(arguments):
    parser = TrainingParser("dpo", __doc__)
    data = "JSON lines of prompt, chosen and rejected, or stdlib: right answers and a neighbour's"
    add_chat_options(parser.group("what"), data)
    add_lora_options(parser.group("adapters"))
    add = add_step_options(parser, 150, lr=5e-5, warmup=10, weight_decay=0.0, draws="the order, adapters")
    beta = "a higher one keeps it nearer to the reference [%(default)s]"
    add("--beta", type=number(above=0), default=0.1, metavar="F", help=beta)
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
