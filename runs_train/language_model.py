r"""Train a decoder of the zoo on text, from fresh weights to a checkpoint that runs.

    python -m runs_train.language_model --config tiny-llama-python-draft --data stdlib \
        --steps 1500 --batch-size 2

takes one to two minutes on two cores, and shows as it goes what the model writes. Without the second line it
trains as the checkpoints that come with the project were trained, for some ten times as long.

    text --text_data.py--> tokens --windows--> model --cross-entropy--> gradients --AdamW--> model

What a step does to a decoder stands in next_token.py, the loop around it in training_run.py. A run that was
stopped (Ctrl-C saves it) and is started again by the same command goes on as if it had never been stopped,
with the same losses: to the bit on a CPU, where sums are always made in the same order.

In the folder --out, by default checkpoints/my-NAME, a run writes
    training/                             the tokens, and state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_language_model.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.language_model, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import (
    MOST_TOKENS,
    TrainingParser,
    add_folder_options,
    add_machine_options,
    add_step_options,
    whole,
)


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train.next_token import train

    train(options)


def parse_options(arguments):
    return make_parser("language_model", __doc__).parse_args(arguments)


def make_parser(page, text, start=None):
    parser = TrainingParser(page, text, start)
    add = parser.group("what")
    add_folder_options(add)
    add("--data", required=True, help="a text file, a folder of them, or stdlib: Python's library")
    add("--vocab-size", type=whole(260, MOST_TOKENS), default=4096, metavar="V", help="pieces [%(default)s]")
    add("--tokenizer", metavar="FILE", help="a sentencepiece tokenizer.model, not one of --vocab-size")
    add("--prompt", help="what the samples begin with, which are shown as it trains")
    add = add_step_options(parser, 2400, lr=2e-3, warmup=200, weight_decay=0.1, draws="weights and windows")
    add("--batch-size", type=whole(1), default=8, metavar="B", help="windows at once [%(default)s]")
    add("--context", type=whole(2), metavar="T", help="tokens of a window [the model's max_seq_len]")
    add_machine_options(parser.group("on this machine"))
    return parser


if __name__ == "__main__":
    run_main(main)
