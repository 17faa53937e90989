"""The page of a lens in a real browser: pointing, keys, scrolling, choosing, and nothing asked for over the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lens.results_by_hand import by_hand
from tests.lens.test_page import NASTY, nasty
from tests.support.browser import MISSING, Browser
from tracelens.lens.results import LensResults
from tracelens.token_texts import visible

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

LENS = by_hand(layers=40)
STEERED = replace(
    LENS, top_ids=LENS.top_ids.flip(-1), statistics={**LENS.statistics, "entropy": LENS.entropy * 2}
)
SIZE = (900, 600)
READY = "document.documentElement.dataset.ready === 'yes'"
TIP = "document.querySelector('.tip').innerText"
SEEN = "getComputedStyle(document.querySelector('.tip')).display !== 'none'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


def show(browser: Browser, thing: Any, path: Path) -> None:
    """Opens the page of a result; it may complain of nothing, and ask for nothing but itself."""
    file = thing if isinstance(thing, Path) else thing.to_html(path / "lens.html")
    browser("open", str(file), *SIZE)
    browser("until", READY)
    assert browser("said") == []


def choose(browser: Browser, name: str, text: str) -> None:
    found = browser(
        "js",
        f"(() => {{ const s = document.querySelector('select[name={name}]');"
        f" s.value = [...s.options].findIndex((o) => o.textContent === {text!r});"
        " s.dispatchEvent(new Event('change')); return s.value; })()",
    )
    assert found not in ("", "-1")


def middle(browser: Browser, layer: int, position: int) -> tuple[float, float]:
    """Where a cell is on the screen; it must be there."""
    box = browser(
        "js",
        f"(() => {{ const c = document.getElementById('cell-{layer}-{position}');"
        " const b = c.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()",
    )
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def cell(browser: Browser, layer: int, position: int) -> dict[str, str] | None:
    return browser(
        "js",
        f"(() => {{ const c = document.getElementById('cell-{layer}-{position}'); if (!c) return null;"
        " const s = getComputedStyle(c); return {text: c.textContent, back: s.backgroundColor, ink: s.color}; })()",
    )


def spelt(component: int, layer: int, position: int, rank: int = 0) -> str:
    return visible(LENS.text_of[int(LENS.top_ids[component, layer, position, rank])])


def test_the_top_layer_stands_above_and_the_newest_position_in_sight(
    browser: Browser, tmp_path: Path
) -> None:
    show(browser, LENS, tmp_path)
    top, below = middle(browser, 39, 12), middle(browser, 38, 12)
    assert top[0] == below[0]
    assert top[1] < below[1]
    for layer in (39, 30):
        found = cell(browser, layer, 12)
        assert found is not None
        assert found["text"] == spelt(0, layer, 12)
    assert cell(browser, 0, 12) is None, "what is out of sight is not drawn"
    heads = browser(
        "js", "[...document.querySelectorAll('.column')].map((e) => [e.innerText.split('\\n'), e.className])"
    )
    assert heads[-1][0] == ["12", "·Rome", "–"]
    assert heads[-2][0] == ["11", "·is", "·Rome"]
    assert "new" in heads[-1][1]
    assert [head[0][0] for head in heads if "begin" in head[1]] == ["8"]


def test_pointing_at_a_cell_shows_the_likeliest_tokens(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS, tmp_path)
    assert not browser("js", SEEN)
    browser("point", *middle(browser, 37, 11))
    assert browser("js", SEEN)
    tip = browser("js", TIP)
    assert tip.startswith("layer 37, attn_out, after “·is” (position 11)")
    for rank in range(4):
        assert f"{spelt(0, 37, 11, rank)}\t{float(LENS.probs[0, 37, 11, rank]):.3f}" in tip
        assert f"id {int(LENS.top_ids[0, 37, 11, rank])}" in tip
    assert "next: ·Rome" in tip
    assert f"rank of the next token\t{int(LENS.rank[0, 37, 11])}\n" in tip
    assert f"entropy (nats)\t{float(LENS.entropy[0, 37, 11]):.3g}".rstrip("0") in tip
    assert f"rank of ' Paris'\t{int(LENS.statistic('rank', ' Paris')[0, 37, 11])}\n" in tip
    inside = browser(
        "js",
        "(() => { const b = document.querySelector('.tip').getBoundingClientRect();"
        " return b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight; })()",
    )
    assert inside, "all of it can be seen"
    browser("point", 300, 10)
    assert not browser("js", SEEN)


def test_keys_go_from_cell_to_cell(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS, tmp_path)
    browser("click", *middle(browser, 39, 11))
    for _ in range(3):
        browser("key", "Down")
    browser("key", "Left")
    assert browser("js", TIP).startswith("layer 36, attn_out, after “·Italy” (position 10)")
    assert (
        browser("js", "document.querySelector('.grid').getAttribute('aria-activedescendant')") == "cell-36-10"
    )
    assert browser("js", "document.querySelector('.cell.at').id") == "cell-36-10"
    browser("key", "Home")
    assert browser("js", TIP).startswith("layer 36, attn_out, after “The” (position 0)")
    assert cell(browser, 36, 0) is not None
    for _ in range(9):
        browser("key", "PageDown")
    assert browser("js", TIP).startswith("layer 0, attn_out, after “The” (position 0)")
    x, y = middle(browser, 0, 0)
    assert 0 < x < SIZE[0]
    assert 0 < y < SIZE[1]
    browser("key", "Escape")
    assert not browser("js", SEEN)


def test_scrolling_draws_what_comes_into_sight(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS, tmp_path)
    drawn = browser("js", "document.querySelectorAll('.cell').length")
    assert drawn < 40 * 13 * 0.8
    assert cell(browser, 2, 12) is None
    before = browser("js", "document.querySelector('.grid').scrollTop")
    browser("wheel", 500, 400, 0, 20)
    assert browser("js", "document.querySelector('.grid').scrollTop") > before
    browser("until", "document.getElementById('cell-0-12') !== null")
    assert cell(browser, 39, 12) is None
    found = cell(browser, 0, 12)
    assert found is not None
    assert found["text"] == spelt(0, 0, 12)
    head = browser("js", "document.querySelector('.head').getBoundingClientRect().top")
    grid = browser("js", "document.querySelector('.grid').getBoundingClientRect().top")
    assert abs(head - grid) < 3, "the tokens stay above"


def test_component_and_statistic_can_be_chosen(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS, tmp_path)
    choose(browser, "component", "resid_post")
    found = cell(browser, 39, 11)
    assert found is not None
    assert found["text"] == spelt(1, 39, 11)
    choose(browser, "statistic", "rank of the next token")
    ranks = {position: int(LENS.rank[1, 39, position]) for position in range(5, 12)}
    shades = {position: cell(browser, 39, position) for position in ranks}
    light = {
        position: sum(map(int, found["back"][4:-1].split(","))) for position, found in shades.items() if found
    }
    order = sorted(light, key=lambda position: ranks[position])
    assert [light[position] for position in order] == sorted(light.values()), "a likely token is dark"
    unknown = cell(browser, 39, 12)
    assert unknown is not None
    assert unknown["back"] == "rgba(0, 0, 0, 0)", "no next token, no shade"
    choose(browser, "statistic", "log-probability of ' Paris' minus that of ' Rome' (nats)")
    legend = browser("js", "document.querySelector('.legend').innerText")
    assert "-" in legend


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_cell_can_be_read(browser: Browser, tmp_path: Path, theme: str) -> None:
    """Letters on their shade have a contrast of 4.5 or more, in both themes and on all shades."""
    show(browser, LENS, tmp_path)
    choose(browser, "theme", theme)
    worst = browser(
        "js",
        """(() => {
          const light = (css) => {
            const c = css.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
            const [r, g, b] = c.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          return Math.min(...[...document.querySelectorAll('.cell')].map((element) => {
            const style = getComputedStyle(element), a = light(style.color), b = light(style.backgroundColor);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          }));
        })()""",
    )
    assert worst >= 4.5


def test_markup_in_tokens_is_text(browser: Browser, tmp_path: Path) -> None:
    show(browser, nasty(), tmp_path)
    assert browser("js", "document.querySelectorAll('script, b, i').length") == 2 + 1 + 1, "the page's own"
    texts = browser("js", "[...document.querySelectorAll('.cell')].map((c) => c.textContent)")
    assert {NASTY[0], NASTY[4].replace(" ", "·")} == set(texts)
    browser("point", *middle(browser, 5, 11))
    tip = browser("js", TIP)
    assert all(text in tip for text in ("</script>", "<b>bold</b>", "<!--", "]]>"))
    assert "probability of '</script>'" in tip


def test_two_runs_beside_each_other(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS.compare(STEERED, ("plain", "steered")), tmp_path)
    found = cell(browser, 39, 11)
    assert found is not None
    assert found["text"] == f"{spelt(0, 39, 11)}→{spelt(0, 39, 11, 3)}"
    browser("point", *middle(browser, 39, 11))
    tip = browser("js", TIP)
    assert "plain: likeliest next tokens" in tip
    assert "steered: likeliest next tokens" in tip
    entropy = float(LENS.entropy[0, 39, 11])
    line = next(line for line in tip.splitlines() if line.startswith("entropy"))
    numbers = [float(number) for number in line.split("\t")[1:]]
    assert numbers == pytest.approx([entropy, 2 * entropy, entropy], rel=6e-3)
    choose(browser, "run", "steered")
    found = cell(browser, 39, 11)
    assert found is not None
    assert found["text"] == spelt(0, 39, 11, 3)


def test_a_prompt_is_chosen_among_several(browser: Browser, tmp_path: Path) -> None:
    show(browser, LensResults((LENS, STEERED)), tmp_path)
    choose(browser, "view", "1")
    found = cell(browser, 39, 11)
    assert found is not None
    assert found["text"] == spelt(0, 39, 11, 3)


def test_several_frames_of_one_notebook_do_not_meet(browser: Browser, tmp_path: Path) -> None:
    """As a notebook has them: in one document, with its elements around, and with ids that the frames use, too."""
    frames = f"<p id='lens'>notebook</p><p id='data'></p>{LENS._repr_html_()}{STEERED._repr_html_()}"
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><meta charset='utf-8'>{frames}", encoding="utf-8"
    )
    browser("open", str(tmp_path / "notebook.html"), 900, 1250)
    pictures = []
    for y in (20, 300, 300 + 565):
        browser("point", 600, y)
        browser("picture", str(tmp_path / "frames.png"))
        pictures.append((tmp_path / "frames.png").read_bytes())
    assert len(set(pictures)) == 3, "a tip in neither, in the first, in the second"
    assert browser("js", "document.getElementById('lens').textContent") == "notebook"
    assert browser("said") == []
    assert all(url.startswith(("file:", "about:", "data:")) for url in browser("asked"))


def test_nothing_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    show(browser, LENS, tmp_path)
    choose(browser, "theme", "dark")
    choose(browser, "component", "resid_post")
    browser("point", *middle(browser, 39, 11))
    browser("wheel", 500, 400, 0, 3)
    assert browser("asked") == [f"file://{tmp_path / 'lens.html'}"]


def test_the_watch_would_have_seen_a_request(browser: Browser, tmp_path: Path) -> None:
    asking = "fetch('http://127.0.0.1:9/x').catch(() => { window.over = true; })"
    (tmp_path / "x.html").write_text(f"<script>{asking}</script>")
    browser("open", str(tmp_path / "x.html"), *SIZE)
    browser("until", "window.over === true")
    assert "http://127.0.0.1:9/x" in browser("asked")
