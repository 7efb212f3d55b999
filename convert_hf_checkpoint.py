"""Turn a published checkpoint into one that this project reads, and back.

    python convert_hf_checkpoint.py checkpoints/NAME              a folder that is already here
    python convert_hf_checkpoint.py meta-llama/Llama-3.2-1B       a repository of the Hugging Face hub
    python convert_hf_checkpoint.py model.gguf                    a file of llama.cpp, into checkpoints/model/
    python convert_hf_checkpoint.py NAME --gguf Q8_0              a checkpoint as a file for llama.cpp

How the tensors go over stands in conversion/convert.py, where Hugging Face keeps them in conversion/tables/.
"""

from models import MODEL_NAMES
from models.utils.command_line import DTYPES, QUANTIZED, Parser, positive
from models.utils.errors import UserError, run_main

EXAMPLES = """
examples:
  python convert_hf_checkpoint.py HuggingFaceTB/SmolLM2-135M         fetch it into checkpoints/, convert it
  python convert_hf_checkpoint.py checkpoints/gpt2 --inspect         how their tensors become ours
  python convert_hf_checkpoint.py checkpoints/gpt2 --dtype bfloat16  half the size of float32
  python convert_hf_checkpoint.py checkpoints/gpt2 --dtype bfloat16 --quantize int4 --out gpt2-int4
  python convert_hf_checkpoint.py checkpoints/gpt2 --reverse         from ours to their layout again
  python convert_hf_checkpoint.py gpt2 --gguf F16                    for llama.cpp, in its folder
  python convert_hf_checkpoint.py checkpoints/NAME --model transformer_lm     a Llama, read with another page
  python convert_hf_checkpoint.py Llama3.1-8B --max-seq-len 131072 --rope-factor 8     Meta's own files

The result is checkpoints/NAME/converted/ with config.json, model.safetensors and the tokenizer's files. Then:
  python run.py --checkpoint checkpoints/NAME --prompt "Once upon a time"
"""


def main():
    args = parse_arguments()
    # torch takes seconds to import, for which no typo waits.
    from conversion.convert import convert, inspect, reverse
    from conversion.hub import fetch
    from conversion.meta import MetaOptions
    from models.utils.machine import dtype_named
    from models.utils.quantize import quantization_of

    dtype = dtype_named(args.dtype)
    quantization = quantization_of(args.quantize, args.group_size, args.calibrate)
    if args.reverse:
        print(f"wrote {reverse(args.checkpoint, args.out, dtype)}")
        return

    if args.gguf:
        from conversion.gguf_write import export

        print(f"wrote {export(args.checkpoint, args.gguf, args.out)}")
        return
    folder = fetch(args.checkpoint)
    meta = MetaOptions(**{name: getattr(args, name) for name in MetaOptions.__dataclass_fields__})
    if args.inspect:
        inspect(folder, args.allow, meta, args.model)
        return
    written = convert(
        folder,
        out=args.out,
        dtype=dtype,
        allow=args.allow,
        meta=meta,
        model=args.model,
        quantization=quantization,
        calibration=args.calibrate,
    )
    print(f"wrote {written}")


# The command line -------------------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser("python convert_hf_checkpoint.py", __doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "checkpoint",
        help="a folder in Hugging Face's or Meta's layout, a GGUF file, or OWNER/NAME on Hugging Face",
    )
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--inspect", action="store_true", help="print both sides' names and shapes; write nothing")
    instead("--reverse", action="store_true", help="from a converted checkpoint to Hugging Face's layout")
    instead(
        "--gguf", choices=GGUF_KINDS, help="write a checkpoint as a file for llama.cpp, matrices in this type"
    )
    add("--dtype", choices=DTYPES, help="of the weights written (default: as stored)")
    add("--quantize", choices=QUANTIZED, help="the linear layers' weights; for a CPU with --dtype bfloat16")
    add("--group-size", type=int, metavar="N", help="of int4: 32 (the most exact, default), 64 or 128")
    add("--calibrate", metavar="FILE", help="a text that tells int4 which errors count; the model reads it")
    add("--model", choices=MODEL_NAMES, help="which of models/, where more than one can read the checkpoint")
    add(
        "--out",
        metavar="PATH",
        help="where to write (default: CHECKPOINT/converted, /reversed or /NAME.TYPE.gguf)",
    )
    add(
        "--allow",
        metavar="FIELD",
        action="append",
        default=[],
        help="let an unknown field of config.json pass",
    )

    meta = parser.add_argument_group("what Meta's params.json leaves out (for consolidated.*.pth only)")
    add = meta.add_argument
    add("--max-seq-len", type=positive(int), metavar="N", help="the context: 4096, 8192 or 131072")
    add("--rope-factor", type=positive(float), metavar="X", help="8 for Llama 3.1, 32 for Llama 3.2")
    for name, default in (("low", 1.0), ("high", 4.0)):
        add(
            f"--rope-{name}-freq-factor",
            type=positive(float),
            metavar="X",
            default=default,
            help="default: %(default)s, as in Llama 3.1",
        )
    add("--rope-original-seq-len", type=positive(int), metavar="N", default=8192, help="default: %(default)s")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    mode = next((mode for mode in MODES if getattr(args, mode)), None)
    for name in given if mode else ():
        if name not in MODES[mode]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} says nothing to --{mode}, which {WHY[mode]}; leave it out")
    return args


GGUF_KINDS = ("F32", "F16", "Q8_0", "Q4_0")
# The options that mean something to those that do not convert.
MODES = {
    "inspect": {"checkpoint", "inspect", "allow", "model", "max_seq_len", "rope_factor"}
    | {"rope_low_freq_factor", "rope_high_freq_factor", "rope_original_seq_len"},
    "reverse": {"checkpoint", "reverse", "out", "dtype"},
    "gguf": {"checkpoint", "gguf", "out"},
}
WHY = {
    "inspect": "writes nothing",
    "reverse": "writes Hugging Face's layout, unquantized, of a checkpoint that is converted",
    "gguf": "writes a checkpoint as it is, in the type that it names",
}


if __name__ == "__main__":
    run_main(main)
