"""The house keeps to its plan: rooms import only from rooms below them, and no file outgrows its room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "maxlm"

# Top to bottom, as docs/architecture.md lists them. Modules of the top level stand in the same order as rooms.
ORDER = (
    "cli",
    "cli_sweep",
    "cli_parsers",
    "train",
    "plan",
    "config",
    "config_keys",
    "config_file",
    "checkpoint",
    "checkpoint_files",
    "run_lock",
    "scaling",
    "planning",
    "evaluation",
    "interop",
    "inference",
    "training",
    "models",
    "data",
    "kernels",
    "parallel",
    "files",
    "console",
    "section",
    "errors",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports at its top: what a function imports when it runs is its own affair."""
    rooms = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maxlm."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("maxlm.")}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(path):
    room = room_of(path)
    assert room in ORDER, f"{room} is a room that the plan does not have"
    above = {other for other in imported_rooms(path) if ORDER.index(other) < ORDER.index(room)}
    assert not above, f"{room} imports from above: {above}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_outgrows_its_room(path):
    text = path.read_text()
    assert text.count("\n") <= 550
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= 75, f"{node.name} has {node.end_lineno - node.lineno} lines"


def test_only_the_axes_table_and_the_kernels_name_mesh_axes():
    """`fsdp` and the like stand in parallel/; elsewhere code speaks of logical axes."""
    for path in MODULES:
        if room_of(path) in ("parallel", "kernels", "cli", "inference"):
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & {"fsdp", "tensor", "context", "pipeline"}, path
