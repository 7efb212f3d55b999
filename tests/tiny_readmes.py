"""What the checkpoints that come with the project say of themselves; they are found by looking."""

import json
import re

from conversion.tables import from_hf_config
from models import kind_of
from models.utils.command_line import CHECKPOINTS

NAMES = sorted(path.parent.name for path in CHECKPOINTS.glob("tiny-*/config.json"))


def model_name_of(name):
    """Of which page a checkpoint is."""
    return from_hf_config(json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8")))[0]


def of_kind(kind):
    return [name for name in NAMES if kind_of(model_name_of(name)) == kind]


def readme_of(name):
    return (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")


def row(name, key):
    """A value in the README's tables."""
    return re.search(rf"^\| {re.escape(key)} \| (.+) \|$", readme_of(name), flags=re.M).group(1)
