"""Every page of models/ has what belongs to a page: a table, a config, a test that proves it."""

from pathlib import Path

import pytest

from conversion.tables import HF_TYPES, PAGES, default_types
from models import CONFIGS_FOLDER, MODEL_NAMES, load_config

ROOT = Path(__file__).parent.parent
every_model = pytest.mark.parametrize("model_name", MODEL_NAMES)


@every_model
def test_a_page_has_a_table(model_name):
    assert model_name in PAGES, f"models/{model_name}.py has no table: conversion/tables/{model_name}.py"


@every_model
def test_a_page_has_a_config(model_name):
    models = [load_config(path.stem)[0] for path in CONFIGS_FOLDER.glob("*.json")]
    assert model_name in models, f"models/{model_name}.py has no config in configs/"


@every_model
def test_a_page_has_a_test_that_says_how_its_shapes_are_checked(model_name):
    path = ROOT / "tests" / f"test_{model_name}.py"
    assert path.is_file(), f"models/{model_name}.py has no test: tests/{path.name}"
    assert "\nSHAPES = Case(" in path.read_text(encoding="utf-8"), f"tests/{path.name} has no SHAPES"


def test_a_table_has_a_page():
    assert set(PAGES) <= set(MODEL_NAMES)


def test_a_model_type_has_one_reader_unless_another_is_asked_for_by_name():
    readers = [hf_type for page in PAGES.values() for hf_type in page.HF_TYPES.values()]
    assert {hf_type.model for hf_type in readers} == set(PAGES)
    assert HF_TYPES["llama"].model == "llama"
    with pytest.raises(ValueError, match="tables of llama and llama both take 'llama'; by_name_only"):
        default_types({"one": PAGES["llama"], "two": PAGES["llama"]})
