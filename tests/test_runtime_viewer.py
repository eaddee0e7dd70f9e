"""The viewer page in a real browser, with MedMO-nano: drop, look, ask, hover, save, go wrong.

Screenshots for the documentation: MEDMO_EDGE_SCREENSHOTS=folder makes this test write them.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import TOKEN, Served, png, served

from medmo_edge.boxes import iou
from medmo_edge.dicom_write import write_radiograph
from medmo_edge.phantoms import Phantom, draw

playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
SEED = 3_000_000  # not one that nano was trained on
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return draw(SEED, nodule=True, effusion=False, heart_enlarged=False)


@pytest.fixture(scope="module")
def radiograph(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewer") / "chest.dcm"
    write_radiograph(path, phantom.pixels)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("gguf", reason="exporting needs the export extra")
    from medmo_edge.export.export import export_checkpoint

    folder = tmp_path_factory.mktemp("viewer") / "artifact"
    export_checkpoint("nano", "gguf-q8_0", folder, golden=False)
    with served(folder) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    scheme = getattr(request, "param", "light")
    context = browser.new_context(
        viewport={"width": 1360, "height": 850}, color_scheme=scheme, accept_downloads=True
    )
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    problems: list[str] = []
    outside: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda sent: outside.append(sent.url))
    opened.goto(f"{server.url}/#token={TOKEN}")
    expect(opened.locator("#model")).to_have_text("MedMO-nano-gguf-q8_0")
    yield opened
    context.close()
    assert problems == []
    assert all(url.startswith((server.url, "blob:", "data:")) for url in outside)


def _open(page: Any, *paths: Path) -> None:
    page.set_input_files("#file", [str(path) for path in paths])
    expect(page.locator("#corner-facts")).not_to_be_empty()
    expect(page.locator("#busy")).to_be_hidden()


def _shot(page: Any, name: str) -> None:
    folder = os.environ.get("MEDMO_EDGE_SCREENSHOTS")
    if folder:
        if not name.startswith("boxes"):
            page.mouse.move(2, 2)
        shot = Image.open(io.BytesIO(page.screenshot()))
        shot.convert("RGB").quantize(192).save(Path(folder) / f"viewer-{name}.png", optimize=True)


@pytest.mark.parametrize(
    "page", ["light", pytest.param("dark", marks=pytest.mark.slow)], indirect=True
)
def test_a_box_is_drawn_where_the_model_said_and_linked_to_its_word(
    page: Any, radiograph: Path, phantom: Phantom
) -> None:
    scheme = page.evaluate("document.documentElement.dataset.theme")
    expect(page.get_by_text("Research use only").first).to_be_visible()
    assert TOKEN not in page.url
    _open(page, radiograph)
    page.fill("#target", "nodule")
    page.get_by_role("button", name="Locate").click()
    expect(page.locator(".turn .save")).to_be_visible()
    rect = page.locator("#overlay .box rect.line")
    x, y, width, height = (
        float(rect.get_attribute(name)) for name in ("x", "y", "width", "height")
    )
    (truth,) = (box for box in phantom.boxes if box.label == "nodule")
    assert iou(truth.xyxy, (x, y, x + width, y + height)) > 0.4
    # On the screen the box lies on the picture where source pixels say it does.
    drawn, picture = rect.bounding_box(), page.locator("#picture").bounding_box()
    scale = picture["width"] / phantom.pixels.shape[1]
    assert abs(drawn["x"] - (picture["x"] + x * scale)) < 4
    assert abs(drawn["width"] - width * scale) < 8
    word, box = page.locator(".turn .word"), page.locator("#overlay .box")
    word.hover()
    expect(box).to_have_class(re.compile("lit"))
    _shot(page, f"boxes-{scheme}")
    page.mouse.move(2, 2)
    expect(box).not_to_have_class(re.compile("lit"))
    page.mouse.move(drawn["x"] + drawn["width"] / 2, drawn["y"] + drawn["height"] / 2)
    expect(word).to_have_class(re.compile("lit"))
    page.mouse.move(2, 2)
    for task in ("Report", "Describe"):
        page.get_by_role("button", name=task, exact=True).click()
        expect(page.locator(".turn").last.locator(".save")).to_be_visible()
    expect(page.locator(".turn .facts").nth(1)).to_contain_text("image kept")
    expect(page.locator("#overlay .box")).to_have_count(0)  # the last answer has none
    word.click()
    expect(page.locator("#overlay .box")).to_have_count(1)
    _shot(page, scheme)


@pytest.mark.slow
def test_results_are_saved(page: Any, radiograph: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom", reason="needs the dicom extra")
    _open(page, radiograph)
    page.fill("#target", "nodule")
    page.keyboard.press("Enter")
    for kind in ("SR", "PNG"):
        with page.expect_download() as saved:
            page.get_by_role("button", name=kind, exact=True).click()
        path = saved.value.path()
        if kind == "SR":
            assert pydicom.dcmread(path).Modality == "SR"
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    expect(page.locator("#alerts")).to_be_empty()


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(page: Any, radiograph: Path) -> None:
    _open(page, radiograph)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Is there a nodule?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .save")).to_be_visible()
    expect(page.locator(".turn .text")).to_have_text("Yes.")
    page.keyboard.press("Escape")
    expect(page.locator("#viewport")).to_be_focused()
    before = page.locator("#zoom").text_content()
    page.keyboard.press("+")
    expect(page.locator("#zoom")).not_to_have_text(before)
    page.keyboard.press("0")
    expect(page.locator("#zoom")).to_have_text(before)
    page.keyboard.press("r")
    expect(page.locator(".turn").nth(1).locator("h3")).to_have_text("Report")
    page.keyboard.press("?")
    expect(page.locator("#help-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    unnamed = page.locator("button:visible, input:visible, select:visible, textarea:visible")
    for index in range(unnamed.count()):
        control = unnamed.nth(index)
        assert control.aria_snapshot().strip().count('"') >= 2, control.evaluate("e => e.outerHTML")


@pytest.mark.slow
def test_window_and_level_change_what_the_model_sees(page: Any, radiograph: Path) -> None:
    _open(page, radiograph)
    grey = _mean_grey(page)
    page.fill("#center", "3600")
    page.press("#center", "Enter")
    expect(page.locator("#corner-window")).to_contain_text("L 3600")
    darker = _mean_grey(page)
    assert darker < grey - 30
    page.locator("#viewport").focus()
    page.keyboard.press("w")
    area = page.locator("#viewport").bounding_box()
    page.mouse.move(area["x"] + 300, area["y"] + 300)
    page.mouse.down()
    page.mouse.move(area["x"] + 300, area["y"] + 200, steps=4)
    page.mouse.up()
    expect(page.locator("#corner-window")).not_to_contain_text("L 3600")
    assert _mean_grey(page) > darker + 10
    page.fill("#question", "Is there a nodule?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .where")).to_contain_text("L ")


def _mean_grey(page: Any) -> float:
    """Mean grey of the middle of the viewport, as a person sees it."""
    expect(page.locator("#busy")).to_be_hidden()
    page.wait_for_timeout(300)
    shot = page.locator("#viewport").screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
    height, width = pixels.shape
    return float(pixels[height // 4 : -height // 4, 3 * width // 8 : -3 * width // 8].mean())


@pytest.mark.slow
def test_several_images_have_a_slider(page: Any, radiograph: Path, tmp_path: Path) -> None:
    other = tmp_path / "second.png"
    other.write_bytes(png(320, 200))
    _open(page, radiograph, other)
    expect(page.locator("#frame-text")).to_have_text("1 / 2")
    page.locator("#viewport").focus()
    page.keyboard.press("]")
    expect(page.locator("#corner-facts")).to_contain_text("PNG")
    expect(page.locator("#tool-window")).to_be_disabled()  # 8 bits have no window
    page.select_option("#scope", "all")
    page.fill("#question", "Describe these.")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .where")).to_contain_text("All 2 images")
    expect(page.locator(".turn .save")).to_be_visible()
    page.get_by_role("button", name="Close study").click()
    expect(page.get_by_text("Drop a DICOM file")).to_be_visible()


def test_what_goes_wrong_is_said(page: Any, server: Served, tmp_path: Path, browser: Any) -> None:
    expect(page.locator("#send")).to_be_disabled()
    broken = tmp_path / "broken.png"
    broken.write_bytes(png()[:60])
    page.set_input_files("#file", str(broken))
    expect(page.get_by_role("alert")).to_contain_text("damaged or not supported")
    _shot(page, "error")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator(".alert")).to_have_count(0)
    stranger = browser.new_context().new_page()
    stranger.goto(server.url)
    expect(stranger.locator("#token-dialog")).to_be_visible()
    stranger.fill("#token", "wrong")
    stranger.keyboard.press("Enter")
    expect(stranger.get_by_text("did not accept")).to_be_visible()
    stranger.fill("#token", TOKEN)
    stranger.keyboard.press("Enter")
    expect(stranger.locator("#model")).to_have_text("MedMO-nano-gguf-q8_0")
    stranger.context.close()
