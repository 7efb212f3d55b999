"""Train an encoder-decoder on pairs of texts, as the Transformer's paper did, to a checkpoint that runs.

    python -m runs_train.seq2seq --config tiny-transformer-dates --data dates
    python -m runs_train.seq2seq --config my-config.json --data english-german.tsv --vocab-size 8000

    source         "3 Mar 87"   --encoder-->  memory
    target   <pad> "1987-03-0"  --decoder-->  logits --cross-entropy, smoothed--> "1987-03-03" </s>

What a step does stands in translation.py, the loop around it in training_run.py. A run that was stopped
(Ctrl-C saves it) and is started again by the same command goes on as if it had never been stopped; with more
--steps it goes on for longer.

In the folder --out, by default checkpoints/my-NAME, a run writes
    training/                             the tokenizer, and state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout (Marian's), in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_seq2seq.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.seq2seq, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import (
    MOST_TOKENS,
    TrainingParser,
    add_folder_options,
    add_machine_options,
    add_step_options,
    number,
    whole,
)

AVERAGE = "of the running mean, what it keeps in a step; 0: the last weights [%(default)s]"


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train.translation import train

    train(options)


def parse_options(arguments):
    parser = TrainingParser("seq2seq", __doc__)
    add = parser.group("what")
    add_folder_options(add)
    add("--data", required=True, help="lines of source TAB target, or dates: made by rule")
    add("--vocab-size", type=whole(8, MOST_TOKENS), metavar="V", help="pieces of each language [characters]")
    eq_3 = {"lr_help": "times eq. 3's learning rate", "least": 1}
    add = add_step_options(parser, 4000, lr=1.0, warmup=800, weight_decay=0.0, draws="weights, order", **eq_3)
    add("--batch-size", type=whole(1), default=128, metavar="B", help="pairs at once [%(default)s]")
    add("--label-smoothing", type=number(least=0, most=1), default=0.1, metavar="E", help="[%(default)s]")
    add("--average", type=number(least=0, most=1), default=0.99, metavar="D", help=AVERAGE)
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
