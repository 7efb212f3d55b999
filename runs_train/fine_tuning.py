"""What `python -m runs_train.sft` does to a decoder: go on training it, on what an assistant says.

    the model reads        <s> ### user \\n Hi \\n ### assistant \\n Hello !
    and has to predict                                            Hello ! </s>    each at the place before it

It is the loss of next_token.py, taken at fewer places: a question is read, not learned. So the head, the
largest matrix of a small model, is applied to the places of answers alone.

One conversation is one row. What packing several into a row would save is pads, and batches of one length
have few; the run says how many. So no token can see another conversation, whatever the model is made of, and
a conversation has the logits that it would have alone.

Shapes: B conversations in a batch, T tokens of the longest.
Proof: tests/test_train_sft.py.
"""

import torch

from runs_train.chat_data import Batches, read_corpus
from runs_train.trained_checkpoint import draw_losses, draw_measured, picture
from runs_train.tuning import Tuning


class Run(Tuning):
    """The loop itself stands in training_run.py, what all tuning shares in tuning.py; here is what it does
    for conversations.
    """

    SETTINGS = (*Tuning.SETTINGS, "batch_tokens", "context")
    BATCHES = Batches

    @staticmethod
    def read(options):
        return read_corpus(options.data)

    def prepare(self, corpus):
        given = (self.tokenizer, self.context, self.options.batch_tokens)
        option = f"--data {self.options.data}"
        self.batches = self.BATCHES(corpus.train, *given, self.options.seed, option)
        self.held_out = self.BATCHES(corpus.held_out, *given, 0, option)
        self.check_logits(max(self.options.batch_tokens, self.context))
        self.samples = self.choose_samples(corpus.held_out)

    def batch(self, n):
        return self.on_device(self.batches.batch(n))  # each (B, T)

    def on_device(self, batch):
        return [part.to(self.options.device) for part in batch]

    def num_predictions(self, batch):
        _, is_answer = batch
        return is_answer[:, 1:].sum().item()

    def loss(self, batch):
        """Mean cross-entropy of the tokens of answers, given all before them in their conversation."""
        mean = -self.log_probs(*batch).sum() / self.num_predictions(batch)
        return mean + self.routers.gradient()

    @torch.no_grad()
    def measure(self, most=None):
        """[the held-out loss], in nats per token of the answers."""
        self.model.eval()
        nats = count = 0
        for n in range(min(most or self.held_out.per_pass, self.held_out.per_pass)):
            batch = self.on_device(self.held_out.batch(n))
            number = self.num_predictions(batch)
            nats, count = nats + self.loss(batch).item() * number, count + number
        return [nats / count]

    # What is said of it.

    def describe(self):
        batches, facts = self.batches, self.facts
        passes = self.options.steps * self.options.accumulate / batches.per_pass
        text = (
            f"{facts['train']:,} conversations, {passes:.1f} passes over them in {self.options.steps} steps; "
        )
        text += f"{batches.share_of_pads():.1%} of the places are pads"
        return "\n".join([text, *self.losses_of_data()])

    def losses_of_data(self):
        """What truncation took, a line each."""
        parts = (self.batches, "training"), (self.held_out, "held-out")
        return [line for batches, name in parts if (line := batches.what_was_lost(name, self.context))]

    def speed(self):
        tokens = self.batches.tokens_per_batch() * self.options.accumulate * self.step
        return {"tokens_per_s": f"{tokens / self.seconds:.0f}"}

    def data_rows(self):
        facts = self.facts
        return {
            "conversations": f"{facts['train']:,} to learn from, {facts['held_out']:,} held out",
            "truncation": "; ".join(self.losses_of_data()) or f"none, at {self.context} tokens",
            "pads": f"{self.batches.share_of_pads():.1%} of the places of the batches",
        }

    def draw(self, folder):
        """Both losses; the gap that opens between them is overfitting."""
        with picture(folder, f"{self.options.checkpoint} on {self.facts['data']}") as (axes,):
            draw_losses(axes, self.losses, least_top=self.evaluations[1][1])
            draw_measured(axes, self.evaluations, "held-out conversations, a sample")
            axes.set_ylabel("nats per token of answers")
