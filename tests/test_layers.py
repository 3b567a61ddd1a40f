"""Imports point down only, and `import entropy_po` needs torch alone: read from the source, nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lower may not import higher. Modules of one number may import one another.
LAYERS = {
    "types": 0,
    "arguments": 0,
    "plan": 0,
    "objective": 0,
    "dual": 0,
    "policy_gradient": 0,
    "pages": 0,
    "testing": 0,
    "dispatch": 0,
    "reference": 1,
    "kernels": 1,
    "tiles": 2,
    "ops": 3,
    "doctor": 4,
    "memory": 4,
    "forecast": 4,
    "heads": 4,
    "answers": 4,
    "models": 4,
    "trainer": 5,
    "bench": 5,
    "evaluation": 5,
    "integrations": 5,
    "demo": 5,
    "tasks": 5,
    "cli": 6,
}
HEAVY = {"triton", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy", "matplotlib", "yaml"}


def modules():
    """(dotted name, path) of every module as it is installed: `kernels/` is `entropy_po.kernels`."""
    for folder, prefix in (("entropy_po", "entropy_po"), ("kernels", "entropy_po.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([prefix, *(p for p in parts if p != "__init__")]), path


MODULES = dict(modules())


def imports(path, top_level_only=False):
    """Every module that a file imports, `from a import b` as a.b. Top level leaves out functions and TYPE_CHECKING."""
    found = []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import at line {child.lineno}"
                found.extend(f"{child.module}.{alias.name}" for alias in child.names)
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if not (top_level_only and lazy):
                visit(child)

    visit(ast.parse(path.read_text()))
    return found


def layer(name):
    """The layer of entropy_po.<this>..., None for the package itself and for names that are not modules."""
    parts = name.split(".")
    return LAYERS.get(parts[1]) if parts[0] == "entropy_po" and len(parts) > 1 else None


def test_every_module_has_a_layer():
    known = {name.split(".")[1] for name in MODULES if "." in name}
    assert known <= LAYERS.keys(), f"give {sorted(known - LAYERS.keys())} a layer in this file"


@pytest.mark.parametrize("name", [n for n in MODULES if "." in n])
def test_imports_point_down(name):
    for imported in imports(MODULES[name]):
        target = layer(imported)
        assert target is None or target <= layer(name), f"{name} imports {imported}, which lies above it"


def test_backends_import_neither_one_another_nor_the_reference():
    for name, path in MODULES.items():
        for imported in imports(path):
            if name.startswith("entropy_po.kernels"):
                allowed = "entropy_po.kernels", "entropy_po.types", "entropy_po.dispatch", "torch", "triton"
                top = imported.split(".")[0]
                outside = top in ("entropy_po", "numpy", "transformers") and not imported.startswith(allowed)
                assert not outside, f"{name} imports {imported}"
            if name == "entropy_po.reference":
                assert not imported.startswith(("entropy_po.tiles", "entropy_po.kernels", "entropy_po.ops"))


def test_only_tiles_knows_the_backends():
    for name, path in MODULES.items():
        if name == "entropy_po.tiles" or name.startswith("entropy_po.kernels"):
            continue
        for imported in imports(path):
            assert not imported.startswith(("entropy_po.kernels", "entropy_po._C")), f"{name} imports {imported}"
        if name not in ("entropy_po.doctor",):
            assert '"entropy_po._C"' not in path.read_text(), f"{name} names the compiled core"


def test_objective_and_plan_see_no_tensor_with_a_vocabulary():
    assert all(not i.startswith("torch") for i in imports(MODULES["entropy_po.plan"]))
    for imported in imports(MODULES["entropy_po.objective"]):
        assert imported.startswith("entropy_po.arguments") or not imported.startswith("entropy_po")


def test_nothing_heavy_at_the_top_of_what_import_entropy_po_reaches():
    reached, todo = set(), ["entropy_po"]
    while todo:
        name = todo.pop()
        if name in reached or name not in MODULES:
            continue
        reached.add(name)
        for imported in imports(MODULES[name], top_level_only=True):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported} at its top level"
            todo += [imported, imported.rpartition(".")[0]]
    assert {"entropy_po.ops.token_stats", "entropy_po.tiles", "entropy_po.reference"} <= reached
    assert not any(layer(name) is not None and layer(name) > 4 for name in reached)


def test_csrc_includes_no_torch_and_pybind_in_one_place():
    sources = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".cu"))
    assert any(path.suffix == ".cu" for path in sources)
    for path in sources:
        included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not any("torch" in line or "ATen" in line or "c10" in line for line in included), path.name
        if path.name != "bindings.cpp":
            assert not any("pybind" in line or "Python.h" in line for line in included), path.name


def test_numbers_never_depend_on_the_environment():
    """No module of the numeric path reads an environment variable, and there is nowhere to keep a second copy of state.

    Two are read, in one place each: they choose among backends, whose results differ by rounding, and `describe` shows them.
    """
    for name, path in MODULES.items():
        if layer(name) is not None and layer(name) <= 3 and not name.startswith("entropy_po.kernels"):
            text = path.read_text()
            if name == "entropy_po.tiles":
                assert 'OVERRIDE, WITHOUT = "ENTROPY_PO_BACKEND", "ENTROPY_PO_WITHOUT"' in text
                for read in ("os.environ.get(OVERRIDE)", 'os.environ.get(WITHOUT, "")'):
                    assert text.count(read) == 1
                    text = text.replace(read, "")
            assert "environ" not in text.replace("environment", "") and "getenv" not in text, name
        assert "global " not in path.read_text(), f"{name} has a global statement"


def test_kernels_has_no_init_at_the_repository_root():
    """`kernels` is the name of another project, which transformers looks for by name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
