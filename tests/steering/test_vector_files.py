"""Steering vectors in files, and those of other packages: what is written comes back, and nothing in a file is run."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tracelens import errors
from tracelens.steering import Facts, SteeringVector

S = tl.steering


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


def drawn(seed: int, width: int = D_MODEL) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def of(model: tl.Model, *layers: int, site: str = "resid_post", **facts: Any) -> SteeringVector:
    return SteeringVector.from_directions(model, {(site, layer): drawn(layer) for layer in layers}, **facts)


def same(found: SteeringVector, wanted: SteeringVector) -> None:
    assert found.places == wanted.places
    for place in wanted:
        assert torch.equal(found[place], wanted[place])


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_with_its_facts(model: tl.Model, tmp_path: Path) -> None:
    place = ("mlp_norm", 2)
    v = SteeringVector(
        {("resid_post", 0): drawn(0), ("post_ln", 2): drawn(1), ("mlp_act", 1): drawn(2, 80)},
        Facts.of(
            model, method="pca", rows=7, scale={place: 2.5}, diagnostics={place: {"agreement": 0.5}}, seed=3
        ),
    )
    path = v.save(tmp_path / "v.safetensors")
    found = S.load(path, model)
    same(found, v)
    assert found.facts == v.facts
    assert sorted(load_file(path)) == ["mlp_act.1", "mlp_norm.2", "resid_post.0"]
    assert S.load(str(path)).facts == v.facts


def test_a_file_of_another_model_is_refused(model: tl.Model, tmp_path: Path) -> None:
    path = of(model, 1).save(tmp_path / "v.safetensors")
    for other in (
        FAMILIES["llama"].build(seed=1),
        FAMILIES["llama"].build(num_hidden_layers=2),
        FAMILIES["llama"].build(hidden_size=24),
    ):
        with pytest.raises(errors.SteeringMismatchError):
            S.load(path, tl.wrap(other))


def test_a_file_that_is_not_whole_is_refused(model: tl.Model, tmp_path: Path) -> None:
    path = of(model, 1).save(tmp_path / "v.safetensors")
    whole = path.read_bytes()
    for cut in (b"", whole[:20], whole[:-4], whole[:-4] + b"abcd", whole.replace(b'"facts', b'"fakts')):
        path.write_bytes(cut)
        assert cut != whole
        with pytest.raises(errors.SteeringFileError) as caught:
            S.load(path)
        assert caught.value.instead
    save_file({"resid_post.1": drawn(1)}, path)
    with pytest.raises(errors.SteeringFileError, match="does not say"):
        S.load(path)
    newer = whole.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    assert newer != whole
    path.write_bytes(newer)
    with pytest.raises(errors.SteeringFileError, match="newer"):
        S.load(path)
    for name in ("nothing.safetensors", "nothing.gguf", "nothing.pt"):
        with pytest.raises(errors.SteeringFileError, match="no file"):
            S.load(tmp_path / name)
    (tmp_path / "v.txt").write_text("")
    with pytest.raises(errors.SteeringFileError, match="no ending"):
        S.load(tmp_path / "v.txt")
    with pytest.raises(errors.SteeringFileError, match="does not end") as caught:
        of(model, 1).save(tmp_path / "v.bin")
    assert caught.value.at is not None


def test_an_activation_addition_comes_back_as_one(model: tl.Model, tmp_path: Path) -> None:
    added = S.ActivationAddition.of(model, [5, 6, 7], [5, 9], layer=1, padding=11)
    path = added.save(tmp_path / "love.safetensors")
    found = S.ActivationAddition.load(path, model)
    assert torch.equal(found.directions["resid_pre", 1], added.directions["resid_pre", 1])
    assert (found.tokens, found.facts, found.words) == (((5, 6, 7), (5, 9, 11)), added.facts, None)
    with pytest.raises(errors.SteeringFileError, match="with a direction for each of 3 tokens") as failure:
        S.load(path, model)
    assert failure.value.instead == "tl.steering.ActivationAddition.load(path, model)"
    with pytest.raises(errors.SteeringMismatchError, match="whose unembedding is another"):
        S.ActivationAddition.load(path, tl.wrap(FAMILIES["llama"].build(seed=1)))
    vector = of(model, 1).save(tmp_path / "v.safetensors")
    with pytest.raises(errors.SteeringFileError, match="no sequence of directions"):
        S.ActivationAddition.load(vector, model)
    with pytest.raises(errors.SteeringFileError, match="there is no file") as failure:
        S.ActivationAddition.load(tmp_path / "none.safetensors")
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__


# --- GGUF ------------------------------------------------------------------------------------------------------------


def read_as_llama_cpp(path: Path) -> dict[int, np.ndarray[Any, Any]]:
    """What its loader asks of a control vector: F32, one axis, k >= 1 and one length, added to what leaves block k."""
    reader = gguf.GGUFReader(path)
    found: dict[int, np.ndarray[Any, Any]] = {}
    for tensor in reader.tensors:
        head, _, number = tensor.name.partition(".")
        assert head == "direction"
        assert int(number) >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        found[int(number)] = np.array(tensor.data)
    assert len({len(direction) for direction in found.values()}) == 1
    return found


def test_gguf_as_llama_cpp_reads_it_and_back(model: tl.Model, tmp_path: Path) -> None:
    v = of(model, 1, 2, rows=5, method="mean_difference")
    path = v.to_gguf(tmp_path / "v.gguf")
    for layer, direction in read_as_llama_cpp(path).items():
        assert np.array_equal(direction, v["resid_post", layer].numpy())
    reader = gguf.GGUFReader(path)
    said = {
        name: bytes(reader.fields[name].parts[-1]).decode()
        for name in ("general.architecture", "controlvector.model_hint")
    }
    assert said == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert reader.fields["controlvector.layer_count"].parts[-1][0] == 2
    found = SteeringVector.from_gguf(path, model)
    same(found, v)
    assert found.facts == v.facts
    with pytest.raises(errors.SteeringMismatchError):
        S.load(path, tl.wrap(FAMILIES["llama"].build(seed=1)))


def written_by_others(
    path: Path, tensors: dict[str, Any], *, arch: str = "controlvector", hint: str = "llama"
) -> Path:
    """As repeng and llama.cpp's own generator write it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_others(model: tl.Model, tmp_path: Path) -> None:
    tensors = {f"direction.{layer}": drawn(layer).numpy() for layer in (1, 2)}
    path = written_by_others(tmp_path / "v.gguf", tensors)
    found = S.load(path, model)
    same(found, of(model, 1, 2))
    assert found.facts.weights  # it is taken for this model's
    alone = S.load(path)
    assert (alone.facts.architecture, alone.facts.weights) == ("llama", {})
    with pytest.raises(errors.SteeringMismatchError, match="llama"):
        S.load(path, tl.wrap(FAMILIES["gpt2"].build()))
    for family, hint in (
        ("gemma3", "gemma3"),
        ("mistral", "llama"),
        ("mistral", "mistral"),
        ("qwen3_moe", "qwen3moe"),
    ):
        named = written_by_others(tmp_path / "named.gguf", tensors, hint=hint)
        assert S.load(named, tl.wrap(FAMILIES[family].build())).layers == (1, 2)
    wrong: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "two axes": ({"direction.1": np.ones((2, 3), dtype=np.float32)}, {}),
        "half": ({"direction.1": np.ones(32, dtype=np.float16)}, {}),
        "name": ({"direction.x": np.ones(32, dtype=np.float32)}, {}),
        "lengths": (
            {"direction.1": np.ones(32, dtype=np.float32), "direction.2": np.ones(8, dtype=np.float32)},
            {},
        ),
        "another kind": ({"direction.1": np.ones(32, dtype=np.float32)}, {"arch": "llama"}),
    }
    for name, (given, more) in wrong.items():
        with pytest.raises(errors.SteeringFileError):
            S.load(written_by_others(tmp_path / f"{name}.gguf", given, **more))
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:40])
    with pytest.raises(errors.SteeringFileError):
        S.load(tmp_path / "cut.gguf")
    narrow = written_by_others(tmp_path / "narrow.gguf", {"direction.1": np.ones(8, dtype=np.float32)})
    with pytest.raises(errors.SteeringMismatchError):
        S.load(narrow, model)


def test_what_llama_cpp_has_no_place_for_is_not_written(model: tl.Model, tmp_path: Path) -> None:
    for v in (of(model, 0, 1), of(model, 1, site="resid_pre"), of(model, 1, site="post_ln")):
        with pytest.raises(errors.SteeringVectorError) as caught:
            v.to_gguf(tmp_path / "v.gguf")
        assert caught.value.at is not None
    assert not (tmp_path / "v.gguf").exists()


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The classes of both packages, as they are there, in modules of their names."""
    package, inside, repeng = (
        ModuleType(name) for name in ("steering_vectors", "steering_vectors.steering_vector", "repeng")
    )

    @dataclass
    class SteeringVector:
        layer_activations: dict[int, torch.Tensor]
        layer_type: str = "decoder_block"

    @dataclass
    class ControlVector:
        model_type: str
        directions: dict[int, Any] = field(default_factory=dict)

    SteeringVector.__module__, SteeringVector.__qualname__ = (
        "steering_vectors.steering_vector",
        "SteeringVector",
    )
    for module in (package, inside):
        module.__dict__["SteeringVector"] = SteeringVector
    repeng.__dict__["ControlVector"] = ControlVector
    for module in (package, inside, repeng):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SteeringVector, ControlVector


SITES = {
    "resid_post": "decoder_block",
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "pre_ln": "input_layernorm",
}


@pytest.mark.parametrize("site", [*SITES, "post_ln"])
def test_steering_vectors_and_back(
    site: str, model: tl.Model, packages: tuple[Any, Any], tmp_path: Path
) -> None:
    v = of(model, 0, 2, site=site)
    theirs = S.to_steering_vectors(v, model)
    assert isinstance(theirs, packages[0])
    assert theirs.layer_type == SITES.get(site, "post_attention_layernorm")
    assert torch.equal(theirs.layer_activations[2], v[site, 2])
    same(S.from_steering_vectors(theirs, model), v)
    torch.save(theirs, tmp_path / "v.pt")  # as its users keep them
    same(S.load(tmp_path / "v.pt", model), v)
    if site != "post_ln":
        same(S.from_steering_vectors(theirs), v)


def test_the_norm_after_attention_is_another_site_in_some_families(packages: tuple[Any, Any]) -> None:
    theirs = packages[0]({1: drawn(1)}, "post_attention_layernorm")
    with pytest.raises(errors.SteeringVectorError, match="not known which"):
        S.from_steering_vectors(theirs)
    gemma = tl.wrap(FAMILIES["gemma3"].build())
    assert S.from_steering_vectors(theirs, gemma).sites == ("attn_post_norm",)
    with pytest.raises(errors.SteeringVectorError):
        S.to_steering_vectors(of(gemma, 1, site="post_ln"), gemma)
    with pytest.raises(errors.SteeringVectorError):
        S.to_steering_vectors(of(gemma, 1, site="resid_pre"))
    with pytest.raises(errors.SteeringVectorError):
        S.from_steering_vectors(packages[0]({1: drawn(1)}, "decoder"))
    with pytest.raises(errors.SteeringMismatchError):
        S.from_steering_vectors(packages[0]({1: drawn(1, 8)}), gemma)


def test_repeng_and_back(model: tl.Model, packages: tuple[Any, Any]) -> None:
    v = of(model, 1, 2)
    theirs = S.to_repeng(v)
    assert isinstance(theirs, packages[1])
    assert theirs.model_type == "llama"
    assert np.array_equal(theirs.directions[1], v["resid_post", 1].numpy())
    same(S.from_repeng(theirs, model), v)
    same(S.from_repeng(theirs), v)
    with pytest.raises(errors.SteeringMismatchError):
        S.from_repeng(theirs, tl.wrap(FAMILIES["gpt2"].build()))
    with pytest.raises(errors.SteeringVectorError):
        S.to_repeng(of(model, 1, site="post_ln"))


def test_a_package_that_is_not_there_is_named(model: tl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, convert in (("repeng", S.to_repeng), ("steering_vectors", S.to_steering_vectors)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(errors.MissingExtraError, match=name) as caught:
            convert(of(model, 1))
        assert caught.value.instead == f"pip install {name.replace('_', '-')}"


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_tensors_of_caa_and_back(model: tl.Model, tmp_path: Path) -> None:
    v = of(model, 0, 2)
    folder = v.to_caa(tmp_path / "vectors")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"vec_layer_{layer}_LlamaForCausalLM.pt" for layer in (0, 2)
    ]
    same(S.load(folder, model), v)
    assert S.load(folder / "vec_layer_2_LlamaForCausalLM.pt").places == (("resid_post", 2),)
    torch.save(drawn(5), tmp_path / "mine.pt")
    assert S.load(tmp_path / "mine.pt", layer=1, site="resid_pre").places == (("resid_pre", 1),)
    assert S.load(tmp_path / "mine.pt", model, layer=-1).places == (("resid_post", 2),)
    torch.save({1: drawn(1), -1: drawn(2)}, tmp_path / "dict.pt")
    same(S.load(tmp_path / "dict.pt", model), of(model, 1, 2))
    for given, kind in (
        ({"path": tmp_path / "mine.pt"}, errors.SteeringFileError),
        ({"path": tmp_path / "dict.pt"}, errors.SteeringFileError),
        ({"path": tmp_path}, errors.SteeringFileError),
        (
            {"path": tmp_path / "mine.pt", "model": model, "layer": 1, "site": "mlp_act"},
            errors.SteeringMismatchError,
        ),
    ):
        with pytest.raises(kind):
            S.load(**given)
    (folder / "vec_layer_2_other.pt").write_bytes((tmp_path / "mine.pt").read_bytes())
    with pytest.raises(errors.SteeringFileError, match="two files"):
        S.load(folder)
    with pytest.raises(errors.SteeringVectorError):
        of(model, 1, site="post_ln").to_caa(tmp_path / "others")


class _Runs:
    """What runs when it is unpickled as usual."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.__dict__["path"]),))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    thing = _Runs()
    thing.__dict__["path"] = str(tmp_path / "was run")
    torch.save({1: thing}, tmp_path / "bad.pt")
    (tmp_path / "worse.pt").write_bytes(pickle.dumps({1: thing}))
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(errors.SteeringFileError) as caught:
            S.load(tmp_path / name)
        assert caught.value.at is not None
    assert not (tmp_path / "was run").exists()
    torch.save([drawn(1)], tmp_path / "list.pt")
    with pytest.raises(errors.SteeringFileError, match="list"):
        S.load(tmp_path / "list.pt", layer=1)


# --- what a file lacks -----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named_before_anything_is_written(
    model: tl.Model, tmp_path: Path
) -> None:
    v = of(model, 1)
    for write, name in ((v.save, "v.safetensors"), (v.to_gguf, "v.gguf")):
        with pytest.raises(errors.SteeringFileError, match="there is no folder") as raised:
            write(tmp_path / "no" / name)
        assert raised.value.at is not None
        assert raised.value.at.filename == __file__


def test_a_tensor_with_axes_before_its_own(model: tl.Model, tmp_path: Path) -> None:
    """[1, width] is one direction; of [layers, width] nobody can know whether layer 0 is the embedding."""
    file, folder = tmp_path / "vec_layer_1_x.pt", tmp_path / "folder"
    for shape in ((1, -1), (1, 1, -1)):
        torch.save(drawn(5).reshape(shape), file)
        assert torch.equal(S.load(file, model)["resid_post", 1], drawn(5))
    folder.mkdir()
    torch.save(drawn(5)[None], folder / file.name)
    assert torch.equal(S.load(folder, model)["resid_post", 1], drawn(5))
    torch.save({1: drawn(5)[None]}, tmp_path / "dict.pt")
    assert torch.equal(S.load(tmp_path / "dict.pt", model)["resid_post", 1], drawn(5))
    torch.save(torch.stack([drawn(0), drawn(1), drawn(2)]), tmp_path / "rows.pt")
    for layer in (None, 1):
        with pytest.raises(errors.SteeringFileError, match=r"which layer each row belongs to") as raised:
            S.load(tmp_path / "rows.pt", model, layer=layer)
        assert raised.value.instead is not None
        assert "hidden_states[l + 1]" in raised.value.instead


def test_a_layer_that_contradicts_the_files_name_is_refused(model: tl.Model, tmp_path: Path) -> None:
    file = tmp_path / "vec_layer_1_x.pt"
    torch.save(drawn(5), file)
    for layer in (None, 1, -2):
        assert S.load(file, model, layer=layer).places == (("resid_post", 1),)
    with pytest.raises(errors.SteeringFileError, match="says that it is of layer 1, and layer=2 was given"):
        S.load(file, model, layer=2)


def test_a_tensor_of_another_width_says_its_file_and_whose_it_may_be(model: tl.Model, tmp_path: Path) -> None:
    file = tmp_path / "vec_layer_1_Llama-2-7b-chat-hf.pt"
    torch.save(drawn(5, 4096), file)
    with pytest.raises(
        errors.SteeringMismatchError, match=r"^vec_layer_1_Llama-2-7b-chat-hf\.pt: .*4096"
    ) as raised:
        S.load(file, model)
    assert raised.value.instead is not None
    assert "d_model is 4096, such as Llama-2-7b" in raised.value.instead
    torch.save(drawn(5), tmp_path / "vec_layer_9_x.pt")  # as wide as this model, and of a layer that it lacks
    with pytest.raises(errors.SteeringMismatchError, match=r"vec_layer_9_x\.pt: .*has 3 layers") as raised:
        S.load(tmp_path / "vec_layer_9_x.pt", model)
    assert "d_model" not in str(raised.value.instead)


def test_a_repeng_that_this_numpy_cannot_import(
    model: tl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As repeng 0.4 begins, whose annotations name what numpy 2 has no more."""
    (tmp_path / "repeng.py").write_text("import numpy as np\nx: np.float_ = 1.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "repeng", raising=False)
    with pytest.raises(errors.MissingExtraError, match=r"float_") as raised:
        S.to_repeng(of(model, 1))
    assert raised.value.instead is not None
    assert 'pip install "numpy<2"' in raised.value.instead
    assert raised.value.at is not None
