"""Train a Vision Transformer of the zoo to name images, from fresh weights to a checkpoint that runs.

    python -m runs_train.image_classifier --config tiny-vit-digits --data digits

    images --image_data.py--> shifted by a pixel --> model --cross-entropy--> gradients --AdamW--> model

What a step does stands in image_labels.py, the loop around it in training_run.py. A run that was stopped
(Ctrl-C saves it) and is started again by the same command goes on as if it had never been stopped: to the bit
on a CPU.

In the folder --out, by default checkpoints/my-NAME, a run writes
    training/state.pt                     from which the same command goes on
    config.json, model.safetensors, ...   at the end: the model in Hugging Face's layout, in bf16
    README.md, loss.png                   what it was trained on, how well it does, how it came about

Proof: tests/test_train_image_classifier.py.
"""

import sys

if not __package__:
    print(
        "error: start it as: python -m runs_train.image_classifier, in the project's folder", file=sys.stderr
    )
    sys.exit(2)

from models.utils.errors import UserError, run_main
from runs_train.options import (
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
    from runs_train.image_labels import train

    train(options)


def parse_options(arguments):
    parser = TrainingParser("image_classifier", __doc__)
    add = parser.group("what")
    add_folder_options(add)
    add("--data", required=True, help="a folder with a subfolder of images per label; or digits")
    add = add_step_options(
        parser, 2400, lr=2e-3, warmup=200, weight_decay=0.05, draws="weights, order, shifts"
    )
    add("--batch-size", type=whole(1), default=64, metavar="B", help="images at once [%(default)s]")
    add("--label-smoothing", type=number(least=0), default=0.1, metavar="E", help="[%(default)s]")
    add("--shift", type=whole(0), default=1, metavar="N", help="by so many pixels at most [%(default)s]")
    add_machine_options(parser.group("on this machine"))
    options = parser.parse_args(arguments)
    if options.label_smoothing >= 1:
        raise UserError(f"--label-smoothing {options.label_smoothing} leaves nothing of the label; give less")
    return options


if __name__ == "__main__":
    run_main(main)
