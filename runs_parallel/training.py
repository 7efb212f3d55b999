"""What several devices do to train one decoder: the loop of runs_train, whose every batch they share.

    batch n (B, T + 1)   rank 0: its rows --> loss --> gradients --+
                         rank 1: its rows --> loss --> gradients --+--mean--> clipped --> AdamW, on every rank

The gradient of a batch is a sum over its rows, so it does not matter who computes which; the sums are
rounded in another order, and only that sets the losses apart from those of one process. (With experts there
is more: the loss that keeps them busy is that of a rank's rows. Dropout draws other numbers on each rank.)

Data parallel: torch's DistributedDataParallel sends gradients while the rest of the backward pass computes.
Fully sharded (FSDP2, fully_shard; Zhao et al. 2023): of 16 bytes a parameter a rank has 16 / R. A layer's
weights are gathered before it computes, forward and backward, and let go after; gradients are summed to the
rank that keeps them. That sends 3 times the weights a step where data parallel sends 2 times the gradients.

State is written by torch.distributed.checkpoint, each rank its part of every tensor, and read by any number
of ranks: FOLDER/training/state-STEP, which counts once its last file, .metadata, is there.

Shapes: B windows in a batch, T tokens that are read.
Proof: tests/test_parallel.py.
"""

import contextlib
import json

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from models import DECODER, build_model, create_model
from models.utils.errors import UserError, one_line
from models.utils.files import read_json, remove
from runs_parallel.ranks import agree, device_of_rank, from_rank_0, is_about_others, patient, rank_0_first
from runs_train import next_token
from runs_train.folder import run_folder, writing
from runs_train.fresh_model import check_kind, check_memory, fresh_model
from runs_train.interrupts import Interrupts
from runs_train.text_data import forget_others, prepare


def train(options):
    options.device = device_of_rank(options.device)
    options.num_shares = dist.get_world_size() if options.shard else 1
    agree("option", {name: value for name, value in vars(options).items() if name != "device"})
    model_name, config = check_kind(options, DECODER, "tokens")
    check_options(options, build_model(model_name, config))
    with contextlib.ExitStack() as stack:
        # The folder is rank 0's, and what stands there is read by all.
        enter = stack.enter_context
        folder = from_rank_0(lambda: enter(run_folder(options, next_token.TOKENIZER_FILES)))
        size = options.vocab_size
        corpus = rank_0_first(lambda: prepare(options.data, folder / "training", size, options.tokenizer))
        agree("of the data,", corpus.facts)
        fields = {"vocab_size": corpus.facts["vocab_size"]}
        model = sharded_model(options, **fields) if options.shard else fresh_model(options, **fields)
        run = Run(model, corpus, options, folder / "training")
        run.train()
        run.model = whole(run.model, model_name)
        from_rank_0(lambda: finish(run, model_name, folder))


def check_options(options, model):
    if options.batch_size < dist.get_world_size():
        raise UserError(
            f"--batch-size {options.batch_size}: {dist.get_world_size()} ranks share every batch, a row each "
            "at the least; give more, or start fewer ranks"
        )
    if options.compile:
        raise UserError("--compile: not under torchrun; leave one of the two out")
    if options.shard and has_experts(model):
        raise UserError(
            f"--shard: {options.config} has experts, of which each rank uses others; leave --shard out"
        )


def finish(run, model_name, folder):
    forget_others(run.corpus.folder)
    next_token.save(run, model_name, folder)
    next_token.report(run, folder)


# The model --------------------------------------------------------------------------------------------------


def sharded_model(options, **fields):
    """The model of --config, of which this rank keeps its part.

    Drawn whole, in main memory, so that the numbers are those of one process; then cut up layer by layer.
    """
    check_memory(options, **fields)
    torch.manual_seed(options.seed)
    model = create_model(options.config, **fields)
    mesh = init_device_mesh(options.device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # What is called when it writes a sample; the embedding and the head are whole from there on.
    for method in ("new_cache", "hidden"):
        register_fsdp_forward_method(model, method)
    return model


def has_experts(model):
    return any(hasattr(module, "experts") for module in model.modules())


def whole(model, model_name):
    """The model that rank 0 saves, in one piece; None on the other ranks."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() > 0:
        return None
    gathered = build_model(model_name, model.config, device="cpu")
    gathered.load_state_dict(state)
    return gathered


# A run ------------------------------------------------------------------------------------------------------


class Run(next_token.Run):
    """The run of runs_train, on one rank of several."""

    def __init__(self, model, corpus, options, folder):
        super().__init__(model, corpus, options, folder)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.interrupts, self.is_asked_to_stop = Noted(), False
        if not options.shard:
            # An expert that no token of a rank chose has no gradient there.
            self.forward = DistributedDataParallel(self.forward, find_unused_parameters=has_experts(model))

    def batch(self, n):
        """This rank's rows of the n-th batch."""
        return super().batch(n).tensor_split(self.num_ranks)[self.rank]

    def train_step(self):
        """A step, after which all ranks stop if one of them was asked to."""
        torch.manual_seed(self.options.seed + self.num_ranks * self.step + self.rank)  # for dropout
        super().train_step()
        if self.is_asked_to_stop:
            raise KeyboardInterrupt

    def mean_over_ranks(self, total, count):
        """By which time a rank was asked to stop, is said along with it."""
        sums = torch.tensor([total, count, self.interrupts.pressed], dtype=torch.float64)
        dist.all_reduce(sums)
        total, count, pressed = (sums / self.num_ranks).tolist()
        self.is_asked_to_stop = pressed > 0
        return total, count

    def clip(self):
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        # Of a sharded model each rank has a part of the squares that are summed.
        return (norm.full_tensor() if self.options.shard else norm).item()

    # State ------------------------------------------------------------------------------------------------

    def tensors(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save_state(self):
        folder = self.folder / f"state-{self.step}"
        from_rank_0(lambda: self.write_progress(folder))
        with writing(folder):
            checkpoints.save(self.tensors(), checkpoint_id=folder, process_group=patient())
        from_rank_0(lambda: self.forget_other_states(folder))

    def write_progress(self, folder):
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        with writing(folder):
            self.write_notes()
            folder.mkdir(exist_ok=True)
            text = json.dumps({**progress, "settings": self.settings()})
            (folder / "progress.json").write_text(text, encoding="utf-8")

    def forget_other_states(self, folder):
        for path in self.folder.glob("state*"):
            if path != folder:
                remove(path)

    def load_state(self):
        """Go on where the newest whole state was written, if there is one and nobody says --restart."""
        folder = from_rank_0(self.newest_state)
        if folder is None:
            return
        try:
            progress = read_json(folder / "progress.json")
            self.check_settings(folder, progress["settings"])
            state = self.tensors()
            checkpoints.load(state, checkpoint_id=folder, process_group=patient())
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            for name, kind in self.PROGRESS.items():
                setattr(self, name, kind(progress[name]))
            self.evaluations = [tuple(each) for each in self.evaluations]
        except (KeyError, TypeError, ValueError, RuntimeError, checkpoints.CheckpointException) as error:
            if is_about_others(error):
                raise
            raise UserError(
                f"{folder}: is no state of this run ({one_line(error)[:200]}); begin anew with --restart"
            ) from None

    def newest_state(self):
        if self.options.restart:
            return None
        if (self.folder / "state.pt").is_file():
            raise UserError(
                f"{self.folder}: holds the run of one process; go on with python -m "
                "runs_train.language_model, give another --out, or --restart to begin anew"
            )
        found = [path.parent for path in self.folder.glob("state-*/.metadata")]
        return max(found, key=lambda path: int(path.name.removeprefix("state-")), default=None)

    def kept(self):
        found = self.newest_state()
        return f"{found} has an earlier step" if found else "no state was kept yet"


class Noted(Interrupts):
    """Ctrl-C, which reaches each rank at another moment, is noted; the ranks stop together, after a step."""

    def press(self, *_):
        self.pressed = True

    def held(self):
        return contextlib.nullcontext()
