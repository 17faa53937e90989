"""Steers one model on one device, on several, and on ranks, and compares what comes out.

    python -m benchmarks.steering_equality --out benchmarks/results --page docs/benchmarks/steering_equality.md

SmolLM2 with a vector from a contrast pair, added at seven strengths while the model reads prompts (nothing is
generated). What is compared is the difference of two logits after the prompt, whose mean over the prompts is what
papers plot. SmolLM2 has 9 heads and 3 key and value heads, so that it can be shared by three ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracelens as tl
from tests.support.pretend import device

STRENGTHS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
LAYER = 12
PAIR = ("I loved it, every minute of it", "I hated it, every minute of it")
WORDS = (" great", " terrible")
PROMPTS = (
    "The new film was",
    "The food at the little restaurant was",
    "We stayed for a week, and the weather was",
    "My first impression of the city was",
    "She said that the concert last night was",
    "After all these years, the book is still",
    "To be honest, the service was",
    "The children thought that the show was",
)

PAGE = """\
# Steering on one device, on several, and on ranks

A steering vector does the same wherever the model's parts lie. SmolLM2 reads {prompts} prompts while `strength * v` is
added after layer {layer}; `v` is the difference between what that layer holds at the end of two sentences. In the table
is the logit of " great" less that of " terrible" after the prompt, the mean over the prompts. It is made by
`python -m benchmarks.steering_equality`.

* **Largest difference**: of any prompt at any strength, from one device in the same dtype, relative to the largest
  logit difference.
* In bfloat16 sums taken in another order round differently. The **noise floor** is how far one device in bfloat16 is
  from one device in float32; a way to run the model is right if it stays within twice that.
* "3 devices" are the pretend devices of the tests
  ([decision 20](../decisions/0020-pretend-devices-are-torch-tensors.md)) under accelerate's `device_map`; ranks are
  processes with gloo, on the CPU. tp=3: three ranks share each layer; pp=2: the layers are cut into two stages.
"""

SWEPT = """\
## A measured steering vector

The same for `tl.steering`, in float32: the vector of {rows} rows of contrast data at `layers[{layer}].post_ln`, made by
`extract` each way anew, and its propensity at seven multipliers by `sweep`, each row at each. **Largest difference**
from one device, relative to the largest number.

| way | slope | vector, largest difference | propensity, largest difference |
| --- | --- | --- | --- |
"""
CONTRAST = Path(__file__).resolve().parent.parent / "tests" / "data" / "contrast_choices.jsonl"


def measured(model: Any) -> Tensor:
    """The logit differences, [strengths, prompts], in float32."""
    ends = []
    for text in PAIR:
        with model.trace(text) as t:
            ends.append(model.layers[LAYER].resid_post[0, -1].save())
    v = ends[0].value - ends[1].value
    one, other = (model.tokenizer.encode(word)[0] for word in WORDS)
    found: list[Tensor] = []
    for strength in STRENGTHS:
        with model.trace(list(PROMPTS)) as t:
            model.layers[LAYER].resid_post += strength * v
            model.logits[:, -1].save("logits")
        logits = t["logits"].float()
        found.append(logits[:, one] - logits[:, other])
    return torch.stack(found)


def swept(model: Any) -> dict[str, Tensor]:
    """The vector, and the propensity [rows, multipliers] when it is swept."""
    data = tl.steering.load_contrast(CONTRAST, template="chat")
    vector = tl.steering.extract(model, data, sites="post_ln", layers=LAYER, progress=False)
    curve: Any = tl.steering.sweep(model, vector, data, controls=False, progress=False)
    return {
        "vector": vector["post_ln", LAYER].double(),
        "propensity": torch.from_numpy(curve.propensity),
        "slope": torch.tensor(curve.slope),
    }


def ways() -> dict[str, Callable[[torch.dtype], Any]]:
    """How the model is run, by name."""

    def spread(dtype: torch.dtype) -> Any:
        parts: dict[str, Any] = {
            "model.embed_tokens": 0,
            "model.rotary_emb": 0,
            "model.norm": 2,
            "lm_head": 0,
        }
        parts |= {f"model.layers.{layer}": layer // 10 for layer in range(30)}
        return tl.load(
            "smollm2-135m",
            dtype=dtype,
            device_map={path: f"pretend:{index}" for path, index in parts.items()},
        )

    return {
        "one device": lambda dtype: tl.load("smollm2-135m", dtype=dtype),
        "3 devices": spread,
        "tp=3": lambda dtype: tl.load("smollm2-135m", dtype=dtype, tp=3),
        "pp=2": lambda dtype: tl.load("smollm2-135m", dtype=dtype, pp=2),
        "pp=3": lambda dtype: tl.load("smollm2-135m", dtype=dtype, pp=3),
    }


def run() -> dict[str, Any]:
    """Everything that the page says, as plain data."""
    found: dict[str, dict[str, Tensor]] = {}
    curves: dict[str, dict[str, Tensor]] = {}
    with device.opened():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            for way, load in ways().items():
                with load(dtype) as model:
                    found.setdefault(name, {})[way] = measured(model)
                    if dtype is torch.float32:
                        curves[way] = swept(model)
                print(f"{name}, {way}: done", flush=True)
    rows: list[dict[str, Any]] = []
    for name, by_way in found.items():
        whole = by_way["one device"]
        for way, values in by_way.items():
            rows.append(
                {
                    "dtype": name,
                    "way": way,
                    "means": values.mean(1).tolist(),
                    "largest": ((values - whole).abs().max() / whole.abs().max()).item(),
                }
            )
    exact, rounded = found["float32"]["one device"], found["bfloat16"]["one device"]
    floor = ((rounded - exact).abs().max() / exact.abs().max()).item()
    for row in rows:
        most = 1e-4 if row["dtype"] == "float32" else 2 * floor
        if row["largest"] > most:
            raise SystemExit(
                f"{row['way']} in {row['dtype']} differs by {row['largest']:.2g}, more than {most:.2g}"
            )
    sweeps: list[dict[str, Any]] = []
    for way, own in curves.items():
        whole = curves["one device"]
        apart = {
            part: ((own[part] - whole[part]).abs().max() / whole[part].abs().max()).item()
            for part in ("vector", "propensity")
        }
        if max(apart.values()) > 1e-4:
            raise SystemExit(f"the sweep of {way} differs by {apart}")
        sweeps.append({"way": way, "slope": own["slope"].item(), **apart})
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "tracelens")},
        "strengths": list(STRENGTHS),
        "floor": floor,
        "rows": rows,
        "sweeps": sweeps,
        "swept": len(curves["one device"]["propensity"]),
    }


def page(report: dict[str, Any]) -> str:
    """The report for reading."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    head = [f"{strength:+.0f}" if strength else "0" for strength in report["strengths"]]
    lines = [
        PAGE.format(prompts=len(PROMPTS), layer=LAYER),
        f"{report['date']}, {versions}. Noise floor of bfloat16: {report['floor']:.2g}.",
        "",
        f"| dtype | way | {' | '.join(head)} | largest difference |",
        "|" + " --- |" * (len(head) + 3),
    ]
    for row in report["rows"]:
        means = " | ".join(f"{mean:.3f}" for mean in row["means"])
        lines.append(f"| {row['dtype']} | {row['way']} | {means} | {row['largest']:.1e} |")
    text = "\n".join(lines) + "\n\n" + SWEPT.format(rows=report["swept"], layer=LAYER)
    for sweep in report["sweeps"]:
        text += (
            f"| {sweep['way']} | {sweep['slope']:.6f} | {sweep['vector']:.1e} | {sweep['propensity']:.1e} |\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a folder for the report as JSON")
    parser.add_argument("--page", type=Path, help="the page to write")
    options = parser.parse_args()
    report = run()
    if options.out is not None:
        (options.out / "steering_equality.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.page is not None:
        options.page.write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
