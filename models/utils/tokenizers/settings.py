"""What the JSON files beside a tokenizer's vocabulary say: special tokens, BOS and EOS, the chat template.

The same fact may stand in several files, written by different versions of different libraries. This page
decides which one counts; tokenizer.py sees only the outcome.
"""

import tokenizers

from models.utils.files import decode_utf8, read_bytes, read_json, reading

MAX_ID = 2**20  # the largest vocabulary in use has a quarter of that


class Settings:
    """What the JSON files beside a vocabulary say, in the order in which `transformers` believes them.

    names          "bos_token" -> "<s>", None where the file says null
    special_names  the special tokens it names
    added          id -> AddedToken, for tokens that may be missing in the vocabulary file
    model_ids      "bos_token" -> id from generation_config.json or config.json, which name ids only
    """

    def __init__(self, folder, model_config=None):
        self.folder = folder
        config = read_json_if_there(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= read_json_if_there(folder / "special_tokens_map.json")
        with reading(folder / "tokenizer_config.json"):
            self.read(config, read_json_if_there(folder / "added_tokens.json"))
            self.chat_template = read_chat_template(folder, config.get("chat_template"))
        self.model_ids = read_model_ids(folder, model_config)

    def read(self, config, added_tokens):
        self.tokenizer_class = config.get("tokenizer_class")
        self.add_bos, self.add_eos = config.get("add_bos_token"), config.get("add_eos_token", False)
        self.add_prefix_space = config.get("add_prefix_space", False)
        # How WordPiece prepares a text; wordpiece.py has the defaults.
        prepare = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
        self.wordpiece = {name: config[name] for name in prepare if config.get(name) is not None}
        self.names = {
            name: content_of(value, name)
            for name, value in config.items()
            if name.endswith("_token") and not isinstance(value, bool)
        }
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = extra.values() if isinstance(extra, dict) else extra
        more = [content_of(token, "additional_special_tokens") for token in extra]
        self.special_names = [name for name in [*self.names.values(), *more] if name]
        self.added = {
            int(id): tokenizers.AddedToken(**token)
            for id, token in config.get("added_tokens_decoder", {}).items()
        }
        for name, id in added_tokens.items():
            special = name in self.special_names
            self.added.setdefault(id, tokenizers.AddedToken(name, special=special, normalized=not special))
        for id in self.added:
            if type(id) is not int or not 0 <= id < MAX_ID:
                raise ValueError(f"adds a token with the id {id!r}, which no vocabulary has")


def content_of(token, name):
    """A token is written as its text or as an object with its text and flags; null where there is none."""
    content = token["content"] if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{name} is {content!r}, where the text of a token was expected")
    return content


def read_json_if_there(path):
    return read_json(path) if path.is_file() else {}


def read_model_ids(folder, config=None):
    """The BOS and EOS ids that the model's own files name; of several EOS ids the first."""
    config = read_json_if_there(folder / "config.json") if config is None else config
    config = config | read_json_if_there(folder / "generation_config.json")
    ids = {}
    for name in ("bos_token", "eos_token"):
        value = config.get(f"{name}_id")
        ids[name] = value[0] if isinstance(value, list) and value else value
    return {name: id for name, id in ids.items() if type(id) is int and 0 <= id < MAX_ID}


def read_chat_template(folder, entry):
    """chat_template.jinja, else what tokenizer_config.json has: a text, or several, one named "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return decode_utf8(read_bytes(path), path)
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}.get("default")
    if entry is not None and not isinstance(entry, str):
        raise ValueError(f"chat_template is a {type(entry).__name__}, where a text was expected")
    return entry
