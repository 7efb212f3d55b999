"""The processes that torchrun starts: who they are, how they meet, and what is said when one of them is gone.

torchrun starts the same command R times, on one machine or on several, and tells each its number, its rank:

    torchrun --nproc-per-node 2 run.py       RANK=0 python run.py    RANK=1 python run.py

Each computes its part and they exchange results, over NCCL between GPUs and over gloo between CPUs. To a
person they are one program: rank 0 alone reads what is typed and shows what comes out. What is wrong with a
command is wrong for all ranks, and rank 0 tells it. What happens to a rank alone it tells, with its number.

    together(main)                                the ranks meet, run main() and end, with one exit status
    corpus = rank_0_first(lambda: prepare(...))   the others wait, and find it done
    agree("option", vars(options))                a sentence that says which rank has another one

Proof: tests/test_parallel.py.
"""

import contextlib
import functools
import os
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from models.utils.errors import UserError, run_main
from models.utils.machine import choose_device

# A rank that says nothing for so long is taken for dead; a dead one on the same machine is noticed at once.
SILENCE = timedelta(seconds=50)
# But for work that rank 0 does alone, and for writing to disk, the others wait.
PATIENCE = timedelta(hours=2)


class OfOneRank(UserError):
    """What the others know nothing of, so that this rank has to tell it."""

    def __init__(self, line):
        super().__init__(f"rank {dist.get_rank()}: {line}")


def device_of_rank(name=None):
    """The torch.device of this process: of several GPUs each rank of a machine takes its own."""
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(
            f"--device {name}: under torchrun give cpu, or cuda, of which each rank takes its own"
        )
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= count:
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} ranks are more than the {count} GPUs of this machine; give "
            f"--nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def together(main):
    """Run main() on all ranks, as run_main runs a script, and end the process."""
    try:
        run_main(lambda: met(main))
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # Without taking down what connects the ranks: of that a process may die, where another still talks.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status or 0)


def met(main):
    # Small things, which Python holds, travel by gloo, whatever the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=SILENCE)
    try:
        dist.barrier(group=patient())  # nobody goes on, and perhaps ends, before all are there
        with shown_by_rank_0():
            main()
        # Who leaves while another still speaks to it is taken for dead.
        dist.barrier(group=patient())
    except OfOneRank:
        raise
    except UserError as error:
        leave_it_to_rank_0(error)
        raise
    except KeyboardInterrupt:
        if dist.get_rank() > 0:
            sys.exit(130)
        raise
    except RuntimeError as error:
        if not is_about_others(error):
            raise
        raise OfOneRank(
            "another rank is gone, or does not answer; start all of them again, and they go on from what "
            "was kept"
        ) from None


@contextlib.contextmanager
def shown_by_rank_0():
    """What other ranks print goes nowhere, and they read nothing."""
    if dist.get_rank() == 0:
        yield
        return
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, open(os.devnull) as nothing:
        before, sys.stdin = sys.stdin, nothing
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            sys.stdin = before


def leave_it_to_rank_0(error):
    """Rank 0 tells what is wrong for all. Wait until it is gone: torchrun ends everybody with the first."""
    if dist.get_rank() > 0:
        try:
            dist.recv(torch.empty(1), src=0)
        except RuntimeError as silence:
            if "timed out" in str(silence).lower():  # rank 0 goes on: nothing is wrong there
                raise OfOneRank(error) from None
        sys.exit(2)


def is_about_others(error):
    """Whether an exception says that a rank cannot be reached."""
    named = isinstance(error, dist.DistError) or "NCCL" in str(error)
    return named or "gloo" in str(error) or "Connection" in str(error)


@functools.cache
def patient():
    """The group of all ranks for what may take long; they make it together, at their first call of this."""
    return dist.new_group(timeout=PATIENCE, backend="gloo")


def from_rank_0(make):
    """What make() gives on rank 0, on all ranks; if it is a UserError, it ends all of them."""
    results = [None]
    if dist.get_rank() == 0:
        try:
            results = [make()]
        except UserError as error:
            results = [error]
    dist.broadcast_object_list(results, src=0, group=patient())
    if isinstance(results[0], UserError):
        raise results[0]
    return results[0]


def rank_0_first(make):
    """What make() gives on each rank; the others begin when rank 0 has it, and find what it left on disk."""
    results = []
    from_rank_0(lambda: results.append(make()))
    try:
        return results[0] if results else make()
    except UserError as error:  # on another machine, say, where a file is missing
        raise OfOneRank(error) from None


def agree(what, values):
    """UserError if the ranks, which people may start on several machines, do not have the same values."""
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, values)
    for rank, others in enumerate(everybody):
        for name, value in everybody[0].items():
            if others[name] != value:
                raise UserError(
                    f"{what} {name} is {value!r} on rank 0 and {others[name]!r} on rank {rank}; "
                    "start all of them alike"
                )
