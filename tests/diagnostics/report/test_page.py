"""The report in a real browser: its controls change its pictures, by pointer and by keyboard, on a desk and on a phone."""

import json
import shutil

import numpy as np
import pytest

from agra.diagnostics.report.page import build_report
from agra.diagnostics.samples.masks import read_masks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000
"""Milliseconds: a busy machine is slow, not wrong."""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make system` installs it on Debian")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, pictured, tmp_path):
    """The report of two policies, opened; it may ask nothing of the network and report no error."""
    size = {"samples": 2, "grid": (3, 4, 5), "blocks": 3, "heads": 2, "actions": 4, "frame": (32, 40)}
    entries = [pictured("wam", seed=0, **size), pictured("agra", seed=1, **size)]
    report = build_report(entries, tmp_path / "report.html")
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    troubles = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    opened.on("request", lambda asked: troubles.append(asked.url) if asked.url.startswith("http") else None)
    opened.goto(report.as_uri())
    yield opened
    assert not troubles
    context.close()


def pixels(page, where):
    """Everything painted below an element."""
    return page.evaluate(
        "where => [...document.querySelectorAll(`${where} canvas`)].map(c => c.toDataURL()).join()", where
    )


def kinds(page, kind):
    """How many panels of a kind can be seen."""
    return page.locator(f".panel[data-kind={kind}]:visible").count()


@needs_browser
def test_controls_change_the_pictures(page):
    seen = [pixels(page, "#gallery")]
    page.locator("#frame").focus()
    for action in (
        lambda: page.keyboard.press("ArrowRight"),
        lambda: page.select_option("#block", "2"),
        lambda: page.select_option("#part", "steps"),
        lambda: (page.locator("#index").focus(), page.keyboard.press("ArrowRight")),
        lambda: page.select_option("#part", "heads"),
        lambda: page.select_option("#layer", "2"),
        lambda: page.select_option("#scale", "shared"),
    ):
        action()
        seen.append(pixels(page, "#gallery"))
    assert len(set(seen)) == len(seen)
    assert page.locator("#frame-label").inner_text() == "2 of 3"
    assert page.locator("#index-label").inner_text() == "2 of 2"


@needs_browser
def test_toggles_show_and_hide(page):
    arms = 2 * 2  # samples times policies
    for name, count in (("attention", arms), ("map", 2 * arms), ("pca", arms), ("imagined", arms)):
        assert kinds(page, name) == count
        page.locator(f"[data-show={name}]").focus()
        page.keyboard.press("Space")
        assert kinds(page, name) == 0
    outline = "document.querySelector('#gallery .panel path').getAttribute('d')"
    assert page.evaluate(outline)
    page.locator("[data-show=mask]").uncheck()
    assert not page.evaluate(outline)


@needs_browser
def test_every_figure_is_there_and_follows_its_controls(page):
    for name, rows in (("figure-3", 2), ("figure-14", 2 * 5), ("figure-15", 2)):
        where = f"#{name} .matrix"
        assert page.locator(f"{where} canvas").count() == 3 * rows
        seen = [pixels(page, where)]
        page.locator(f"#{name} [data-pick=frame]").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        seen.append(pixels(page, where))
        page.select_option(f"#{name} [data-pick=sample]", "1")
        seen.append(pixels(page, where))
        assert len(set(seen)) == 3
    named = " ".join(page.locator(".ref").all_inner_texts())
    assert all(figure in named for figure in ("Figures 2 and 5", "Figures 3 and 16", "14", "15", "Table 1", "4 (c)"))


@needs_browser
def test_a_mask_is_drawn_by_keyboard_and_pointer_and_saved_as_coco(page, tmp_path):
    count = page.locator("#mask-count")
    assert count.inner_text() == "80 pixels in the mask"  # 8 rows of 10, as it came
    page.locator("#mask-clear").focus()
    page.keyboard.press("Enter")
    assert count.inner_text() == "0 pixels in the mask"
    page.locator("#brush").fill("1")
    page.locator("#mask-canvas").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Space"):
        page.keyboard.press(key)
    assert count.inner_text() == "5 pixels in the mask"
    page.locator("#mask-frame").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#mask-canvas").click(position={"x": 2, "y": 2})
    with page.expect_download(timeout=PATIENCE) as saved:
        page.locator("#mask-save").click()
    path = tmp_path / "masks.json"
    saved.value.save_as(path)
    assert len(json.loads(path.read_text())["images"]) == 6
    masks = read_masks(path)
    first = masks["t0-step00000-frame0.png"]
    assert first.shape == (38, 40)  # the recorded frame: four rows were cropped above the picture, two below
    assert first.sum() == 5
    assert np.argwhere(first).mean(axis=0).tolist() == [16 - 3 + 4, 20 - 6]
    assert masks["t0-step00000-frame1.png"][4, 0]
    assert masks["t1-step00000-frame2.png"].sum() == 80


@needs_browser
def test_policies_without_some_instruments_stand_beside_one_with_all(
    browser, write_policy, policy, token_policy, plain_policy, tmp_path
):
    """Their panels are absent, and no control fails."""
    entries = [
        write_policy("plain", policy=plain_policy),
        write_policy("tokens", policy=token_policy),
        write_policy("all", policy=policy),
    ]
    context, troubles = browser.new_context(), []
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.goto(build_report(entries, tmp_path / "report.html").as_uri())
    samples = 2
    assert [kinds(opened, name) for name in ("attention", "map", "pca", "imagined")] == [
        samples,
        4 * samples,
        2 * samples,
        samples,
    ]
    for selector, value in (("#block", "1"), ("#part", "heads"), ("#scale", "shared"), ("#layer", "2")):
        opened.select_option(selector, value)
    opened.locator("#figure-15 [data-pick=frame]").focus()
    opened.keyboard.press("ArrowLeft")
    assert opened.locator("#figure-15 canvas").count() == 2  # two blocks of the one policy with attention
    opened.goto(build_report(entries[:1], tmp_path / "plain.html").as_uri())
    assert kinds(opened, "attention") == 0
    assert opened.locator("#block").count() == 0
    assert not troubles
    context.close()


@needs_browser
def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_browser
def test_a_script_that_got_in_would_not_run_and_text_keeps_its_direction(browser, pictured, tmp_path):
    """The second wall behind the template's escaping, and names that turn the direction of writing."""
    size = {"samples": 1, "grid": (3, 4, 5), "blocks": 3, "heads": 2, "actions": 4, "frame": (32, 40)}
    entries = [pictured(name, seed=0, **size) for name in ("one\u202eeno", "<script>window.pwned = 1</script>")]
    path = build_report(entries, tmp_path / "report.html")
    hostile = tmp_path / "hostile.html"
    injected = (
        '<script>window.pwned = 1</script><img src="x" onerror="window.pwned = 1"><style>h1 { color: red }</style>'
    )
    hostile.write_text(path.read_text().replace("<main>", f"<main>{injected}"))
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    opened, asked = context.new_page(), []
    opened.on("request", lambda request: asked.append(request.url))
    for place in (path, hostile):
        opened.goto(place.as_uri())
        pixels(opened, "#gallery")
        assert opened.evaluate("window.pwned") is None
        assert opened.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(255, 0, 0)"
        add = "() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s); }"
        opened.evaluate(add)
        assert opened.evaluate("window.pwned") is None
        assert opened.evaluate("fetch('http://127.0.0.1:9/').catch(() => 'refused')") == "refused"
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    # "two against one": after the name that turns around, the words beside it stand to its right again.
    after = """() => {
        const cell = [...document.querySelectorAll('th')].find(e => e.textContent.includes(' against '));
        const node = [...cell.childNodes].find(n => n.textContent.includes(' against '));
        const range = document.createRange();
        const at = node.textContent.indexOf('against');
        const box = (a, b) => { range.setStart(node, a); range.setEnd(node, b); return range.getBoundingClientRect(); };
        return [box(at, at + 1).left, box(at + 6, at + 7).left];
    }"""
    first, last = opened.evaluate(after)
    assert first < last
    assert "\u2068one\u202eeno\u2069" in path.read_text()
    context.close()


@pytest.mark.slow
def test_two_policies_and_twenty_samples_at_paper_scale_stay_small(pictured, tmp_path):
    size = {"samples": 20, "grid": (5, 12, 21), "blocks": 8, "heads": 32, "actions": 48, "frame": (192, 336)}
    entries = [pictured("wam", seed=0, **size), pictured("agra", seed=1, **size)]
    report = build_report(entries, tmp_path / "report.html")
    assert report.stat().st_size < 25e6
    assert "each denoising step" in report.read_text()
