"""A model on several GPUs: a block that reads and writes on all of them, and what travels between them.

It takes all the GPUs that there are; without one it runs on the CPU, and nothing travels.

    python -m examples.several_gpus
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import tracelens as tl

PROMPT = "The capital of France is"
LAYERS = 30


def parts(layers: int, devices: Sequence[str]) -> dict[str, str]:
    """A map for ``device_map``: equal runs of layers, and the head beside the embedding whose weights it shares."""
    found = {f"model.layers.{layer}": devices[layer * len(devices) // layers] for layer in range(layers)}
    return {
        "model.embed_tokens": devices[0],
        "model.rotary_emb": devices[0],
        **found,
        "model.norm": devices[-1],
        "lm_head": devices[0],
    }


def load(devices: Sequence[str]) -> tl.Model:
    """The embedded model, spread over devices; ``device_map="auto"`` would do so by their free memory."""
    return tl.load("smollm2-135m", device_map=parts(LAYERS, devices))


def across(model: tl.Model, prompt: str, v: torch.Tensor) -> tl.Trace:
    """Layer 25 is given what layer 5 had at the last position, layer 15 a vector from the CPU; three results."""
    with model.trace(prompt, max_extra_memory="1GiB") as t:
        model.layers[25].resid_post[:, -1:] += 0.5 * model.layers[5].resid_post[:, -1:]
        model.layers[15].resid_post += v
        model.layers[::5].resid_post.norm(dim=-1).save("norms")
        model.layers[28].mlp_act.save("neurons", device="keep")
        model.logits[:, -1].argmax(-1).save("best")
    return t


def main(model: tl.Model | None = None) -> tl.Results:
    """Runs the block and prints what was planned for it, and what came back from where."""
    if model is None:
        model = load([f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"])
    t = across(model, PROMPT, torch.full((model.hf.config.hidden_size,), 0.1))
    print(t.explain())
    print()
    print("norms:", list(t["norms"].shape), "on", t["norms"].device)
    print("neurons:", list(t["neurons"].shape), "on", t["neurons"].device)
    assert model.tokenizer is not None
    print("next:", repr(model.tokenizer.decode(t["best"])))
    return t.results


if __name__ == "__main__":
    main()
