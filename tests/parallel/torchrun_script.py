"""What a user's script under torchrun does, on all ranks: ``python -m torch.distributed.run ... FOLDER OUT --tp 2``.

Each rank writes down what it has seen in a file of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import tracelens as tl
from tests.support import users_plans
from tracelens.errors import TracelensError

arguments = argparse.ArgumentParser()
arguments.add_argument("folder", type=Path)
arguments.add_argument("out", type=Path)
arguments.add_argument("--tp", type=int, default=1)
arguments.add_argument("--pp", type=int, default=1)
arguments.add_argument("--way", default="load", choices=("load", "function", "wrapped", "wrapped plan"))
asked = arguments.parse_args()


def wrapped() -> tl.Model:
    """A model that the script itself has loaded and spread."""
    torch.distributed.init_process_group("gloo")
    spread = DistributedConfig(tp_size=asked.tp, pp_size=asked.pp)
    options = {"distributed_config": spread} if asked.way == "wrapped" else {}
    hf = AutoModelForCausalLM.from_pretrained(asked.folder, **options)
    if asked.way == "wrapped plan":
        users_plans.sequence(hf, init_device_mesh("cpu", (asked.tp,)))
    return tl.wrap(hf)


if asked.way in ("load", "function"):
    plan = "tests.support.users_plans:tutorial" if asked.way == "function" else None
    model = tl.load(asked.folder, tp=asked.tp, pp=asked.pp, parallelize=plan)
else:
    model = wrapped()
rank = torch.distributed.get_rank()
own = [p.to_local() if hasattr(p, "to_local") else p for p in model.hf.parameters()]
seen: dict[str, object] = {"rank": rank, "bytes": sum(tensor.nbytes for tensor in own)}


def refusal(read) -> dict[str, str]:
    """What an error says, or that there was none."""
    try:
        read()
    except TracelensError as error:
        return {
            "error": type(error).__name__,
            "problem": error.problem,
            "file": str(error.at and error.at.filename),
        }
    return {"error": ""}


with model.trace([[5, 6, 7, 8], [9, 10, 11, 12]]) as t:
    model.layers[1].mlp_act[..., :70] = 0
    model.layers[2].head(3).z = 0
    model.layers[2].resid_post += model.layers[0].resid_post
    q = model.layers[1].q.save("q")
    act = model.module("model.layers.2.mlp.act_fn").output.save("act")
    logits = model.logits.save("logits")

seen["value"] = refusal(lambda: logits.value)
seen["by name"] = refusal(lambda: t["q"])
if rank == 0:
    torch.save({"logits": logits.value, "q": q.value, "act": act.value}, asked.out / "results.pt")


def other_prompts() -> None:
    with model.trace([[5, 6, 7 + rank]]):
        model.layers[1].resid_post.save()


def other_blocks() -> None:
    with model.trace([[5, 6, 7]]):
        model.layers[1 + rank].resid_post.save()


def other_tensors() -> None:
    with model.trace([[5, 6, 7]]):
        model.layers[1].resid_post += torch.full((48,), float(rank))
        model.logits.save()


seen["stream"] = refusal(lambda: model.stream([[5, 6, 7]], max_new_tokens=2))
seen["prompts"] = refusal(other_prompts)
seen["blocks"] = refusal(other_blocks)
seen["tensors"] = refusal(other_tensors)
texts: list[list[int] | list[list[int]]] = []


def text(seed: int, **options: object) -> None:
    torch.manual_seed(seed)
    with model.generate([[5, 6, 7]], max_new_tokens=3, **options) as generation:
        model.layers[1].z[:, :, 2] = 0
    texts.append(generation.tokens)


def noisy_text() -> None:
    """What the ranks of one layer draw by themselves in a pass."""
    torch.manual_seed(2)
    with model.generate([[5, 6, 7]], max_new_tokens=6, do_sample=True, eos_token_id=None) as generation:
        stream = model.layers[2].resid_post
        model.layers[2].resid_post += tl.apply(torch.randn_like, stream, like=stream)
    texts.append(generation.tokens)


def looked_at() -> None:
    """A function is called where the embedding is, with what the last layer has made of each step."""
    steps: list[list[int]] = []

    def note(scores: torch.Tensor) -> torch.Tensor:
        steps.append(scores[:, -1].argmax(-1).tolist())
        return scores

    with model.generate([[5, 6, 7]], max_new_tokens=4, do_sample=False, eos_token_id=None):
        scores = model.layers[2].resid_post @ model.param("model.embed_tokens.weight").T
        tl.apply(note, scores, like=scores)
    seen["steps"] = steps


if asked.pp > 1:
    seen["noisy"] = refusal(noisy_text)
    seen["looked at"] = refusal(looked_at)
if asked.way == "load" or asked.pp > 1:
    seen["options"] = refusal(lambda: text(1, do_sample=False, eos_token_id=rank + 1))
    seen["draws"] = refusal(lambda: text(rank, do_sample=True))
    seen["greedy"] = refusal(lambda: text(rank, do_sample=False))
    seen["sampled"] = refusal(lambda: text(1, do_sample=True))
    seen["tokens"] = texts

if asked.way == "load":
    with model.generate([[5, 6, 7], [9, 10]], max_new_tokens=4, do_sample=False, eos_token_id=None) as steps:
        steps.decode.layers[0].resid_post[:, -1] += steps.prefill.layers[2].resid_post.tok[-1]
        model.layers[:].mlp_act[:, -1].save("stack")
        model.layers[1].z.save("z")
    seen["a step"] = refusal(lambda: steps["z"])
    seen["new"] = steps.tokens
    if rank == 0:
        torch.save({"stack": steps["stack"], "z": steps["z"]}, asked.out / "steps.pt")

# After all of this the ranks still stand at the same step.
with model.trace([[5, 6, 7, 8], [9, 10, 11, 12]]):
    again = model.layers[1].q.save()
if rank == 0:
    seen["again"] = bool(torch.isfinite(again.value).all())

(asked.out / f"rank{rank}.json").write_text(json.dumps(seen))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
