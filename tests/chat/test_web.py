"""The page in a real browser: Chromium, driven by playwright. Both have to be installed, and gradio:
`pip install gradio playwright`, `apt-get install chromium`."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megamm.chat.answering import Answerer
from megamm.chat.conversation import Conversation
from megamm.chat.web import Chat
from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.inference import Decoding, Model

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if BROWSER else ["chromium"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
LENGTH = 60
QUESTION = "what <b>is</b> this & that?"
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def greedy(model: Model, turns: list[Turn], pictures: list[Path]) -> str:
    return model.generate([turns], [pictures], LENGTH)[0]


def squeezed(text: str) -> str:
    """Without white space, of which a page keeps not all."""
    return re.sub(r"\s", "", text)


class Page:
    """A visitor's page. What the browser complains of and where it asks is kept."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#question textarea")

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def ask(self, question: str, *pictures: Path) -> None:
        if pictures:
            self.page.set_input_files("#question input[type=file]", [str(p) for p in pictures])
            self.page.wait_for_selector(f"#question .thumbnails img >> nth={len(pictures) - 1}")
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def bubbles(self, who: str) -> list[str]:
        """What the user or the bot says on the page."""
        return self.page.locator(f"#conversation [data-testid={who}]").all_inner_texts()

    def wait_until_still(self) -> None:
        """Until no answer is being given."""
        self.page.wait_for_selector("#stop:not([disabled])")
        self.page.wait_for_selector("#stop[disabled]", state="attached")

    def answer(self) -> str:
        """The last answer, when it is complete."""
        self.wait_until_still()
        return self.bubbles("bot")[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(
    browser: Any, answerer_under: Callable[..., Answerer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Page]]:
    """Opens the page of a model that takes its time."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    from megamm.chat.page import Texts, build, served

    answerer, decoding = answerer_under(), Decoding(LENGTH)
    quick = answerer.answer

    def slow(question: Any, decoding: Decoding, listener: Callable[[str], None]) -> str:
        return quick(question, decoding, lambda text: (time.sleep(0.03), listener(text))[1])

    monkeypatch.setattr(answerer, "answer", slow)
    page = build(Chat(answerer, decoding), Texts("a model", "", None, True), decoding, [], tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened: list[Page] = []
    with served(page, "127.0.0.1", port, 1) as address:

        def open_one(**options: Any) -> Page:
            opened.append(Page(browser, address, **options))
            return opened[-1]

        yield open_one
        for visitor in opened:
            visitor.page.close()
    assert opened and all(visitor.elsewhere == [] for visitor in opened), "asked another host"


@pytest.mark.slow
@needs_browser
def test_ask_stop_and_clear(model: Model, open_page: Callable[..., Page], pictures: list[Path]) -> None:
    visitor = open_page()
    first = [Turn("user", f"<image>\n{QUESTION}")]
    wanted = greedy(model, first, pictures[:1])
    visitor.ask(QUESTION, pictures[0])
    visitor.page.wait_for_selector("#conversation [data-testid=bot]")
    seen = set()
    while visitor.page.locator("#stop[disabled]").count() == 0:
        seen.update(visitor.bubbles("bot"))
        time.sleep(0.05)
    growing = sorted({squeezed(text).rstrip("…") for text in seen}, key=len)
    assert len(growing) > 3 and all(squeezed(wanted).startswith(text) for text in growing)
    assert squeezed(visitor.bubbles("bot")[-1]) == squeezed(wanted)
    assert visitor.bubbles("user")[-1].strip() == QUESTION, "tags are words"
    share = visitor.page.locator("#conversation [aria-label=Share]")
    assert not any(share.nth(number).is_visible() for number in range(share.count()))
    assert visitor.page.locator("#conversation [data-testid=user] img").count() == 1

    second = [*first, Turn("assistant", wanted), Turn("user", "a dog?")]
    wanted = greedy(model, second, pictures[:1])
    visitor.ask("a dog?")
    visitor.page.wait_for_function(
        "document.querySelectorAll('#conversation [data-testid=bot]').length == 2 &&"
        " [...document.querySelectorAll('#conversation [data-testid=bot]')].at(-1).innerText.length > 5"
    )
    visitor.page.click("#stop")
    visitor.page.wait_for_selector("#stop[disabled]")
    heard = visitor.bubbles("bot")[-1]
    assert squeezed(wanted).startswith(squeezed(heard)) and 5 < len(squeezed(heard)) < len(squeezed(wanted))

    visitor.page.click("#clear")
    visitor.page.wait_for_selector("#conversation [data-testid=bot]", state="detached")
    visitor.ask("a dog?")
    assert squeezed(visitor.answer()) == squeezed(greedy(model, [Turn("user", "a dog?")], []))
    assert visitor.errors == []


@pytest.mark.slow
@needs_browser
def test_clear_in_the_middle_of_an_answer(model: Model, open_page: Callable[..., Page]) -> None:
    visitor = open_page()
    visitor.ask("a red circle")
    visitor.page.wait_for_selector("#stop:not([disabled])")
    visitor.page.click("#clear")
    visitor.page.wait_for_selector("#stop[disabled]")
    time.sleep(0.5)
    assert visitor.bubbles("bot") == []
    visitor.ask("a dog?")
    assert squeezed(visitor.answer()) == squeezed(greedy(model, [Turn("user", "a dog?")], []))
    assert len(visitor.bubbles("bot")) == 1 and visitor.errors == []


@pytest.mark.slow
@needs_browser
def test_two_visitors(model: Model, open_page: Callable[..., Page], pictures: list[Path]) -> None:
    asked = [[Turn("user", "<image>\n<image>\na red circle")], [Turn("user", "a dog?")]]
    wanted = [greedy(model, turns, shown) for turns, shown in zip(asked, [pictures, []], strict=True)]
    one, two = open_page(), open_page(viewport={"width": 390, "height": 800}, has_touch=True)
    one.ask("a red circle", *pictures)
    two.ask("a dog?")
    for visitor in (one, two):
        visitor.page.wait_for_selector("#stop:not([disabled])")
    for visitor in (one, two):
        visitor.page.wait_for_selector("#stop[disabled]", state="attached")
    assert [squeezed(visitor.bubbles("bot")[-1]) for visitor in (one, two)] == [squeezed(t) for t in wanted]
    width = two.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "a phone has to scroll sideways"
    assert one.errors == two.errors == []


@pytest.mark.slow
@needs_browser
def test_troubles_are_sentences_on_the_page(
    open_page: Callable[..., Page], pictures: list[Path], tmp_path: Path
) -> None:
    visitor, long = open_page(), "red " * 300
    visitor.ask(long, pictures[0])
    alert = visitor.page.wait_for_selector("#problem [role=alert]")
    assert "positions, and the model has 256; ask for less" in alert.inner_text()
    assert visitor.page.input_value("#question textarea").strip() == long.strip(), "it can be corrected"
    assert visitor.page.locator("#question .thumbnails img").count() == 1
    visitor.page.click("#clear")
    visitor.page.wait_for_selector("#problem [role=alert]", state="detached")
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    visitor.page.set_input_files("#question input[type=file]", str(broken))
    visitor.page.wait_for_selector("#question .thumbnails img")
    visitor.page.fill("#question textarea", "what?")
    visitor.page.press("#question textarea", "Enter")
    alert = visitor.page.wait_for_selector("#problem [role=alert]")
    assert "broken.png: " in alert.inner_text() and "give another image" in alert.inner_text()
    large = tmp_path / "large.bmp"
    Image.new("RGB", (700, 700)).save(large)
    visitor.page.set_input_files("#question input[type=file]", str(large))
    visitor.page.wait_for_selector("text=exceed the maximum allowed size")
    assert visitor.bubbles("bot") == []


def test_values_that_the_page_does_not_have(answerer_under: Callable[..., Answerer]) -> None:
    chat = Chat(answerer_under(), Decoding(4))
    for settings in ((0.0, 2.0, 4), (0.0, 1.0, 0)):
        with pytest.raises(InputError):
            list(chat.ask("a", "a dog?", [], Conversation(), settings))
    assert list(chat.ask("a", "a dog?", [], Conversation(), (0.0, 1.0, 4)))


def test_conversations_in_threads_do_not_mix(model: Model, answerer_under: Callable[..., Answerer]) -> None:
    chat, found = Chat(answerer_under(), Decoding(8)), {}

    def visit(name: str, question: str) -> None:
        found[name] = list(chat.ask(name, question, [], Conversation(), (0.0, 1.0, 8)))[-1]

    questions = {f"visitor {number}": f"what is {number} red?" for number in range(4)}
    threads = [threading.Thread(target=visit, args=pair) for pair in questions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, question in questions.items():
        (exchange,) = found[name].exchanges
        wanted = model.generate([[Turn("user", question)]], [[]], 8)[0]
        assert (exchange.question, exchange.answer) == (question, wanted)


def test_stopping_and_forgetting(answerer_under: Callable[..., Answerer]) -> None:
    answerer = answerer_under()
    chat = Chat(answerer, Decoding(100))
    quick = answerer.answer
    answerer.answer = lambda question, decoding, listener: quick(  # type: ignore[method-assign]
        question, decoding, lambda text: (time.sleep(0.02), listener(text))[1]
    )
    for end, num_left in ((chat.stop, 1), (chat.forget, 0)):
        states = chat.ask("a", "a dog?", [], Conversation(), (0.0, 1.0, 100))
        state = next(states)
        while not state.exchanges[0].answer:
            state = next(states)
        end("a")
        *_, last = states
        assert len(last.exchanges) == num_left
    whole = list(chat.ask("a", "a dog?", [], Conversation(), (0.0, 1.0, 100)))[-1].exchanges[0].answer
    assert whole.startswith(state.exchanges[0].answer) and whole != state.exchanges[0].answer
