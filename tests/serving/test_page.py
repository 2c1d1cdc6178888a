"""The playground in headless Chromium, over the real HTTP application."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from pipeline.data.formats.codecs import encode_png
from pipeline.serving.service import Service
from pipeline.web.app import make_app

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()),
    reason="needs Chromium: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = make_app(service, service.config)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Driver(str(DRIVER)))
    yield made
    made.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Any:
    """The page, loaded and knowing its model."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(url)
    until(lambda: browser.execute_script("return document.querySelectorAll('#sampler option').length"))
    browser.get_log("browser")
    return browser


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.05)
    return value


def text(page: Any, element: str) -> str:
    return page.find_element("id", element).text


def fill(page: Any, element: str, value: object) -> None:
    page.execute_script("arguments[0].value = arguments[1]", page.find_element("id", element), str(value))


def sources(page: Any) -> list[str]:
    return [image.get_attribute("src") for image in page.find_elements("css selector", "#images img")]


def make(page: Any) -> list[str]:
    page.find_element("id", "make").click()
    until(lambda: "network evaluations each" in text(page, "status"))
    return sources(page)


def test_it_makes_images_live_and_shows_their_lineage(page: Any, service: Service) -> None:
    assert "tiny, version 7, 8×8 pixels" in text(page, "facts")
    fill(page, "n", 10)
    fill(page, "steps", 5)
    fill(page, "seed", 3)
    page.execute_script(
        "window.seen = new Set(); new MutationObserver(() => seen.add(document.getElementById('progress').value))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    first = make(page)
    assert len(set(first)) == 10
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in first)
    assert len(page.execute_script("return [...seen]")) > 3, "no live denoising was seen"
    shown = text(page, "lineage")
    assert service.identity.digest[:16] in shown
    assert "heun, 5 steps" in shown
    assert make(page) == first
    fill(page, "seed", 4)
    assert make(page) != first
    assert page.get_log("browser") == []


def test_an_image_is_scored_with_its_parts_and_its_place_among_the_held_out_ones(
    page: Any, tmp_path: Path, digits: np.ndarray
) -> None:
    (tmp_path / "one.png").write_bytes(encode_png(digits[0]))
    page.find_element("id", "file").send_keys(str(tmp_path / "one.png"))
    alone = until(lambda: page.find_elements("css selector", "#scores article"))[0]
    assert "Choose its class to see its place" in alone.text
    page.execute_script("document.getElementById('scores').replaceChildren()")
    fill(page, "score-class", 3)
    (tmp_path / "two.png").write_bytes(encode_png(digits[0]))
    page.find_element("id", "file").send_keys(str(tmp_path / "two.png"))
    result = until(lambda: page.find_elements("css selector", "#scores article"))[0]
    for part in ("two.png", "class 3", "bits/dim", "prior", "diffusion", "reconstruction", "of 300 held-out images"):
        assert part in result.text.replace("Of 300", "of 300"), result.text
    assert result.find_elements("css selector", "svg[role=img] .mark")
    make(page)
    page.find_elements("css selector", "#images button")[1].click()
    until(lambda: len(page.find_elements("css selector", "#scores article")) == 2)
    assert page.get_log("browser") == []


def test_errors_are_shown_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    page.find_element("id", "file").send_keys(str(tmp_path / "bad.png"))
    until(lambda: "not a jpg, png or webp image" in text(page, "score-status"))
    fill(page, "class", -1)
    fill(page, "guidance", 2)
    page.execute_script("document.getElementById('form').noValidate = true")
    fill(page, "steps", 65)
    page.find_element("id", "make").click()
    until(lambda: "at most 64 steps" in text(page, "status"))


def test_stop_cancels_the_request(page: Any, service: Service) -> None:
    before = service.engine.load().cancelled
    fill(page, "n", 16)
    fill(page, "steps", 64)
    page.find_element("id", "make").click()
    until(lambda: text(page, "status").startswith("Evaluation"))
    page.find_element("id", "stop").click()
    until(lambda: text(page, "status") == "Stopped.")
    until(lambda: service.engine.load().cancelled == before + 1)


def test_it_works_by_keyboard_alone_and_every_control_has_a_name(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.activeElement.blur()")
    seen: list[str] = []
    for _ in range(14):
        page.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(page.switch_to.active_element.get_attribute("id"))
    for wanted in ("model", "class", "sampler", "steps", "guidance", "n", "seed", "dice", "make", "curl", "estimator"):
        assert wanted in seen, seen
    page.find_element("id", "steps").send_keys(Keys.ENTER)
    until(lambda: "network evaluations each" in text(page, "status"))
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = ("button", "combobox", "spinbutton", "textbox", "image", "progressbar")
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"] and node["role"]["value"] in controls and not node.get("name", {}).get("value")
    ]
    assert not nameless


def test_copy_as_curl_is_a_command_that_gives_these_images(page: Any) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    fill(page, "n", 2)
    fill(page, "steps", 3)
    images = make(page)
    page.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")
    page.find_element("id", "curl").click()
    command = until(lambda: text(page, "status") if text(page, "status").startswith("curl ") else "")
    told = subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, check=True, timeout=30).stdout
    assert [f"data:image/png;base64,{item['b64_json']}" for item in json.loads(told)["data"]] == images


def test_the_api_is_documented_without_other_sites(browser: Any, url: str) -> None:
    browser.get(f"{url}docs")
    until(lambda: browser.find_elements("css selector", "section table"))
    shown = browser.find_element("id", "paths").text
    for part in ("POST /v1/images/generations", "multipart/form-data", "guidance", "(from 0 to 100)"):
        assert part in shown
    assert browser.get_log("browser") == []


def test_a_picture_is_saved_by_a_name_of_its_own(page: Any) -> None:
    fill(page, "n", 2)
    fill(page, "steps", 3)
    images = make(page)
    links = page.find_elements("css selector", "#images a.save")
    assert [link.get_attribute("href") for link in links] == images
    assert [link.get_attribute("download") for link in links] == ["tiny-seed0-0.png", "tiny-seed0-1.png"]


def test_guidance_is_offered_where_the_model_takes_it(page: Any) -> None:
    def choose(value: str) -> bool:
        fill(page, "class", value)
        page.execute_script("document.getElementById('class').dispatchEvent(new Event('change'))")
        return page.find_element("id", "guidance").is_enabled()

    assert [choose(value) for value in ("each", "-1", "3")] == [True, False, True]


@pytest.mark.parametrize("width", [320, 1200])
def test_long_class_names_stay_within_their_tiles(page: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    fill(page, "steps", 2)
    make(page)
    page.execute_script(
        "for (const each of document.querySelectorAll('#images small')) "
        "each.textContent = 'Sphyrapicus_varius_the_yellow-bellied sapsucker of the eastern woods ' + 'x'.repeat(80)"
    )
    wide = "return [...document.querySelectorAll('#images li')].filter((li) => li.scrollWidth > li.clientWidth).length"
    assert page.execute_script(wide) == 0
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [320, 390, 820])
def test_nothing_overflows_at_phone_width(page: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    make(page)
    page.find_elements("css selector", "#images button")[0].click()
    until(lambda: page.find_elements("css selector", "#scores article"))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
