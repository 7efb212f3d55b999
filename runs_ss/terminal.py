"""Speculative sampling at the terminal: what run.py does with --draft FOLDER, --lookup and --multi-token.

The text is the target model's: greedily the very same, sampled one of the same distribution. How many drafts
it accepted is said at the end on standard error; with --show-drafts a terminal shows it in colours.
Proof: tests/test_run_speculate.py.
"""

import dataclasses
import sys

from models.utils.command_line import shows_colours
from models.utils.errors import UserError
from models.utils.sampling import seeded_generators
from runs_ar.generate import TextStream
from runs_ar.terminal import run_decoder
from runs_ar.transformer import check_source
from runs_ar.translator import Translator, run_transformer
from runs_ss.ahead import AheadDrafter, Overheard
from runs_ss.economy import Account, TimedDrafter, TimedModel, spoken
from runs_ss.lookup import LookupDrafter
from runs_ss.pair import check_pair
from runs_ss.speculate import ModelDrafter, check_num_draft_tokens, speculate
from runs_ss.transformer import TransformerDrafter
from runs_ss.transformer import speculate as speculate_target

COLOURS = {
    "accepted": "\033[32m",  # green
    "rejected": "\033[9;31m",  # red and struck through
    "resampled": "\033[33m",  # yellow
    "own": "\033[36m",  # cyan
}
RESET = "\033[0m"
LEGEND = {
    "accepted": "accepted drafts",
    "rejected": "a rejected draft and those after it",
    "resampled": "resampled in its place",
    "own": "the target's own, where no draft was rejected",
}


def run_speculative(args, checkpoint, draft=None):
    """Continue a text. draft: the Checkpoint of --draft; None: --lookup or --multi-token."""
    speculation = Speculation(args, checkpoint, draft)
    try:
        run_decoder(args, checkpoint, speculation)
    finally:
        speculation.report()


def run_speculative_transformer(args, checkpoint, draft=None):
    """Translate."""
    speculation = Speculation(args, checkpoint, draft)

    def make_translator(model, tokenizer, rules, beams, sampling):
        return SpeculativeTranslator(model, tokenizer, rules, beams, sampling, speculation)

    try:
        run_transformer(args, checkpoint, make_translator)
    finally:
        speculation.report()


class Speculation:
    """How a run makes its tokens: a way like Plain in runs_ar/terminal.py."""

    def __init__(self, args, checkpoint, draft):
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        for option in ("chat", "score"):
            if getattr(args, option):
                raise UserError(f"--{option} takes no drafts; leave out --draft, --lookup and --multi-token")
        if args.multi_token:
            check_looks_ahead(checkpoint, args.compile)
        check_num_draft_tokens(config, args.num_draft_tokens)
        if draft:
            check_pair(config, tokenizer, draft.config, draft.tokenizer)
        self.num_draft_tokens, self.device = args.num_draft_tokens, args.device
        self.vocab_size, self.tokenizer, self.draft = config.vocab_size, tokenizer, draft
        self.multi_token = args.multi_token
        self.in_colour = args.show_drafts and shows_colours(sys.stdout) and not args.json
        self.account = Account()
        self.model = None

    def load(self, checkpoint, num_slots):
        """Both models."""
        model = checkpoint.load(num_slots)
        self.start(model, ModelDrafter, num_slots)
        return model

    def start(self, model, make_drafter, num_slots=0):
        model = Overheard(model) if self.multi_token else model
        self.model = TimedModel(model, self.account)
        if self.multi_token:
            drafter = AheadDrafter(model)
        elif self.draft:
            drafter = make_drafter(self.draft.load(min(num_slots, self.draft.config.max_seq_len)))
        else:
            drafter = LookupDrafter(self.vocab_size, self.device)
        self.drafter = TimedDrafter(drafter, self.account, self.device)
        if self.in_colour:
            legend = [COLOURS[kind] + meaning + RESET for kind, meaning in LEGEND.items()]
            print("; ".join(legend), file=sys.stderr)

    def write(self, model, prompt_ids, stream, **options):
        """(token, text to show) step by step, as generate_text in runs_ar."""
        made = speculate(
            self.model, self.drafter, [prompt_ids], num_draft_tokens=self.num_draft_tokens, **options
        )
        # The first round is the prompt's pass.
        for token in self.tokens(made, prompt_ids, num_uncounted=1):
            yield token, stream.push(token)
            if stream.stopped:
                return

    def tokens(self, rounds, text, num_uncounted=0):
        """The tokens of the rounds, which continue `text`, one by one; of each, what it is and replaces."""
        self.text = list(text)
        for number, round in enumerate(rounds):
            if number >= num_uncounted:
                self.account.add(round)
            (tokens,), (drafts,), (num_accepted,) = round
            for place, token in enumerate(tokens):
                self.rejected = drafts[num_accepted:] if place == num_accepted else []
                self.newest = "resampled" if self.rejected else "own"
                self.newest = "accepted" if place < num_accepted else self.newest
                yield token
                self.text.append(token)

    def paint(self, piece):
        """The newest token's text in its colour, after the drafts that it replaces."""
        if not self.in_colour:
            return piece
        parts = [("rejected", self.rejected_text()), (self.newest, piece)]
        return "".join(COLOURS[kind] + text + RESET for kind, text in parts if text)

    def rejected_text(self):
        """On one line, since it is no part of the text."""
        if not self.rejected:
            return ""
        stream = TextStream(self.tokenizer, self.text)
        return "".join([*map(stream.push, self.rejected), stream.finish()]).replace("\n", "\\n")

    def figures(self):
        if self.account.num_rounds and not self.account.seconds["plain"]:
            self.model.time_plain_steps()
        return {"num_draft_tokens": self.num_draft_tokens, "drafts": self.account.figures()}

    def report(self):
        if self.account.num_rounds:
            for line in spoken(**self.figures()):
                print(f"[{line}]", file=sys.stderr)


def check_looks_ahead(checkpoint, compiled):
    """UserError for a model that has no layer for --multi-token, or whose states nobody would hear."""
    if getattr(checkpoint.model, "ahead", None) is None:
        raise UserError(
            f"--multi-token: {checkpoint.folder} has no layer that looks a token further ahead; "
            "use --draft or --lookup"
        )
    if compiled:
        raise UserError("--multi-token drafts from states that no compiled step gives; leave out --compile")


@dataclasses.dataclass
class SpeculativeTranslator(Translator):
    speculation: Speculation

    def __post_init__(self):
        self.speculation.start(self.model, lambda model: TransformerDrafter(model, self.rules))

    def tokens(self, source, seed, on_step):
        if self.speculation.draft:
            check_source(self.speculation.draft.config, source)
        way, generators = self.speculation, seeded_generators(seed, batch_size=1)
        made = speculate_target(
            way.model, way.drafter, [source], self.rules, self.sampling, generators, way.num_draft_tokens
        )
        for token in way.tokens(made, [self.rules.start_id]):
            on_step()
            yield token

    def paint(self, piece):
        return self.speculation.paint(piece)

    def figures(self):
        return self.speculation.figures()
