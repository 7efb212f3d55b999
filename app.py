"""Serve a checkpoint by OpenAI's protocol: many clients at once, one model, and a page to watch it at work.

    python app.py                                          the tiny model that comes with the project
    python app.py --checkpoint checkpoints/Llama-3.2-1B-Instruct --port 9000
    python app.py --checkpoint tiny-bert-python            an encoder: /v1/embeddings
    ZOO_API_KEY=secret python app.py --host 0.0.0.0        for other machines too
    python app.py --pace 4                                 four steps a second, slow enough to watch
    python app.py --compile                                minutes once, kept on disk; then faster

Then open http://127.0.0.1:8000, or let a client of OpenAI's speak to http://127.0.0.1:8000/v1. Ctrl-C ends
the server once all answers are complete, a second one at once. runs_serve/README.md says what is served.
"""

import contextlib
import logging
import os
import signal
import socket
import sys

from conversion.find import find_folder
from models.utils.command_line import DTYPES, QUANTIZED, Parser, positive
from models.utils.errors import UserError, report, run_main

DEFAULT_CHECKPOINT = "tiny-llama-python"
NUM_DRAFT_TOKENS = 4  # at most, of --lookup in a step


def main(argv=None):
    args = parse(argv)
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise UserError("app.py needs the packages fastapi and uvicorn; run: make serve") from None
    with listening(args.host, args.port) as listener:
        service = service_of(args)
        # log_level: a line for what goes wrong, none for each request.
        config = uvicorn.Config(service.app, log_level="error", ws="none", server_header=False)
        server = ended_by_ctrl_c(uvicorn.Server)(config, service)
        host, port = listener.getsockname()[:2]
        report(f"{service.name} at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends)")
        server.run(sockets=[listener])
    if server.force_exit:
        sys.exit(130)


def listening(host, port):
    """A socket at the address; taken before the model is loaded, so that a port in use is told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({why}); try --port 0, which is any free one"
        ) from None


def ended_by_ctrl_c(Server):
    """uvicorn's server, which ends in order: after Ctrl-C the page's live pictures end, and answers go on."""

    class Ending(Server):
        def __init__(self, config, service):
            super().__init__(config)
            self.service = service

        @contextlib.contextmanager
        def capture_signals(self):
            before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, number, frame):
            if not self.should_exit:
                report("\nending once all answers are complete; Ctrl-C again ends at once")
            super().handle_exit(number, frame)
            if self.force_exit:  # what is broken off now is nobody's mistake
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

        async def shutdown(self, sockets=None):
            self.service.stop_watching()
            await super().shutdown(sockets)
            if self.force_exit:
                await self.service.stop()

    return Ending


# The model --------------------------------------------------------------------------------------------------


def service_of(args):
    """The model, loaded, with all that its kind offers; slow."""
    from conversion.checkpoint import open_checkpoint
    from models import DECODER, ONE_PASS
    from models.utils.machine import dtype_named, keep_freed_memory
    from models.utils.quantize import quantization_of

    keep_freed_memory()
    quantization = quantization_of(args.quantize, None, None)
    dtype, widths = dtype_named(args.dtype), (1,) if args.compile else ()
    checkpoint = open_checkpoint(args.checkpoint, args.device, dtype, quantization, widths)
    if checkpoint.kind == DECODER:
        serve = serve_decoder
    elif args.compile:
        raise UserError("--compile: for decoders, whose steps it makes faster")
    elif checkpoint.kind == ONE_PASS and {"tokens", "attention_mask"} <= set(checkpoint.inputs):
        serve = serve_encoder
    else:
        raise UserError(
            f"{checkpoint.folder}: app.py serves models that continue a text, and encoders of texts; "
            f"this one ({checkpoint.model_name}) is neither; try: python run.py"
        )
    local = ("127.0.0.1", "localhost", "::1")
    if args.host not in local and not args.api_key:
        report("whoever reaches this address may use it; to ask for a key, set ZOO_API_KEY")
    return serve(
        args,
        checkpoint,
        name=checkpoint.folder.parent.name
        if checkpoint.folder.name == "converted"
        else checkpoint.folder.name,
        most_open=args.max_running + args.queue,
        api_key=args.api_key,
        is_local=args.host in local,
        max_body=args.max_body,
    )


def serve_decoder(args, checkpoint, **options):
    from runs_serve.live import LiveEngine
    from runs_serve.web import DecoderService
    from runs_serve.writing import Writer

    checkpoint.check_memory(args.num_blocks * args.block_size)
    model = checkpoint.read()
    sizes = {"num_blocks": args.num_blocks, "block_size": args.block_size, "max_running": args.max_running}
    engine = LiveEngine(model, checkpoint.tokenizer, **sizes)
    sizes["num_blocks"] = engine.blocks.num_blocks
    context = min(engine.max_tokens, sizes["num_blocks"] * sizes["block_size"] + 1)
    writer = Writer(checkpoint, context, args.max_tokens, NUM_DRAFT_TOKENS if args.lookup else 0)
    info = {"kind": "decoder", "summary": summary_of(checkpoint), "context": context, **sizes}
    info |= {
        "chats": writer.chats,
        "max_tokens": args.max_tokens,
        "chars_per_token": writer.chars_per_token(),
    }
    return DecoderService(engine, writer, args.pace, info=info, **options)


def serve_encoder(args, checkpoint, **options):
    from runs_encoder.embeddings import Embedder
    from runs_serve.web import EncoderService

    info = {"kind": "encoder", "summary": summary_of(checkpoint)}
    return EncoderService(Embedder(checkpoint, checkpoint.load()), info=info, **options)


def summary_of(checkpoint):
    """A line about the model, for the page."""
    count = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    size = (
        f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
    )
    context, held = f"a context of {checkpoint.config.max_seq_len:,} tokens", checkpoint.weight_bytes()[1]
    return f"{checkpoint.model_name}, {size} parameters, {context}, {held} on {checkpoint.device}"


# Options ----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser("python app.py", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        help="a name in checkpoints/ or a folder; default: %(default)s",
    )
    add("--host", default="127.0.0.1", help="default: %(default)s, which no other machine reaches")
    add("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0 is any free one")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best of cuda, mps, cpu")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own; float32 on a CPU slow at bfloat16")
    add("--quantize", choices=QUANTIZED, help="the linear layers' weights, while loading")

    add = parser.add_argument_group("memory and batch (decoders)").add_argument
    number = positive(int)
    add(
        "--num-blocks", type=number, default=256, metavar="N", help="of keys and values; default: %(default)s"
    )
    add("--block-size", type=number, default=16, metavar="N", help="tokens in a block; default: %(default)s")
    add("--max-running", type=number, default=16, metavar="N", help="texts in a step; default: %(default)s")
    add(
        "--lookup",
        action="store_true",
        help="guess tokens from the text so far; the same texts, sooner or not",
    )
    add("--pace", type=positive(float), metavar="N", help="at most N steps a second, to watch the page at /")
    add("--compile", action="store_true", help="the decoding step: minutes once, kept on disk, then faster")

    add = parser.add_argument_group("limits").add_argument
    add("--queue", type=number, default=64, metavar="N", help="texts that may wait; default: %(default)s")
    add(
        "--max-tokens",
        type=number,
        default=1024,
        metavar="N",
        help="new ones of a text; default: %(default)s",
    )
    add(
        "--max-body", type=number, default=2**20, metavar="N", help="bytes of a request; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port is {args.port}; give 0 to {2**16 - 1}")
    args.checkpoint = find_folder(args.checkpoint)
    # Not an option: everybody on this machine sees the options of a command.
    args.api_key = os.environ.get("ZOO_API_KEY") or None
    return args


if __name__ == "__main__":
    run_main(main)
