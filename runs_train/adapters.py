"""What `python -m runs_train.lora` does to a decoder: what tuning.py does, but only adapters are trained.

The frozen matrices are held in the dtype that they are multiplied in, or in their codes (--quantize): nobody
adds small steps to them, for which fp32 would be needed. The adapters, norms and embeddings are fp32.

What is kept on the way is the adapters and their two means; the rest is read from the checkpoint again.
Proof: tests/test_train_lora.py.
"""

import torch

from conversion.adapter import CONFIG, WEIGHTS, peft_files
from models import load_model
from models.utils.lora import adapters, attach
from models.utils.machine import choose_device, dtype_named
from models.utils.quantize import quantization_of
from runs_train import fine_tuning, tuning
from runs_train.folder import remove_other_results, run_folder, write_result
from runs_train.fresh_model import BYTES_PER_PARAMETER, check_room
from runs_train.options import ADAPTER_OPTIONS
from runs_train.training_run import is_trained

FILES = (CONFIG, WEIGHTS, "chat_template.jinja")


def train(options, run_class):
    """Train adapters; run_class, BesideFrozen and a Tuning, says on what, and what a step does."""
    options.device = choose_device(options.device)
    quantization = quantization_of(options.quantize, options.group_size)
    base = tuning.open_base(options)
    with run_folder(options, FILES) as folder:
        data = run_class.read(options)
        base.check_memory(num_slots=0)
        # In the dtype of the file: that is what run.py --quantize rounds, and so the same codes.
        model = load_model(base.folder, options.device, None, quantization, arranged=False)
        torch.manual_seed(options.seed)
        attach(model.float(), options.rank, options.alpha, options.dropout, options.targets)
        count = sum(parameter.numel() for parameter in filter(is_trained, model.parameters()))
        check_room(
            count * BYTES_PER_PARAMETER,
            f"--rank {options.rank}: adapters with their gradients",
            options.device,
        )
        run = run_class(model, base, data, options, folder / "training")
        run.train()
        save(run, folder)
        tuning.report(run, folder)


class BesideFrozen(tuning.Tuning):
    """What is otherwise in any run, once only adapters are trained."""

    WITH_STATE = ("trained", "optimizer")

    def __init__(self, model, *rest):
        super().__init__(model, *rest)
        self.trained = Trained(model)

    def settings(self):
        return super().settings() | {name: getattr(self.options, name) for name in ADAPTER_OPTIONS}

    def settle_options(self):
        super().settle_options()
        for layer in adapters(self.model).values():
            layer.base.to(dtype_named(self.options.dtype))

    def how_to_run(self, folder):
        chat = " --chat" if self.tokenizer.chat_template else ""
        return f"python run.py {self.options.checkpoint} --adapter {folder}{chat}"


class Run(BesideFrozen, fine_tuning.Run):
    """On conversations."""


class Trained:
    """The parameters of a model that are trained, to be kept and taken back like a module's."""

    def __init__(self, model):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        if state.keys() != self.parameters.keys():
            raise KeyError("other adapters than this run has")
        for name, parameter in self.parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} has another shape")
            parameter.copy_(state[name])


def save(run, folder):
    """The adapter as PEFT has it, and the template of the conversations."""
    options, factors = run.options, {name: (layer.A, layer.B) for name, layer in adapters(run.model).items()}
    files = peft_files(
        factors, run.base.fields, run.base.folder, options.rank, options.alpha, options.dropout
    )
    if run.tokenizer.chat_template:
        files["chat_template.jinja"] = run.tokenizer.chat_template.encode()
    remove_other_results(folder, (*files, "README.md", "loss.png"))
    for name, content in files.items():
        with write_result(folder, name) as path:
            path.write_bytes(content)
