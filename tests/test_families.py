"""Tables that somebody else brings: registered, by name or as an object, or with an installed package."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Starcoder2Config

import tracelens as tl
from tests.support import my_families
from tests.support.families import randomise
from tests.support.my_families import STARCODER2
from tests.support.ranks import PoolOf
from tracelens.backends.architectures import FAMILIES, registry
from tracelens.backends.table_rules import problems
from tracelens.errors import (
    AbsentSiteError,
    FamilyImportError,
    FamilyKnownError,
    FamilyTableError,
    NotALanguageModelError,
    RefutedSitesWarning,
    UnknownArchitectureError,
)
from tracelens.families import Family, HeadsView, InSome, Side, Tap

IDS = [[3, 4, 5, 9]]
NAME = "tests.support.my_families:STARCODER2"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers goes with it."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_names", {})
    registry._packages.cache_clear()
    yield
    registry._packages.cache_clear()


@pytest.fixture(scope="module")
def hf() -> Any:
    config = Starcoder2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        residual_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, 0)
    return model.eval()


def packages(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Installed packages with these entry points; a name with ``_2`` is of another one."""
    found = [EntryPoint(name.removesuffix("_2"), value, registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == registry.GROUP else [])
    registry._packages.cache_clear()


def test_a_registered_table_gives_the_sites(hf: Any) -> None:
    with pytest.raises(NotALanguageModelError, match="no site table for models of type 'starcoder2'"):
        tl.wrap(hf).layers
    tl.families.register(STARCODER2)
    assert tl.families.known()["starcoder2"] == "registered here"
    assert tl.families.table("starcoder2") is STARCODER2
    model = tl.wrap(hf)
    proof = model.check_sites()
    assert proof.ok
    assert not proof.derived
    with model.trace(IDS) as t:
        for layer in range(model.n_layers):
            model.layers[layer].resid_pre.save(f"{layer}")
        model.layers[1].mlp_act[..., 7] = 0
        model.logits.save("logits")
    plain = hf(torch.tensor(IDS), output_hidden_states=True)
    for layer in range(model.n_layers):
        assert_close(t[f"{layer}"], plain.hidden_states[layer], rtol=1e-5, atol=1e-5)
    edited: dict[str, Any] = {}

    def without(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        edited["hidden"] = args[0].clone()
        edited["hidden"][..., 7] = 0
        return (edited["hidden"],)

    hook = hf.model.layers[1].mlp.c_proj.register_forward_pre_hook(without)
    try:
        expected = hf(torch.tensor(IDS)).logits
    finally:
        hook.remove()
    assert (expected - plain.logits).abs().max() > 1e-3
    assert_close(t["logits"], expected, rtol=1e-5, atol=1e-5)


def test_forgetting_it_leaves_models_without_one(hf: Any) -> None:
    tl.families.register(STARCODER2)
    tl.families.forget("starcoder2")
    assert "starcoder2" not in tl.families.known()
    assert isinstance(tl.wrap(hf), tl.PlainModel)
    with pytest.raises(UnknownArchitectureError, match="no table was registered"):
        tl.families.forget("llama")
    with pytest.raises(UnknownArchitectureError, match="no site table"):
        tl.families.table("starcoder2")


def test_the_proof_at_load_holds_it_to_the_model(
    hf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRACELENS_PROBE")
    monkeypatch.setenv("TRACELENS_CACHE", str(tmp_path))
    wrong = {**STARCODER2.taps, "resid_mid": Tap("input_layernorm", Side.IN)}
    tl.families.register(replace(STARCODER2, taps=wrong))
    with pytest.warns(RefutedSitesWarning, match="resid_mid"):
        model = tl.wrap(hf)
    with pytest.raises(AbsentSiteError, match="does not hold"), model.trace(IDS):
        model.layers[0].resid_mid.save()
    tl.families.register(STARCODER2, replace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tl.wrap(hf).check_sites().ok


TAPS = STARCODER2.taps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_types": ()}, "serves no type"),
        ({"layers": "model.layers"}, "without a place for the number"),
        ({"taps": {**TAPS, "resid_middle": TAPS["resid_mid"]}}, "'resid_middle' in taps, which is no site"),
        (
            {"absent": {**STARCODER2.absent, "mlp_gate": "none"}},
            "'mlp_gate' in absent, which is no site",
        ),
        ({"absent": {**STARCODER2.absent, "q": "none"}}, "'q' in taps and in absent"),
        ({"absent": {}}, "does not say where 'pos_embed' is"),
        ({"absent": {**STARCODER2.absent, "mlp_up": " "}}, "does not say where 'mlp_up' is"),
        (
            {
                "taps": {name: tap for name, tap in TAPS.items() if name != "final_norm"},
                "absent": {**STARCODER2.absent, "final_norm": "none"},
            },
            "no tap for 'final_norm'",
        ),
        (
            {
                "taps": {name: tap for name, tap in TAPS.items() if name != "embed"},
                "absent": {**STARCODER2.absent, "embed": "none"},
            },
            "which module has a row for each token",
        ),
        ({"taps": {**TAPS, "q": "self_attn.q_proj"}}, "has a str for 'q'"),
        (
            {"taps": {**TAPS, "scores": Tap("self_attn", Side.INSIDE, "weights")}},
            "'weights' inside attention",
        ),
        ({"taps": {**TAPS, "q": Tap("a", Side.OUT, view=HeadsView(("H", "G")))}}, "'q', and no width 'G'"),
        ({"taps": {**TAPS, "q": Tap("a", Side.OUT, view=HeadsView(("H",), 1))}}, "part 1 of 1"),
        ({"in_some": (InSome(("mlp_up",), lambda _: frozenset(), "", ""),)}, "'mlp_up' in in_some"),
        ({"in_some": (InSome(("embed",), lambda _: frozenset(), "", ""),)}, "'embed' in in_some"),
        ({"withheld": {"odd": (("mlp_up",), "no")}}, "withholds 'mlp_up'"),
        ({"reached": ("mlp_up",)}, "'mlp_up' in reached"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_that_leave_something_open_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(FamilyTableError, match=words) as caught:
        tl.families.register(replace(STARCODER2, **change))
    assert caught.value.at is not None
    assert "starcoder2" not in tl.families.known()


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(FamilyTableError, match="a dict is no table"):
        tl.families.register({})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_our_own_tables_pass(family: Family) -> None:
    assert list(problems(family)) == []


def test_a_type_has_one_table_unless_it_is_replaced() -> None:
    with pytest.raises(FamilyKnownError, match="'llama' have a table already \\(tracelens\\)"):
        tl.families.register(my_families.OF_LLAMA)
    mine = replace(my_families.OF_LLAMA, name="Mine")
    tl.families.register(mine, replace=True)
    assert tl.families.table("llama") is mine
    tl.families.forget("llama")
    assert tl.families.table("llama").name == "Llama"
    tl.families.register(STARCODER2)
    with pytest.raises(FamilyKnownError, match="registered here"):
        tl.families.register(NAME)
    # Nothing of a call that is refused is kept.
    other = replace(STARCODER2, model_types=("starcoder3",))
    with pytest.raises(FamilyKnownError):
        tl.families.register(other, STARCODER2)
    assert "starcoder3" not in tl.families.known()


def test_several_tables_of_one_type_are_asked_by_the_configuration(hf: Any) -> None:
    never = replace(STARCODER2, name="Never", serves=lambda config: config.hidden_size == 1, these="none")
    tl.families.register(never, replace(STARCODER2, serves=lambda config: config.hidden_size == 48, these=""))
    assert tl.wrap(hf).anatomy.family.name == "StarCoder2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_families", "does not name a table"),
        ("tests.support.no_such_module:TABLE", "could not be imported: ModuleNotFoundError"),
        ("tests.support.my_families:NONE", "could not be imported: AttributeError"),
        ("tests.support.my_families:NO_TABLE", "is a str, and no"),
    ],
)
def test_names_that_are_no_tables_are_refused(name: str, words: str) -> None:
    with pytest.raises(FamilyImportError, match=words):
        tl.families.register(name)


# --- installed packages ---------------------------------------------------------------------------------------------


def test_an_installed_package_brings_a_table(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, starcoder2=NAME, never="no_such_package:TABLE")
    assert tl.families.known()["starcoder2"] == NAME
    assert tl.wrap(hf).check_sites().ok
    with pytest.raises(FamilyKnownError, match="my_families:STARCODER2"):
        tl.families.register(STARCODER2)


def test_our_own_table_goes_before_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, llama="no_such_package:TABLE")
    assert tl.families.known()["llama"] == "tracelens"
    assert tl.families.table("llama").name == "Llama"


def test_packages_with_a_broken_table_are_named(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, starcoder2="no_such_package:TABLE")
    with pytest.raises(FamilyImportError, match="no_such_package:TABLE"):
        tl.wrap(hf)
    packages(monkeypatch, starcoder2="tests.support.my_families:OF_LLAMA")
    with pytest.raises(FamilyImportError, match="serves 'llama'"):
        tl.wrap(hf)
    packages(monkeypatch, starcoder2=NAME, starcoder2_2="other_package:TABLE")
    with pytest.raises(FamilyKnownError, match="several packages"):
        tl.wrap(hf)
    tl.families.register(NAME, replace=True)
    assert tl.wrap(hf).check_sites().ok


# --- ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_import_it_by_name(hf: Any, tmp_path: Path, ranks_of: PoolOf) -> None:
    hf.config.save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    tl.families.register(STARCODER2)
    with pytest.raises(UnknownArchitectureError, match="registered as an object of this process"):
        tl.load(tmp_path, tp=2, ranks=ranks_of(2))
    tl.families.register(NAME, replace=True)
    one = tl.wrap(hf)
    found = []
    with tl.load(tmp_path, tp=2, ranks=ranks_of(2)) as spread:
        for model in (one, spread):
            with model.trace(IDS) as t:
                model.layers[0].mlp_act[..., 3:70] *= 0.5
                model.layers[1].z.save("z")
                model.logits.save("logits")
            found.append(t)
    for name in ("z", "logits"):
        assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-5)


def test_a_table_that_is_another_one_elsewhere_is_refused() -> None:
    tl.families.register(NAME)
    ((name, same),) = registry.told("starcoder2")
    registry.learn([[name, same]])
    other = replace(STARCODER2, taps={**STARCODER2.taps, "mlp_out": Tap("mlp", Side.OUT)})
    with pytest.raises(UnknownArchitectureError, match="another in the process that owns it"):
        registry.learn([[name, registry.fingerprint((other,))]])


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """Functions in a table are at another address in each: these tell them by what they do."""
    import subprocess
    import sys

    code = (
        "from tracelens.backends.architectures import FAMILIES\n"
        "from tracelens.backends.architectures.registry import fingerprint\n"
        "print([fingerprint(each) for each in FAMILIES])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    own = [registry.fingerprint(each) for each in FAMILIES]
    assert printed.strip() == str(own)
    assert len(set(own)) == len(own)
    mixtral = tl.families.table("mixtral")
    other = replace(mixtral.taps["router_logits"], decides=lambda module, tensor: (tensor,))
    assert registry.fingerprint(mixtral) != registry.fingerprint(
        replace(mixtral, taps={**mixtral.taps, "router_logits": other})
    )


TRACELENS = Path(tl.__file__).parent
TABLES = TRACELENS / "backends" / "architectures"


def test_a_table_is_a_file_of_at_most_eighty_lines() -> None:
    files = [path for path in TABLES.glob("*.py") if "Family" in path.read_text(encoding="utf-8")]
    tables = [path for path in files if path.stem not in ("__init__", "lookup", "registry", "others")]
    assert len(tables) > 15
    for path in tables:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name


def test_nothing_outside_the_tables_asks_which_family_a_model_is_of() -> None:
    types = {kind for family in FAMILIES for kind in family.model_types}
    asked: list[str] = []
    for path in TRACELENS.rglob("*.py"):
        if TABLES in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                asked += [
                    f"{path.name}:{node.lineno} {word}"
                    for word in words
                    if isinstance(word, str)
                    and (word in types or word.endswith(("ForCausalLM", "DecoderLayer")))
                ]
    assert asked == []
