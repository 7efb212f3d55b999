"""Run a checkpoint: continue a text, hold a conversation, or measure how well it predicts a text.

    python run.py                                  the tiny model that comes with the project
    python run.py --list                           the checkpoints that are here
    python run.py tiny-gpt2-python --prompt "class Stack:" --temperature 0.8 --top-p 0.95
    cat story.txt | python run.py checkpoints/Llama-3.2-1B --max-new-tokens 500
    cat lines.txt | python run.py checkpoints/opus-mt-en-fr --beams 4
    python run.py --lookup --temperature 0 --show-drafts
    python run.py checkpoints/Llama-3.2-1B-Instruct --chat
    python run.py checkpoints/gpt2 --score book.txt --stride 512
    python run.py tiny-bert-python --prompt "Return the [MASK] of the list."
    python run.py checkpoints/vit-base-patch16-224 --image cat.jpg --attention cat-seen.png
    torchrun --nproc-per-node 2 run.py checkpoints/Llama-3.2-1B      split over two devices

The text goes to standard output, everything else (memory, speed, errors) to standard error.
"""

import os
import random
import sys

from conversion.find import find_folder, listing
from models.utils.command_line import DTYPES, QUANTIZED, Parser
from models.utils.errors import UserError, run_main

DEFAULT_CHECKPOINT = "tiny-llama-python"


def main(argv=None):
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this, once for each device
        from runs_parallel.ranks import together
        from runs_parallel.terminal import run_split

        together(lambda: run_split(parse(argv)))
    args = parse(argv)
    if args.list:
        return print("\n".join(listing()))
    # The imports from here on take seconds; what was typed wrongly is answered before.
    from conversion.checkpoint import open_checkpoint
    from models.utils.machine import dtype_named, keep_freed_memory
    from models.utils.quantize import quantization_of

    keep_freed_memory()
    how = {"device": args.device, "dtype": dtype_named(args.dtype), "calibration": args.calibrate}
    how["quantization"] = quantization_of(args.quantize, args.group_size, args.calibrate)
    # A verification feeds the last token and the drafts; a drafter two tokens, where it lacks its own last.
    drafting = args.draft or args.lookup or args.multi_token
    widths = (1, args.num_draft_tokens + 1) if drafting else (1,)
    checkpoint = open_checkpoint(
        args.checkpoint, **how, widths=widths if args.compile else (), adapter=args.adapter
    )
    args.device = checkpoint.device
    run_page = page_for(checkpoint, args, drafting)
    if args.draft:
        draft = open_checkpoint(args.draft, **how, widths=(1, 2) if args.compile else ())
        check_kind_of_draft(args, draft, checkpoint)
        return run_page(args, checkpoint, draft)
    return run_page(args, checkpoint)


def page_for(checkpoint, args, drafting):
    """This kind of checkpoint, that page."""
    from models import DECODER, ENCODER_DECODER

    if checkpoint.kind == DECODER and drafting:
        from runs_ss.terminal import run_speculative as run_page
    elif checkpoint.kind == DECODER:
        from runs_ar.terminal import run_decoder as run_page
    elif checkpoint.kind == ENCODER_DECODER and drafting:
        from runs_ss.terminal import run_speculative_transformer as run_page
    elif checkpoint.kind == ENCODER_DECODER:
        from runs_ar.translator import run_transformer as run_page
    elif "images" in checkpoint.inputs:
        from runs_encoder.vision_transformer import run_vit as run_page
    else:
        from runs_encoder.bert import run_bert as run_page

    reads_one = checkpoint.kind in (DECODER, ENCODER_DECODER) or "images" in checkpoint.inputs
    if len(args.prompts) > 1 and reads_one:
        raise UserError(f"--prompt is given {len(args.prompts)} times; only an encoder takes several texts")
    if args.images and "images" not in checkpoint.inputs:
        raise UserError(f"--image: {checkpoint.folder} holds a model that reads text; give it --prompt TEXT")
    if args.compile and (checkpoint.kind != DECODER or args.score):
        raise UserError("--compile: for decoders that write text, whose steps it makes faster")
    return run_page


def check_kind_of_draft(args, draft, target):
    if draft.kind != target.kind:
        raise UserError(
            f"--draft {args.draft}: is {with_article(draft.kind)}, which cannot draft for "
            f"{with_article(target.kind)}; give a checkpoint of that kind"
        )


def with_article(kind):
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


# Options ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser("python run.py", __doc__)
    add = parser.add_argument
    add("name", nargs="?", metavar="CHECKPOINT", help="the same as --checkpoint CHECKPOINT")
    add("--checkpoint", metavar="CHECKPOINT", help="a name in checkpoints/, a folder or a GGUF file")
    add("--list", action="store_true", help="what is in checkpoints/, and nothing else")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best of cuda, mps, cpu")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own; float32 on a CPU slow at bfloat16")
    add("--quantize", choices=QUANTIZED, help="the linear layers' weights, while loading")
    add("--adapter", metavar="FOLDER", help="LoRA, trained on this checkpoint: by runs_train.lora, or PEFT")
    add("--group-size", type=int, metavar="N", help="of int4: 32 (default), 64 or 128")
    add("--compile", action="store_true", help="the decoding step: minutes once, kept on disk, then faster")
    add("--calibrate", metavar="FILE", help="a text that tells int4 which errors count")

    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", action="append", help="default: what is piped in; with BERT repeatable")
    add("--chat", action="store_true", help="a conversation; Ctrl-C interrupts an answer, Ctrl-D ends")
    add("--score", metavar="FILE", help="perplexity and bits per byte of a text file")
    parser.add_argument(
        "--system", metavar="TEXT", help="with --chat: what the model is told before it begins"
    )

    add = parser.add_argument_group("generation (defaults: generation_config.json's)").add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, metavar="T", help="0 takes the most probable token, always")
    add("--top-k", type=int, metavar="K", help="only the K most probable tokens; 0 = all")
    add("--top-p", type=float, metavar="P", help="only the fewest tokens that hold probability P; 1 = all")
    add("--min-p", type=float, metavar="P", help="no token below P times the most probable; 0 = all")
    add("--seed", type=int, metavar="N", help="the same seed, the same text; default: a new one each time")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--json", action="store_true", help="one JSON object (text, tokens, timings) instead of the text")

    add = parser.add_argument_group("speculative sampling (sooner; the distribution stays)").add_argument
    add("--draft", metavar="CHECKPOINT", help="a smaller one with the same tokenizer, to guess ahead")
    add("--lookup", action="store_true", help="guess from the text so far instead; no second model")
    add("--multi-token", action="store_true", help="guess with the model's own layer for it (DeepSeek-V3)")
    add("--num-draft-tokens", type=int, default=4, metavar="N", help="guesses a round; default: %(default)s")
    add("--show-drafts", action="store_true", help="colour what is accepted, rejected and resampled")

    add = parser.add_argument_group("translation (encoder-decoders)").add_argument
    add("--beams", type=int, metavar="N", help="hypotheses of beam search; 1 = greedy, or sampled")

    add = parser.add_argument_group("looking at what it does").add_argument
    add("--top", type=int, metavar="K", help="each token's probability, and the K most probable beside it")
    add("--attention", metavar="FILE.png", help="a picture of what each token, or a class token, looked at")

    add = parser.add_argument_group("images (vision transformers)").add_argument
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
    if args.name and args.checkpoint:
        raise UserError(f"two checkpoints are named, {args.name} and {args.checkpoint}; give one of them")
    args.checkpoint = find_folder(args.name or args.checkpoint or DEFAULT_CHECKPOINT)
    if args.chat and args.json:
        raise UserError("--json prints one object, --chat is a conversation; give one of them")
    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat; leave it out, or say it in --prompt")
    args.prompts = args.prompt or []
    args.prompt = args.prompts[0] if args.prompts else None
    args.draft = args.draft and find_folder(args.draft)
    drafters = {"--draft": args.draft, "--lookup": args.lookup, "--multi-token": args.multi_token}
    drafters = [option for option, given in drafters.items() if given]
    if len(drafters) > 1:
        raise UserError(f"{' and '.join(drafters)} both guess ahead; give one of them")
    for option in ("--num-draft-tokens", "--show-drafts"):
        if option in args.given and not drafters:
            raise UserError(
                f"{option} goes with --draft CHECKPOINT, --lookup or --multi-token; give one of them"
            )
    if args.top is not None and args.top < 1:
        raise UserError(f"--top is {args.top}; give 1 or more")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; give 1 or more")
    args.seed = random.randrange(2**32) if args.seed is None else args.seed
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; give 0 to 2**63 - 1")
    return args


if __name__ == "__main__":
    run_main(main)
