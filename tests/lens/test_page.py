"""The page of a lens as a file: everything in it, nothing asked for, and no text that could be markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lens.results_by_hand import by_hand
from tracelens.lens.result import LensResult
from tracelens.lens.results import LensResults
from tracelens.lens.statistics import Kind
from tracelens.viz.lens_page import MOST_CELLS
from tracelens.viz.scales import scale_of

LENS = by_hand()
OTHER = replace(
    LENS, top_ids=LENS.top_ids.flip(2), statistics={**LENS.statistics, "entropy": LENS.entropy * 2}
)
NASTY = (
    "</script>",
    "<b>bold</b>",
    "<!--",
    "]]>",
    "\"quoted\" & 'so'",
    "<script>alert(1)</script>",
    "\u2028",
    "&lt;",
)


def nasty() -> LensResult:
    """A result whose likeliest tokens are markup."""
    ids = torch.arange(len(NASTY)).repeat(LENS.top_ids.numel() // len(NASTY)).view(LENS.top_ids.shape)
    texts = {**LENS.text_of, **dict(enumerate(NASTY))}
    return replace(LENS, top_ids=ids, text_of=texts, model="<b>model</b>", tracked={"</script>": 0, "<i>": 1})


class Parts(HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)


def page_of(thing: Any, path: Path) -> str:
    return thing.to_html(path / "lens.html").read_text(encoding="utf-8")


def content_of(page: str) -> tuple[dict[str, Any], bytes]:
    """What the page's script reads, and the arrays behind it."""
    content = json.loads(Parts(page).scripts[0])
    return content, zlib.decompress(base64.b64decode(content["data"]))


@pytest.mark.parametrize(
    "thing", [LENS, nasty(), LENS.compare(OTHER), LensResults((LENS, OTHER))], ids=str.__class__
)
def test_a_page_asks_for_nothing(thing: Any, tmp_path: Path) -> None:
    page = page_of(thing, tmp_path)
    parts = Parts(page)
    assert [tag for tag, _ in parts.tags] == [
        *(
            "html",
            "head",
            "meta",
            "meta",
            "meta",
            "title",
            "style",
            "body",
            "div",
            "noscript",
            "script",
            "script",
        )
    ], "no element but those of the page itself"
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in parts.tags)
    style_and_script = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style_and_script is not None
    for code in (style_and_script[1], parts.scripts[1]):
        assert not re.search(
            r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttp|WebSocket|import\(|importScripts", code
        )
        assert "innerHTML" not in code


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    page = page_of(LENS, tmp_path)
    parts = Parts(page)
    policy = next(attributes["content"] for tag, attributes in parts.tags if "http-equiv" in attributes)
    digest = base64.b64encode(hashlib.sha256(parts.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_texts_are_no_markup(tmp_path: Path) -> None:
    page = page_of(nasty(), tmp_path)
    content, _ = content_of(page)
    assert set(NASTY) - {"\u2028", NASTY[4], NASTY[5]} <= set(content["views"][0]["runs"][0]["texts"])
    assert "\\u2028" in content["views"][0]["runs"][0]["texts"]
    assert page.count("</script>") == 2
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<!--" not in page
    inside = html.unescape(nasty()._repr_html_().partition('srcdoc="')[2].partition('" sandbox')[0])
    assert inside == page


def test_the_numbers_of_a_page_are_those_of_the_result(tmp_path: Path) -> None:
    content, data = content_of(page_of(LENS, tmp_path))
    (view,) = content["views"]
    (run,) = view["runs"]

    def array(name: str) -> np.ndarray:
        entry = run["arrays"][name]
        dtype = np.dtype(entry["type"])
        return np.frombuffer(data, dtype, entry["length"], entry["start"])

    ids = np.asarray(run["ids"])
    assert ids[array("top ids")].tolist() == LENS.top_ids.reshape(-1).tolist()
    found = torch.tensor(array("top log_probs") * -content["step"]).view(LENS.top_log_probs.shape)
    torch.testing.assert_close(found.float(), LENS.top_log_probs, rtol=0, atol=content["step"])
    assert ids[run["tokens"]].tolist() == LENS.token_ids.tolist()
    assert [ids[at] if at >= 0 else -1 for at in run["next"]] == LENS.next_ids.tolist()
    for name, tensor in {
        **LENS.statistics,
        "tracked log_prob  Rome": LENS.statistic("log_prob", " Rome"),
    }.items():
        values = torch.tensor(array(name)).view(2, 6, 13)
        exact = {"rtol": 0, "atol": 0} if name == "rank" else {"rtol": 5e-4, "atol": 0}
        torch.testing.assert_close(values.to(tensor.dtype), tensor, equal_nan=True, **exact)
    assert view["prompt"] == 8
    assert view["layers"] == list(range(6))


def test_a_frame_of_a_notebook_says_what_it_leaves_out() -> None:
    long = 2 * MOST_CELLS // 4
    logits = torch.zeros(1, 4, long, 3)
    lens = LensResult.from_logits(logits, [1] * long, top_k=1)
    frame = lens._repr_html_()
    inside = html.unescape(frame.partition('srcdoc="')[2].partition('" sandbox')[0])
    content, _ = content_of(inside)
    assert content["views"][0]["positions"] == list(range(long // 2, long))
    assert content["note"] == f"Here: the last {long // 2} of {long} positions; to_html(path) has all."
    assert 'sandbox="allow-scripts"' in frame
    assert " id=" not in frame.partition("srcdoc")[0]
    both = html.unescape(lens.compare(lens)._repr_html_())
    assert f"the last {long // 4} of {long} positions" in both


def test_several_prompts_are_a_choice(tmp_path: Path) -> None:
    content, _ = content_of(page_of(LensResults((LENS, OTHER)), tmp_path))
    assert [view["label"] for view in content["views"]] == ["0", "1"]
    content, _ = content_of(page_of(LENS.compare(OTHER, ("plain", "steered")), tmp_path))
    (view,) = content["views"]
    assert view["names"] == ["plain", "steered"]
    assert len(view["runs"]) == 2
    assert all("change" in entry for entry in view["statistics"])


# --- shades ----------------------------------------------------------------------------------------------------------


def test_shades_of_each_kind() -> None:
    share = scale_of(Kind.SHARE, torch.tensor([0.2]))
    assert [share.shade(value) for value in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    rank = scale_of(Kind.RANK, torch.tensor([0, 1000]))
    assert rank.shade(0) == 1.0
    assert rank.shade(1000) == 0.0
    assert rank.shade(-1) is None
    assert 0.4 < float(rank.shade(31) or 0) < 0.6
    change = scale_of(Kind.SIGNED, torch.tensor([-4.0, 2.0]))
    assert [change.shade(value) for value in (-4.0, 0.0, 2.0, 9.0)] == [-1.0, 0.0, 0.5, 1.0]
    log = scale_of(Kind.LOG, torch.tensor([-8.0, -torch.inf]))
    assert [log.shade(value) for value in (0.0, -4.0, -torch.inf)] == [1.0, 0.5, 0.0]
    level = scale_of(Kind.LEVEL, torch.tensor([20.0, 30.0]))
    assert level.shade(25.0) == 0.5
    for kind in Kind:
        assert scale_of(kind, torch.tensor([torch.nan])).shade(float("nan")) is None
        shade = scale_of(kind, torch.zeros(3)).shade(0.0)
        assert shade is not None


def test_one_extreme_cell_does_not_make_the_others_pale() -> None:
    values = torch.cat([torch.linspace(0, 2, 999), torch.tensor([500.0])])
    scale = scale_of(Kind.NATS, values)
    assert 1.9 < scale.high < 2.1
    assert scale.clipped
    assert scale.shade(500.0) == 1.0
