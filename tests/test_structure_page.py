"""The pages of show_structure.py: what is in them, and how they behave in a real browser, from disk."""

import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from models import load_config
from show_structure import images
from structure import facts
from structure.capture import capture
from structure.compare import compare
from structure.page import page
from structure.page.rows import arrange
from tests import zoo
from tests.browser import Elements

ROOT = Path(__file__).parent.parent
MODELS = list(zoo.one_config_each("llama-3-8b", "gpt2", "bert-base-uncased", "opus-mt", "vit-b-16").values())
HOSTILE = "</script><script>window.broken = 1</script><b>\"bold\"</b> & 'quoted' {{ 7 * 7 }} <!--"


@cache
def captured(name):
    model_name, config = load_config(name)
    box = capture.capture(model_name, config)
    return box, facts.describe(name, model_name, config, box)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page_of(folder):
    """The path of a model's page, written once."""

    @cache
    def write(name):
        page.write(*captured(name), folder / f"{name}.html")
        return folder / f"{name}.html"

    return write


# What is in a page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_box_is_drawn_once_and_every_wire_has_its_ends(name, page_of):
    box, _ = captured(name)
    elements = Elements(page_of(name))
    assert sorted(elements.values("data-id")) == sorted(each.id for each in page.inside(box))
    anchors = set(elements.values("data-anchor")) | {"port:out"}
    for wires in json.loads(elements.scripts[0])[0]["wires"].values():
        assert {anchor for path, *_ in wires for anchor in path} <= anchors


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_in_the_order_of_the_data(name):
    for box in page.inside(captured(name)[0]):
        rows = arrange(box).rows
        stands = {item.anchor: n for n, row in enumerate(rows) for item in row} | {"port:out": len(rows)}
        assert len(stands) == 1 + sum(map(len, rows)), "an anchor stands twice"
        for path, edge in arrange(box).wires:
            steps = [stands[anchor] for anchor in path]
            assert steps == sorted(set(steps)), f"{box.id}: {edge.source} to {edge.target} goes back"
            if not arrange(box).has_gutter:
                assert steps == list(range(steps[0], steps[-1] + 1)), f"{box.id}: {edge} runs through a box"


def test_the_residual_stream_of_a_layer():
    """Llama reads the stream anew below the first addition; GPT-NeoX's feed-forward reads what came in."""
    wires = {}
    for name in ("llama-3-8b", "pythia-1b"):
        layer = next(box for box in page.inside(captured(name)[0]) if box.id == "layers.0")
        rows = arrange(layer)
        assert rows.has_gutter
        spine = [item.key for row in rows.rows for item in row if item.place == "spine"]
        assert spine == [child.id for child in layer.children if child.role == "add"] and len(spine) == 2
        wires[name] = {edge.target: path for path, edge in rows.wires}
    assert wires["llama-3-8b"]["layers.0.ffn_norm"][0] == "box:layers.0:add"
    assert wires["pythia-1b"]["layers.0.ffn_norm"][0] == "port:in"
    assert any(anchor.startswith("lane:in:") for anchor in wires["pythia-1b"]["layers.0.ffn_norm"])


@pytest.mark.parametrize("file", sorted(Path("models").glob("*.py")), ids=str)
def test_the_source_is_the_source(file):
    source = file.read_text(encoding="utf-8")
    lines = page.highlighted(source)
    assert [re.sub("<[^>]*>", "", line) for line in lines] == [
        str(page.escape(line)) for line in source.splitlines()
    ]
    for line in lines:
        assert line.count("<span") == line.count("</span>")


def test_shape_comments_stand_out():
    lines = page.highlighted(
        "x = 1  # (B, T)\ny = 2  # each (B, T)\nz = L  # L x (B, T)\nw = 3  # (not a shape?\nv = 4  # a note"
    )
    assert ["shape" in line for line in lines] == [True, True, True, True, False]


def test_a_page_holds_what_it_needs(page_of):
    """No address of anything outside: neither as a source, a link, nor in the style."""
    path = page_of("llama-3-8b")
    for tag, attributes in Elements(path).elements:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:")), (tag, attributes)
    addresses = set(re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8")))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a name that browsers know, which none fetches"
    assert "@import" not in path.read_text() and "url(" not in path.read_text()


def hostile(folder):
    """The page of a model whose names, titles and docstrings try to leave their strings."""
    box, info = deepcopy(captured("gpt2"))
    for each in page.inside(box):
        each.doc = each.title = HOSTILE
    box.children[0].label = HOSTILE
    info |= {"name": HOSTILE, "config": {**info["config"], HOSTILE: HOSTILE}}
    page.write(box, info, folder / "hostile.html")
    return folder / "hostile.html"


def test_a_hostile_name_stays_text(folder):
    elements = Elements(hostile(folder))
    assert len(elements.scripts) == 2 and "window.broken" not in elements.scripts[1]
    assert all(tag != "b" for tag, _ in elements.elements)
    data = json.loads(elements.scripts[0])[0]
    assert data["name"] == HOSTILE and data["config"][HOSTILE] == HOSTILE


def test_lines_that_two_sources_share():
    left, right = ["a", "b", "c", "d"], ["x", "a", "c", "y", "d"]
    assert page.same_lines(left, right) == ({1, 3, 4}, {2, 3, 5})
    assert page.same_lines(left, left) == ({1, 2, 3, 4}, {1, 2, 3, 4})
    assert page.same_lines(left, ["z"]) == (set(), set())


# In a browser -----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(browser, page_of):
    browser.open(page_of("llama-3-8b"))
    return browser


def test_pointing_at_a_box_lights_its_lines(llama):
    for name, text in [
        ("layers.0.attn.k_proj", "k = self.k_proj(x)"),
        ("final_norm", "return self.final_norm(x)"),
    ]:
        llama.point(llama.box(name))
        boxes, lines = llama.lit()
        number = llama.run(
            "const line = all('.line').find((each) => each.textContent.includes(arguments[0]));"
            "return Number(line.dataset.line)",
            text,
        )
        assert boxes == {name} and lines == [number]
        assert llama.in_view(".line.lit")
    assert llama.run("return all('.line.soft')[0].textContent").endswith("class RMSNorm(nn.Module):")
    llama.point(llama.find("h1"))
    assert llama.lit() == (set(), [])


def test_pointing_at_a_line_lights_its_boxes(llama):
    element, number = llama.line("q = self.q_proj(x)")
    llama.point(element)
    assert llama.lit() == ({"layers.0.attn.q_proj"}, [number])
    # A line inside a class that no box runs by itself: all that are of this class.
    llama.point(llama.line("self.weight = nn.Parameter(torch.ones")[0])
    assert llama.lit()[0] == {"layers.0.attn_norm", "layers.0.ffn_norm", "final_norm"}
    assert llama.in_view('.box.lit[data-id="layers.0.attn_norm"]')
    llama.point(llama.line("import math")[0])
    assert llama.lit() == (set(), [])


def test_a_click_pins(llama):
    llama.box("layers.0.attn.o_proj").click()
    assert llama.pinned() == ["layers.0.attn.o_proj"]
    assert llama.run("return location.hash") == "#layers.0.attn.o_proj"
    assert llama.find("#box h2").text == "o_proj"
    llama.point(llama.box("layers.0.ffn.up_proj"))
    assert llama.lit()[0] == {"layers.0.attn.o_proj"}, "what is pinned stays"
    llama.keys("\ue00c")
    assert llama.pinned() == [] and llama.run("return location.hash") == ""
    llama.line("return self.o_proj(out")[0].click()
    assert llama.pinned() == ["layers.0.attn.o_proj"]


@pytest.mark.parametrize(
    "link, name",
    [
        ("#layers.0.attn.q_proj", "layers.0.attn.q_proj"),
        ("#layers.17.ffn.up_proj", "layers.0.ffn.up_proj"),
        ("#layers.31", "layers.0"),
        ("#layers.2:add", "layers.0:add"),
        ("#nothing.of.ours", None),
        ("#%E0%A4%A", None),
    ],
)
def test_links(link, name, browser, page_of):
    browser.open(page_of("llama-3-8b"), link)
    assert browser.pinned() == ([name] if name else [])
    assert not name or browser.in_view(".box.pinned")
    assert not name or browser.run("return location.hash") == link, "a link to layer 17 stays one"


@pytest.mark.parametrize(
    "model, link, theirs",
    [
        ("llama-3-8b", "layers.17.ffn.up_proj", "model.layers.17.mlp.up_proj.weight"),
        ("gpt2", "layers.5.attn.q_proj", "h.5.attn.c_attn.weight"),
    ],
)
def test_a_link_to_a_layer_shows_that_layer(model, link, theirs, browser, page_of):
    browser.open(page_of(model), "#" + link)
    panel = browser.find("#box").text
    assert link in panel.splitlines() and f"{link}.weight" in panel and theirs in panel
    assert "layers.0." not in panel and "h.0." not in panel
    browser.box(browser.pinned()[0].rpartition(".")[0] + ".v_proj" if model == "gpt2" else "lm_head").click()
    assert link not in browser.find("#box").text, "another box is of the first layer"


def test_the_panel_says_the_shape_of_the_wire(llama):
    """What comes out of q_proj, and how it goes on; and what comes out for one more token."""
    llama.box("layers.0.attn.q_proj").click()
    wire = llama.run(
        "return elements[0].get('layers.0.attn.q_proj').parentElement.querySelector('.out').textContent"
    )
    panel = " ".join(llama.find("#box").text.split())
    assert wire == "(B, H, T, d)"
    assert "Output (B, T, D) (1, 512, 4096)" in panel and f"goes on as {wire} (1, 32, 512, 128)" in panel
    llama.box("model:mask").click()
    panel = " ".join(llama.find("#box").text.split())
    assert "Output (B, 1, T, S) (1, 1, 512, 512) of one more token (1, 1, 1, 2048)" in panel


def test_a_mask_is_shown_for_a_prompt_and_for_one_more_token(llama):
    llama.box("model:mask").click()
    rows = "return all('.mask').map((each) => all('i', each).map((cell) => Number(cell.className === 'on')))"
    prompt, step = llama.run(rows)
    assert prompt == [int(slot <= token) for token in range(6) for slot in range(10)]
    assert step == [int(slot <= 6) for slot in range(10)]
    assert "one more token" in llama.find("#box").text
    llama.box("layers.0.attn.q_proj").click()
    assert llama.run(rows) == []


def test_a_field_says_what_is_wrong_with_it(llama):
    remark = "return document.getElementById('remark-' + arguments[0]).textContent"
    for name, wrong, says in [
        ("B", "1.5", "a whole number, 1 or more; still counted for 1"),
        ("bandwidth", "-1", "a number above 0; still counted for 100"),
        ("T", "9000", "at most 8,192 tokens fit this model; still counted for 512"),
        ("S", "8193", "at most 8,192 tokens fit this model; still counted for 2,048"),
    ]:
        before = llama.values()
        llama.set(**{name: wrong})
        assert llama.run(remark, name) == says and llama.values() == before
        assert llama.find(f'input[name="{name}"]').get_attribute("aria-invalid") == "true"
        described = llama.find(f'input[name="{name}"]').get_attribute("aria-describedby")
        assert described == f"remark-{name}"
    llama.set(B=2, T=8192, bandwidth=0.5)
    assert [llama.run(remark, name) for name in ("B", "T", "bandwidth")] == ["", "", ""]


def test_the_numbers_are_explained_on_the_page(llama):
    """In words that a finger reaches too, which no title of a pointer is."""
    assert "At most" in llama.find("#numbers").text
    llama.find("#notes summary").click()
    words = llama.find("#notes").text
    for name in ("FLOP", "Intensity", "At most", "Fits", "Activations"):
        assert name in words
    assert llama.run("return all('#numbers dt').filter((each) => each.title).length") == 0


def test_a_link_opens_what_is_closed_and_may_change(llama):
    llama.find('[data-id="layers.0"] .toggle').click()
    assert not llama.find('[data-id="layers.0.attn.q_proj"]').is_displayed()
    llama.run("location.hash = '#layers.0.attn.q_proj'")
    assert llama.find('[data-id="layers.0.attn.q_proj"]').is_displayed()
    assert llama.pinned() == ["layers.0.attn.q_proj"]


def test_keyboard(llama):
    up, down, left, right, enter, escape = "\ue013", "\ue015", "\ue012", "\ue014", "\ue007", "\ue00c"
    focused = "return document.activeElement.dataset.id"
    llama.run("document.querySelector('.box[tabindex=\"0\"]').focus()")
    boxes = llama.run("return all('.box').map((each) => each.dataset.id)")
    llama.keys(down, down)
    assert llama.run(focused) == boxes[2] and llama.lit()[0] == {boxes[2]}
    llama.keys(up)
    assert llama.run(focused) == boxes[1]
    llama.run("elements[0].get('layers.0.attn').focus()")
    llama.keys(left)
    assert llama.find('[data-id="layers.0.attn"]').get_attribute("aria-expanded") == "false"
    llama.keys(right, right)
    assert llama.run(focused) == "layers.0.attn.o_proj"
    llama.keys(left, left, left)
    assert llama.run(focused) == "layers.0"
    llama.keys(enter)
    assert llama.pinned() == ["layers.0"]
    llama.keys(escape, "?")
    assert llama.pinned() == [] and llama.find("#keys").is_displayed()
    llama.keys("?")
    assert not llama.find("#keys").is_displayed()
    outline = llama.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert llama.run(focused) == "layers.0" and outline == "solid", "the focus is to be seen"
    assert len(llama.run("return all('.box[tabindex=\"0\"]')")) == 1


def test_the_numbers_are_those_of_python(llama):
    _, info = captured("llama-3-8b")
    llama.set(B=3, T=700, S=5000, dtype="bf16", bandwidth=936)
    shown = llama.values()
    python = facts.totals(info, "bf16", batch=3, prompt=700, cached=5000, bandwidth=936)
    names = {"weights": "weights", "cache": "cache", "perToken": "cache_per_token", "flops": "prefill_flops"}
    names |= {"stepFlops": "step_flops", "intensity": "prefill_intensity", "stepIntensity": "step_intensity"}
    for name, theirs in (names | {"tokensPerSecond": "tokens_per_second"}).items():
        assert shown[name] == pytest.approx(python[theirs], rel=1e-12), name

    # And by hand: Llama 3 8B has 8.03 B parameters; keys and values, layers, heads, features, bytes.
    assert shown["parameters"] == 8_030_261_248 and shown["weights"] == 2 * 8_030_261_248
    assert shown["perToken"] == 2 * 32 * 8 * 128 * 2 and shown["cache"] == 3 * 5000 * 131_072
    read = 2 * (8_030_261_248 - 128_256 * 4096) + 3 * 5000 * 131_072  # of token_embed, a step takes rows
    assert shown["tokensPerSecond"] == pytest.approx(3 * 936e9 / read)
    fits = llama.run("return all('.fits span').map((each) => [each.dataset.memory, each.className])")
    assert dict(fits) == {"8": "no", "16": "no", "24": "yes", "80": "yes"}

    # Every multiplication of q_proj, by hand.
    llama.box("layers.0.attn.q_proj").click()
    box = llama.values("document.getElementById('box')")
    assert box["parameters"] == 4096 * 4096 and box["bf16"] == 2 * 4096 * 4096
    assert box["boxFlops"] == 2 * 3 * 700 * 4096 * 4096 and box["boxStepFlops"] == 2 * 3 * 4096 * 4096
    assert box["activation"] == 2 * 3 * 700 * 4096
    panel = llama.find("#box").text
    assert "(3, 700, 4096)" in panel
    assert "self_attn.q_proj.weight" in panel and "all 32" in panel


@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_every_model(name, browser, page_of):
    """The terms that a page holds, summed by its script and by Python."""
    _, info = captured(name)
    browser.open(page_of(name))
    sizes = {"B": 2, "T": 300, "S": 300, "N": 70}
    shown = browser.run(
        "return Object.entries(model.boxes).map(([id, box]) =>"
        "[id, ['flops', 'activation', 'cache'].map((name) => evaluate(box[name], arguments[0]))])",
        sizes,
    )
    assert dict(shown) == {
        id: [facts.evaluate(fact[name], **sizes) for name in ("flops", "activation", "cache")]
        for id, fact in info["facts"].items()
    }


def test_a_model_of_short_texts_begins_with_one_that_fits(browser, page_of):
    browser.open(page_of("gpt2"))
    assert browser.run("return [settings.T, settings.S]") == [512, 1024]
    assert browser.run("return all('[aria-invalid=\"true\"]').length") == 0


def test_controls_change_the_numbers_at_once(llama):
    before = llama.values()
    llama.set(dtype="fp32")
    assert llama.values()["weights"] == 2 * before["weights"]
    assert llama.values()["perToken"] == 2 * before["perToken"]
    llama.set(dtype="int4", B=4)
    assert llama.values()["perToken"] == before["perToken"], "quantizing is for weights"
    assert llama.values()["cache"] == 4 * before["cache"]
    llama.set(bandwidth=1000)
    fast = llama.values()["tokensPerSecond"]
    llama.set(bandwidth=500)
    assert llama.values()["tokensPerSecond"] == pytest.approx(fast / 2)
    for wrong in ("", "-3", "0", "1.5"):
        llama.set(B=wrong)
        assert llama.find('input[name="B"]').get_attribute("aria-invalid") == "true"
        assert llama.values()["cache"] == 4 * before["cache"], "the last good number holds"
    llama.find('input[name="B"]').clear()
    llama.find('input[name="B"]').send_keys("2?t")
    assert llama.run("return document.documentElement.dataset.theme") is None, "keys in a field are text"


def test_what_a_model_has_not_is_not_asked_for(browser, page_of):
    for name, letters in [("vit-b-16", "B"), ("bert-base-uncased", "BT"), ("opus-mt", "BTNS")]:
        browser.open(page_of(name))
        asked = browser.run(
            "return all('#controls label').filter((each) => !each.hidden).map((each) => each.className)"
        )
        assert set(asked) - {""} == set(letters), name
        assert ("tokensPerSecond" in browser.values()) == ("S" in letters)


# Panes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_data_flows_upward_as_in_the_pictures(name, browser, page_of):
    """From the upper edge of its source, or the stream, a wire leads up to the lower edge of its target."""
    browser.open(page_of(name))
    falls = """
        const ends = (path) => [0, path.getTotalLength()].map((at) => {
            const point = path.getPointAtLength(at);
            return new DOMPoint(point.x, point.y).matrixTransform(path.getScreenCTM()).y;
        });
        const paths = all('.wires path:not(.tip)').filter((path) => path.getClientRects().length);
        return [paths.length, paths.filter((path) => {
            const [start, end] = ends(path), source = elements[0].get(path.dataset.source);
            const free = path.closest('.gutter') || !source;
            const edge = source?.getBoundingClientRect().top;
            const target = elements[0].get(path.dataset.target);
            const foot = target?.getBoundingClientRect().bottom + 6 * target?.matches('.folded');
            const misses = target && !target.matches('.circle') && Math.abs(end - foot) > 1.5;
            return end > start + 0.5 || misses || (!free && Math.abs(start - edge) > 1.5);
        }).map((path) => `${path.dataset.source} to ${path.dataset.target}`)];
    """
    drawn, wrong = browser.run(falls)
    assert drawn > 5 and wrong == []
    begins = browser.run(
        "const pane = document.querySelector('.pane.diagram').getBoundingClientRect();"
        "const inlet = all('.tree .ports').at(-1).getBoundingClientRect();"
        "return inlet.top > pane.top && inlet.bottom <= pane.bottom"
    )
    assert begins, "the page begins where the tokens come in"


@pytest.mark.parametrize("width", [1440, 1100, 390])
def test_no_line_of_the_source_is_cut_off(width, browser, page_of):
    browser.open(page_of("llama-3-8b"), width=width, height=844)
    if width < 600:
        browser.find('.tabs [data-pane="source"]').click()
    cut = """
        const right = document.querySelector('.pane.source').getBoundingClientRect().right;
        const ends = (node) => [...node.data.matchAll(/\\S+/g)].map((word) => {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            return range.getBoundingClientRect().right;
        });
        return all('.line .text').filter((line) => {
            const nodes = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
            while (nodes.nextNode()) if (ends(nodes.currentNode).some((end) => end > right)) return true;
            return false;
        }).map((line) => line.textContent);
    """
    assert browser.run(cut) == []
    pane = "document.querySelector('.pane.source')"
    assert browser.run(f"return {pane}.scrollWidth <= {pane}.clientWidth")
    short = "all('.shape').filter((each) => each.textContent.length < 30)"
    broken = f"return {short}.filter((each) => each.getClientRects().length > 1)"
    assert browser.run(broken) == [], "a shape stays in one piece"


def test_borders_move_by_pointer_and_by_keys(llama):
    from selenium.webdriver import ActionChains

    left, right, enter = "\ue012", "\ue014", "\ue007"
    widths = "return all('.pane').map((pane) => Math.round(pane.getBoundingClientRect().width))"
    first, middle, last = llama.run(widths)
    border = llama.find('.border[data-name="--left"]')
    ActionChains(llama.driver, duration=0).drag_and_drop_by_offset(border, 100, 0).perform()
    assert llama.run(widths) == [first + 100, middle - 100, last]
    ActionChains(llama.driver, duration=0).drag_and_drop_by_offset(border, 600, 0).perform()
    assert llama.run(widths)[1] == 180, "the next pane keeps some room"
    llama.run("arguments[0].focus()", border)
    llama.keys(enter)
    assert llama.run(widths) == [first, middle, last], "Enter moves it back"
    llama.keys(right, right, left)
    assert llama.run(widths) == [first + 24, middle - 24, last]
    assert 0 < int(border.get_attribute("aria-valuenow")) < 100
    llama.run("document.querySelector('[data-name=\"--right\"]').focus()")
    llama.keys(left)
    assert llama.run(widths) == [first + 24, middle - 48, last + 24]
    tips = llama.run("return all('.wires path.tip').length")
    assert tips and llama.run("return document.documentElement.scrollWidth") <= 1440


def test_dark(browser, page_of):
    lightness = (
        "const colour = getComputedStyle(document.body).backgroundColor;"
        "return colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0)"
    )
    for dark in (False, True):
        browser.open(page_of("gpt2"), dark=dark)
        assert (browser.run(lightness) < 150) == dark
        browser.find("#theme").click()
        assert (browser.run(lightness) < 150) != dark
        browser.keys("t")
        assert (browser.run(lightness) < 150) == dark


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_sticks_out(name, width, browser, page_of):
    """At a desk and on a phone: no sideways scrolling, boxes inside their boxes, words inside theirs."""
    browser.open(page_of(name), width=width, height=844)
    sticks_out = """
        const outside = (box, around) => {
            const inner = box.getBoundingClientRect(), outer = around.getBoundingClientRect();
            const [left, right] = [inner.left - outer.left, outer.right - inner.right];
            return Math.min(left, right, outer.bottom - inner.bottom) < -1;
        };
        return all('.box .box').filter((box) => box.offsetParent && (
            outside(box, box.parentElement.closest('.box')) || box.scrollWidth > box.clientWidth + 8
        )).map((box) => box.dataset.id);
    """
    assert browser.run(sticks_out) == []
    wires = browser.run("return all('.wires path').map((path) => path.getAttribute('d'))")
    assert wires and not any("NaN" in wire or "undefined" in wire for wire in wires)
    off_the_stream = """
        return all('.spine').map((sign) => {
            const {left, right} = sign.getBoundingClientRect();
            const group = sign.closest('.inside').getBoundingClientRect();
            return Math.abs((left + right) / 2 - group.left - SPINE);
        })
    """
    assert all(distance < 1 for distance in browser.run(off_the_stream)), "the additions stand on the stream"
    for tab in browser.driver.find_elements("css selector", ".tabs button") if width < 600 else [None]:
        if tab:
            tab.click()
            assert browser.find(f".pane.{tab.get_attribute('data-pane')}").is_displayed()
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run("return document.body.scrollWidth") <= width


def test_a_hostile_name_does_nothing_in_a_browser(browser, folder):
    browser.open(hostile(folder))
    assert browser.run("return window.broken") is None
    assert browser.find("h1").text == HOSTILE and browser.driver.title == HOSTILE
    browser.box(captured("gpt2")[0].children[0].id).click()
    assert browser.find("#box h2").text == HOSTILE and not browser.run(
        "return all('b:not([data-name])').length"
    )


# Two models -------------------------------------------------------------------------------------------------


def test_two_models_side_by_side(browser, folder):
    page.compare(*captured("gpt2"), *captured("llama-3-8b"), folder / "pair.html")
    browser.open(folder / "pair.html")
    vivid = "return all(`.box[data-model='${arguments[0]}']:not(.same)`).map((each) => each.dataset.id)"
    assert {"layers.0.attn_norm", "final_norm"} <= set(browser.run(vivid, 0)) & set(browser.run(vivid, 1))
    assert "pos_embed" in browser.run(vivid, 0)
    assert "layers.0" not in browser.run(vivid, 0) and "layers.0" not in browser.run(vivid, 1)
    sentences = [item.text for item in browser.driver.find_elements("css selector", ".differences li")]
    assert any("pos_embed" in sentence and "rope" in sentence for sentence in sentences)
    said = compare(captured("gpt2")[0], captured("llama-3-8b")[0]).sentences
    shown = browser.driver.find_elements("css selector", ".differences .sentence")
    assert len(shown) == sum(bool(sentence) for _, *both in said for sentence in both)
    assert len(browser.driver.find_elements("css selector", ".differences h3")) == len(said)

    heights = "return all('.pair > .pane.diagram').map((pane) => Math.round(pane.offsetHeight))"
    before = browser.run(heights)
    browser.run("document.querySelector('.border.level').focus()")
    browser.keys("\ue015")
    assert browser.run(heights) == [height + 24 for height in before], "both diagrams are higher"

    item = next(n for n, sentence in enumerate(sentences) if "RMSNorm" in sentence)
    browser.point(browser.driver.find_elements("css selector", ".differences li")[item])
    lit = "return all(`.box.lit[data-model='${arguments[0]}']`).map((each) => each.dataset.id)"
    assert "final_norm" in browser.run(lit, 0) and "final_norm" in browser.run(lit, 1)
    browser.point(browser.run("return elements[1].get('final_norm').querySelector('.head')"))
    assert browser.run("return all('.differences li').map((each) => each.matches('.lit'))")[item]

    # A click moves both sides, from a box that differs and from one in a box that has no twin of its own.
    for model, box, twin in [
        (0, "layers.0.ffn.up_proj", "layers.0.ffn.up_proj"),
        (1, "layers.0.attn:rotate", None),
    ]:
        browser.run(
            "document.querySelectorAll('.pane').forEach((pane) => pane.scrollTo(0, 0));"
            "elements[arguments[0]].get(arguments[1]).querySelector('.head').click()",
            model,
            box,
        )
        other = browser.run(lit, 1 - model)
        assert other == [twin or "layers.0.attn"]
        seen = f'.box.lit[data-model="{1 - model}"] > .head'
        assert browser.in_view(seen)
        pane = "return all('.code')[arguments[0]].parentElement.scrollTop"
        assert browser.run(pane, 0) > 0 and browser.run(pane, 1) > 0
    browser.keys("\ue00c")

    same = browser.run("return all('.line.same .text', all('.code')[1]).map((each) => each.textContent)")
    assert "import torch" in same and "class RMSNorm(nn.Module):" not in same

    browser.open(folder / "pair.html", width=390, height=844)
    for tab in browser.driver.find_elements("css selector", ".tabs button"):
        tab.click()
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        assert browser.find(f".pane.{tab.get_attribute('data-pane')}").is_displayed()


def test_a_model_beside_itself(browser, folder):
    page.compare(*captured("gpt2"), *captured("gpt2"), folder / "same.html")
    browser.open(folder / "same.html")
    assert browser.run("return all('.box:not(.same)').length + all('.line:not(.same)').length") == 0
    assert browser.find(".differences h2").text == "0 differences"


def test_the_pages_in_git_are_those_of_today(tmp_path):
    """`python show_structure.py --all` writes them anew."""
    for names, _, html in images():
        if html:
            path = tmp_path / ("-".join(names) + ".html")
            subjects = [part for name in names for part in captured(name)]
            (page.compare if len(names) > 1 else page.write)(*subjects, path)
            assert path.read_text() == (ROOT / "structure_images" / path.name).read_text(), path.name
