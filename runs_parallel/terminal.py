"""A decoder at the terminal, split over several devices: what `torchrun --nproc-per-node 2 run.py` does.

All ranks run runs_ar/terminal.py with the same prompt and the same seed. They get the same logits, to the
bit, and so pick the same tokens; only rank 0 is heard.

Proof: tests/test_parallel.py.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.tables import PAGES
from conversion.weight_files import open_weights
from models.utils.errors import UserError
from models.utils.machine import dtype_named
from models.utils.weights import mismatches, names_of_parameters
from runs_ar.terminal import given_text, run_decoder
from runs_parallel.ranks import OfOneRank, agree, device_of_rank, from_rank_0, rank_0_first
from runs_parallel.tensor_parallel import load_share, local_part, split

# Options of run.py that want more than a model that continues or scores a text, or one that is not split.
REFUSED = [
    "--list",
    "--image",
    "--chat",
    "--draft",
    "--lookup",
    "--multi-token",
    "--compile",
    "--quantize",
    "--adapter",
]
PRIVATE = ("seed", "prompt", "prompts", "given", "device")  # that rank 0 decides, or each rank for itself


def run_split(args):
    """args: run.py's options."""
    for option in REFUSED:
        if option in args.given:
            raise UserError(
                f"{option}: not under torchrun, where a model continues or scores a text; leave one of the "
                "two out"
            )
    args.device = device_of_rank(args.device)
    checkpoint = rank_0_first(lambda: open_checkpoint(args.checkpoint, args.device, dtype_named(args.dtype)))
    checkpoint = SplitCheckpoint(**vars(checkpoint))
    options = {name: value for name, value in vars(args).items() if name not in PRIVATE}
    agree("option", options | {"dtype": str(checkpoint.dtype)})
    agree("config.json's", checkpoint.fields)
    checkpoint.prepare()
    args.seed = from_rank_0(lambda: args.seed)
    if not args.score:
        args.prompt = from_rank_0(lambda: given_text(args))
    run_decoder(args, checkpoint)


class SplitCheckpoint(Checkpoint):
    """A checkpoint of which each rank loads its share."""

    def prepare(self):
        """Make `model` this rank's share, still without weights; UserError if that cannot be."""
        table = getattr(PAGES.get(self.model_name), "PARALLEL", None)
        if table is None:
            raise UserError(
                f"{self.folder}: holds a {self.model_name}, which cannot be split over several devices; "
                "run it without torchrun"
            )
        if self.stored:
            raise UserError(
                f"{self.folder}: is in {self.stored}, whose codes are not split; convert it without "
                "--quantize, or run it without torchrun"
            )
        self.files, self.names_of = open_weights(self.folder), names_of_parameters(self.model)
        if problems := mismatches(self.names_of, self.files.entries):
            raise UserError(f"{self.folder}: {'; '.join(problems[:5])}; convert the checkpoint again")
        self.mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        split(self.model, table, self.mesh)

    def load(self, num_slots=0):
        try:
            self.check_memory(num_slots)
        except UserError as error:
            raise OfOneRank(error) from None
        return load_share(self.model, self.names_of, self.files, self.mesh, self.device, self.dtype)

    def weight_bytes(self):
        shares = [local_part(parameter) for parameter in self.model.parameters()]
        dtype = str(self.dtype).removeprefix("torch.")
        return sum(share.nbytes for share in shares), f"{dtype}, a rank's share of {self.mesh.size()}"
