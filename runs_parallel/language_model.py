r"""Train a decoder of the zoo on text with several devices at once.

    torchrun --nproc-per-node 2 -m runs_parallel.language_model --config tiny-llama-python-draft \
        --data stdlib --steps 1500 --batch-size 2

is `python -m runs_train.language_model` with the same options, shared by two processes: the same batches,
the same losses but for the rounding of sums, the same folder in the end. Each rank computes the gradients of
its rows of a batch, so that --batch-size is at least the number of ranks.

    without --shard    data parallel: every rank has the whole model, and the mean of all gradients
    with --shard       fully sharded, for what does not fit one device: of R ranks each keeps 1 / R of every
                       layer, its gradients and Adam's means; a layer is put together where it is computed

Ctrl-C saves, and so does --save-every. The same command goes on from there, with as many ranks as it is
given, with --shard or without. What happens to a run stands in training.py.

Proof: tests/test_parallel.py.
"""

import os
import sys

if not __package__ or "TORCHELASTIC_RUN_ID" not in os.environ:
    start = "torchrun --nproc-per-node 2 -m runs_parallel.language_model"
    print(f"error: start it as: {start}, in the project's folder", file=sys.stderr)
    sys.exit(2)

from runs_parallel.ranks import together
from runs_train.language_model import make_parser


def main():
    options = parse_options(sys.argv[1:])
    from runs_parallel.training import train  # slow to import

    train(options)


def parse_options(arguments):
    ranks, page = os.environ["LOCAL_WORLD_SIZE"], "runs_parallel.language_model"
    parser = make_parser(page, __doc__, f"torchrun --nproc-per-node {ranks} -m {page}")
    add = parser.group("on several devices")
    add("--shard", action="store_true", help="each rank keeps a part of every layer (FSDP)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    together(main)
