"""A decoder at the terminal: what run.py does with a model that continues text.

The text goes to standard output as it is made; what there is to say about the run, to standard error.
Proof: tests/test_run.py.
"""

import dataclasses
import json
import math
import os
import stat
import sys

import torch
from tqdm import tqdm

from models.utils.errors import UserError, report
from models.utils.files import check_output, decode_utf8, read_text
from models.utils.machine import Stopwatch
from models.utils.sampling import seeded_generators
from runs_ar.attention_picture import save, self_attention
from runs_ar.chat import FIRST_SLOTS, Conversation, require_template
from runs_ar.generate import (
    NOT_FINITE,
    TextStream,
    check_prompts,
    check_vocabulary,
    generate_text,
    generation_defaults,
)
from runs_ar.score import figures, negative_log_likelihood
from runs_ar.top import continuation, lines, token_name

DEFAULT_PROMPT = "def"  # without a space, which would be a token of its own
LARGEST_WINDOW = 4096  # of --score, for models with a longer context than papers score with


def run_decoder(args, checkpoint, way=None):
    """Continue, chat or score, as the options say.

    checkpoint.load(num_slots) is slow: what can be wrong with the input is found out before.
    """
    if args.beams is not None:
        raise UserError("--beams: for a model that translates; this one continues text")
    check_looks(args)
    if args.score:
        score(args, checkpoint)
    elif args.chat:
        chat(args, checkpoint, generation_options(args, checkpoint))
    else:
        continue_text(args, checkpoint, generation_options(args, checkpoint), way or Plain())


def check_looks(args):
    """UserError for --attention and --top where there is no one text to look at."""
    for option, value in (("--attention", args.attention), ("--top", args.top)):
        if value and (args.score or args.chat):
            raise UserError(f"{option}: of one text; leave out --chat and --score, and give --prompt TEXT")
        if value and args.compile:
            raise UserError(f"{option}: a compiled step tells nothing of itself; leave out --compile")
    if args.attention:
        check_output(args.attention, "--attention")


def generation_options(args, checkpoint):
    """What `generate` needs to know: the checkpoint's own values where the command line gives none."""
    sampling, eos_ids = generation_defaults(checkpoint.folder, checkpoint.tokenizer)
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and sampling.greedy:
        given.setdefault("temperature", 1.0)  # who asks for --top-p wants to sample
    return {
        "max_new_tokens": args.max_new_tokens,
        "sampling": dataclasses.replace(sampling, **given),
        "generators": seeded_generators(args.seed, batch_size=1),
        "eos_ids": eos_ids,
    }


# Continue a text --------------------------------------------------------------------------------------------


class Plain:
    """How the tokens of a text are made; runs_ss/terminal.py has another way."""

    def load(self, checkpoint, num_slots):
        return checkpoint.load(num_slots)

    def write(self, model, prompt_ids, stream, **options):
        """(token, text to show) step by step."""
        return generate_text(model, prompt_ids, stream, **options)

    def paint(self, piece):
        """The text of the newest token as a terminal shows it."""
        return piece

    def figures(self):
        """What there is to say in the end, by name."""
        return {}


def continue_text(args, checkpoint, options, way):
    prompt, tokenizer = prompt_text(args, checkpoint) or DEFAULT_PROMPT, checkpoint.tokenizer
    prompt_ids = tokenizer.encode(prompt)
    check_prompts(checkpoint.config, [prompt_ids])
    tell_of_marks(tokenizer, prompt)
    stream = TextStream(tokenizer, prompt_ids, args.stop)
    num_slots = min(len(prompt_ids) + args.max_new_tokens, checkpoint.config.max_seq_len)
    model = way.load(checkpoint, num_slots)

    show = ignore if args.json else write
    show(prompt)
    pieces, tokens, interrupted, watch = [], [], False, Stopwatch()
    try:
        for token, piece in way.write(model, prompt_ids, stream, **options):
            watch.token()
            tokens.append(token)
            pieces.append(piece)
            show(way.paint(piece))
    except KeyboardInterrupt:
        interrupted = True
    pieces.append(stream.finish())
    show(pieces[-1] + "\n")

    reason = "interrupted" if interrupted else finish_reason(stream, tokens, options)
    if args.json:
        result = {"prompt": prompt, "text": "".join(pieces), "tokens": tokens, "finish_reason": reason}
        result |= {"seed": args.seed, **dataclasses.asdict(options["sampling"]), **way.figures()}
        print(json.dumps(result | {"timings": watch.timings(args.device)}))
    print(f"[{watch.line(args.device)}; end: {reason}; seed {args.seed}]", file=sys.stderr)
    look_back(args, model, tokenizer, prompt_ids, tokens)
    if interrupted:
        sys.exit(130)


def look_back(args, model, tokenizer, prompt, tokens):
    """What --top and --attention say of a text that is there: prompt, then the tokens that were written."""
    if args.top and tokens:
        found = continuation(model, prompt, tokens, args.top)
        print("\n".join(lines(tokenizer, tokens, found)), file=sys.stderr)
    if args.attention:
        text = [*prompt, *tokens]
        probs = self_attention(model, torch.tensor([text], device=model.lm_head.weight.device))
        names = [token_name(tokenizer, id) for id in text]
        save(args.attention, probs, names, names)


def tell_of_marks(tokenizer, prompt):
    """A chat pasted as a prompt is plain text by design: no text a user types becomes a special token."""
    marks = [name for name in tokenizer.special_tokens if name in prompt]
    if marks:
        report(f"{marks[0]} in the prompt is read as plain text; for a conversation use --chat")


def write(text):
    print(text, end="", flush=True)


def ignore(text):
    pass


def finish_reason(stream, tokens, options):
    """Why a generation ended that ran to its end."""
    if stream.stopped:
        return "stop string"
    if tokens[-1] in options["eos_ids"]:
        return "end of text"
    return "max_new_tokens" if len(tokens) == options["max_new_tokens"] else "context full"


def prompt_text(args, checkpoint):
    """--prompt, or else what is piped in, or else the example of the checkpoint; None where it has none."""
    if text := given_text(args):
        return text
    example = checkpoint.example("example.txt")
    return example and example.read_text(encoding="utf-8")


def given_text(args):
    """--prompt, or else what is piped in; None where there is neither."""
    if args.prompt == "":
        raise UserError("--prompt is empty; give a text to continue")
    if args.prompt is not None:
        return args.prompt
    if not is_piped(sys.stdin):
        return None
    print("reading the prompt from standard input", file=sys.stderr)
    text = decode_utf8(sys.stdin.buffer.read(), "standard input")
    # The line end that echo adds and files end with is not meant to be continued. An empty pipe is none:
    # many programs start others with one.
    return text.removesuffix("\n") or None


def is_piped(stream):
    """Whether there is a text to read; a terminal and /dev/null are neither pipe nor file."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


# Chat -------------------------------------------------------------------------------------------------------


def chat(args, checkpoint, options):
    tokenizer = checkpoint.tokenizer
    require_template(tokenizer)
    eos_ids = options.pop("eos_ids")
    TextStream(tokenizer, stop_strings=args.stop)  # checks the stop strings
    model = checkpoint.load(min(FIRST_SLOTS, checkpoint.config.max_seq_len))
    conversation = Conversation(model, tokenizer, eos_ids, args.system)
    print("Ctrl-C interrupts an answer, Ctrl-D ends the conversation.", file=sys.stderr)
    while (text := ask()) is not None:
        if text.strip():
            answer_once(args, conversation, text, options)


def answer_once(args, conversation, text, options):
    watch = Stopwatch()
    answer = conversation.answer(text, stop_strings=args.stop, on_token=watch.token, **options)
    try:
        for piece in answer:
            write(piece)
        write("\n")
    except KeyboardInterrupt:
        write(" [interrupted]\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    finally:
        answer.close()  # now, not when memory is cleaned up: so that what was said joins the conversation
    print(f"[{watch.line(args.device)}]", file=sys.stderr)


def ask():
    """The next line from the terminal or the pipe; None at its end."""
    while True:
        try:
            return input("\n> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print("\nCtrl-D ends the conversation.", file=sys.stderr)
        except EOFError:
            write("\n" if sys.stdin.isatty() else "")
            return None
        except UnicodeDecodeError:
            raise UserError("standard input: no UTF-8 text") from None


# Score ------------------------------------------------------------------------------------------------------


def score(args, checkpoint):
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    window, stride = window_and_stride(args, config)
    text = read_text(args.score, "--score")
    token_ids = tokenizer.encode(text)
    if len(token_ids) < 2:
        raise UserError(f"{args.score}: one token only; the first is not counted, so that none is left")
    check_vocabulary(config, token_ids)
    model = checkpoint.load()
    with tqdm(total=len(token_ids) - 1, unit=" tokens", desc=args.score) as bar:
        nats, num_tokens = negative_log_likelihood(model, token_ids, window, stride, bar.update)
    if not math.isfinite(nats):
        raise UserError(f"{checkpoint.folder}: {NOT_FINITE}")

    result = figures(nats, num_tokens, len(text.encode())) | {"window": window, "stride": stride}
    result["bos"] = token_ids[0] == tokenizer.bos_id
    if args.json:
        print(json.dumps(result))
    else:
        print_score(result)


def print_score(result):
    print(f"perplexity     {result['perplexity']:.4f}")
    print(f"bits per byte  {result['bits_per_byte']:.4f}")
    print(f"{result['num_tokens']:,} tokens counted, {result['num_bytes']:,} bytes", end="; ")
    print(f"window {result['window']}, stride {result['stride']} tokens")
    first = "a BOS token, as the checkpoint has it" if result["bos"] else "the text's own, no BOS token"
    print(f"the first token is given and not counted; it is {first}")


def window_and_stride(args, config):
    window = min(config.max_seq_len, LARGEST_WINDOW) if args.window is None else args.window
    if not 1 <= window <= config.max_seq_len:
        raise UserError(f"--window is {window}; give 1 to {config.max_seq_len}, the model's context")
    stride = max(1, window // 2) if args.stride is None else args.stride
    if not 1 <= stride <= window:
        raise UserError(f"--stride is {stride}; give 1 to {window}, the window")
    return window, stride
