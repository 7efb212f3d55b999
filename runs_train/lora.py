r"""Fine-tune a decoder through adapters: thin matrices beside the large ones, which stay as they are.

    python -m runs_train.lora --checkpoint tiny-llama-python --data stdlib
    python -m runs_train.lora --checkpoint tiny-llama-python --data stdlib --quantize int4

does what sft.py does, with a fraction of the memory: of the model only the weights are there, no gradients
and none of Adam's means. With --quantize the weights are there in 4 bits (QLoRA). Then:

    python run.py tiny-llama-python --adapter checkpoints/my-tiny-llama-python-lora --chat

    y = x W^T + alpha / r (x A^T) B^T     W: the model's, frozen; A, B: trained, and all that is stored

models/utils/lora.py explains the layer, chat_data.py which tokens count, fine_tuning.py what a step does,
conversion/adapter.py what stands in the files: `peft` reads them, and its own are read by run.py.

In the folder --out, by default checkpoints/my-NAME-lora, a run writes
    training/                             state.pt, from which the same command goes on
    adapter_config.json, adapter_model.safetensors, chat_template.jinja     at the end: the adapter, as PEFT's
    README.md, loss.png                   what it was trained on, how well it does, answers before and after

Papers: Hu et al. 2021 (LoRA), Dettmers et al. 2023 (QLoRA).
Proof: tests/test_train_lora.py.
"""

import sys

if not __package__:
    print("error: start it as: python -m runs_train.lora, in the project's folder", file=sys.stderr)
    sys.exit(2)

from models.utils.errors import run_main
from runs_train.options import (
    TrainingParser,
    add_adapter_options,
    add_chat_options,
    add_machine_options,
    add_step_options,
)


def main(arguments=None):
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    # Not above: it imports torch, which takes seconds, and what is wrong with a command is said at once.
    from runs_train.adapters import Run, train

    train(options, Run)


def parse_options(arguments):
    parser = TrainingParser("lora", __doc__)
    add_chat_options(parser.group("what"))
    add_adapter_options(parser.group("adapters"))
    add_step_options(parser, 150, lr=2e-3, warmup=10, weight_decay=0.0, draws="adapters, order, dropout")
    add_machine_options(parser.group("on this machine"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
