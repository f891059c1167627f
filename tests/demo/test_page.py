"""The demo's page in a real browser: instruction, play, mask and objects, by the mouse and the keyboard."""

import shutil
import sys

import pytest

pytest.importorskip("gradio")

from agra.cli.main import main
from agra.demo.page import build_page
from agra.simulators.registry import expert

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000
"""Milliseconds: a busy machine is slow, not wrong."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make system` installs it on Debian")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a page in the browser. It may ask nothing of other machines and report no error."""
    troubles, launched = [], []

    def open_page(page):
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        launched.append(page)
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        context.set_default_timeout(PATIENCE)
        opened = context.new_page()
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        opened.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        opened.on(
            "request", lambda asked: troubles.append(asked.url) if not asked.url.startswith((url, "data:")) else None
        )
        opened.goto(url)
        opened.wait_for_selector(".camera >> nth=1")
        return opened

    yield open_page
    for page in launched:
        page.close()
    assert not troubles


def say(page, element, text):
    page.locator(element).filter(has_text=text).wait_for()


def instruct(page, text):
    """Type an instruction, and leave the field."""
    box = page.get_by_label("Instruction")
    box.fill(text)
    box.press("Enter")
    box.blur()


def drag(page, player, start, end):
    """Drag on a camera's image, between fractions of its width and height."""
    box = page.locator(f"#player-{player} .camera").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=3)
    page.mouse.up()


def test_two_experts_follow_an_instruction_and_objects_move(visit):
    page = visit(build_page(["one <expert>", "two"], lambda _, env: expert(env)))
    assert page.locator("#player-0 h3").inner_text() == "one <expert>: 0.0 s"
    before = [page.locator(f"#player-{index} .camera").get_attribute("src") for index in range(2)]
    banana, free, box = (0.5, 0.7), (0.75, 0.3), (0.41, 0.2)  # of the first scene
    drag(page, 0, banana, free)
    say(page, "#message", "The banana is at")
    after = [page.locator(f"#player-{index} .camera").get_attribute("src") for index in range(2)]
    assert before[0] != after[0]
    assert before[1] != after[1]
    drag(page, 1, free, box)
    say(page, "#message", "⚠ no room for the banana")
    page.get_by_label("Object to move").click()
    page.get_by_role("option", name="can").click()
    say(page, "#message", "Click where the can goes.")
    drag(page, 1, (0.5, 0.6), (0.5, 0.6))
    say(page, "#message", "The can is at")
    instruct(page, "Put the banana in the box")
    say(page, "#message", "Instruction: put the banana in the box.")
    page.get_by_role("button", name="Play").click()
    for index in range(2):
        say(page, f"#player-{index} h3", ": success after")
    say(page, "#rate", "control steps a second")


def test_without_gradio_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "agra.demo.page")
    with pytest.raises(SystemExit, match="1"):
        main(["demo"])
    assert (
        capsys.readouterr().err == "agra: error: agra demo needs Gradio: pip install '.[demo]' in a checkout of agra\n"
    )


@pytest.mark.slow
def test_both_bundled_policies_act_and_a_mask_changes_their_plans(visit):
    import agra

    page = visit(agra.make_demo())
    for index, name in enumerate(("tabletop-wam", "tabletop-agra")):
        assert page.locator(f"#player-{index} h3").inner_text() == f"{name}: 0.0 s"
        panel = page.locator(f"#player-{index}")
        assert panel.get_by_alt_text("Reads").count() == panel.get_by_alt_text("Imagines").count() == 1
        assert "of the attention" in panel.inner_text()
    page.get_by_label("mask a patch").check()
    drag(page, 0, (0.2, 0.1), (0.5, 0.4))  # the box
    say(page, "#message", "% of the image is masked.")
    for index in range(2):
        say(page, f"#player-{index}", "the mask changes the plan by")
    page.get_by_role("button", name="Clear mask").click()
    say(page, "#message", "Nothing is masked.")
    assert "the mask" not in page.locator("#player-0").inner_text()
    instruct(page, "wave at me")
    say(page, "#message", "success is not judged")
    visitor = page.context.new_page()
    visitor.goto(page.url)
    visitor.wait_for_selector(".camera >> nth=1")
    assert "wave" not in visitor.locator("#message").inner_text()
    visitor.close()
    page.get_by_label("Scene").fill("semantic/pick-cup-or-lemon/lemon-swapped")
    page.get_by_label("Scene").press("Enter")
    say(page, "#message", "put the lemon in the bowl")
    page.get_by_role("button", name="Play").click()
    say(page, "#player-1 h3", "tabletop-agra: success after")
