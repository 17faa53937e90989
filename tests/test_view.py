"""Views: one tree, and two renderers that say the same."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import tracelens as tl
from tests.errors import LLAMA
from tests.support.families import FAMILIES
from tracelens.location import Location
from tracelens.view import Code, Fold, Line, Stack, Table, Token, TokenRows, View, display, html, text

model = LLAMA.model
ROWS = TokenRows(
    (
        (Token(0, "The", 504, '"The"'), Token(1, " end", 7, '" end"')),
        (Token(0, "<b>", 3, '"<b>"'),),
    )
)
VIEWS: dict[str, View] = {
    "line": Line("a & b"),
    "code": Code("x  <  1\n  y"),
    "table": Table(("name", "<i>"), (("a", "b & c"), ("dd", "e"))),
    "empty": Table(("name",), (), empty="nothing"),
    "fold": Fold("more", Code("inside")),
    "tokens": ROWS,
    "stack": Stack((Line("one"), Table(("h",), (("c",),)), Fold("f", Line("two")))),
}


def words(shown: str) -> set[str]:
    return set(re.findall(r"[\w&<>\"]+", shown))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_both_renderers_say_the_same_words(view: View) -> None:
    own = {"position", "token", "id", "padding", "more", "f"}
    in_html = words(unescape(re.sub(r"<[^>]*>", " ", html(view))))
    in_text = words(re.sub(r"\d+ tokens?.*", "", text(view)))
    assert in_text - own <= in_html
    assert in_html - own - {"·"} <= in_text


def test_html_is_escaped() -> None:
    for view in (Line("<b>"), Code("<b>"), Table(("<b>",), (("<b>",),)), Fold("<b>", Line("<b>")), ROWS):
        assert "<b>" not in html(view)
        assert "&lt;b&gt;" in html(view)


def test_tokens_to_the_letter() -> None:
    assert text(ROWS) == (
        "row 0: 2 tokens\n"
        "  position  0      1\n"
        '  token     "The"  " end"\n'
        "  id        504    7\n"
        "row 1: 1 token, after 1 of padding\n"
        "  position  0\n"
        '  token     "<b>"\n'
        "  id        3"
    )
    assert html(ROWS).count('title="padding"') == 1
    assert html(ROWS).index('title="padding"') < html(ROWS).index("&lt;b&gt;")


def test_long_rows_are_broken_at_the_width_of_a_terminal() -> None:
    tokens = tuple(
        Token(position, f"word{position}", 100 + position, f'"word{position}"') for position in range(40)
    )
    lines = text(TokenRows((tokens,))).splitlines()
    assert max(map(len, lines)) <= 100
    assert re.findall(r'"word\d+"', "\n".join(lines)) == [token.shown for token in tokens]


def test_the_tokens_of_a_prompt_are_what_tok_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The capital of France is", "Paris is"]
    tokens = model.tokens(prompts)
    with model.trace(prompts):
        embedded = model.embed.save()
    weight = model.hf.get_input_embeddings().weight
    for row, padded in zip(tokens, embedded.value, strict=True):
        for token in row:
            assert torch.equal(padded[0, token.position], weight[token.id])
    tokenizer = LLAMA.tokenizer
    assert [token.id for token in tokens[0]] == tokenizer(prompts[0])["input_ids"]
    for row, prompt in zip(tokens, prompts, strict=True):
        assert "".join(token.spelt for token in row).endswith(prompt)
        assert row[-1].spelt in prompt
        assert row[-1].shown == f'"{row[-1].spelt}"'
    model.show(prompts)
    assert capsys.readouterr().out == repr(tokens) + "\n"
    assert f"after {len(tokens[0]) - len(tokens[1])} of padding" in repr(tokens)


def test_without_a_tokenizer_there_are_ids() -> None:
    plain = tl.wrap(FAMILIES["llama"].build())
    assert repr(plain.tokens([5, 60, 7])) == "3 tokens\n  position  0  1   2\n  id        5  60  7"


def test_bad_prompts_are_refused() -> None:
    with pytest.raises(tl.errors.PromptError):
        model.show([])
    with pytest.raises(tl.errors.NoTokenizerError):
        tl.wrap(FAMILIES["llama"].build()).show("text")


def test_a_notebook_is_given_the_object_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    shell = SimpleNamespace(kernel=object())
    fake = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=given.append))
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    tokens = model.tokens("Paris is")
    display(tokens)
    assert given == [tokens]


def test_a_cell_is_named_as_the_notebook_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"/tmp/ipykernel_1/2.py": ("Cell", "In[4]")}
    shell = SimpleNamespace(compile=SimpleNamespace(format_code_name=names.get))
    at = Location("/tmp/ipykernel_1/2.py", 3)
    assert str(at) == "/tmp/ipykernel_1/2.py:3"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert (str(at), at.short) == ("cell In[4], line 3", "In[4]:3")
    assert str(Location("script.py", 3)) == "script.py:3"


# The kernel of a notebook talks over sockets of its own; what its libraries warn of is not ours.
@pytest.mark.filterwarnings("ignore")
def test_errors_in_a_notebook_point_at_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(Path(tl.__file__).parent.parent))
    FAMILIES["llama"].build().save_pretrained(tmp_path / "model")
    notebook = nbformat.v4.new_notebook()
    sources = [
        f"import tracelens as tl\nmodel = tl.load({str(tmp_path / 'model')!r})",
        "model.show([[5, 6, 7], [8, 9]])",
        "with model.trace([5, 6, 7]) as t:\n"
        "    h = model.layers[1].resid_post\n"
        "    h += 1\n"
        "    model.logits.save()",
        "with model.trace([5, 6, 7]) as t:\n    model.layers[1].resid_post[:, 9].save()",
    ]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    client = NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.allow_errors = True
    client.execute()
    shown = notebook.cells[1].outputs[-1].data
    assert "<table>" in shown["text/html"]
    assert "after 1 of padding" in shown["text/plain"]
    for cell, line, source in ((2, 3, "h += 1"), (3, 2, "model.layers[1].resid_post[:, 9].save()")):
        (output,) = [output for output in notebook.cells[cell].outputs if output.output_type == "error"]
        assert f"at cell In[{cell + 1}], line {line}\n      {source}" in output.evalue
        plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
        assert f"In[{cell + 1}], line {line}" in plain
