"""The stub of the compiled core says what the module is."""

import ast
from pathlib import Path

import pytest

from entropy_po import tiles

CORE = tiles.compiled_core()
STUB = Path(tiles.__file__).with_name("_C.pyi")
# pybind11 writes what it converts, the stub what this package hands over.
WIDER = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "entropy_po._C.TileArgs": "TileArgs",
    "entropy_po._C.StatsArgs": "StatsArgs",
    "dict": "dict[str, str | int | None]",
}


def declared(node):
    """A function as ((name, type, default) of every parameter but self, keyword-only ones, type of the result)."""
    arguments = node.args
    names = [*arguments.args, *arguments.kwonlyargs]
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults, *arguments.kw_defaults]
    parameters = [
        (a.arg, a.annotation and WIDER.get(ast.unparse(a.annotation), ast.unparse(a.annotation)), d and ast.unparse(d))
        for a, d in zip(names, defaults, strict=True)
    ]
    result = ast.unparse(node.returns)
    return [p for p in parameters if p[0] != "self"], len(arguments.kwonlyargs), WIDER.get(result, result)


def in_stub():
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef):
            (constructor,) = (member for member in node.body if isinstance(member, ast.FunctionDef))
            found[node.name] = declared(constructor)
        else:
            found[node.name] = declared(node)
    return found


def in_module():
    found = {}
    for name in dir(CORE):
        member = getattr(CORE, name)
        if not name.startswith("__"):
            text = (member.__init__ if isinstance(member, type) else member).__doc__.splitlines()[0]
            found[name] = declared(ast.parse(f"def {text}: ...").body[0])
    return found


@pytest.mark.skipif(CORE is None, reason="the C++ core was not built")
def test_the_stub_declares_what_the_module_has():
    stub, module = in_stub(), in_module()
    if CORE.build_info()["cuda"] is None:
        stub = {name: signature for name, signature in stub.items() if not name.startswith("cuda_")}
    assert stub == module
