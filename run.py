"""Run a checkpoint: continue a text, hold a conversation, or measure how well it predicts a text.

    python run.py                                  the tiny model that comes with the project
    python run.py --checkpoint checkpoints/gpt2 --prompt "The sea" --temperature 0.8 --top-p 0.95
    cat story.txt | python run.py --checkpoint checkpoints/Llama-3.2-1B --max-new-tokens 500
    cat lines.txt | python run.py --checkpoint checkpoints/opus-mt-en-fr --beams 4
    python run.py --draft checkpoints/tiny-llama-python-draft --show-drafts
    python run.py --checkpoint checkpoints/Llama-3.2-1B-Instruct --chat
    python run.py --checkpoint checkpoints/gpt2 --score book.txt --stride 512
    python run.py --checkpoint checkpoints/tiny-bert-python --prompt "Return the [MASK] of the list."
    python run.py --checkpoint checkpoints/vit-base-patch16-224 --image cat.jpg --attention cat-seen.png

The text goes to standard output, everything else (memory, speed, errors) to standard error.
"""

import random
import sys

from conversion.checkpoint import CHECKPOINTS, open_checkpoint, open_draft
from models.utils.command_line import Parser
from models.utils.errors import UserError, run_main
from models.utils.machine import (
    DTYPES,
    choose_device,
    keep_freed_memory,
)
from models.utils.quantize import KINDS, quantization_of
from models.utils.tokenizer import load_tokenizer
from runs_ar.terminal import run_decoder
from runs_ar.translator import run_transformer
from runs_encoder.bert import run_bert
from runs_encoder.vision_transformer import run_vit
from runs_ss.terminal import run_speculative, run_speculative_transformer

DEFAULT_CHECKPOINT = CHECKPOINTS / "tiny-llama-python"
DECODERS = ("gpt2", "gpt_neox", "llama", "transformer_lm")


def main(argv=None):
    keep_freed_memory()
    args = parse(argv)
    args.device = choose_device(args.device)
    drafting = args.draft or args.lookup
    # A verification feeds the last token and the drafts behind it.
    widths = (1, args.num_draft_tokens + 1) if drafting else (1,)
    folder, model_name, config, load = open_checkpoint(args.checkpoint, args, widths)
    if len(args.prompts) > 1 and model_name != "bert":
        raise UserError(f"--prompt is given {len(args.prompts)} times; only a BERT takes several texts")
    if args.images and model_name != "vision_transformer":
        raise UserError(f"--image: {folder} holds a model that reads text; give it --prompt TEXT")
    if args.compile and (model_name not in DECODERS or args.score):
        raise UserError("--compile: for decoders that write text, whose steps it makes faster")
    # What each kind of model does, and which page does it.
    if model_name in DECODERS and drafting:
        run_speculative(args, folder, config, load, open_draft(args, DECODERS))
    elif model_name == "transformer" and drafting:
        run_speculative_transformer(args, folder, config, load, open_draft(args, ("transformer",)))
    elif model_name in DECODERS:
        run_decoder(args, folder, config, load_tokenizer(folder), load)
    elif model_name == "transformer":
        run_transformer(args, folder, config, load)
    elif model_name == "bert":
        run_bert(args, folder, config, load)
    elif model_name == "vision_transformer":
        run_vit(args, folder, config, load)
    else:
        raise UserError(f"{folder}: run.py does not know what to do with a {model_name} model")


# Options ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser("python run.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="FOLDER", help="converted first if need be")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best of cuda, mps, cpu")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    add("--quantize", choices=KINDS, help="the linear layers' weights, while loading")
    add("--group-size", type=int, metavar="N", help="of int4: 32 (default), 64 or 128")
    add("--compile", action="store_true", help="the decoding step: once a minute's work, then far faster")
    add("--calibrate", metavar="FILE", help="a text that tells int4 which errors count")

    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", action="append", help="default: what is piped in; with BERT repeatable")
    add("--chat", action="store_true", help="a conversation; Ctrl-C interrupts an answer, Ctrl-D ends")
    add("--score", metavar="FILE", help="perplexity and bits per byte of a text file")

    add = parser.add_argument_group("generation (defaults: generation_config.json's)").add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, metavar="T", help="0 takes the most probable token, always")
    add("--top-k", type=int, metavar="K", help="only the K most probable tokens; 0 = all")
    add("--top-p", type=float, metavar="P", help="only the fewest tokens that hold probability P; 1 = all")
    add("--min-p", type=float, metavar="P", help="no token below P times the most probable; 0 = all")
    add("--seed", type=int, metavar="N", help="the same seed, the same text; default: a new one each time")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--json", action="store_true", help="one JSON object (text, tokens, timings) instead of the text")

    add = parser.add_argument_group("speculative sampling (the same text, sooner)").add_argument
    add("--draft", metavar="FOLDER", help="a smaller checkpoint with the same tokenizer, to guess ahead")
    add("--lookup", action="store_true", help="guess from the text so far instead; no second model")
    add("--num-draft-tokens", type=int, default=4, metavar="N", help="guesses a round; default: %(default)s")
    add("--show-drafts", action="store_true", help="colour what is accepted, rejected and resampled")

    add = parser.add_argument_group("translation (encoder-decoders)").add_argument
    add("--beams", type=int, metavar="N", help="hypotheses of beam search; 1 = greedy, or sampled")
    add("--attention", metavar="FILE.png", help="a picture of what each token of the target looked at")

    add = parser.add_argument_group("images (vision transformers; --attention as well)").add_argument
    add("--image", metavar="FILE", dest="images", action="append", default=[], help="to be named; repeatable")

    add = parser.add_argument_group("score").add_argument
    add("--window", type=int, metavar="N", help="tokens seen at once; default: the context, at most 4096")
    add("--stride", type=int, metavar="N", help="tokens from window to window; default: half a window")
    args = parser.parse_args(argv)
    # What was given, unlike what is a default, must make sense with the kind of model that there is.
    words = sys.argv[1:] if argv is None else argv
    args.given = {word.partition("=")[0] for word in words if word.startswith("--")}
    return checked(args)


def checked(args):
    if args.chat and args.json:
        raise UserError("--json prints one object, --chat is a conversation; give one of them")
    args.prompts = args.prompt or []
    args.prompt = args.prompts[0] if args.prompts else None
    if args.draft and args.lookup:
        raise UserError("--draft and --lookup both guess ahead; give one of them")
    for option in ("--num-draft-tokens", "--show-drafts"):
        if option in args.given and not (args.draft or args.lookup):
            raise UserError(f"{option} goes with --draft FOLDER or --lookup; give one of them")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; give 1 or more")
    args.quantization = quantization_of(args.quantize, args.group_size, args.calibrate)
    args.seed = random.randrange(2**32) if args.seed is None else args.seed
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; give 0 to 2**63 - 1")
    return args


# Checkpoints ------------------------------------------------------------------------------------------------


# Memory -----------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    # A terminal that cannot show a character shows a question mark, and the run goes on.
    sys.stdout.reconfigure(errors="replace")
    run_main(main)
