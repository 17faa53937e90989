"""What travels between the devices of a spread model, for typical analyses: tracelens, hooks by hand and nnsight.

    python -m benchmarks.device_map --out benchmarks/results --page docs/benchmarks/device_map.md

It counts copies, bytes and moments at which the host waits, on the pretend devices of the tests, where every copy is
seen. Each contestant has a model of its own, spread over three devices, and answers each case twice: what is kept from
the first time does not travel in the second. What the model itself sends in a forward pass is taken off.
Each answer is compared with that of the hooks, and a wrong one ends the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor

import tracelens as tl
from benchmarks.across_devices import CASES, CONTESTANTS, Answer, Spread, bare
from tests.support.pretend import Copy, Seen, device, watched

DEVICES = ("pretend:0", "pretend:1", "pretend:2")
TOKENS = 32
COLUMNS = ("case", "contestant", "between devices", "to the host", "from the host", "host waits", "again")

PAGE = """\
# What travels between devices

A model is spread over three devices: ten layers on each, the final norm on the last, and the head on the first, beside
the embedding whose weight it shares. Six analyses are written with tracelens, with torch hooks by hand, and with
nnsight. This page counts what each makes travel. It is made by `python -m benchmarks.device_map`.

* Counted are **copies and their bytes**, on the pretend devices of the tests
  ([decision 20](../decisions/0020-pretend-devices-are-torch-tensors.md)), which see every copy and refuse operands on
  two devices as GPUs do. Nothing here is a time.
* What the model sends by itself in a forward pass (the stream, from device to device) is taken off: the table holds
  what the analysis adds, its token ids included.
* **Host waits** are the moments at which the host waits for a device. tracelens copies results asynchronously and waits
  when one of them is looked at first; that one wait is not in the table.
* **Again**: copies and bytes of all kinds together when the same is done a second time.
* The hooks and nnsight are written with care: they reduce before they copy, index before they send, and say `.to(...)`
  and `.cpu()` where that is needed. "As on one device" is nnsight without these.

How to read it: for tracelens nothing in a forward pass waits, and a tensor of the user's travels once to each device
instead of once to each layer, or in every run. In a lens the others go through accelerate's hooks, which send each
layer's stream to the final norm and from there to the head; tracelens sends the norm's weight to the streams, once to
each device. Else the three are much alike in bytes between devices, since all compute where the data is.

Where tracelens moves more than it would have to: a stack of one small result for each layer is as many small copies to
the host as there are layers, where one for each device would do. And a prompt is three tensors (tokens, mask,
positions) instead of one.
"""


def run(
    load: Callable[[], Any], ids: Tensor, v: Tensor, contestants: Sequence[str] = tuple(CONTESTANTS)
) -> dict[str, Any]:
    """Counts everything; the report is plain data, made for JSON. ``load`` gives a newly spread model."""
    hf = load()
    own = counted(bare(Spread(hf, ids, v)))[1]
    reference = CONTESTANTS["hooks by hand"](Spread(hf, ids, v))
    right = {case: answer() for case, answer in reference.items()}
    rows: list[dict[str, Any]] = []
    for name in contestants:
        answers = CONTESTANTS[name](Spread(load(), ids, v))
        for case, answer in answers.items():
            row: dict[str, Any] = {"case": case, "contestant": name}
            try:
                for time in ("first", "again"):
                    found, seen = counted(answer)
                    row[time] = added(seen, own)
                    compare(found, right[case], f"{name}, {case}")
            except RuntimeError as error:
                row = {"case": case, "contestant": name, "fails": str(error).strip().splitlines()[-1]}
            rows.append(row)
    order = list(CASES)
    rows.sort(key=lambda row: order.index(row["case"]))
    return {"about": about(ids), "rows": rows}


def counted(answer: Answer) -> tuple[list[Tensor], Seen]:
    """An answer, and what was seen on the way to it."""
    with watched() as seen:
        found = answer()
    return found, seen


def compare(found: Sequence[Tensor], right: Sequence[Tensor], what: str) -> None:
    """A wrong answer ends the run: what it takes to be wrong is of no interest."""
    assert len(found) == len(right), f"{what}: {len(found)} results instead of {len(right)}"
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(
            one, other.reshape(one.shape), rtol=1e-4, atol=1e-4, msg=lambda text: f"{what}: {text}"
        )


def added(seen: Seen, own: Seen) -> dict[str, Any]:
    """What was copied beyond the model's own, by direction, and how often the host waited."""
    rest = Counter(map(journey, seen.copies)) - Counter(map(journey, own.copies))
    found = {"between": [0, 0], "out": [0, 0], "in": [0, 0]}
    for (source, target, _, _, size), times in rest.items():
        way = "out" if target == "cpu" else "in" if source == "cpu" else "between"
        found[way][0] += times
        found[way][1] += times * size
    waits = Counter((read.kind, read.device) for read in seen.reads)
    beyond = waits - Counter((read.kind, read.device) for read in own.reads if read.kind != "copy")
    return {**found, "waits": beyond.total()}


def journey(copy: Copy) -> tuple[str, str, tuple[int, ...], torch.dtype, int]:
    """Where a copy went, and what it was of."""
    return copy.source, copy.target, copy.shape, copy.dtype, copy.bytes


def about(ids: Tensor) -> dict[str, Any]:
    """With what it was counted."""
    names = ("torch", "transformers", "accelerate", "nnsight")
    return {
        "date": datetime.date.today().isoformat(),
        "tracelens": tl.__version__,
        "devices": len(DEVICES),
        "tokens": ids.shape[1],
        **{name: version(name) for name in names},
    }


# --- the report ------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the report as text."""
    start = [CASES[row["case"]], row["contestant"]]
    if "fails" in row:
        return [*start, f"fails: {row['fails']}", "", "", "", ""]
    first, again = row["first"], row["again"]
    total = [sum(again[way][part] for way in ("between", "out", "in")) for part in (0, 1)]
    ways = [amount(first[way]) for way in ("between", "out", "in")]
    return [*start, *ways, str(first["waits"]), amount(total)]


def amount(pair: Sequence[int]) -> str:
    """Copies and bytes."""
    copies, size = pair
    if not copies:
        return "-"
    shown = (
        f"{size:,} B"
        if size < 10_000
        else f"{size / 1000:,.0f} kB"
        if size < 10**7
        else f"{size / 10**6:,.0f} MB"
    )
    return f"{copies} x, {shown}"


def markdown(report: dict[str, Any], *, page: bool = False) -> str:
    """The report as Markdown."""
    known = report["about"]
    model = known.get("model", "a random model")
    lines = [PAGE] if page else ["# What travels between devices\n"]
    lines.append(
        f"{model}, {known['devices']} devices, a prompt of {known['tokens']} tokens; {known['date']}, "
        f"torch {known['torch']}, transformers {known['transformers']}, accelerate {known['accelerate']}, "
        f"nnsight {known['nnsight']}, tracelens {known['tracelens']}.\n"
    )
    lines.append(f"| {' | '.join(COLUMNS)} |")
    lines.append("|" + " --- |" * len(COLUMNS))
    lines += [f"| {' | '.join(cells(row))} |" for row in report["rows"]]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path | None, page: Path | None) -> None:
    """The files that were asked for."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "device_map.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "device_map.md").write_text(markdown(report), encoding="utf-8")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(markdown(report, page=True), encoding="utf-8")


def spread(hf: Any) -> Any:
    """Equal runs of layers; the head beside the embedding, whose weights it may share."""
    layers = len(hf.model.layers)
    parts: dict[str, Any] = {
        f"model.layers.{layer}": DEVICES[layer * len(DEVICES) // layers] for layer in range(layers)
    }
    parts |= {"model.embed_tokens": DEVICES[0], "model.rotary_emb": DEVICES[0], "lm_head": DEVICES[0]}
    parts["model.norm"] = DEVICES[-1]
    return accelerate.dispatch_model(hf, parts, main_device=torch.device(DEVICES[0]))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    chosen = parser.parse_args()
    if (reason := device.missing()) is not None:
        print(f"the pretend devices are needed: {reason}")
        return 1
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    ids = torch.randint(100, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with device.opened():
        report = run(lambda: spread(tl.load("smollm2-135m").hf), ids, torch.full((576,), 0.1))
    report["about"]["model"] = "SmolLM2-135M"
    print(markdown(report))
    write(report, chosen.out, chosen.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
