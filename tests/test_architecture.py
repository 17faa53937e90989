"""The shape of the code: floors, sizes, a quiet import, and public names that are documented and typed."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tracelens as tl
from tracelens.ir.sites import Site
from tracelens.plan import Plan
from tracelens.site_table import SiteRow, SiteTable

ROOT = Path(tl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file may import from its own floor and from lower ones. The first entry that matches decides.
FLOORS: tuple[tuple[str, int], ...] = (
    ("errors", 0),
    ("lens_errors", 0),
    ("naming_errors", 0),
    ("steering_errors", 0),
    ("tracelens_error", 0),
    ("location", 0),
    ("view", 0),
    ("readout_tiles", 0),
    ("readout_part", 0),
    ("readout_distance", 0),
    ("readout", 0),
    ("ir.passes", 2),
    ("ir", 1),
    ("advice", 3),
    ("constants", 3),
    ("destination", 3),
    ("subject", 3),
    ("misaligned", 3),
    ("origins", 3),
    ("steps", 3),
    ("skipping", 3),
    ("draft", 3),
    ("saving", 3),
    ("recorder", 3),
    ("open_recordings", 3),
    ("refusing", 3),
    ("per_prompt", 3),
    ("operand", 3),
    ("shapes", 3),
    ("indexing", 3),
    ("own_tokens", 3),
    ("tokens", 3),
    ("values", 3),
    ("mapped", 3),
    ("porting", 3),
    ("heads", 3),
    ("experts", 3),
    ("handles", 3),
    ("prompts", 3),
    ("language", 3),
    ("named", 3),
    ("spliced_module", 3),
    ("splicing", 3),
    ("other_names", 3),
    ("identities", 3),
    ("sites", 5),
    ("families", 5),
    ("proving", 5),
    ("deriving", 5),
    ("dictionaries", 5),
    ("gradients", 3),
    ("lens_value", 3),
    ("einops_backend", 3),
    ("extras", 3),
    ("spelling", 3),
    ("token_texts", 3),
    ("chat", 3),
    ("batch", 3),
    ("branching", 3),
    ("matching", 3),
    ("selection", 3),
    ("prompted", 3),
    ("inputs", 3),
    ("placement", 3),
    ("fetching", 3),
    ("returning", 3),
    ("placing", 3),
    ("pushing", 3),
    ("own_part", 3),
    ("sharding", 3),
    ("collectives", 3),
    ("sharding_rules", 3),
    ("sharding_lens", 3),
    ("sharding_steps", 3),
    ("checking", 3),
    ("simulate", 3),
    ("lens_memory", 3),
    ("memory", 3),
    ("reach", 3),
    ("plan", 3),
    ("program", 3),
    ("reference", 3),
    ("backends", 4),
    ("pretrained", 5),
    ("results", 5),
    ("report", 5),
    ("explain_tokens", 5),
    ("progress", 5),
    ("explain", 5),
    ("site_table", 5),
    ("prompt_tokens", 5),
    ("tensor_file", 5),
    ("leaving", 5),
    ("agreeing", 5),
    ("remote", 5),
    ("ranked", 5),
    ("serving", 5),
    ("rank_loading", 5),
    ("parallel_check", 5),
    ("compiled", 5),
    ("generation_plan", 5),
    ("fitting", 5),
    ("compiling", 5),
    ("reusable", 5),
    ("gathered", 5),
    ("generating", 5),
    ("slices", 5),
    ("scopes", 5),
    ("tracing", 5),
    ("generation", 5),
    ("telling", 5),
    ("streaming", 5),
    ("sweeping", 5),
    ("module_handle", 5),
    ("plain_model", 5),
    ("methods", 5),
    ("model", 5),
    ("loading", 5),
    ("bridge", 5),
    ("lens", 6),
    ("steering", 6),
    ("viz", 7),
    ("demo", 7),
    ("lens_command", 7),
    ("steer_command", 7),
    ("cli", 7),
    ("__main__", 7),
)
# Imports that point upwards on purpose, each with its reason.
UPWARDS = {
    ("methods", "lens.attribution"): "a method of the model, written on its public methods",
    ("methods", "lens.logit_lens"): "as above",
    ("tracing", "viz.html"): "a block's notebook view; imported when a notebook asks for it",
    ("lens.result", "viz.lens_page"): "the page of a lens; imported when a notebook or a file asks for it",
    ("lens.results", "viz.lens_page"): "as above",
    ("lens.comparison", "viz.lens_page"): "as above",
    ("lens.result", "viz.lens_picture"): "a picture of it; imported when one is asked for",
    ("lens.comparison", "viz.lens_picture"): "as above",
    ("steering.report", "viz.cosines"): "as above",
    ("steering.curve", "viz.steering_picture"): "a figure of it; made when a notebook or a file asks for it",
    ("steering.reading", "viz.steering_picture"): "as above",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(name: str) -> int:
    for prefix, floor in FLOORS:
        if name == prefix or name.startswith(prefix + "."):
            return floor
    raise AssertionError(f"tracelens/{name.replace('.', '/')}.py stands on no floor: add it to FLOORS")


def imports_of(path: Path) -> list[str]:
    """All modules that a file imports, inside functions too, but not for type checking only."""
    found: list[str] = []

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:  # ast's name
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.extend(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path != ROOT / "__init__.py"], ids=name_of)
def test_a_file_imports_only_from_its_floor_and_below(path: Path) -> None:
    name = name_of(path)
    floor = floor_of(name)
    for module in imports_of(path):
        if not module.startswith("tracelens."):
            continue
        target = module.removeprefix("tracelens.")
        if (
            not (ROOT / (target.replace(".", "/") + ".py")).exists()
            and not (ROOT / target.replace(".", "/")).is_dir()
        ):
            continue  # a name in a module that is in the list itself
        if (name, target) in UPWARDS:
            continue
        assert floor_of(target) <= floor, (
            f"{name} (floor {floor}) imports {target} (floor {floor_of(target)})"
        )


@pytest.mark.parametrize(
    "path",
    [
        *sorted((ROOT / "ir").rglob("*.py")),
        *(ROOT / f"{name}.py" for name in ("placement", "plan", "program")),
    ],
    ids=name_of,
)
def test_the_language_and_its_planning_know_no_torch(path: Path) -> None:
    torch = [
        module
        for module in imports_of(path)
        if module.split(".")[0] in ("torch", "transformers", "accelerate")
    ]
    if name_of(path) == "ir.infer":
        assert torch, "the one file that may"
    else:
        assert not torch


def test_only_backends_know_transformers() -> None:
    for path in FILES:
        if name_of(path) in ("loading", "rank_loading", "pretrained", "cli") or name_of(path).startswith(
            "backends"
        ):
            continue
        assert not [module for module in imports_of(path) if module.split(".")[0] == "transformers"], path


# Tensors of the user's, before a run or after it, that are brought to the host.
HOST = ("batch", "constants", "results", "selection", "steering.directions", "sweeping")
_MOVES = re.compile(r"""\.(cpu|cuda)\(|\.to\((device|\w+\.device|"cpu")""")


def test_one_file_registers_hooks_and_one_moves_tensors() -> None:
    for path in FILES:
        source = path.read_text()
        if name_of(path) not in ("backends.transfer", *HOST):
            # What is said in docstrings and messages is not done.
            code = re.sub(r'"(?:[^"\\n])*\.to\([^"\n]*"', "", source)
            assert not _MOVES.search(code), path
        if name_of(path) != "backends.hooks":
            assert "register_forward" not in source, path
            assert "register_full_backward" not in source, path


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_importing_changes_nothing_and_pulls_in_no_extras() -> None:
    code = textwrap.dedent("""
        import builtins, sys, warnings
        import torch, einops
        before = {name: set(vars(module)) for name, module in (("torch", torch), ("builtins", builtins), ("sys", sys),
                  ("Tensor", torch.Tensor), ("Module", torch.nn.Module))}
        settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
                    sys.getrecursionlimit(), sys.excepthook, sys.displayhook,
                    list(warnings.filters), sys.gettrace(), sys.getprofile())
        methods = dict(vars(torch.Tensor))
        import tracelens
        for name, module in (("torch", torch), ("builtins", builtins), ("sys", sys), ("Tensor", torch.Tensor),
                             ("Module", torch.nn.Module)):
            new = set(vars(module)) - before[name]
            added = {key for key in new if not isinstance(vars(module)[key], type(sys))}
            assert not added, (name, added)
        assert settings == (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
                            sys.getrecursionlimit(), sys.excepthook, sys.displayhook, list(warnings.filters),
                            sys.gettrace(), sys.getprofile())
        assert all(vars(torch.Tensor)[name] is method for name, method in methods.items())
        extras = {"nnsight", "matplotlib", "plotly", "pandas", "IPython", "transformers.models"} & set(sys.modules)
        assert not extras, extras
    """)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


@pytest.mark.parametrize("name", [name for name in tl.__all__ if not name.startswith("__")])
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(tl, name)
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            if key.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
                continue
            function = member.fget if isinstance(member, property) else member
            assert function is not None
            _typed(function, f"{name}.{key}")
    else:
        _typed(thing, name)


def _typed(function: object, name: str) -> None:
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty, f"{name} has no return type"
    for parameter in list(signature.parameters.values()):
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not inspect.Parameter.empty, (
                f"{name}: {parameter.name} has no type"
            )


@pytest.mark.parametrize(
    "class_",
    [
        tl.Model,
        tl.Value,
        tl.MappedValue,
        tl.Trace,
        tl.Results,
        tl.Graph,
        tl.Program,
        tl.Contribution,
        tl.LogitAttribution,
        tl.LogitAttributions,
        Plan,
        Site,
        SiteRow,
        SiteTable,
    ],
)
def test_public_methods_are_documented(class_: type) -> None:
    for key, member in vars(class_).items():
        if key.startswith("_"):
            continue
        if inspect.isfunction(member) or isinstance(member, property):
            assert inspect.getdoc(member), f"{class_.__name__}.{key} has no docstring"
