"""Who may import whom: the rules of the house, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORACLES = {"diffusers", "transformers", "peft", "accelerate"}
OPTIONAL = {"torchao", "tensorboard", "wandb"}  # imported where they are used, and nowhere else
LAYERS = {  # arrows go down or stay on their floor; a folder stands for all of its modules
    5: ["train", "infer", "report", "adapters.__main__", "study.__main__"],
    4: ["training"],
    3: ["edit", "offload", "quantize", "study.experiment", "presets", "data.examples", "data.cache", "data.check"],
    2: ["encoders", "sampler", "checkpoints.load", "checkpoints.save", "checkpoints.tensors", "adapters.inject",
        "adapters.read", "adapters.write", "adapters.merge", "memory", "parallel", "study.hooks"],
    1: ["models", "flow", "adapters.layers", "adapters.rows", "checkpoints.keys", "compare",
        "data.buckets", "data.degrade", "data.pairs", "training.optim", "run_folder"],
    0: ["config", "foreign"],
}  # fmt: skip


def sources() -> dict[str, Path]:
    """Module name, without `kontext_min.` -> file: the package, the two doors, not nano and not package docstrings."""
    package = ROOT / "kontext_min"
    found = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    doors = {name: ROOT / f"{name}.py" for name in ("train", "infer")}
    return doors | {name: path for name, path in found.items() if not name.endswith("__init__")}


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sources()


def ours(name: str) -> str | None:
    """An imported name -> the module of the house it belongs to."""
    stem = name.removeprefix("kontext_min.")
    if stem == name and name.partition(".")[0] not in ("train", "infer"):
        return None
    return next((m for m in (stem, stem.rpartition(".")[0]) if m in MODULES), None)


def layer(module: str) -> int:
    """The floor a module lives on; the longest entry that fits decides."""
    fits = [
        (len(entry), n) for n, entries in LAYERS.items() for entry in entries if f"{module}.".startswith(f"{entry}.")
    ]
    assert fits, f"{module} has no floor: give it one in DESIGN.md section 2 and in this table"
    return max(fits)[1]


HOUSE = sorted(name for name in MODULES if not name.startswith("nano."))


@pytest.mark.parametrize("module", HOUSE)
def test_imports_only_go_down(module):
    for name in imports(MODULES[module]):
        imported = ours(name)
        if imported and imported != "config":
            assert layer(imported) <= layer(module), f"{module} imports {imported} from a floor above"


def test_only_the_doors_and_training_know_the_config():
    knowing = {module for module in HOUSE if "config" in map(ours, imports(MODULES[module]))}
    assert {module for module in knowing if layer(module) < 4} == set()


def test_siblings_among_the_networks_do_not_import_each_other():
    for module in HOUSE:
        if module.startswith("models."):
            assert not [name for name in imports(MODULES[module]) if ours(name)], module


def test_nothing_imports_nano_or_a_door_and_train_alone_imports_the_report():
    for module in HOUSE:
        for name in imports(MODULES[module]):
            stem = name.removeprefix("kontext_min.")
            forbidden = ("nano",) if module == "train" else ("nano", "report")
            assert stem == name or stem.partition(".")[0] not in forbidden, (module, name)
            assert ours(name) not in ("train", "infer"), (module, name)


def test_the_report_knows_files_alone():
    assert set(map(ours, imports(MODULES["report"]))) - {None} == {"run_folder"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_oracles_of_the_tests_are_never_imported(module):
    assert not {name.partition(".")[0] for name in imports(MODULES[module])} & ORACLES


def test_importing_everything_imports_no_optional_package():
    names = [name if name in ("train", "infer") else f"kontext_min.{name}" for name in HOUSE]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    run = [sys.executable, "-c", code, "kontext_min", *names]
    loaded = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & (OPTIONAL | ORACLES)


def test_packages_hold_a_docstring_and_nothing_else():
    for path in (ROOT / "kontext_min").rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} has no docstring"
        assert len(tree.body) == 1 or all(isinstance(node, ast.ImportFrom | ast.Assign) for node in tree.body[1:]), path


def test_no_file_is_called_utils():
    forbidden = {"utils", "common", "helpers", "misc", "base", "core"}
    assert not {path.stem for path in ROOT.glob("kontext_min/**/*")} & forbidden


def test_every_trap_of_the_fact_sheet_has_its_test():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert set(map(int, re.findall(r"trap (\d+)", text))) == set(range(1, 16))
