"""The page in which a text runs through a model, in a real browser, from disk."""

import json
import math
from pathlib import Path

import pytest
import torch

import show_structure
from conversion.convert import convert
from models import load_model
from models.utils.command_line import CHECKPOINTS
from structure.watch.thought import Text, think

ROOT = Path(__file__).parent.parent
DATA = '<script type="application/json" id="data">'
PROMPT = "def read(path):\n    return"
HOSTILE = "<img src=x onerror='window.reached=1'></script><script>window.reached = 1</script>"
PARTS = "return all('#parts b').map((each) => Number(each.textContent.replace('−', '-')))"
PAGES = {
    "tiny-llama-python": ["--prompt", PROMPT, "--new-tokens", "6", "--lookup"],
    "tiny-moe-python": ["--prompt", HOSTILE],
    "tiny-bert-python": ["--prompt", "Return the [MASK] of the list."],
    "tiny-vit-digits": [],
    "tiny-transformer-dates": ["--prompt", "the 3rd of March, 1987"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("watch")


@pytest.fixture(scope="module")
def page_of(folder):
    done = {}

    def page(name):
        if name not in done:
            convert(CHECKPOINTS / name, out=folder / name, progress=False)
            example = CHECKPOINTS / name / "example.png"
            options = PAGES[name] or ["--image", str(example)]
            done[name] = folder / f"{name}.html"
            show_structure.main([str(folder / name), *options, "--html", "--out", str(done[name])])
        return done[name]

    return page


@pytest.fixture(scope="module")
def thought(page_of, folder):
    """The llama page's run, anew."""
    page_of("tiny-llama-python")
    model = load_model(folder / "tiny-llama-python", dtype=torch.float32, arranged=False)
    return lambda tokens: think(model, Text(tokens))


def frame(browser):
    """Wait for what is drawn in the next frame."""
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def choose(browser, **seen):
    browser.run("turn(arguments[0])", seen)
    frame(browser)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width, dark", [(1440, False), (1024, True), (390, True)])
def test_it_opens_at_every_size(name, width, dark, browser, page_of):
    """Without an error (see the fixture); nothing is wider than the window, and no canvas is empty."""
    browser.open(page_of(name), width=width, height=900, dark=dark)
    frame(browser)
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    scrolled, inner = browser.run(wide)
    assert scrolled <= inner + 1
    assert browser.run("return window.reached") is None
    painted = (
        "return all('canvas').filter((each) => each.offsetParent).map((each) => "
        "each.getContext('2d').getImageData(0, 0, each.width, each.height).data.some((n) => n > 0))"
    )
    found = browser.run(painted)
    assert len(found) == 3 and all(found)
    headings = browser.run(
        "return all('main.thought > section:not([hidden]) h2').map((each) => each.textContent)"
    )
    assert browser.run("return all('.jump a').length") == len(headings)
    has = {title: any(title in each for each in headings) for title in ("experts", "keeps", "part adds")}
    assert has["experts"] == (name == "tiny-moe-python")
    assert has["keeps"] == (name not in ("tiny-bert-python", "tiny-vit-digits"))
    assert has["part adds"] == (name != "tiny-bert-python")


def test_a_hostile_text_stays_text(browser, page_of):
    browser.open(page_of("tiny-moe-python"))
    assert browser.run("return document.querySelectorAll('img').length") == 0
    shown = browser.run("return all('#tokens .token').map((each) => each.textContent).join('')")
    assert HOSTILE.replace(" ", "") in shown.replace(" ", "").replace("·", "")


def test_temperature_and_top_p(browser, page_of, thought):
    browser.open(page_of("tiny-llama-python"))
    tokens, given = browser.run("return [run.tokens, run.given]")
    logits = thought(tokens).logits[given - 1]
    for temperature, top_p in ((1, 1), (0.5, 1), (1.7, 1), (1, 0.6)):
        browser.run(
            "byId('temperature').value = arguments[0]; byId('top-p').value = arguments[1];"
            "byId('top-p').dispatchEvent(new Event('input'))",
            temperature,
            top_p,
        )
        frame(browser)
        probs = (logits / temperature).softmax(dim=0).sort(descending=True).values
        kept = int((probs.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(probs)
        expected = [(p / probs[:kept].sum()).item() if n < kept else 0 for n, p in enumerate(probs[:10])]
        widths = browser.run(
            "return all('#guesses li:not(.others) i').map((each) => parseFloat(each.style.width) / 100)"
        )
        for found, p in zip(widths, expected):
            assert found == pytest.approx(p, abs=3e-3)
    says = browser.run("return document.querySelector('[data-of=next]').textContent")
    assert "the model expects" in says


def test_a_pair_has_its_numbers(browser, page_of, thought):
    """q . k, the scale and the probability that a page shows are those of the run."""
    browser.open(page_of("tiny-llama-python"))
    found = thought(browser.run("return run.tokens"))
    for module, head, at, column in ((0, 0, 5, 2), (3, 5, 7, 7), (5, 7, 4, 0)):
        choose(browser, module=module, head=head, at=at, column=column)
        heads = found.attention[module]
        dot = (heads.q[head, at] @ heads.k[head // 2, column]).item()
        p = heads.probs[head, at, column].item()
        numbers = browser.run("return all('#pair dd b').map((each) => each.textContent)")
        assert float(numbers[0]) == pytest.approx(dot, rel=0.02, abs=0.02)
        assert float(numbers[1]) == pytest.approx(dot / math.sqrt(32), rel=0.02, abs=0.02)
        said = browser.run("return probability(modules[seen.module], seen.head, seen.at, seen.column)")
        assert said == pytest.approx(p, abs=0.004)
    marked = browser.run("return chips.map((each) => Number(each.style.getPropertyValue('--look-at')) ** 2)")
    assert marked == pytest.approx(found.attention[5].probs[7, 4].tolist(), abs=0.004)


def test_the_parts_that_are_drawn_add_up(browser, page_of, thought):
    browser.open(page_of("tiny-llama-python"))
    logits = thought(browser.run("return run.tokens")).logits
    for at in (2, 6):
        choose(browser, at=at)
        parts = browser.run(
            "return all('#parts b').map((each) => Number(each.textContent.replace('−', '-')))"
        )
        assert sum(parts) == pytest.approx(logits[at].max().item(), abs=0.1)
    browser.run("all('#versus button')[1].click()")
    frame(browser)
    parts = browser.run(PARTS)
    first, second = logits[6].topk(2).values.tolist()
    assert sum(parts) == pytest.approx(first - second, abs=0.1)


def test_pointing_at_a_box_shows_its_tensor_and_lights_its_line(browser, page_of, thought):
    browser.open(page_of("tiny-llama-python"))
    tokens = browser.run("return run.tokens")
    browser.run("document.getElementById('inside').scrollIntoView()")
    browser.point(browser.box("layers.0.attn.q_proj"))
    frame(browser)
    assert browser.find("#value-name").text == "layers.0.attn.q_proj"
    assert "(B, T, D)" in browser.find("#value-shape").text
    boxes, lines = browser.lit()
    assert boxes == {"layers.0.attn.q_proj"} and len(lines) == 1
    browser.run("layer.value = 4; layer.dispatchEvent(new Event('input'))")
    frame(browser)
    assert browser.find("#value-name").text == "layers.4.attn.q_proj"
    values = browser.run(
        "const [path, {most}] = entry(); return [...codesOf(path)].map((code) => valueOf(code, most))"
    )
    model_values = thought(tokens).recording.outputs["layers.4.attn.q_proj"][0][1][0]
    groups = model_values.unflatten(1, (-1, 4))
    expected = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)).flatten()
    torch.testing.assert_close(
        torch.tensor(values), expected, atol=0.02 * expected.abs().max().item(), rtol=0
    )


def test_the_keyboard_is_enough(browser, page_of):
    browser.open(page_of("tiny-llama-python"))
    right, left, down, end = "\ue014", "\ue012", "\ue015", "\ue010"
    browser.run("byId('tokens').focus()")
    before = browser.run("return seen.at")
    browser.keys(right)
    frame(browser)
    assert browser.run("return [seen.at, all('.token.at').length, Number(slider.value)]") == [
        before + 1,
        1,
        before + 1,
    ]
    browser.keys(end)
    frame(browser)
    assert browser.run("return seen.at === rows.length - 1")
    browser.run("byId('heads').focus(); turn({ module: 0, head: 0 })")
    browser.keys(down, right)
    frame(browser)
    assert browser.find("#head-name").text == "layer 1 attn, head 2 of 8"
    browser.run("byId('head').focus()")
    browser.keys(left)
    frame(browser)
    assert browser.run("return seen.column !== null")
    reachable = browser.run(
        "return ['tokens', 'play', 'place', 'temperature', 'top-p', 'heads', 'head', 'layer', 'values']"
        ".every((id) => byId(id).tabIndex >= 0)"
    )
    assert reachable


def test_playing_writes_token_by_token(browser, page_of):
    """The cache grows slot by slot, what is not yet written is faint, and drafts are marked."""
    browser.open(page_of("tiny-llama-python"))
    full = "return all('.slot-of.full').length"
    given, count = browser.run("return [run.given, rows.length]")
    assert browser.run(full) == given == count - browser.run("return all('.token.ahead').length")
    browser.run("play.click()")
    browser.driver.implicitly_wait(0)
    browser.driver.set_script_timeout(10)
    browser.driver.execute_async_script("setTimeout(arguments[0], 1600)")
    frame(browser)
    assert browser.run(full) == given + 2
    browser.run("play.click()")
    assert browser.run("return timer") == 0
    rounds = browser.run("return run.rounds")
    accepted = sum(each["accepted"] for each in rounds)
    assert browser.run("return all('.token.accepted').length") == accepted
    assert sum(len(each["tokens"]) for each in rounds) == count - given


def test_light_and_dark_draw_anew(browser, page_of):
    browser.open(page_of("tiny-llama-python"))
    pixel = "return [pictureInk, ink('text').join()]"
    light = browser.run(pixel)
    browser.run("byId('theme').click()")
    frame(browser)
    assert all(new != old for new, old in zip(browser.run(pixel), light))


@pytest.mark.parametrize("name", [name for name, _ in show_structure.thinking_pages()])
def test_the_pages_in_git_are_those_of_today(name, tmp_path, monkeypatch):
    """`python show_structure.py --all` writes them anew. Numbers, which other processors round otherwise, are
    left out of the comparison."""
    kept = ROOT / "structure_images" / f"{name}-thinks.html"
    convert(CHECKPOINTS / name, out=tmp_path / name, progress=False)
    monkeypatch.chdir(ROOT)
    asked = dict(show_structure.thinking_pages())[name]
    show_structure.watch_it_think(str(tmp_path / name), asked, tmp_path / "now.html")
    pages = [path.read_text(encoding="utf-8").split(DATA) for path in (kept, tmp_path / "now.html")]
    (before, rest), (before_now, rest_now) = pages
    data, after = rest.split("</script>", 1)
    data_now, after_now = rest_now.split("</script>", 1)
    assert before == before_now and after == after_now
    runs = [json.loads(text)[0]["watch"] for text in (data, data_now)]
    for part in ("rows", "given", "dropped", "rounds", "asked", "caches"):
        assert runs[0][part] == runs[1][part]
    assert runs[0].keys() == runs[1].keys() and kept.stat().st_size < 1_100_000
