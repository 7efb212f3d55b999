"""What the ranks do that tests/test_parallel.py starts: torchrun -m tests.parallel_worker TASK ROOT.

Each task is done by all ranks of one start, since starting takes longer than the task.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from conversion.checkpoint import open_checkpoint
from models.utils.errors import UserError
from models.utils.safetensors_files import SafetensorsFile
from runs_ar.generate import generate
from runs_parallel.ranks import together
from runs_parallel.terminal import SplitCheckpoint

LENGTH, PREFIX = 12, 7  # tokens of a text, and how many of them come at once before single steps


def passes(model, tokens):
    """The logits of a whole pass, of a prefill, and of the steps behind it."""
    cache = model.new_cache(len(tokens), LENGTH)
    pieces = [model(tokens[:, :PREFIX], cache=cache)]
    for n in range(PREFIX, LENGTH):
        pieces.append(model(tokens[:, n : n + 1], torch.full((len(tokens), 1), n), cache))
    return torch.stack([model(tokens), torch.cat(pieces, dim=1)])


def split(root):
    """Logits, tokens and the bytes that each rank read, or the error, of every checkpoint in the folder."""
    results = {}
    for folder in sorted(root.glob("*/")):
        with counted_reads() as count:
            try:
                checkpoint = SplitCheckpoint(**vars(open_checkpoint(folder, "cpu")))
                checkpoint.prepare()
                model = checkpoint.load()
                with torch.inference_mode():
                    logits = passes(model, torch.load(folder / "tokens.pt"))
                made = [token for (token,) in generate(model, [[1, 2, 3]], 10)]
                result = {"logits": logits, "made": made, "read": count()}
            except UserError as error:
                result = {"error": str(error)}
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, result)
        results[folder.name] = everybody
    if dist.get_rank() == 0:
        torch.save(results, root / "results.pt")


class counted_reads:
    """The bytes that come out of files in the block."""

    def __enter__(self):
        self.total, self.kept = 0, (SafetensorsFile.read, SafetensorsFile.read_part)
        for name, original in zip(("read", "read_part"), self.kept):
            setattr(SafetensorsFile, name, self.counting(original))
        return lambda: self.total

    def counting(self, original):
        def read(*arguments):
            tensor = original(*arguments)
            self.total += tensor.nbytes
            return tensor

        return read

    def __exit__(self, *_):
        SafetensorsFile.read, SafetensorsFile.read_part = self.kept


def training(root):
    """The commands in ROOT/commands.json, one after the other, as runs_parallel/language_model.py does them.

    Rank 0 writes beside them how long the gradients were, norms-NUMBER, or what is wrong, error-NUMBER.
    """
    from runs_parallel.language_model import parse_options
    from runs_parallel.training import Run, train

    norms, clip = [], Run.clip
    Run.clip = lambda run: norms.append(clip(run)) or norms[-1]
    for number, arguments in enumerate(json.loads((root / "commands.json").read_text())):
        # A list has a word for each rank, where they are to disagree.
        words = [word if isinstance(word, str) else word[dist.get_rank()] for word in arguments]
        try:
            norms.clear()
            train(parse_options(words))
            if dist.get_rank() == 0:
                (root / f"norms-{number}").write_text(json.dumps(norms))
        except UserError as error:
            if dist.get_rank() == 0:
                (root / f"error-{number}").write_text(str(error))
        except KeyboardInterrupt:
            (root / f"stopped-{number}-{dist.get_rank()}").touch()


def dying(root):
    """The same, but that rank 1 is killed in the seventh step."""
    from runs_parallel.training import Run

    train_step = Run.train_step

    def step(run):
        if run.step == 6 and run.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(run)

    Run.train_step = step
    training(root)


def interrupted(root):
    """The same, but that rank 1 alone hears of Ctrl-C, in the sixth step."""
    from runs_parallel.training import Run

    find_gradients = Run.find_gradients

    def gradients(run):
        if run.step == 5 and run.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return find_gradients(run)

    Run.find_gradients = gradients
    training(root)


if __name__ == "__main__":
    task = {"split": split, "training": training, "dying": dying, "interrupted": interrupted}[sys.argv[1]]
    together(lambda: task(Path(sys.argv[2])))
