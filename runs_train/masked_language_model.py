"""Train a BERT of the zoo to fill gaps in text, from fresh weights to a checkpoint that runs.

    python -m runs_train.masked_language_model --config tiny-bert-python --data stdlib

    text --passage_data.py--> gaps --> model --cross-entropy at the gaps--> gradients --AdamW--> model

What a step does stands in masked_tokens.py, the loop around it in training_run.py. A run that was stopped
(Ctrl-C saves it) and is started again by the same command goes on as if it had never been stopped: to the bit
on a CPU.

In the folder --out, by default checkpoints/my-NAME, a run writes
    training/                             the tokens, and state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_masked_language_model.py.
"""

import sys

if not __package__:
    message = "error: start it as: python -m runs_train.masked_language_model, in the project's folder"
    print(message, file=sys.stderr)
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


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train.masked_tokens import train

    train(options)


def parse_options(arguments):
    parser = TrainingParser("masked_language_model", __doc__)
    add = parser.group("what")
    add_folder_options(add)
    add("--data", required=True, help="a text file, a folder of them, or stdlib: its docstrings")
    # One more than the special tokens at least.
    add("--vocab-size", type=whole(6, MOST_TOKENS), default=4096, metavar="V", help="pieces [%(default)s]")
    add = add_step_options(parser, 5000, lr=1e-3, warmup=200, weight_decay=0.01, draws="weights, order, gaps")
    add("--batch-tokens", type=whole(1), default=2048, metavar="N", help="padded passages [%(default)s]")
    add("--context", type=whole(3), metavar="T", help="longest passage, in tokens [the model's max_seq_len]")
    add("--masked", type=number(least=0, most=1), default=0.15, help="share hidden [%(default)s]")
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
