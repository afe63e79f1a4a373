"""What a reader of the page does and sees, in a real browser."""

import time
from pathlib import Path
from typing import Any


def shown(browser: Any) -> list[str]:
    return [name.get_attribute("title") for name in browser.find_elements("css selector", ".card .name")]


def number(browser: Any, name: str) -> int:
    return int(browser.find_element("id", name).text)


def choose(browser: Any, name: str, text: str) -> None:
    browser.find_element("xpath", f'//*[@id="{name}"]/option[text()="{text}"]').click()


def enter(browser: Any, name: str, text: str) -> None:
    browser.find_element("id", name).send_keys("\ue009a\ue000", text or "\ue017")  # Ctrl+A, then text or Delete


def show(browser: Any, kind: str) -> None:
    browser.find_element("css selector", f'#kinds input[value="{kind}"]').click()


def cards_of(browser: Any) -> list[Any]:
    return browser.find_elements("class name", "card")


def judge(browser: Any, path: str, judgement: str) -> None:
    cards = {card.find_element("class name", "name").get_attribute("title"): card for card in cards_of(browser)}
    next(b for b in cards[path].find_elements("css selector", ".judge button") if b.text == judgement).click()


def assert_judged(browser: Any, words: str) -> None:
    """The browser hands what is kept from one window, or one load of the page, to the next with a delay."""
    deadline = time.monotonic() + 10
    while (found := browser.find_element("id", "judgements").text) != words:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def downloaded(folder: Path) -> str:
    """The browser makes an empty file of this name before it fills it."""
    deadline = time.monotonic() + 10
    while not (content := "".join(path.read_bytes().decode() for path in folder.glob("*.csv"))):
        assert time.monotonic() < deadline, "no file came"
        time.sleep(0.02)
    for path in folder.iterdir():
        path.unlink()
    return content


def wait_for(parent: Any, selector: str) -> Any:
    deadline = time.monotonic() + 10
    while not (found := parent.find_elements("css selector", selector)):
        assert time.monotonic() < deadline, selector
        time.sleep(0.02)
    return found[0]
