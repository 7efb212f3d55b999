r"""Fine-tune a decoder on conversations: it learns what the assistant says in them, in its own chat format.

    python -m runs_train.sft --checkpoint tiny-llama-python --data stdlib

teaches the tiny Llama, which has only ever continued Python, to answer "What does operator.is_not do?". It
takes about a minute on two cores and shows, before the first step and as it goes, what the model answers to
questions that it does not learn from. Then: python run.py my-tiny-llama-python-sft --chat

    conversations --chat template--> tokens, of which the assistant's count
                  --> model --cross-entropy of these--> gradients --AdamW--> model

Any checkpoint of a decoder can be tuned: its template is used or, where it has none, a plain one that goes
with the result (--template FILE gives another). Which tokens count is found in chat_data.py, what a step does
stands in fine_tuning.py, what all tuning shares in tuning.py, the loop in training_run.py. A run that was
stopped (Ctrl-C saves it) and is started again by the same command goes on as if it had never been stopped: to
the bit on a CPU.

In the folder --out, by default checkpoints/my-NAME-sft, a run writes
    training/                             state.pt, from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, answers before and after

All weights are trained, which takes 16 bytes each; lora.py does with far less. Papers: Ouyang et al. 2022,
section 3.4 (supervised fine-tuning).
Proof: tests/test_train_sft.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.sft, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import TrainingParser, add_chat_options, add_machine_options, add_step_options


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train.fine_tuning import Run
    from runs_train.tuning import train

    train(options, Run)


def parse_options(arguments):
    parser = TrainingParser("sft", __doc__)
    add_chat_options(parser.group("what"))
    add_step_options(parser, 150, lr=5e-4, warmup=10, weight_decay=0.0, draws="the order, dropout")
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
