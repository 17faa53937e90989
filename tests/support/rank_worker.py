"""The process of a rank that can also be asked to go wrong. Pools of the tests start it in place of the real one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tracelens as tl
from tracelens import serving
from tracelens.backends import body
from tracelens.backends.ranks import worker
from tracelens.backends.ranks.channel import Message
from tracelens.backends.ranks.instep import InStepError
from tracelens.backends.ranks.requests import HANDLERS
from tracelens.backends.ranks.served import Served
from tracelens.errors import ShapeError, TracelensError
from tracelens.location import Location

_connection = -1


def main(about: Mapping[str, Any]) -> None:
    """What the pool calls in the new process."""
    global _connection
    _connection = about["fd"]
    if about["rank"] == int(os.environ.get("TRACELENS_TEST_FAILING_RANK", "-1")):
        raise RuntimeError("this rank does not even start")
    body.resolve = breakable
    more = {
        function.__name__: function
        for function in (misbehave, keep, kept, arm, drift, as_script, run, generate, communicated)
    }
    worker.main(about, {**HANDLERS, **more})


def misbehave(served: Served, request: Message) -> Message:
    """Rank ``rank`` does what ``how`` says, and each other one sums over all ranks where ``others`` says so."""
    header = request.header
    if header.get("together"):
        dist.all_reduce(torch.ones(2))
    if served.rank == header["rank"]:
        return _MISDEEDS[header["how"]]()
    if header.get("others") == "sum":
        dist.all_reduce(torch.ones(2))
    return Message({"done": True})


def keep(served: Served, request: Message) -> Message:
    """As if a model were loaded: keeps what was sent under an id."""
    served.models[request.header["id"]] = request.tensors["weight"]
    return Message()


def kept(served: Served, request: Message) -> Message:
    """What was kept under an id."""
    return Message({}, {"weight": served.models[request.header["id"]]})


# --- steps that go wrong ---

BREAKABLE = "torch.sinh"
"""The function that goes wrong in a step, when it was armed."""
_fault: str | None = None
_times = 0
_resolve = body.resolve


def breakable(name: str) -> Any:
    """What hooks call for a function of this name."""
    function = _resolve(name)
    if name != BREAKABLE:
        return function

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if _fault is not None:
            _FAULTS[_fault]()
        return function(*args, **kwargs)

    return stepping


def arm(served: Served, request: Message) -> Message:
    """From now on a step goes wrong on rank ``rank``, in the way ``how``; nowhere if that is ``None``."""
    global _fault, _times
    _times = 0
    _fault = request.header["how"] if request.header["rank"] in (served.rank, "all") else None
    return Message()


def drift(served: Served, request: Message) -> Message:
    """On rank ``rank`` the last bit of a gain is another one from now on, in the model ``model``."""
    if served.rank == request.header["rank"]:
        gain = served.models[request.header["model"]].model.anatomy.model.get_parameter(
            request.header["path"]
        )
        with torch.no_grad():
            gain[0] = torch.nextafter(gain[0], torch.tensor(9.0))
    return Message()


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("no memory is left for this step")


def _third_time() -> None:
    """In the third step of a generation, say."""
    global _times
    _times += 1
    if _times == 3:
        _out_of_memory()


def _sleep_long() -> None:
    time.sleep(60)


def _sleep_short() -> None:
    time.sleep(2)


_FAULTS = {
    "memory": _out_of_memory,
    "third time": _third_time,
    "sleep": _sleep_long,
    "short sleep": _sleep_short,
}


def as_script(served: Served, request: Message) -> Message:
    """What a script does that all ranks run: a trace or a text, on the model of a folder; tells how it ended."""
    header = request.header
    with torch.inference_mode(False):
        model = served.models.get("script") or tl.load(header["source"], tp=header["tp"], pp=header["pp"])
    served.models["script"] = model
    try:
        if header.get("text"):
            with model.generate([[5, 6, 7]], max_new_tokens=5, eos_token_id=None) as text:
                model.layers[2].resid_post += (model.layers[0].resid_post / 10).sinh()
            return Message({"error": None}, {"tokens": torch.tensor(text.tokens)})
        with model.trace([[5, 6, 7]]):
            total = model.layers[0].mlp_act.sinh().sum(-1).save()
            gradient = None
            if header["gradient"]:
                point = model.layers[0].resid_pre
                gradient = tl.grad(model.layers[1].mlp_out.sinh().sum(), point).save()
    except TracelensError as error:
        cause = error.__cause__
        about = {"error": type(error).__name__, "text": str(error), "cause": type(cause).__name__}
        return Message({**about, "rank": getattr(cause, "rank", None)})
    if served.rank:
        return Message({"error": None})
    assert gradient is None or gradient.value.abs().sum() > 0
    return Message({"error": None}, {"total": total.value})


_NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")


class Communicating(TorchDispatchMode):
    """Notes every collective with the bytes that this rank gives to it, whoever asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if "c10d" in namespace and not name.startswith(_NO_COLLECTIVES):
            # The tensors that are filled stand first where they are given.
            own = args[1] if name.startswith(("gather_", "_allgather", "allgather_")) else args[0]
            self.seen.append((name.strip("_").partition(".")[0], _bytes_of(own)))
        return func(*args, **kwargs or {})


def _bytes_of(arg: Any) -> int:
    return arg.nbytes if isinstance(arg, torch.Tensor) else sum(map(_bytes_of, arg))


_communicating = Communicating()


def run(served: Served, request: Message) -> Message:
    """As the real one, under watch."""
    _communicating.seen.clear()
    with _communicating:
        return serving.run(served, request)


def generate(served: Served, request: Message) -> Message:
    """As the real one, under watch."""
    _communicating.seen.clear()
    with _communicating:
        return serving.generate(served, request)


def communicated(served: Served, request: Message) -> Message:
    """The collectives of the last run."""
    return Message({"seen": _communicating.seen})


def _raise() -> Message:
    return _deeper()


def _deeper() -> Message:
    raise ValueError("a mistake, deep inside")


def _raise_in_step() -> Message:
    try:
        _deeper()
    except ValueError as error:
        raise InStepError from error
    raise AssertionError


def _raise_ours() -> Message:
    raise ShapeError("no such shape", at=Location("script.py", 7, "f"), instead="another")


def _exit() -> Message:
    print("the last words of this rank", flush=True)
    os._exit(7)


def _sleep() -> Message:
    time.sleep(3)
    return Message({"done": True})


def _hang() -> Message:
    while True:
        time.sleep(60)


def _garbage() -> Message:
    # Protocol 2 of pickle, which must not be read, after which there is nothing to wait for.
    os.write(_connection, b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true\x85R." + b"." * 64)
    return _hang()


def _unsendable() -> Message:
    return Message({"value": object()})


_MISDEEDS = {
    "raise": _raise,
    "raise in step": _raise_in_step,
    "raise ours": _raise_ours,
    "exit": _exit,
    "sleep": _sleep,
    "hang": _hang,
    "garbage": _garbage,
    "unsendable": _unsendable,
}
