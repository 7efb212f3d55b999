"""An encoder-decoder at the terminal: what run.py does with a model that translates.

Each line that is piped in, or the one text of --prompt, is a source of its own. Greedy and sampled tokens are
shown as they are made; beam search knows its translation only at the end.
Proof: tests/test_run_transformer.py.
"""

import dataclasses
import json
import sys

from models.utils.errors import UserError
from models.utils.files import check_output
from models.utils.machine import Stopwatch
from models.utils.sampling import Sampling, seeded_generators
from models.utils.tokenizers.base import Tokenizer
from models.utils.tokenizers.marian import LANGUAGE_CODE
from runs_ar.attention_picture import cross_attention, save
from runs_ar.beam_search import Beams, beam_search
from runs_ar.generate import TextStream
from runs_ar.terminal import finish_reason, generation_options, ignore, prompt_text, write
from runs_ar.top import lines, translation
from runs_ar.transformer import Decoder, Rules, check_source, generate, generation_rules

# What follows one hypothesis alone.
ONE_HYPOTHESIS = dict.fromkeys(("--temperature", "--top-k", "--top-p", "--min-p"), "samples")
ONE_HYPOTHESIS |= dict.fromkeys(("--draft", "--lookup", "--multi-token"), "drafts")
MOST_BEAMS = 256  # each is a row of the batch, with a cache of its own
FOR_OTHER_MODELS = ("--chat", "--score", "--window", "--stride")


@dataclasses.dataclass
class Translator:
    model: object
    tokenizer: Tokenizer
    rules: Rules
    beams: Beams
    sampling: Sampling

    def tokens(self, source, seed, on_step):
        """The tokens of one target; on_step is called when the model has made a step."""
        if self.beams.num_beams == 1:
            generators = seeded_generators(seed, batch_size=1)
            for (token,) in generate(self.model, [source], self.rules, self.sampling, generators):
                on_step()
                yield token
        else:
            decoder = Decoder(self.model, [source], self.beams.num_beams)
            ((tokens, _),) = beam_search(decoder, self.rules, self.beams, on_step)
            yield from tokens

    def paint(self, piece):
        """The text of the newest token as a terminal shows it; runs_ss/terminal.py has colours."""
        return piece

    def figures(self):
        """What there is to say in the end, by name."""
        return {}


def run_transformer(args, checkpoint, make_translator=Translator):
    """Translate. checkpoint.load() is slow: what can be wrong with the input is found out before."""
    texts = texts_to_translate(args, checkpoint)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    sources = [tokenizer.encode(text) for text in texts]
    for text, source in zip(texts, sources):
        check_language(tokenizer, text)
        check_source(config, source)

    options = generation_options(args, checkpoint)
    max_new_tokens = args.max_new_tokens if "--max-new-tokens" in args.given else None
    rules, beams = generation_rules(checkpoint.folder, config, options["eos_ids"], max_new_tokens)
    beams = choose_beams(args, beams)
    TextStream(tokenizer, stop_strings=args.stop)  # checks the stop strings
    translator = make_translator(checkpoint.load(), tokenizer, rules, beams, options["sampling"])

    watch = Stopwatch()
    for number, (text, source) in enumerate(zip(texts, sources)):
        target = translate(args, translator, text, source, args.seed + number, watch)
        if args.top and target:
            found = translation(translator.model, source, rules.start_id, target, args.top)
            print("\n".join(lines(tokenizer, target, found)), file=sys.stderr)
    if args.attention:
        save_picture(args.attention, translator, sources[0], target)
    way = f"{beams.num_beams} beams" if beams.num_beams > 1 else f"seed {args.seed}"
    print(f"[{watch.line(args.device)}; {way}]", file=sys.stderr)


def translate(args, translator, text, source, seed, total):
    """Translate one text and show it; returns the target's tokens."""
    show = ignore if args.json else write
    stream = TextStream(translator.tokenizer, stop_strings=args.stop)
    pieces, tokens, watch = [], [], Stopwatch()

    def on_step():
        watch.token()
        total.token()

    # An empty line stays one.
    for token in translator.tokens(source, seed, on_step) if text.strip() else ():
        tokens.append(token)
        pieces.append(stream.push(token))
        show(translator.paint(pieces[-1]))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    show(pieces[-1] + "\n")

    if args.json:
        result = {"prompt": text, "text": "".join(pieces), "tokens": tokens}
        result["finish_reason"] = reason(stream, tokens, translator.rules)
        result |= {"seed": seed, **dataclasses.asdict(translator.sampling)}
        result |= {**dataclasses.asdict(translator.beams), **translator.figures()}
        result["timings"] = watch.timings(args.device)
        print(json.dumps(result), flush=True)
    return tokens


def reason(stream, tokens, rules):
    """Why a translation ended."""
    options = {"eos_ids": rules.eos_ids, "max_new_tokens": rules.max_new_tokens}
    return finish_reason(stream, tokens, options) if tokens else "empty text"


# What was asked for -----------------------------------------------------------------------------------------


def texts_to_translate(args, checkpoint):
    """The sources; UserError for what a translator does not do."""
    for option in FOR_OTHER_MODELS:
        if option in args.given:
            raise UserError(f"{option}: this model translates; give --prompt TEXT, or pipe lines into run.py")
    text = prompt_text(args, checkpoint)
    if not text:
        raise UserError("there is nothing to translate; give --prompt TEXT, or pipe lines into run.py")
    texts = [text] if args.prompt is not None else text.split("\n")
    if args.attention and (len(texts) > 1 or not text.strip()):
        raise UserError(f"--attention draws the picture of one text; {len(texts)} lines were given")
    if args.attention:
        check_output(args.attention, "--attention")
    return texts


def choose_beams(args, beams):
    """--beams, or one where sampling or drafts are asked for, or else what generation_config.json says."""
    given = [option for option in ONE_HYPOTHESIS if option in args.given]
    if given and args.beams is not None and args.beams > 1:
        verb = ONE_HYPOTHESIS[given[0]]
        raise UserError(f"{given[0]} {verb}, --beams {args.beams} searches; give one of them")
    if given:
        return dataclasses.replace(beams, num_beams=1)
    if args.beams is not None and args.beams > MOST_BEAMS:
        raise UserError(f"--beams is {args.beams}; give 1 to {MOST_BEAMS}")
    return beams if args.beams is None else dataclasses.replace(beams, num_beams=args.beams)


def check_language(tokenizer, text):
    """A language that the checkpoint does not know would be an unknown word to the model."""
    codes = getattr(tokenizer, "language_codes", [])
    code = LANGUAGE_CODE.match(text)
    if codes and code and code[0] not in codes:
        raise UserError(f"{code[0]}: this checkpoint has no such language; it has {' '.join(codes)}")


# The picture ------------------------------------------------------------------------------------------------


def save_picture(path, translator, source, target):
    """Draw which source tokens each token of the target was made from."""
    probs = cross_attention(translator.model, source, [translator.rules.start_id, *target[:-1]])
    pieces = translator.tokenizer.pieces
    save(path, probs, [pieces[id] for id in source], [pieces[id] for id in target])
