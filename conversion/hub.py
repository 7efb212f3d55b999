"""From the Hugging Face hub to checkpoints/NAME: only the files that a conversion reads."""

import re
from pathlib import Path

from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError, one_line

# Beside config.json and the weights: the tokenizer, how to generate, how an image becomes numbers, how a
# conversation is written.
COMPANIONS = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "vocab.txt",
    # How a sentence encoder makes one vector of its hidden states.
    "modules.json",
    "*_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
]


def fetch(name):
    """The folder called `name`, or else the one that the hub's repository of that name is downloaded to."""
    if Path(name).is_dir() or Path(name).is_file():
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+/[\w./-]+\.gguf", str(name)):
        owner, repository, file = str(name).split("/", 2)
        folder = CHECKPOINTS / Path(file).stem
        download(f"{owner}/{repository}", folder, file)
        return folder / file
    if str(name).endswith(".gguf"):
        raise UserError(f"{name}: no such file; one of the hub is called OWNER/NAME/FILE.gguf")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-]+", str(name)) or str(name).startswith("checkpoints/"):
        raise UserError(f"{name}: no such folder, and no repository of the hub, which is called OWNER/NAME")
    folder = CHECKPOINTS / str(name).split("/")[-1]
    download(str(name), folder)
    return folder


def claim(folder, name):
    """Two owners may have repositories of one name; their files must not mix in one folder."""
    label = folder / ".hub_repository"
    there = label.read_text().strip() if label.is_file() else "something else"
    if folder.exists() and there != name:
        raise UserError(f"{folder}: already holds {there}; convert it by its path, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    label.write_text(name + "\n")


def download(name, folder, file=None):
    """Fetch what is needed, or one file; what is already there, whole and current, is not fetched again."""
    # Imported here, since it takes a second that nobody waits for whose checkpoint is on the disk.
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        files = [file.rfilename for file in HfApi().model_info(name).siblings]
        claim(folder, name)
        snapshot_download(name, local_dir=folder, allow_patterns=[file] if file else needed(files))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name} with your account, then "
            "make a token known (run: hf auth login, or set HF_TOKEN)"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{name}: no such folder here and no such repository on the hub; if it is private, make a token "
            "known (run: hf auth login, or set HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"{name}: the hub refused ({one_line(error)[:200]}); try again later") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError):
        raise UserError(
            f"{name}: no such folder here, and the hub cannot be reached; check the network, or give the "
            "path of a checkpoint on this disk"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)}); free some space") from None


def needed(files):
    """Patterns for one set of weights: safetensors, else pickles, else Meta's own files."""
    if any(re.fullmatch(r"model.*\.safetensors", file) for file in files):
        weights = ["model*.safetensors", "model.safetensors.index.json"]
    elif any(re.fullmatch(r"pytorch_model.*\.bin", file) for file in files):
        weights = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    else:
        weights = ["original/params.json", "original/consolidated.*.pth", "original/tokenizer.model"]
        weights += ["params.json", "consolidated.*.pth"]
    return ["config.json", *COMPANIONS, *weights]
