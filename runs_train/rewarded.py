"""What `python -m runs_train.grpo` does to a decoder: write several continuations, and do more of the better.

    1. To each of Q prompts the model writes a group of G continuations, each token drawn by its probability.
    2. A program gives each a reward. How much better than its group it is, is its advantage:
           A = (reward - mean of the group) / standard deviation of the group
    3. Each token of a continuation becomes likelier if A is above 0, less likely below (eq. 3):

           min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) - beta * KL

ratio is the token's probability now by that when it was written, 1 at first. Where one draw serves several
updates it moves, and at the clip there is nothing more to gain: the text says little of a model that has gone
far from the one that wrote it. KL says how far the model is from its reference, the model before the first
step, at this token (eq. 4): reference / now - log(reference / now) - 1, which is 0 where they agree and never
less.

The mean is over the tokens of a continuation, then over all of them. Both divisions tilt the scale, as Liu et
al. 2025 (Dr. GRPO) found. By the length: each token of a long wrong text is blamed less than one of a short
one, so wrong texts grow. By the deviation: prompts whose group is almost all right or all wrong weigh most.
They leave both out. Here it is the paper's formula.

Paper: Shao et al. 2024 (DeepSeekMath), section 4.1.
Shapes: B = Q G continuations in a batch, T tokens of the longest row, its prompt included.
Proof: tests/test_train_grpo.py, against the formula in fp64.
"""

import math

import numpy as np
import torch

from models import load_model
from models.utils.errors import UserError, one_line, printable
from models.utils.lora import switched_off
from models.utils.sampling import Sampling, seeded_generators
from runs_train.adapters import BesideFrozen
from runs_train.chat_data import padded
from runs_train.rewards import Prompts, find_reward, read_prompts
from runs_train.trained_checkpoint import draw_losses, draw_measured, picture
from runs_train.training_run import say
from runs_train.tuning import NUM_SAMPLES, Tuning, without_dropout

AS_IT_IS = Sampling()  # the model's own probabilities, all of them
HELD_OUT = 128  # prompts at most, spread over all of them


def advantages(rewards):
    """(Q, G): how much better than its group each is, in standard deviations; 0 where all are alike.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(decimals=2).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-4)


def group_losses(now, old, reference, advantage, counts, epsilon, beta):
    """(B,): eq. 3, its sign turned; log-probabilities and `counts` are (B, T - 1), the advantage (B,)."""
    ratio = (now - old).exp()  # (B, T - 1)
    A = advantage[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    apart = reference - now
    kl = apart.exp() - apart - 1  # (B, T - 1), eq. 4
    return -((gain - beta * kl) * counts).sum(dim=1) / counts.sum(dim=1)


class Run(Tuning):
    """The loop itself stands in training_run.py; here is what it does for prompts."""

    SETTINGS = (*Tuning.SETTINGS, "reward", "questions", "group", "new_tokens", "updates", "epsilon", "beta")
    PROGRESS = Tuning.PROGRESS | {"rewards": list, "written": list}
    FIGURES = {"held-out reward": ".3f"}
    MEASURED = None

    @staticmethod
    def read(options):
        return read_prompts(options.data, options.reward)

    def prepare(self, corpus):
        options = self.options
        self.reward = find_reward(options.reward)
        given = (self.tokenizer, self.context - options.new_tokens, f"--data {options.data}")
        self.prompts = Prompts(corpus.train, *given)
        self.held_out = Prompts(corpus.held_out, *given).spread(HELD_OUT)
        self.samples = self.held_out[:: -(-len(self.held_out) // NUM_SAMPLES)]
        self.check_logits(options.questions * options.group * options.new_tokens)
        without_dropout(self.model)
        self.reference = self.load_reference() if options.beta else None
        self.rewards, self.written = [], []  # mean reward of each step; the batches that are learned from

    def load_reference(self):
        return load_model(self.base.folder, self.options.device, torch.float32, arranged=False)

    # Writing.

    def batch(self, n):
        """Batch n: written in the first of several updates that learn from it."""
        step, index = divmod(n, self.options.accumulate)
        if step % self.options.updates == 0:
            number = step // self.options.updates * self.options.accumulate + index
            self.written = [*self.written[:index], self.write_groups(number)]
        return [part.to(self.options.device) for part in self.written[index]]

    @torch.no_grad()
    def write_groups(self, number):
        """tokens (B, T), counts (B, T), old (B, T - 1), reference (B, T - 1), advantage (B,), rewards (B,)"""
        options, device = self.options, self.options.device
        asked = self.prompts.ask(number, options.questions, options.seed)
        asked = [each for each in asked for _ in range(options.group)]
        written, rewards, _ = self.judged(asked, number)
        tokens = padded([ids + new for (_, ids), new in zip(asked, written)]).to(device)
        counts = padded([[0] * len(ids) + [1] * len(new) for (_, ids), new in zip(asked, written)]).to(device)
        old = self.log_probs(tokens, counts)
        reference = self.reference_log_probs(tokens, counts) if options.beta else old
        self.model.train()
        advantage = advantages(rewards.view(-1, options.group)).flatten()
        return tokens, counts, old, reference, advantage.to(device), rewards

    def judged(self, asked, number):
        """(tokens, rewards, texts) of what the model writes behind each prompt; number: of the draw."""
        seed = np.random.SeedSequence([self.options.seed, number]).generate_state(1, np.uint64)[0] >> 2
        draws = {"sampling": AS_IT_IS, "generators": seeded_generators(int(seed), len(asked))}
        written = self.write([ids for _, ids in asked], self.options.new_tokens, **draws)
        is_chat = bool(self.tokenizer.chat_template)  # else the model goes on with a text, and that is judged
        texts = [self.text_of(new if is_chat else ids + new) for (_, ids), new in zip(asked, written)]
        rewards = [
            self.checked_reward(text, prompt.row, new[-1] in self.ends)
            for (prompt, _), text, new in zip(asked, texts, written)
        ]
        return written, torch.tensor(rewards), texts

    def checked_reward(self, *given):
        try:
            reward = float(self.reward(*given))
        except Exception as error:
            raise UserError(
                f"--reward {self.options.reward}: {type(error).__name__}: {one_line(error)} ({self.kept()})"
            ) from None
        if not math.isfinite(reward):
            raise UserError(
                f"--reward {self.options.reward}: step {self.step + 1}: the reward of {given[0][:60]!r} is "
                f"{reward}; it has to be a finite number ({self.kept()})"
            )
        return reward

    def reference_log_probs(self, tokens, counts):
        return self.log_probs(tokens, counts, self.reference)

    # A step.

    def num_predictions(self, batch):
        return len(batch[0])

    def loss(self, batch):
        tokens, counts, old, reference, advantage, _ = batch
        now = self.log_probs(tokens, counts)
        options = self.options
        given = (old, reference, advantage, counts[:, 1:], options.epsilon, options.beta)
        return group_losses(now, *given).mean() + self.routers.gradient()

    def update(self, loss):
        super().update(loss)
        self.rewards.append(torch.cat([batch[-1] for batch in self.written]).mean().item())

    def measure(self, most=None):
        """[mean reward] of continuations of held-out prompts, drawn alike each time."""
        _, rewards, self.texts = self.judged(self.held_out, 0)
        self.marks = rewards.tolist()
        return [rewards.mean().item()]

    # What is said of it.

    def answer(self):
        """What was just measured, of the samples: the whole text, behind its reward."""
        every = -(-len(self.held_out) // NUM_SAMPLES)
        return [f"[{mark:g}] {text}" for mark, text in zip(self.marks[::every], self.texts[::every])]

    def show_answers(self, written):
        for text in written:
            say("".join(f"    | {printable(line)}\n" for line in text.splitlines()))

    def compared(self):
        """What became of the samples, each a block of text."""
        blocks = []
        for texts in zip(*self.answers):
            for when, text in zip(("before", "after"), (texts[0], texts[-1])):
                lines = [printable(line) for line in text.splitlines()]
                blocks.append("\n".join([f"    {when}:", *(f"        {line}" for line in lines)]))
        return "\n\n".join(blocks)

    def before_and_after(self):
        return (
            f"The reward is the mean over {len(self.held_out)} held-out prompts, one continuation each, "
            f"drawn alike before and after. Some of them, with their rewards:\n\n{self.compared()}"
        )

    def describe(self):
        options = self.options
        return (
            f"{len(self.prompts):,} prompts; for every {options.updates} steps it writes {options.group} "
            f"continuations of up to {options.new_tokens} tokens to {options.questions * options.accumulate}"
        )

    def speed(self):
        texts = self.options.questions * self.options.group * self.options.accumulate / self.options.updates
        speed = f"{texts * self.step / self.seconds:.1f}"
        return {"reward": f"{self.rewards[-1]:.2f}", "texts_per_s": speed}

    def data_rows(self):
        return {
            "prompts": f"{len(self.prompts):,} to learn from, {len(self.held_out)} held out and measured",
            "reward": self.options.reward,
            "to learn from": self.describe().partition("; ")[2],
        }

    def draw(self, folder):
        with picture(folder, f"{self.options.checkpoint}, rewarded: {self.options.reward}") as (axes,):
            draw_losses(axes, self.rewards)
            draw_measured(axes, self.evaluations, f"{len(self.held_out)} held-out prompts")
            axes.set_ylim(auto=True)
            axes.autoscale_view()
            axes.set_ylabel("mean reward")


class AdapterRun(BesideFrozen, Run):
    """The same of adapters; without them the model is its reference."""

    def load_reference(self):
        return None

    def reference_log_probs(self, tokens, counts):
        with switched_off(self.model):
            return self.log_probs(tokens, counts)
