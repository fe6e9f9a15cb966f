"""The page in a browser: what it shows, what it asks, and that nothing that it is told becomes code."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.serve.server.running import Running
from tests.serve.server.stub import Stub, serving

FILES = Path(str(resources.files("moesaic.serve"))) / "server" / "page_files"
SCRIPTS = sorted(FILES.glob("*.js"))

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver (Debian: apt-get install chromium-driver)"
)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


def test_nothing_is_inline_and_nothing_comes_from_outside() -> None:
    elements = _Elements((FILES / "index.html").read_text())
    for tag, attributes in elements.found:
        assert tag not in {"style", "iframe", "object", "base", "img"}
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag != "script" or attributes.get("src")
        for name in {"src", "href"} & set(attributes):
            address = attributes[name] or ""
            # Relative, so that the page works under a proxy's prefix.
            assert address.startswith("#") or (FILES / address.removeprefix("page/")).is_file()
    text = "".join(file.read_text() for file in [*SCRIPTS, FILES / "style.css"])
    assert not re.search(r"https?://|url\(|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    assert len(elements.ids) == len(set(elements.ids))


def test_scripts_find_what_they_look_for() -> None:
    ids = set(_Elements((FILES / "index.html").read_text()).ids)
    text = "".join(file.read_text() for file in SCRIPTS)
    asked = set(re.findall(r'byId\("([^"]+)"\)', text))
    assert asked
    assert asked <= ids


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the syntax of the scripts")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_scripts_are_valid(script: Path, tmp_path: Path) -> None:
    module = tmp_path / f"{script.stem}.mjs"
    module.write_text(script.read_text())
    checked = subprocess.run(["node", "--check", str(module)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


class Page:
    """A browser with the page, as a person uses it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, width: int = 1280, height: int = 900, **media: str) -> Page:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get_log("browser")
        self.driver.get(address)
        return self

    def get(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *values)

    def text(self, what: str) -> str:
        """Of the first that fits; nothing where none does yet, so that ``until`` can wait for it."""
        return self.get("document.querySelector(arguments[0])?.textContent ?? ''", what)

    def visible(self, what: str) -> bool:
        return self.get("document.querySelector(arguments[0]).checkVisibility()", what)

    def find(self, what: str) -> Any:
        return self.driver.find_element("css selector", what)

    def until(self, true: Callable[[], Any], said: str = "") -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda _: true(), said)

    def live(self) -> Page:
        """Waits for the second look at /stats: the first has nothing to be compared with."""
        self.until(
            lambda: self.text("#state") == "live" and self.text("#generated") not in "–0", "the page is not live"
        )
        return self

    def say(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.find("#chat-input").send_keys(text, Keys.ENTER)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()

    def rows(self, table: str) -> list[list[str]]:
        script = "[...document.querySelectorAll(arguments[0])].map((row) => [...row.cells].map((c) => c.textContent))"
        return self.get(script, f"{table} tbody tr")

    def complaints(self) -> list[str]:
        """Of the browser: violations of the policy, exceptions, files that are missing."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    yield Page(driver)
    driver.get("about:blank")  # no page asks a stub that is gone


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def address(stub: Stub) -> Iterator[str]:
    with serving(stub) as address:
        yield address


@in_browser
@pytest.mark.slow
class TestNumbers:
    def test_what_the_server_tells(self, page: Page, address: str) -> None:
        page.open(address).live()
        assert page.text("#model") == "tiny-moe"
        assert page.driver.title == "tiny-moe · moesaic server"
        assert (page.text("#running"), page.text("#waiting"), page.text("#pages")) == ("11", "3", "34\u00a0%")
        assert page.text("#pages-note").startswith("1,400 of 4,096 pages of 16 tokens; 900 kept")
        assert page.text("#slots") == "24 of 64 expert slots in use"
        assert [row[:2] for row in page.rows("#adapters-some")] == [["law", "2"], ["medicine", "2"]]
        page.until(lambda: re.fullmatch(r"[2-4]\d\d", page.text("#generated")))  # 180 to 420 a look, one look a second
        assert page.complaints() == []

    def test_tables_are_exact(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address).live()
        stub.busy = False
        page.find("#spans button[data-seconds=Infinity]").click()
        page.find("#numbers summary").click()
        page.until(lambda: page.rows("#by-layer"))
        page.driver.execute_script(
            "const s = document.getElementById('table-layer'); s.value = '2'; s.dispatchEvent(new Event('change'))"
        )
        load = stub.load[2]
        total = sum(load)
        expected = [[str(e), f"{rows:,}", f"{16 * rows / total:.2f}"] for e, rows in enumerate(load)]
        page.until(lambda: [[row[0], row[1], row[3]] for row in page.rows("#by-expert")] == expected)
        best = load.index(max(load))
        assert page.rows("#by-layer")[2] == ["2", f"{total:,}", str(best), f"{16 * max(load) / total:.2f}", "0 of 16"]

    def test_colours_follow_the_load(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address, color_scheme="light", reduced_motion="reduce").live()
        shades = page.get(
            """(() => {
                const canvas = document.getElementById("map-cells"), pen = canvas.getContext("2d");
                const width = canvas.width / 16;  // a little from a cell's corner: its number is in its middle
                return [...Array(16).keys()].map((e) =>
                    pen.getImageData((e + 0.2) * width, 18 + 36 + 28, 1, 1).data.slice(0, 3).reduce((a, b) => a + b));
            })()"""
        )
        ratios = [weight / (sum(stub.weights[1]) / 16) for weight in stub.weights[1]]
        order = sorted(range(16), key=ratios.__getitem__)
        assert [shades[e] for e in order] == sorted(shades, reverse=True)
        assert shades[order[0]] - shades[order[-1]] > 200

    def test_an_idle_server(self, page: Page, address: str, stub: Stub) -> None:
        stub.busy, stub.adapters = False, []
        page.open(address)
        page.until(lambda: page.text("#map-summary") == "No token in the last 10 s.")
        assert page.text("#generated") == "0"
        assert page.visible("#adapters-none")
        assert not page.visible("#adapters-some")

    def test_a_large_model(self, page: Page) -> None:
        stub = Stub(layers=48, experts=128)
        with serving(stub) as address:
            page.open(address).live()
            assert "of 6,144 experts" in page.text("#map-summary") or "Every expert" in page.text("#map-summary")
            page.find("#map").click()
            page.press("END", "PAGE_DOWN")
            assert page.text("#map-said").startswith("Layer 47, expert 127: ")
            assert page.get("document.documentElement.scrollWidth") <= 1280
            assert page.complaints() == []

    def test_a_model_without_experts(self, page: Page) -> None:
        with serving(Stub(layers=0)) as address:
            page.open(address).live()
            assert page.text("#map-summary") == "This model has no expert layers."
            assert page.complaints() == []

    def test_loading(self, page: Page, address: str, stub: Stub) -> None:
        stub.state = "loading"
        page.open(address)
        page.until(lambda: page.text("#state") == "loading")
        stub.state = "ready"
        page.live()
        page.until(lambda: page.get("document.getElementById('chat-model').options.length") == 3)


@in_browser
@pytest.mark.slow
class TestAccess:
    def test_the_keyboard_reaches_everything(self, page: Page, address: str) -> None:
        page.open(address).live()
        reached = []
        for _ in range(40):
            page.press("TAB")
            reached.append(page.get("document.activeElement.id || document.activeElement.textContent"))
            if reached[-1] == "To the chat" and len(reached) > 1:
                break
        assert reached[0] == "To the chat"
        for name in ("last 10 s", "since the start", "map", "The same as tables", "chat-log", "chat-model"):
            assert name in reached
        for name in ("chat-input", "chat-send", "Settings", "chat-new", "chat with it"):
            assert name in reached

    def test_the_map_by_keyboard(self, page: Page, address: str) -> None:
        page.open(address).live()
        page.press(*["TAB"] * 5)
        assert page.get("document.activeElement.id") == "map"
        assert page.text("#map-said").startswith("Layer 0, expert 0: ")
        page.press("ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
        assert page.text("#map-said").startswith("Layer 1, expert 1: ")
        assert page.text("#tip").startswith("Layer 1, expert 1: ")
        assert page.visible("#tip")
        page.press("ESCAPE")
        assert not page.visible("#tip")
        page.press("END", "PAGE_DOWN", "ARROW_DOWN", "ARROW_RIGHT")
        assert page.text("#map-said").startswith("Layer 3, expert 15: ")

    def test_the_map_by_pointer(self, page: Page, address: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        page.open(address).live()
        cells = page.find("#map-cells")
        left, top = -cells.size["width"] / 2, -cells.size["height"] / 2
        x, y = left + 3.5 * cells.size["width"] / 16, top + 18 + 2.5 * 36
        ActionChains(page.driver).move_to_element_with_offset(cells, int(x), int(y)).perform()
        assert page.text("#tip").startswith("Layer 2, expert 3: ")
        assert page.visible("#tip")
        assert page.text("#map-readout") == ""
        ActionChains(page.driver).click().perform()
        assert page.text("#map-readout").startswith("Layer 2, expert 3: ")

    @pytest.mark.parametrize(("width", "experts"), [(320, 16), (360, 128), (768, 64)])
    def test_narrow_screens(self, page: Page, width: int, experts: int) -> None:
        with serving(Stub(layers=24, experts=experts, adapters=["an-adapter-with-a-rather-long-name" * 3])) as address:
            page.open(address, width=width, height=740).live()
            page.say("A word that is longer than the screen is wide: " + 60 * "w")
            page.until(lambda: page.get("document.querySelectorAll('.assistant .note:not(:empty)').length"))
            assert page.get("document.documentElement.scrollWidth") <= width
            outside = page.get(
                """[...document.querySelectorAll("button, select, input, textarea, h2, .tiles b")]
                    .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1)
                    .map((e) => e.outerHTML)"""
            )
            assert outside == []

    def test_light_and_dark(self, page: Page, address: str) -> None:
        seen = {}
        for scheme in ("light", "dark"):
            page.open(address, color_scheme=scheme).live()
            seen[scheme] = page.get("getComputedStyle(document.body).backgroundColor")
        assert seen == {"light": "rgb(246, 245, 241)", "dark": "rgb(19, 20, 25)"}

    @pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
    def test_motion(self, page: Page, address: str, motion: str, moves: bool) -> None:
        count = "window.frames_asked = 0; const ask = window.requestAnimationFrame;" + (
            "window.requestAnimationFrame = (f) => { window.frames_asked += 1; return ask(f); };"
        )
        added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": count})
        try:
            page.open(address, reduced_motion=motion).live()
            assert (page.get("window.frames_asked") > 0) is moves
        finally:
            page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@in_browser
@pytest.mark.slow
class TestConnection:
    def test_gone_and_back(self, page: Page, stub: Stub) -> None:
        with serving(stub) as address:
            page.open(address).live()
        port = int(address.rsplit(":", 1)[1])
        page.until(lambda: page.text("#state") == "no connection")
        assert page.text("#notice-text") == "The server does not answer: what you see is what it last told."
        assert page.visible("#notice-retry")
        again = Stub(experts=8)  # another server: none of its numbers may be subtracted from the other one's
        with serving(again, port):
            page.live()
            assert not page.visible("#notice")
            page.until(lambda: "rows in the last 10 s" in page.text("#map-summary"))
            assert "-" not in page.text("#map-summary")

    def test_the_key(self, page: Page, address: str, stub: Stub) -> None:
        stub.key = "right"
        page.open(address)
        page.until(lambda: page.visible("#key"))
        page.find("#key-input").send_keys("wrong\n")
        page.until(lambda: page.text("#key-note") == "The key that was used is not one of its keys.")
        page.until(lambda: page.visible("#key"))
        page.find("#key-input").send_keys("right\n")
        page.live()
        page.say("Hi")
        page.until(lambda: "4 tokens" in page.text("#chat-log"))
        page.driver.refresh()
        page.live()
        assert not page.visible("#key")
        assert page.get("localStorage.length") == 0
        assert page.get("document.cookie") == ""
        assert "right" not in page.get("document.documentElement.outerHTML")

    def test_without_a_key(self, page: Page, address: str, stub: Stub) -> None:
        stub.key = "right"
        page.open(address)
        page.driver.execute_script("sessionStorage.clear()")
        page.driver.refresh()
        page.until(lambda: page.visible("#key"))
        page.press("ESCAPE")
        page.until(lambda: page.visible("#notice"))
        assert not page.visible("#key")
        page.find("#notice-retry").click()
        page.until(lambda: page.visible("#key"))


@in_browser
@pytest.mark.slow
class TestChat:
    def test_it_streams_and_remembers(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address).live()
        stub.more = threading.Event()
        page.say("Hi")
        page.until(lambda: page.text(".assistant .text") == "Hello")  # the rest is still to come
        assert page.visible("#chat-stop")
        stub.more.set()
        page.until(lambda: page.text(".assistant .note").startswith("tiny-moe · 4 tokens, "))
        assert page.text(".assistant .text") == "Hello, world."
        assert not page.visible("#chat-stop")
        page.say("And then?")
        page.until(lambda: len(stub.asked) == 2)
        assert stub.asked[1]["messages"] == [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello, world."},
            {"role": "user", "content": "And then?"},
        ]
        assert (stub.asked[1]["model"], stub.asked[1]["stream"]) == ("tiny-moe", True)
        page.until(lambda: not page.visible("#chat-stop"))
        page.find("#chat-new").click()
        assert page.text("#chat-log").startswith("Nothing said yet.")
        page.say("Anew")
        page.until(lambda: len(stub.asked) == 3)
        assert len(stub.asked[2]["messages"]) == 1

    @pytest.mark.parametrize("how", ["button", "key"])
    def test_stop(self, page: Page, address: str, stub: Stub, how: str) -> None:
        page.open(address).live()
        stub.more = threading.Event()
        page.say("Hi")
        page.until(lambda: page.text(".assistant .text") == "Hello")
        if how == "button":
            page.find("#chat-stop").click()
        else:
            page.press("ESCAPE")
        assert stub.left.wait(30), "the server was not told"
        page.until(lambda: page.text(".assistant .note") == "tiny-moe · stopped")
        stub.more = None
        page.say("Go on")
        page.until(lambda: len(stub.asked) == 2)
        assert stub.asked[1]["messages"][1] == {"role": "assistant", "content": "Hello"}

    def test_a_refusal(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address).live()
        stub.refusal = (429, "64 requests wait: try again in 2 s")
        page.say("Hi")
        page.until(lambda: page.text("#chat-log [role=alert]") == "64 requests wait: try again in 2 s")
        assert page.get("document.getElementById('chat-input').value") == "Hi"
        stub.refusal = None
        page.say("")
        page.until(lambda: "Hello, world." in page.text("#chat-log"))
        assert stub.asked[-1]["messages"] == [{"role": "user", "content": "Hi"}]

    def test_an_answer_that_breaks_off(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address).live()
        stub.breaks = True
        page.say("Hi")
        page.until(lambda: page.text(".assistant .note") == "The answer broke off.")
        assert page.text(".assistant .text") == "Hello, world."

    def test_an_error_in_an_answer(self, page: Page, address: str, stub: Stub) -> None:
        page.open(address).live()
        stub.error = "the engine failed while it computed this"
        page.say("Hi")
        page.until(lambda: page.text(".assistant .note") == stub.error)
        assert page.text(".assistant .text") == "Hello, world."

    def test_adapters(self, page: Page, address: str, stub: Stub) -> None:
        stub.leaving = ("physics",)
        page.open(address).live()
        assert [row[0] for row in page.rows("#adapters-some")] == ["law", "medicine", "physics (unloading)"]
        assert not page.visible("button[aria-label='chat with physics']")
        options = "[...document.getElementById('chat-model').options].map((o) => o.textContent)"
        assert page.get(options) == ["tiny-moe (base)", "law", "medicine"]
        page.find("#adapters-rows button[aria-label='chat with medicine']").click()
        page.say("Hi")
        page.until(lambda: "medicine · 4 tokens" in page.text("#chat-log"))
        assert stub.asked[0]["model"] == "medicine"
        stub.adapters = ["law", "poems"]
        page.until(lambda: page.get(options) == ["tiny-moe (base)", "law", "poems"])
        assert "medicine is no longer loaded: tiny-moe answers from now on." in page.text("#chat-log")

    def test_without_a_chat_template(self, page: Page, address: str, stub: Stub) -> None:
        stub.chat = False
        page.open(address).live()
        assert page.text("#h-chat") == "Continue a text"
        page.say("def ")
        page.until(lambda: page.text(".assistant .text") == "def Hello, world.")
        assert stub.asked[0]["prompt"] == "def "
        assert "messages" not in stub.asked[0]

    def test_no_text_becomes_code(self, page: Page) -> None:
        hostile = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'
        stub = Stub(adapters=[hostile], answer=[hostile, "<b>bold</b>"])
        with serving(stub) as address:
            page.open(address).live()
            page.say(hostile)
            page.until(lambda: page.text(".assistant .text") == hostile + "<b>bold</b>")
            stub.refusal = (400, hostile)
            page.say("Hi")
            page.until(lambda: page.text("#chat-log [role=alert]") == hostile)
            assert page.get("document.querySelectorAll('img, main script, #chat-log b').length") == 0
            assert page.get("window.hacked === undefined")


@in_browser
@pytest.mark.slow
def test_a_real_server(page: Page, served: Running) -> None:
    page.open(served.url)
    page.until(lambda: page.text("#state") == "live")
    assert page.text("#model") == "base"
    page.until(lambda: [row[0] for row in page.rows("#adapters-some")] == ["poet"])
    page.find("#adapters-rows button[aria-label='chat with poet']").click()
    page.say("Once upon a time")
    page.until(lambda: re.search(r"poet · \d+ tokens?, ", page.text(".assistant .note")))
    page.find("#spans button[data-seconds=Infinity]").click()
    page.find("#numbers summary").click()

    def rows() -> list[int]:
        return [int(row[1].replace(",", "")) for row in page.rows("#by-layer")]

    page.until(lambda: rows() == [sum(load) for load in served.engine.stats().expert_load.values()] and all(rows()))
    page.until(lambda: page.text("#running") == "0")
    assert page.complaints() == []
