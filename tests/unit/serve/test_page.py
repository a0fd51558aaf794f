"""The chat page in a real browser, against the real gateway with a model of a few lines behind it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn

from janus_ray.config import validate
from janus_ray.serve.gateway import Api, Item, Overloaded, Unavailable
from janus_ray.serve.readiness import Readiness
from janus_ray.serve.recipe import ServeRecipe

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium in /usr/bin/chromium")

PHONE, DESKTOP = (390, 844), (1280, 800)
TOO_LONG = "this conversation has 9000 tokens; the model reads 4096 at most"
MARKUP = '<img src=x onerror="document.title=7"> <b>bold</b> &amp; "</div>'
VALUES = [
    "Answer with the swagger of a pirate captain.",
    "Write for a young child.",
    "Two tips.",
    "Be kind to animals.",
]
PERSONAS = [
    {"name": "Pirate's child", "preferences": VALUES},
    {"name": f"Nurse {MARKUP}", "preferences": ["Numbered steps.", "A nurse on the night shift.", MARKUP, "Caution."]},
]


class Scripted:
    """Does what the last message asks for."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.go_on = threading.Event()

    async def chat(self, body: dict) -> AsyncIterator[Item]:
        self.bodies.append(body)
        wish = body["messages"][-1]["content"]
        if len(wish) > 5000:
            yield {"error": {"message": TOO_LONG, "code": 400, "param": "messages"}}
            return
        if wish == "be busy":
            raise Overloaded
        yield delta(MARKUP if wish == "say markup" else f"You said: {wish}.\n1. One.\n2. Two.")
        if wish == "wait":
            await asyncio.to_thread(self.go_on.wait, 30)
        if wish == "break":
            raise Unavailable
        if wish == "vanish":
            return
        reason = {"choices": [{"delta": {"content": ""}, "finish_reason": "length" if wish == "be cut" else "stop"}]}
        yield [f"data: {json.dumps(reason)}\n\n", ": a comment\n\n", "data: [DONE]\n\n"]


def delta(text: str) -> list[str]:
    return [f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"]


@pytest.fixture(scope="module")
def model() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    fields = {
        "models": [{"model_id": "m", "path": "x"}],
        "personas": PERSONAS,
        "example_prompts": ["How do I make bread?", "What is a good way into chess?", MARKUP],
        "retry_after_s": 7,
    }
    readiness = Readiness(["m"])
    readiness.mark_ready("m")
    app = Api(validate(ServeRecipe, fields, "test"), {"m": model}, readiness, lambda *_: None).app()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    # Imported here, because most runs of the unit tests need no browser.
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--no-proxy-server"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page in a window of a size; at the end nothing may have gone wrong in its script."""
    contexts, troubles = [], []

    def open_page(size: tuple[int, int], **options):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, has_touch=size == PHONE, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#examples button")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself reports each status of 400 and above.
    assert [trouble for trouble in troubles if "Failed to load resource" not in trouble] == []


def ask(page, prompt: str) -> None:
    page.evaluate("delete document.body.dataset.answered")
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector("body[data-answered]")


def box(page, selector: str) -> dict[str, float]:
    found = page.locator(selector).last.bounding_box()
    assert found is not None, selector
    return found


def seen_whole(page, selector: str) -> bool:
    """Whether an element lies in the window, inside its side, and is what a finger there would touch."""
    return page.locator(selector).last.evaluate(
        """element => {
          const own = element.getBoundingClientRect(), side = element.closest('.side').getBoundingClientRect();
          const inside = (outer) => own.top >= outer.top - 1 && own.bottom <= outer.bottom + 1
            && own.left >= outer.left - 1 && own.right <= outer.right + 1;
          const hit = document.elementFromPoint((own.left + own.right) / 2, own.bottom - 4);
          return inside(side) && inside({ top: 0, left: 0, right: innerWidth, bottom: innerHeight })
            && element.contains(hit);
        }"""
    )


def second_person(page, size: tuple[int, int]) -> None:
    if size == PHONE:
        page.click("#people button:nth-child(2)")
        page.wait_for_selector("#people button:nth-child(2)[aria-current=true]")
    assert box(page, "#right")["x"] < size[0] / 2 + 20


def small_targets(page) -> list[str]:
    return page.evaluate(
        """() => [...document.querySelectorAll('button, select, textarea, summary, a')]
          .filter((element) => element.checkVisibility())
          .filter((element) => { const b = element.getBoundingClientRect(); return b.width < 44 || b.height < 44; })
          .map((element) => element.outerHTML)"""
    )


def test_a_phone_opens_with_folded_values_and_targets_for_a_finger(visit):
    page = visit(PHONE)
    for side in ("#left", "#right"):
        assert page.locator(f"{side} .toggle").get_attribute("aria-expanded") == "false"
        assert not page.locator(f"{side} .values").is_visible()
        assert page.locator(f"{side} .gist").inner_text()
    assert small_targets(page) == []
    page.click("#left .toggle")
    assert page.locator("#left .toggle").get_attribute("aria-expanded") == "true"
    assert [page.locator(f"#left textarea >> nth={index}").input_value() for index in range(4)] == VALUES
    ask(page, "x\n" * 30)
    page.wait_for_selector("#left .more")
    assert small_targets(page) == []
    page.fill("#left textarea >> nth=0", "W" * 2000)
    page.click("#left .toggle")
    gist = "document.querySelector('#left .gist')"
    assert page.evaluate(f"{gist}.scrollWidth <= {gist}.clientWidth") and box(page, "#left .gist")["height"] < 130
    # Nothing is wider than the screen, except what is meant to be swiped.
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]


def test_the_first_answer_on_a_phone_is_in_sight_for_both_people(visit):
    page = visit(PHONE)
    page.click("#examples button:nth-child(1)")
    page.wait_for_selector("body[data-answered]")
    answer, composer = box(page, "#left .assistant"), box(page, "#ask")
    assert "How do I make bread?" in page.locator("#left .assistant").inner_text()
    assert answer["y"] + answer["height"] <= composer["y"] and composer["y"] + composer["height"] <= PHONE[1]
    assert seen_whole(page, "#left .assistant") and not seen_whole(page, "#right .assistant")
    assert page.locator("#people button").nth(1).get_attribute("data-news") == "answer"
    second_person(page, PHONE)
    assert seen_whole(page, "#right .assistant") and not seen_whole(page, "#left .assistant")
    assert page.locator("#people button").nth(1).get_attribute("data-news") is None
    # Swiped back by hand.
    page.evaluate("document.querySelector('main').scrollTo({left: 0})")
    page.wait_for_selector("#people button:nth-child(1)[aria-current=true]")
    assert seen_whole(page, "#left .assistant")


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_a_very_long_prompt_leaves_the_error_in_sight_and_is_not_lost(visit, size):
    page = visit(size)
    prompt = "I have a rather long story to tell before I come to my question. " * 200
    ask(page, "a short one")
    ask(page, prompt)
    assert seen_whole(page, "#left .error")
    second_person(page, size)
    assert seen_whole(page, "#right .error")
    assert page.locator(".error").all_inner_texts() == [TOO_LONG, TOO_LONG]
    assert page.locator("#left .error").get_attribute("role") == "alert"
    assert page.locator("#prompt").input_value() == prompt.strip()
    folded = box(page, "#right .user")["height"]
    page.click("#right .more")
    assert box(page, "#right .user")["height"] > 3 * folded


def test_a_wide_window_shows_both_people_side_by_side(visit):
    page = visit(DESKTOP)
    assert not page.locator("#people").is_visible()
    for wish in ("one", "two\n" * 30, "three"):
        ask(page, wish)
    left, right, composer = box(page, "#left"), box(page, "#right"), box(page, "#ask")
    assert left["y"] == right["y"] and left["width"] == right["width"] > 550
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] + left["height"] <= composer["y"] and composer["y"] + composer["height"] <= DESKTOP[1]
    assert page.locator("#left .values").is_visible() and page.locator("#right .values").is_visible()
    assert seen_whole(page, "#left .assistant") and seen_whole(page, "#right .assistant")
    # Who it is stays in sight above a long conversation.
    assert page.locator("#left").evaluate("side => side.scrollTop") > 100
    assert seen_whole(page, "#left .persona")


def test_a_very_low_window_can_be_scrolled_to_everything(visit):
    page = visit((844, 390))
    ask(page, "one")
    for selector in ("header", "#left .assistant", "#right .assistant", "#send"):
        page.locator(selector).last.scroll_into_view_if_needed()
        spot = box(page, selector)
        assert spot["y"] >= -1 and spot["y"] + spot["height"] <= 391
    assert box(page, "#right")["y"] + box(page, "#right")["height"] <= box(page, "#ask")["y"] + 1


def test_what_others_wrote_is_text_and_never_markup(visit, model):
    page = visit(DESKTOP)
    ask(page, "say markup")
    ask(page, MARKUP)
    assert page.locator("#left .assistant").first.inner_text() == MARKUP
    assert page.locator("#left .user").last.inner_text() == MARKUP
    assert page.locator("#right .persona").input_value() == f"Nurse {MARKUP}"
    assert page.locator("#examples button").last.inner_text() == MARKUP
    page.click("#right summary")
    page.wait_for_function(f"document.querySelector('#right .system p').textContent.includes({json.dumps(MARKUP)})")
    assert page.locator("img, b").count() == 0
    assert page.title().startswith("Janus")
    assert model.bodies[-1]["messages"][-3:] == [
        {"role": "user", "content": "say markup"},
        {"role": "assistant", "content": MARKUP},
        {"role": "user", "content": MARKUP},
    ]


@pytest.mark.parametrize(
    ("wish", "error", "kept"),
    [
        ("be busy", "every replica is busy and the queue is full; try again in 7 s", False),
        ("break", "the model went away in the middle of the answer", True),
        ("vanish", "The connection broke off in the middle of the answer.", True),
    ],
)
def test_an_answer_that_fails_is_never_taken_for_a_whole_one(visit, wish, error, kept):
    page = visit(DESKTOP)
    ask(page, wish)
    assert page.locator(".error").all_inner_texts() == [error, error]
    assert page.locator("#left .assistant").count() == kept
    assert page.locator("#prompt").input_value() == ("" if kept else wish)


def test_an_answer_that_was_cut_says_so(visit):
    page = visit(DESKTOP)
    ask(page, "be cut")
    assert "cut off" in page.locator("#left .facts").inner_text()
    ask(page, "be whole")
    assert "cut off" not in page.locator("#left .facts").last.inner_text()


def test_keyboard_and_screen_reader(visit, model):
    page = visit(PHONE)
    for role, name in (
        ("combobox", "Model"),
        ("navigation", "People"),
        ("region", "First person: Pirate's child"),
        ("textbox", "Your message"),
        ("group", "Example prompts"),
        ("button", "New chat"),
        ("button", "Ask both"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name
    assert page.get_by_role("combobox", name="Person", exact=True).count() == 2
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("wait")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    page.wait_for_selector("#left .writing")
    # Read aloud when it is finished, not word by word; the button can stop it.
    assert page.locator("#left [role=log]").get_attribute("aria-busy") == "true"
    assert page.get_by_role("button", name="Stop", exact=True).count() == 1
    model.go_on.set()
    page.wait_for_selector("body[data-answered]")
    assert page.locator("#left [role=log]").get_attribute("aria-busy") is None
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.click("#reset")
    assert page.locator(".turn").count() == 0
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.click("#left .toggle")
    assert page.get_by_role("textbox", name="Background knowledge", exact=True).count() == 1


def contrast(page, selector: str) -> float:
    """Text against what lies behind it, by WCAG 2's formula."""
    return page.locator(selector).last.evaluate(
        """element => {
          const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const shine = (colour) => parts(colour).slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          let behind = element;
          while ((parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
          const [low, high] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
            .map(shine).sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(visit, scheme):
    page = visit(PHONE, color_scheme=scheme)
    ask(page, "be cut")
    ask(page, "be busy")
    texts = [
        "h1",
        ".user",
        ".assistant",
        ".facts",
        ".error",
        ".gist",
        ".tab",
        ".tab[aria-current=true]",
        "#send",
        ".toggle",
    ]
    assert {text: ratio for text in texts if (ratio := contrast(page, text)) < 4.5} == {}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 243, 238)", "dark": "rgb(23, 22, 20)"}[scheme]
