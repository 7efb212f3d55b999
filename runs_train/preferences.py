"""What `python -m runs_train.dpo` does to a decoder: make one answer likelier than another, within limits.

    reward of an answer y to x:     r = beta * (log p(y | x) - log p_reference(y | x))
    loss of a pair (eq. 7):         -log sigmoid(r of the chosen answer - r of the rejected one)

The reference is the model as it was before the first step. The better answer is to become likelier than it
was there, the worse one less likely. It is the difference that counts, the margin: at 0 the loss is log 2,
and the wider it is, the less there is to gain. So beta says how far the model may go from its reference.

How likely an answer was to the reference never changes. It is computed once, before the first step, and kept
beside the run: training/reference.safetensors, two numbers for each pair.

Paper: Rafailov et al. 2023 (Direct Preference Optimization), eq. 7.
Shapes: B pairs in a batch, T tokens of the longest row; 2 stands for chosen and rejected.
Proof: tests/test_train_dpo.py, against the formula in fp64, and `trl` where that is installed.
"""

import json

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from models.utils.errors import UserError
from models.utils.files import write_atomically
from runs_train import fine_tuning
from runs_train.adapters import BesideFrozen
from runs_train.folder import writing
from runs_train.preference_data import PairBatches, read_pairs
from runs_train.trained_checkpoint import draw_losses, draw_measured, percent, picture
from runs_train.tuning import without_dropout

REFERENCE = "reference.safetensors"


def preference_losses(log_probs, reference, beta):
    """(losses (B,), rewards (2, B)) of log-probabilities of whole answers, the model's and the reference's.

    >>> log_probs, reference = torch.tensor([[-8.0], [-12.0]]), torch.tensor([[-10.0], [-9.0]])
    >>> losses, rewards = preference_losses(log_probs, reference, beta=0.5)
    >>> rewards.flatten().tolist()  # the chosen answer became likelier, the rejected one less likely
    [1.0, -1.5]
    >>> round(losses.item(), 4)  # -log sigmoid(2.5)
    0.0789
    """
    rewards = beta * (log_probs - reference)  # (2, B)
    chosen, rejected = rewards
    return -F.logsigmoid(chosen - rejected), rewards


class Run(fine_tuning.Run):
    """The loop itself stands in training_run.py; here is what it does for pairs."""

    SETTINGS = (*fine_tuning.Run.SETTINGS, "beta")
    FIGURES = {"held-out loss": ".3f", "accuracy": ".1%", "margin": ".3f"}
    BATCHES = PairBatches

    @staticmethod
    def read(options):
        return read_pairs(options.data)

    def prepare(self, corpus):
        super().prepare(corpus)
        without_dropout(self.model)

    # The reference.

    def introduce(self):
        self.references = self.read_references()
        if self.references is None:
            if self.step:
                path = self.folder / REFERENCE
                raise UserError(f"{path}: is missing, or of another run; begin anew with --restart")
            self.references = self.write_references()
        super().introduce()

    def read_references(self):
        """{"train": (pairs, 2), "held_out": the same}, or None where there are none that are this run's."""
        try:
            with safe_open(self.folder / REFERENCE, "pt") as file:
                if file.metadata() == {"of": self.reference_of()}:
                    return {name: file.get_tensor(name) for name in ("train", "held_out")}
        except (OSError, SafetensorError):
            pass
        return None

    def reference_of(self):
        """What the numbers depend on."""
        settings = self.settings()
        names = (*self.DATA_SETTINGS, "dtype", "context", "quantize", "group_size")
        return json.dumps({name: settings.get(name) for name in names})

    def write_references(self):
        parts = {"train": self.batches, "held_out": self.held_out}
        found = {name: self.reference_log_probs(batches) for name, batches in parts.items()}
        path = self.folder / REFERENCE
        with writing(path), write_atomically(path) as partial:
            save_file(found, partial, {"of": self.reference_of()})
        return found

    @torch.no_grad()
    def reference_log_probs(self, batches):
        """(pairs, 2): of each pair's answers, while the model is still its own reference."""
        self.model.eval()
        found = torch.zeros(len(batches.lengths), 2)
        for n in tqdm(range(batches.per_pass), desc="reference", leave=False, disable=None):
            tokens, is_answer, pairs = batches.batch(n)
            found[pairs] = self.answer_log_probs(*self.on_device((tokens, is_answer))).T.cpu()
        return found

    def answer_log_probs(self, tokens, is_answer):
        """(2, B): of whole answers, the sums over their tokens."""
        return self.log_probs(tokens, is_answer).sum(dim=1).view(2, -1)

    # A step.

    def batch(self, n, part="train"):
        batches = self.batches if part == "train" else self.held_out
        tokens, is_answer, pairs = batches.batch(n)
        return self.on_device((tokens, is_answer, self.references[part][pairs].T))

    def num_predictions(self, batch):
        return len(batch[0]) // 2

    def judge(self, batch):
        tokens, is_answer, reference = batch
        return preference_losses(self.answer_log_probs(tokens, is_answer), reference, self.options.beta)

    def loss(self, batch):
        losses, rewards = self.judge(batch)
        self.latest = figures_of(losses, rewards)
        return losses.mean() + self.routers.gradient()

    @torch.no_grad()
    def measure(self, most=None):
        """[mean loss, share of pairs whose chosen answer has the higher reward, mean margin]."""
        self.model.eval()
        count = min(most or self.held_out.per_pass, self.held_out.per_pass)
        judged = [self.judge(self.batch(n, "held_out")) for n in range(count)]
        losses, rewards = zip(*judged)
        return figures_of(torch.cat(losses), torch.cat(rewards, dim=1))

    # What is said of it.

    def describe(self):
        return super().describe().replace("conversations,", "pairs,")

    def speed(self):
        _, accuracy, margin = self.latest
        return {"of the pairs right": f"{accuracy:.0%}", "margin": f"{margin:.2f}", **super().speed()}

    def data_rows(self):
        rows = super().data_rows()
        return {
            {"conversations": "pairs", "truncation": "left out"}.get(name, name): rows[name] for name in rows
        }

    def draw(self, folder):
        title = f"{self.options.checkpoint} on {self.facts['data']}"
        steps, losses, shares, margins = zip(*self.evaluations)
        with picture(folder, title, panels=3) as (top, middle, bottom):
            draw_losses(top, self.losses, least_top=losses[0])
            draw_measured(top, list(zip(steps, losses)), "held-out pairs, a sample")
            top.set_ylabel("loss")
            draw_measured(
                middle, percent(list(zip(steps, shares))[1:]), "held-out pairs with the right one ahead"
            )
            middle.set_ylabel("%")
            draw_measured(bottom, list(zip(steps, margins)), "held-out margin")
            bottom.set_ylabel("reward")


def figures_of(losses, rewards):
    margins = rewards[0] - rewards[1]
    return [losses.mean().item(), (margins > 0).float().mean().item(), margins.mean().item()]


class AdapterRun(BesideFrozen, Run):
    """The same of adapters."""
