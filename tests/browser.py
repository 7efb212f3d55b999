"""Pages as a test sees them: their elements as text, and a real browser that opens them from disk."""

import json
import shutil
from html.parser import HTMLParser

import pytest


class Elements(HTMLParser):
    """Every element of a page as (tag, attributes), and the text of its scripts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.scripts, self.inside = [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Told where the driver is, Selenium fetches none.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


class Browser:
    """One page in the browser; closing it checks that nothing was fetched and nothing went wrong."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, link="", width=1440, height=900, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + link)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def box(self, name):
        """The head of a box, which is where a pointer meets no other."""
        return self.run(
            "const box = elements[0].get(arguments[0]); return box.querySelector('.head') ?? box", name
        )

    def line(self, text):
        """The element of the first line that holds a text, and its number."""
        return self.run(
            "const line = all('.line').find((each) => each.textContent.includes(arguments[0]));"
            "line.scrollIntoView({block: 'center'});"
            "return [line.querySelector('.text span, .text'), Number(line.dataset.line)]",
            text,
        )

    def point(self, element):
        from selenium.webdriver import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver, duration=0).move_to_element(element).perform()

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def lit(self):
        """The ids of the lit boxes and the numbers of the lit lines."""
        return (
            set(self.run("return all('.box.lit').map((each) => each.dataset.id)")),
            self.run("return all('.line.lit').map((each) => Number(each.dataset.line))"),
        )

    def pinned(self):
        return self.run("return all('.box.pinned').map((each) => each.dataset.id)")

    def values(self, root="document"):
        """{name: the exact number} of the facts that are shown."""
        named = f"all('[data-name]', {root})"
        return dict(
            self.run(f"return {named}.map((each) => [each.dataset.name, Number(each.dataset.value)])")
        )

    def set(self, **fields):
        for name, value in fields.items():
            self.run(
                "const field = controls.elements[arguments[0]]; field.value = arguments[1];"
                "field.dispatchEvent(new Event('input', {bubbles: true}))",
                name,
                str(value),
            )

    def in_view(self, selector):
        """Whether an element stands inside its pane's window."""
        return self.run(
            "const element = document.querySelector(arguments[0]), pane = element.closest('.pane');"
            "const a = element.getBoundingClientRect(), b = pane.getBoundingClientRect();"
            "return a.top >= b.top && a.top < b.bottom",
            selector,
        )


@pytest.fixture
def browser(driver):
    driver.get("about:blank")
    driver.get_log("browser"), driver.get_log("performance")  # what came before is forgotten
    yield Browser(driver)
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(url.startswith(("file:", "data:", "about:")) for url in asked), asked
