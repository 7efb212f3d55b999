"""The family tree: what the docstrings say of it, that no line crosses a card, and where a click leads."""

import random
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

import show_structure
from models import MODEL_NAMES
from structure.picture import picture
from structure.picture.sheet import width_of
from structure.tree import ancestry, draw
from structure.tree.ancestry import Relative, relatives
from structure.tree.place import CARD, lay_out
from structure.tree.site import write as write_site
from tests.browser import Elements

ROOT = Path(__file__).parent.parent
COLUMNS = (1, 2, 3)


@cache
def found():
    return relatives()


def forest(seed):
    """A family of 30 models by chance, some older than their parents, some without a year."""
    chance, family = random.Random(seed), []
    for n in range(30):
        parent = chance.choice(family).name if family and chance.random() < 0.95 else None
        year = chance.choice([None, *range(2017, 2026)])
        changes = tuple("word " * chance.randrange(1, 25) for _ in range(chance.randrange(6)))
        family.append(Relative(f"model{n}", f"Model {n}", "", "decoder", year, parent, parent or "", changes))
    return tuple(ancestry.in_time(family))


# What the docstrings say ------------------------------------------------------------------------------------


def test_every_page_has_its_place():
    """A page that names no paper, or is new against no other, is found here."""
    assert {each.name for each in found()} == set(MODEL_NAMES)
    assert [each.name for each in found() if each.parent is None] == ["transformer"]
    for each in found():
        assert each.year, f"models/{each.name}.py: the docstring names no paper with its year"
        lines = (ROOT / "models" / f"{each.name}.py").read_text().split('"""')[1].splitlines()
        assert len(each.changes) == sum(line.startswith("- ") for line in lines), each.name
        for change in each.changes:
            assert change.split(" ")[0] and change in " ".join(" ".join(lines).split())


def test_years_and_kinds_that_one_knows():
    known = {
        "transformer": (2017, "encoder-decoder"),
        "gpt2": (2019, "decoder"),
        "bert": (2019, "encoder"),
        "vision_transformer": (2021, "vision"),
        "gpt_neox": (2022, "decoder"),
        "llama": (2024, "decoder"),
        "qwen3": (2025, "decoder"),
    }
    said = {each.name: (each.year, each.kind) for each in found()}
    assert known.items() <= said.items()


@pytest.mark.parametrize(
    "papers, year",
    [
        ("Paper: One 2001.", 2001),
        ("Papers: One 2001 (New, section 2), Two et al. 2011 (Mine, section 3), Three 2021 (Newer).", 2011),
        ("Papers: One 2001 (section 2), Two et al. 2011a (Mine2),\nThree 1999.", 2011),
        ("Papers: One 1999.\n\nIn 2024 it was found.", 1999),
        ("In 2024 it was found.", None),
    ],
)
def test_the_year_is_that_of_the_paper_which_names_the_model(papers, year):
    assert ancestry.year_of(f"Mine: a model.\n\n{papers}", "Mine") == year


def test_a_docstring_is_read():
    pages = {"llama.py": '"""Old: it was."""', "gpt2.py": "x = 1"}
    pages["llama.py"] = (
        '"""Mine: what\nit is. More.\n\nNew against gpt2:\n- a\n  b\n- c: d\nPapers: X 2020.\n"""'
    )
    one = relatives(pages)[-1]
    assert (one.title, one.parent, one.changes, one.pair) == ("Mine", "gpt2", ("a b", "c: d"), "gpt2-llama")
    alone = relatives({"llama.py": pages["llama.py"]})[0]
    assert alone.parent is None and alone.against == "gpt2", "what is not there is no parent"


def test_the_older_comes_first_and_parents_before_their_children():
    for family in (found(), forest(0)):
        names = [each.name for each in family]
        years = {each.name: each.year for each in family}
        for each in family:
            if each.parent and years[each.parent] and years[each.parent] == each.year:
                assert names.index(each.parent) < names.index(each.name)
        known = [each.year for each in family if each.year]
        assert known == sorted(known)


# Where the cards stand --------------------------------------------------------------------------------------


def overlap(a, b):
    """How wide and how high two rectangles (left, top, right, bottom) meet."""
    return min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])


def box_around(xs, ys):
    return min(xs), min(ys), max(xs), max(ys)


def rectangle(card):
    return card.x, card.y, card.x + CARD, card.bottom


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_no_line_crosses_a_card_and_no_card_another(columns, seed):
    tree = lay_out(found() if seed is None else forest(seed), columns)
    cards = [rectangle(card) for card in tree.cards]
    for n, one in enumerate(cards):
        assert one[0] >= 0 and one[2] <= tree.width + 0.01 and one[3] <= tree.high + 0.01
        assert all(min(overlap(one, other)) < 0 for other in cards[:n])
    assert len(tree.lines) == sum(card.relative.parent is not None for card in tree.cards)
    for line in tree.lines:
        for (x0, y0), (x1, y1) in zip(line.points, line.points[1:]):
            piece = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
            inside = [
                card for card in cards if overlap(piece, card)[0] > 0.01 and overlap(piece, card)[1] >= 0
            ]
            inside += [
                card for card in cards if overlap(piece, card)[1] > 0.01 and overlap(piece, card)[0] >= 0
            ]
            assert not inside, (line, piece)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("seed", [None, 4, 5])
def test_a_line_begins_at_its_parent_and_ends_at_its_child(columns, seed):
    tree = lay_out(found() if seed is None else forest(seed), columns)
    cards = {card.relative.name: card for card in tree.cards}
    parents = {name: card.relative.parent for name, card in cards.items() if card.relative.parent}
    assert {line.child: line.parent for line in tree.lines} == parents
    for line in tree.lines:
        for name, (x, y) in ((line.parent, line.points[0]), (line.child, line.points[-1])):
            left, top, right, _ = rectangle(cards[name])
            assert min(abs(x - left), abs(x - right)) < 0.01 and top < y < top + cards[name].head


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("seed", [None, 6, 7, 8])
def test_lines_of_two_parents_do_not_run_on_each_other(columns, seed):
    """They may cross, and keep apart where they run side by side."""
    tree = lay_out(found() if seed is None else forest(seed), columns)
    pieces = [(line.parent, *zip(*ends)) for line in tree.lines for ends in zip(line.points, line.points[1:])]
    for n, (parent, xs, ys) in enumerate(pieces):
        for other, other_xs, other_ys in pieces[:n]:
            wide, high = overlap(box_around(xs, ys), box_around(other_xs, other_ys))
            on_each_other = wide > 4 and high > -4 or high > 4 and wide > -4
            assert parent == other or not on_each_other, (parent, other, xs, ys)


@pytest.mark.parametrize("columns", COLUMNS)
def test_words_stand_in_their_card_and_years_run_down(columns):
    tree = lay_out(found(), columns)
    for card in tree.cards:
        for word in card.words:
            width = width_of(word.text, word.size, word.bold)
            left = word.x - width if word.anchor == "end" else word.x
            assert left > 4 and left + width < CARD - 4, word.text
            assert 0 < word.y < card.high
        head = [word for word in card.names if word.bold]
        year = card.words[0]
        assert all(width_of(word.text, word.size, True) + word.x < year.x - 30 for word in head)
    years, places = zip(*tree.years)
    assert list(years) == sorted(years) and list(places) == sorted(places)
    began = dict(tree.years)
    for card in tree.cards:
        later = [y for year, y in began.items() if year > card.relative.year]
        assert card.y >= began[card.relative.year] and all(card.y < y for y in later)


# The picture ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["family-tree.png", "family-tree.svg", "family-tree-dark.png", "family-tree-dark.svg"]
)
def test_the_picture_is_that_of_today(file):
    """Draw it again with: python show_structure.py --all"""
    path = ROOT / "structure_images" / file
    assert picture.shown(path) == draw.facts(found())
    assert path.stat().st_size < 450_000


def test_all_draws_the_tree_again():
    assert show_structure.tree_images() == [True, False]
    assert all(each.kind in draw.KINDS for each in found()), "a kind without a colour"


# The pages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of three models of one line, and of one whose parent is left out."""
    folder = tmp_path_factory.mktemp("site") / "pages"
    show_structure.write_site(folder, ("gpt2", "llama", "bert", "gpt_oss"))
    return folder


def test_every_link_leads_to_a_file_and_nothing_is_fetched(site):
    pages = {path.name for path in site.iterdir()}
    assert pages >= {"index.html", "gpt2-llama.html", "gpt2-bert.html"}
    assert pages >= {f"{name}.html" for name in ("gpt2", "llama", "bert", "gpt_oss")}
    assert not any("qwen3" in name for name in pages), "gpt_oss has no parent here"
    linked = set()
    for path in site.iterdir():
        for tag, attributes in Elements(path).elements:
            assert attributes.get("src", "data:").startswith("data:"), (path.name, tag)
            target = attributes.get("href", "#")
            if not target.startswith(("#", "data:")):
                assert tag == "a" and ":" not in target and not target.startswith("/"), target
                assert (site / unquote(target.partition("#")[0])).is_file(), (path.name, target)
                linked.add(target)
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert "@import" not in text and not re.search(r"url\((?!['\" ]*(data:|\$\{))", text)
    assert linked == pages, "each page can be reached"


def test_a_tag_publishes_what_make_pages_builds():
    workflow = (ROOT / ".github" / "workflows" / "pages.yml").read_text()
    assert "tags:" in workflow and "run: make pages" in workflow and "path: site\n" in workflow
    assert "show_structure.py --tree --html --out site\n" in (ROOT / "Makefile").read_text()


def test_a_text_that_runs_through_a_model_has_a_page(tmp_path):
    """Where there are weights for it: its model's page leads there."""
    load = cache(
        lambda name: show_structure.load("tiny-gpt2-python" if name == "gpt2" else "tiny-llama-python")
    )

    def run(name, path, ways):
        assert ways[0] == ("family tree", "index.html") and ways[1][1] == f"{name}.html"
        if name == "gpt2":
            path.write_text("a text in gpt2")
        return name == "gpt2"

    written = {path.name for path in write_site(tmp_path, load, ("gpt2", "llama"), run)}
    assert written == {path.name for path in tmp_path.iterdir()} and "gpt2-thinks.html" in written
    links = {name: Elements(tmp_path / f"{name}.html").values("href") for name in ("gpt2", "llama")}
    assert "gpt2-thinks.html" in links["gpt2"] and "llama-thinks.html" not in links["llama"]


def test_the_tree_in_a_browser(site, browser):
    """A click on what is new opens the comparison, one on a name the model; keys do the same."""
    browser.open(site / "index.html")
    shown = "return [...document.querySelectorAll('.forest')].filter((each) => each.clientWidth).length"
    assert browser.run(shown) == 1
    browser.find('.columns-3 [data-name="llama"] .news text:last-of-type').click()
    assert browser.run("return location.pathname").endswith("/gpt2-llama.html")
    browser.find(".ways a").click()
    assert browser.run("return location.pathname").endswith("/index.html")
    browser.run("document.querySelector('.columns-3 [data-name=\"bert\"] .head').focus()")
    lit = "return [...document.querySelectorAll('.columns-3 .card.lit')].map((each) => each.dataset.name)"
    assert set(browser.run(lit)) == {"bert", "gpt2", "transformer"}, "the way that leads to it"
    browser.keys("\ue007")
    assert browser.run("return location.pathname").endswith("/bert.html")


@pytest.mark.parametrize("width, columns", [(1440, 3), (800, 2), (390, 1)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_tree_fits_the_window(width, columns, dark, site, browser):
    browser.open(site / "index.html", width=width, height=800, dark=dark)
    assert browser.find(f".columns-{columns}").is_displayed()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    words = "return [...document.querySelectorAll(`.columns-${arguments[0]} .card`)].flatMap((card) => {"
    words += "const outer = card.querySelector('.news rect').getBoundingClientRect();"
    words += "return [...card.querySelectorAll('text')].filter((text) => {"
    words += "const inner = text.getBoundingClientRect();"
    words += "return inner.left < outer.left || inner.right > outer.right || inner.bottom > outer.bottom"
    words += "}).map((text) => text.textContent)})"
    assert browser.run(words, columns) == []
    size = (
        "return document.querySelector(`.columns-${arguments[0]} .card text`).getBoundingClientRect().height"
    )
    assert browser.run(size, columns) > 9, "letters that can be read"
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == dark
