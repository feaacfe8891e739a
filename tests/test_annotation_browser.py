"""The page for comparing images in a real browser, with its server killed meanwhile."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_annotation import serving, twenty

from rlhf_img.training.annotation.candidates import batch_of, read_candidates
from rlhf_img.training.annotation.store import Store

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no browser is installed here: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(condition: Any, seconds: float = 30) -> Any:
    deadline = time.time() + seconds
    while time.time() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came about")


def shown(browser: Any, other_than: str | None = None) -> str:
    """The pair on the page once it is another one and both images are there."""
    script = (
        "return document.body.dataset.pair && !busy && [...document.querySelectorAll('#sides img')]"
        ".every(i => i.complete && i.naturalWidth > 0) && document.body.dataset.pair"
    )
    return str(until(lambda: (found := browser.execute_script(script)) and found != other_than and found))


def test_twenty_pairs_by_keyboard_with_a_server_that_is_killed(browser: Any, tmp_path: Path) -> None:
    data = twenty(tmp_path)
    keys = ["1", "2", "t", "s", "\ue012", "\ue014"]  # the last two are the arrows
    body: Any = None
    order: list[str] = []

    def press(key: str) -> None:
        browser.find_element("tag name", "body").send_keys(key)

    with serving(data, "--twice", "0") as (process, address):
        port = int(address.rpartition(":")[2])
        browser.get(address)
        browser.find_element("id", "name").send_keys("ann")
        browser.find_element("css selector", "#who button").click()
        for number in range(10):
            order.append(shown(browser, order[-1] if order else None))
            if number < 9:
                press(keys[number % 6])
        # The tenth is answered while the server is away.
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        press("1")
        body = until(lambda: browser.find_element("id", "trouble").text)
        assert "kept here" in body
    with serving(data, "--twice", "0", port=port) as (_, address):
        for number in range(10, 20):
            order.append(shown(browser, order[-1]))
            assert not browser.find_element("id", "trouble").is_displayed()
            press(keys[number % 6])
        until(lambda: browser.find_element("id", "done").is_displayed())
        assert "20 answered" in browser.find_element("id", "progress").text
        lines = until(lambda: browser.find_element("id", "agreement").get_attribute("textContent").count("ann"))
        assert lines
    candidates = read_candidates(data)
    labels = Store(str(data / "answers.sqlite"), batch_of(candidates)).labels()
    assert [label.pair for label in labels] == order and len(set(order)) == 20
    # What each key meant, seen from the side on which each image was.
    by_id = {candidate.id: candidate for candidate in candidates}
    pressed = [keys[n % 6] if n != 9 else "1" for n in range(20)]
    for key, label in zip(pressed, labels, strict=True):
        left = by_id[label.pair].left_image("ann")
        meant = {"1": left, "\ue012": left, "2": 1 - left, "\ue014": 1 - left, "t": "tie", "s": "skip"}
        assert label.choice == str(meant[key]) and label.left_image == left
    assert all(0 < label.seconds < 60 for label in labels)


def test_a_click_answers_and_a_reload_shows_the_same_pair(browser: Any, tmp_path: Path) -> None:
    data = twenty(tmp_path)
    with serving(data) as (_, address):
        for _ in range(2):
            browser.get(address)
            until(lambda: browser.find_elements("id", "name"))
            field = browser.find_element("id", "name")
            field.clear()
            field.send_keys("bob")
            browser.find_element("css selector", "#who button").click()
            first = shown(browser)
        assert "0 answered" in browser.find_element("id", "progress").text
        browser.find_element("id", "left").click()
        second = shown(browser, first)
        assert "1 answered" in browser.find_element("id", "progress").text
    (label,) = Store(str(data / "answers.sqlite"), batch_of(read_candidates(data))).labels()
    assert label.pair == first != second and label.choice == str(label.left_image)
