"""Whether drafting pays: what a round brings, what it costs, and what plain decoding takes for the same.

Say that each draft is accepted with probability a, whatever its place. A round of k drafts brings its first
token for certain, a second if one draft passes, a third if two pass, and so on; its expected number of tokens
is the geometric sum (Leviathan et al. 2023, eq. 1)

    1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

It costs k steps of the drafter and one verification, while plain decoding takes a step of the target for each
of these tokens. So the pair is faster than the target alone by (theorem 3.8, which takes a verification and a
plain step to be the same)

    speedup = (1 - a^(k+1)) / (1 - a) * plain / (k * draft + verify)

and it breaks even at the a that makes this 1. There is none if even k + 1 tokens a round, all accepted, cost
more than plain steps. a is counted over the drafts that were judged: those after a rejection never were.

That is an estimate. Real texts have easy stretches and hard ones, and where lookup finds nothing a round is a
plain step. So the speedup is also computed from what the rounds really brought.
Proof: tests/test_economy.py.
"""

import statistics
import time

import torch

NUM_PLAIN_STEPS = 5  # timed at the end, after one that is not


def expected_tokens(a, k):
    """Of a round with k drafts, each accepted with probability a."""
    return sum(a**n for n in range(k + 1))


def break_even(k, draft, verify, plain):
    """The acceptance rate at which a round of k drafts costs what its tokens cost plainly, or None.

    draft, verify, plain: seconds of one step each.
    """
    needed = (k * draft + verify) / plain
    if needed > k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, k) < needed else (low, middle)
    return high


class Account:
    """Counts and times of the rounds of one or more runs with one row each."""

    def __init__(self):
        self.num_rounds = self.num_tokens = self.num_drafted = self.num_judged = self.num_accepted = 0
        self.seconds = {"draft": [], "verify": [], "plain": []}
        self.widths = []  # k of each round that drafted

    def add(self, round):
        """Take in a Round. Each text's first one, which only reads the prompt, is left out by the caller."""
        (tokens,), (drafts,), (num_accepted,) = round
        self.num_rounds += 1
        self.num_tokens += len(tokens)
        self.num_drafted += len(drafts)
        self.num_accepted += num_accepted
        # The token after the accepted drafts is there because the next draft, if there was one, failed.
        self.num_judged += min(len(tokens), len(drafts))

    def figures(self):
        """All that can be said, by name; None for what there was no occasion to measure."""
        draft, verify, plain = (statistics.median(all) if all else None for all in self.seconds.values())
        figures = {
            "num_drafted": self.num_drafted,
            "num_judged": self.num_judged,
            "num_accepted": self.num_accepted,
            "acceptance_rate": self.num_accepted / self.num_judged if self.num_judged else None,
            "target_passes": self.num_rounds,
            "tokens_per_target_pass": self.num_tokens / self.num_rounds if self.num_rounds else None,
            "seconds_per_draft_step": draft,
            "seconds_per_verification": verify,
            "seconds_per_plain_step": plain,
            "break_even_acceptance": None,
            "expected_speedup": None,
            "speedup": None,
        }
        if self.num_judged and self.widths and plain:
            k = round(statistics.mean(self.widths))
            figures["break_even_acceptance"] = break_even(k, draft, verify, plain)
            tokens = expected_tokens(figures["acceptance_rate"], k)
            figures["expected_speedup"] = tokens * plain / (k * draft + verify)
            num_plain_rounds = self.num_rounds - len(self.widths)
            seconds = sum(self.widths) * draft + len(self.widths) * verify + num_plain_rounds * plain
            figures["speedup"] = self.num_tokens * plain / seconds
        return figures


def spoken(num_draft_tokens, drafts):
    """The figures of an Account as lines for a person."""
    if not drafts["num_judged"]:
        return ["nothing was drafted, so that every token was a plain step"]
    counts = "{acceptance_rate:.0%} of the drafts accepted ({num_accepted} of {num_judged} that were judged"
    counts += ", {num_drafted} made), {tokens_per_target_pass:.2f} tokens per target pass"
    lines = [counts.format(**drafts)]
    if drafts["speedup"] is None:
        return lines

    times = "a draft step {seconds_per_draft_step:.2f} ms, a verification {seconds_per_verification:.2f} ms, "
    times += "a plain step {seconds_per_plain_step:.2f} ms"
    seconds = {name: 1000 * value for name, value in drafts.items() if name.startswith("seconds")}
    lines.append(times.format(**drafts | seconds))

    verdict = (
        f"drafting {'pays' if drafts['speedup'] > 1 else 'does not pay'} with {num_draft_tokens} draft tokens"
    )
    verdict += ": {speedup:.2f} times the speed of plain decoding (to be expected: {expected_speedup:.2f}); "
    needed = drafts["break_even_acceptance"]
    at = "it could not, were all accepted" if needed is None else f"break-even is at {needed:.0%} accepted"
    return [*lines, verdict.format(**drafts) + at]


# Clocks -----------------------------------------------------------------------------------------------------


def timed(function, *inputs, device):
    """(what the function returns, the seconds it took), the work that it has left to a GPU included."""
    synchronize(device)
    start = time.perf_counter()
    result = function(*inputs)
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class TimedDrafter:
    """A drafter whose time goes into an Account."""

    def __init__(self, drafter, account, device):
        self.drafter, self.account, self.device = drafter, account, device
        self.vocab_size = drafter.vocab_size

    def start(self, *inputs):
        self.drafter.start(*inputs)

    def draft(self, *inputs):
        draft, seconds = timed(self.drafter.draft, *inputs, device=self.device)
        num_steps = draft.tokens.shape[1]
        if any(draft.counts):
            self.account.seconds["draft"].append(seconds / num_steps)
        return draft


class TimedModel:
    """A model whose verifications go into an Account, otherwise the model itself."""

    def __init__(self, model, account):
        self.model, self.account = model, account
        self.device = model.lm_head.weight.device

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *inputs):
        return self.verify(self.model, *inputs)

    def decode(self, *inputs):
        """The same for an encoder-decoder."""
        return self.verify(self.model.decode, *inputs)

    def verify(self, function, *inputs):
        self.last = function, inputs
        logits, seconds = timed(function, *inputs, device=self.device)
        num_drafts = logits.shape[1] - 1
        if num_drafts:
            self.account.seconds["verify"].append(seconds)
            self.account.widths.append(num_drafts)
        return logits

    @torch.inference_mode()
    def time_plain_steps(self):
        """What the last verification did, for its first token alone: the cache stays what it was."""
        function, (tokens, positions, cache) = self.last
        inputs = tokens[:, :1], positions[:, :1], cache
        steps = [timed(function, *inputs, device=self.device)[1] for _ in range(NUM_PLAIN_STEPS + 1)]
        self.account.seconds["plain"] += steps[1:]
