"""The report's page in a browser: its toolbar, cells at one place, pictures that enlarge."""

from __future__ import annotations

import json

import pytest
from kit import chromium, skips
from kit.reports import record
from PIL import Image
from vlmprune.eval import cli

pytestmark = skips.needs("chromium")

PLOT = "document.querySelector('.plot')"
ALLOWED = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def method(name, ratio=0.5, **fields):
    return [{"name": name, "fields": fields, "budget": {"word": "keep_ratio", "value": ratio}}]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three methods, two of them at one place, of whose pictures one is missing."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 48), "red").save(folder / "pictures" / "0.png")
    gone = record(0)["examples"][0] | {"picture": "pictures/gone.png"}
    records = [
        record(1),
        record(2, method("fastv", layer=2), share=0.5, outcomes=(1, 0, 0, 1)),
        record(3, method("grid"), share=0.5, outcomes=(0, 1, 1, 0)),
        record(4, method("random"), share=0.5, outcomes=(1, 1, 1, 0), examples=[gone]),
    ]
    (folder / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = folder / "a.html"
    assert cli.main(["report", str(folder), "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser(page):
    with chromium.Browser() as found:
        found.open(page, width=1280)
        found.until("document.documentElement.dataset.charts === 'drawn'")
        yield found
        assert found.requests == [page.resolve().as_uri()]
        assert found.errors == []


def press(browser, key):
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


def test_the_toolbar_has_only_what_is_listed(browser):
    found = browser.evaluate(
        f"[...{PLOT}.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)"
    )
    assert found and set(found) == ALLOWED
    context = f"{PLOT}._context"
    assert browser.evaluate(f"{context}.plotlyServerURL") == ""
    assert not browser.evaluate(f"{context}.displaylogo || {context}.showSendToCloud")


def test_cells_at_one_place_are_rings_of_their_own_and_each_names_the_others(browser):
    def traces(name):
        chosen = f"{PLOT}.data.filter(t => t.name === '{name}')"
        return json.loads(
            browser.evaluate(f"JSON.stringify({chosen}.map(t => [t.marker, t.x, t.y, t.text]))")
        )

    (hidden, ring), (above,), (alone,) = traces("fastv"), traces("grid"), traces("random")
    assert ring[0]["symbol"] == "circle-open" and ring[0]["size"][0] > above[0]["size"]
    assert ring[0]["color"] == hidden[0]["color"] != above[0]["color"]
    assert ring[1:3] == above[1:3]  # nothing is moved to be seen
    assert "Same place: grid @ 0.5" in ring[3][0]
    assert "Same place: fastv @ 0.5" in above[3][0]
    assert "Same place" not in alone[3][0]
    assert browser.evaluate(f"{PLOT}.querySelectorAll('.legend .traces').length") == 5


def test_a_picture_enlarges_and_escape_closes_it(browser):
    shown = "document.querySelector('dialog.large')"
    buttons = "document.querySelectorAll('button.enlarge')"
    assert browser.evaluate(f"{buttons}.length") == 3
    browser.evaluate(f"{buttons}[1].focus()")
    browser.call(
        "Input.dispatchKeyEvent",
        type="rawKeyDown",
        key="Enter",
        code="Enter",
        windowsVirtualKeyCode=13,
        text="\r",
    )
    browser.call("Input.dispatchKeyEvent", type="char", key="Enter", text="\r")
    browser.until(f"{shown}.open")
    assert browser.evaluate(f"{shown}.querySelector('img').getBoundingClientRect().width") > 500
    assert "fastv @ 0.5" in browser.evaluate(f"{shown}.textContent")
    press(browser, "ArrowRight")
    browser.until(f"{shown}.textContent.includes('grid @ 0.5')")
    press(browser, "ArrowRight")  # the last one stays
    browser.call(
        "Input.dispatchKeyEvent",
        type="keyDown",
        key="Escape",
        code="Escape",
        windowsVirtualKeyCode=27,
    )
    browser.until(f"!{shown}.open")
    browser.until(f"document.activeElement === {buttons}[2]", seconds=5)


def test_a_command_is_copied_or_selected(browser):
    shown = "document.querySelector('#cell-2')"
    browser.evaluate(f"{shown}.open = true")
    browser.evaluate(f"{shown}.querySelector('button.copy').click()")
    button = f"{shown}.querySelector('button.copy').textContent"
    browser.until(f"['Copied', 'Selected'].includes({button})", seconds=5)
    command = browser.evaluate(f"{shown}.querySelector('.command').textContent")
    assert command.startswith("vlmprune sweep") and "fastv@0.5" in command
    if browser.evaluate(button) == "Selected":  # a file has no clipboard everywhere
        assert browser.evaluate("getSelection().toString()").strip() == command


def test_long_names_stay_in_their_column_on_a_phone(tmp_path):
    both = [*method("divprune"), *method("fastv", 0.25, layer=3)]
    (tmp_path / "runs.jsonl").write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2, both)))
    out = tmp_path / "a.html"
    assert cli.main(["report", str(tmp_path), "-o", str(out)]) == 0
    with chromium.Browser() as phone:
        phone.open(out, width=390)
        names = "[...document.querySelectorAll('tbody th')]"
        assert phone.evaluate(f"{names}.some(th => th.textContent.includes('layer=3'))")
        assert phone.evaluate(f"{names}.every(th => th.scrollWidth <= th.clientWidth)")
