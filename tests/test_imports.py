"""Imports run one way (design.md, section 2). Files are parsed, never imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each module of fewstep may import from fewstep. A key covers everything below it that has no key of its own: "objectives"
# is the whole folder, "zoo.build" that one file. A module may always import its own key's. A new module needs a row here.
MATH = {"schedules", "losses", "divergences", "stream"}
DENOISER = MATH | {"denoiser"}
PARTS = {"sampling", "times", "taps", "heads", "experts", "matched", "tangents"}
TEACHER = {"families", "folders", "shapes", "deploy", "adapters", "weightless"}
SIDE_DOORS = TEACHER | {"storage", "networks", "data", "card", "loraformat", "lorafiles", "mixture", "phased", "told", "strength"}
SIDE_DOORS |= {"proof", "export"}
LOOP = {"trainer", "ema", "checkpoint", "optimizers", "advice", "costs", "monitor", "progress", "stopping"}
COMMANDS = {"plan", "forecast", "drawing", "judging", "listing", "doctor", "push", "demo"}
MAY_IMPORT = {
    # upwards, one layer a paragraph
    "schedules": set(),
    "losses": set(),
    "divergences": set(),
    "stream": set(),
    "progress": set(),
    "stopping": {"progress"},
    "hints": set(),
    "origin": set(),
    "devices": set(),
    "hub": set(),
    #
    "denoiser": MATH,
    #
    "sampling": DENOISER,
    "times": DENOISER,
    "matched": DENOISER,
    "tangents": DENOISER,
    "taps": DENOISER,
    "heads": DENOISER | {"taps"},
    "experts": DENOISER,
    "embedders": DENOISER | {"experts"},
    #
    "objectives": DENOISER | PARTS,
    #
    "ema": set(),
    "optimizers": set(),
    "checkpoint": {"ema", "origin"},
    "advice": set(),
    "costs": set(),
    "monitor": {"advice", "costs", "progress", "objectives"},
    "preview": {"experts", "monitor", "networks"},
    "trainer": DENOISER | PARTS | LOOP | {"objectives", "networks", "data"},
    # side doors: they know Diffusers, and nothing of objectives and the trainer
    "families": DENOISER | PARTS,
    "folders": {"zoo"},
    "shapes": {"families", "folders"},
    "deploy": DENOISER | PARTS | {"families"},
    "adapters": DENOISER | PARTS | {"families", "folders", "shapes", "deploy", "zoo", "embedders"},
    "weightless": {"hub", "families", "folders", "adapters"},
    "storage": set(),
    "swap": set(),
    "slim": DENOISER | {"experts", "hints"},
    "networks": DENOISER | PARTS | TEACHER | {"embedders", "slim", "storage"},
    "data": DENOISER | PARTS | TEACHER | {"zoo", "progress"},
    "keymaps": set(),
    "loraformat": {"keymaps"},
    "lorafiles": DENOISER | PARTS | TEACHER | {"networks", "loraformat", "mixture"},
    "mixture": set(),
    "phased": set(),  # what exports take along: it knows Diffusers alone
    "told": set(),  # as phased
    "strength": set(),  # as proof
    "proof": set(),  # runs where fewstep cannot be imported
    "painting": DENOISER | PARTS | TEACHER | {"progress"},
    "card": DENOISER | PARTS | TEACHER | {"loraformat"},
    "export": DENOISER | PARTS | SIDE_DOORS | {"embedders", "slim", "origin", "swap"},
    "verify": DENOISER | PARTS | SIDE_DOORS,
    "exported": {"devices", "proof", "verify", "deploy", "families", "progress", "stream"},
    # the judge: sees pictures, not how they were trained
    "evaluation": DENOISER | PARTS | TEACHER | {"data", "zoo", "progress", "hints", "origin", "devices"},
    # the embedded world is free of the framework; the programs that made its teachers are not
    "zoo": DENOISER | PARTS | {"progress"},
    "zoo.teachers": DENOISER | PARTS | {"zoo", "families"},
    "zoo.sana": DENOISER | PARTS | {"zoo", "zoo.teachers", "families"},
    "zoo.recipes": {"zoo.teachers", "zoo.sana"},
    "zoo.build": DENOISER | PARTS | SIDE_DOORS | {"zoo", "zoo.teachers", "zoo.sana", "zoo.recipes", "evaluation", "swap"},
    "pixels": {"denoiser", "evaluation", "heads", "networks"},
    "weighting": {"embedders", "networks"},
    # where all is joined
    "plain": {"objectives", "hints"},
    "succession": {"embedders", "networks"},
    "config": DENOISER | PARTS | {"objectives", "networks", "trainer", "plain", "embedders", "shapes", "succession"},
    "roles": {"adapters", "config", "experts", "networks", "pixels", "storage", "weighting"},
    "identity": {"adapters", "checkpoint", "data", "folders"},
    "walks": {"adapters", "config", "objectives", "plain"},
    "stages": {"checkpoint", "folders", "config", "experts", "loraformat", "networks", "trainer", "succession"},
    "study": DENOISER
    | PARTS
    | {
        "adapters",
        "config",
        "data",
        "experts",
        "networks",
        "objectives",
        "painting",
        "pixels",
        "preview",
        "roles",
        "slim",
        "walks",
    },
    "api": DENOISER
    | PARTS
    | SIDE_DOORS
    | LOOP
    | {
        "objectives",
        "verify",
        "evaluation",
        "zoo",
        "config",
        "stages",
        "devices",
        "exported",
        "identity",
        "study",
        "walks",
    },
    "distillation": {"api", "config", "objectives", "plain"},
    # what the commands do; Run.evaluate, which is below, finds judging by its name when it is asked
    "plan": {"config", "weightless", "study"},
    "forecast": DENOISER | PARTS | LOOP | {"objectives", "networks", "weightless", "slim", "data", "config", "study", "zoo"},
    "drawing": {"api", "data", "evaluation", "exported", "families", "folders", "proof"},
    "judging": {"api", "adapters", "devices", "exported", "data", "denoiser", "evaluation", "painting", "stages", "zoo"},
    "listing": {"families", "objectives", "zoo"},
    "doctor": set(),
    "push": {"proof", "hub"},
    "demo": {"api", "config", "evaluation", "export", "judging", "verify"},
    "cli": COMMANDS | {"api", "config", "verify", "zoo"},
    "__main__": {"cli"},
    "": {"api", "adapters", "distillation"},  # fewstep/__init__.py: its lazy public names
}

# Which modules alone may import these packages.
DIFFUSERS = SIDE_DOORS | {"zoo"}
ONLY_IN = {"diffusers": DIFFUSERS, "transformers": DIFFUSERS, "peft": DIFFUSERS, "accelerate": {"trainer"}}

# What these may not import even by way of others.
NEVER_REACHES = {"evaluation": {"objectives", "trainer"}, "zoo": {"objectives", "trainer"}}

MOST_LINES = 300


def files(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py") if "__pycache__" not in f.parts)


def dotted(file: Path) -> str:
    """fewstep/zoo/__init__.py -> fewstep.zoo"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(f): f for f in files("fewstep")}


def at_load(tree: ast.AST) -> Iterator[ast.AST]:
    """ast.walk, less what runs only when a function is called."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_load(node)


def imports(source: str, module: str, is_package: bool = False, walk=ast.walk) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `module` imports, anywhere in it: in functions and under TYPE_CHECKING too.

    `from a import b` gives a.b: whether b is a module or a name in one, the key that covers it is the same."""
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_of(module: str, walk=ast.walk) -> list[tuple[int, str]]:
    file = MODULES[module]
    return list(imports(file.read_text("utf-8"), module, file.name == "__init__.py", walk))


def key(name: str) -> str | None:
    """The longest key of MAY_IMPORT that covers a dotted name of fewstep, or None."""
    parts = name.split(".")[1:]
    if not parts or name == "fewstep.__version__":
        return ""
    return next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in MAY_IMPORT), None)


def faults(module: str, found: list[tuple[int, str]]) -> Iterator[str]:
    """A sentence for each import of `module` that the tables do not allow."""
    own = key(module)
    if own is None:
        yield f"{module} has no row in MAY_IMPORT: say there what it may import"
        return
    for line, name in found:
        package = name.split(".")[0]
        if package in ONLY_IN and own.split(".")[0] not in ONLY_IN[package]:
            yield f"{module}:{line} imports {package}, which is for {', '.join(sorted(ONLY_IN[package]))}"
        allowed = MAY_IMPORT[own]
        if package == "fewstep" and key(name) not in allowed | {own, ""}:
            yield f"{module}:{line} imports {name}: {own or 'fewstep'} may import {', '.join(sorted(allowed)) or 'nothing'}"


def edges(walk=ast.walk) -> dict[str, set[str]]:
    """module -> the modules of fewstep that it imports, as files."""

    def file_of(name: str) -> str:
        return name if name in MODULES else name.rpartition(".")[0]

    return {m: {file_of(n) for _, n in imports_of(m, walk) if n.startswith("fewstep.")} - {m} for m in MODULES}


def test_imports_run_one_way():
    found = [fault for module in MODULES for fault in faults(module, imports_of(module))]
    assert not found, "\n" + "\n".join(found)


def test_the_table_itself_runs_one_way():
    done: set[str] = set()
    rows = {k: {v for v in row if v != k} for k, row in MAY_IMPORT.items()}
    while ready := {k for k in rows.keys() - done if rows[k] <= done}:
        done |= ready
    assert done == rows.keys(), f"these rows form a circle: {sorted(rows.keys() - done)}"


def test_no_module_needs_itself_to_load():
    graph, done, path = edges(at_load), set(), []

    def visit(module: str) -> None:
        assert module not in path, "circle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in graph.get(module, set()) - {"fewstep"}:
            visit(other)
        path.pop()
        done.add(module)

    for module in graph.keys() - {"fewstep"}:
        visit(module)


@pytest.mark.parametrize("judge", NEVER_REACHES)
def test_the_judge_does_not_know_the_judged(judge):
    graph = edges()
    reached = {m for m in MODULES if key(m) == judge}
    while more := {n for m in reached for n in graph.get(m, set())} - reached - {"fewstep"}:
        reached |= more
    met = sorted(m for m in reached if key(m) in NEVER_REACHES[judge])
    assert not met, f"{judge} reaches {met}"


def test_samplers_need_no_fewstep():
    found = [
        f"{f.name}:{n}" for f in files("samplers") for n, name in imports(f.read_text("utf-8"), "") if name.startswith("fewstep")
    ]
    assert not found, f"a deployer's script imports fewstep: {found}"


def test_files_are_short_and_none_is_called_utils():
    counts = {f: len(f.read_text("utf-8").splitlines()) for f in files("fewstep", "samplers", "eval")}
    long = [f"{f.relative_to(ROOT)}: {n} lines" for f, n in counts.items() if n > MOST_LINES]
    assert not long, f"over {MOST_LINES} lines, split by noun: {long}"
    vague = [str(f.relative_to(ROOT)) for f in counts if f.stem in {"utils", "util", "helpers", "misc", "common"}]
    assert not vague, f"a name that says nothing: {vague}"


def test_the_public_names_are_where_init_says():
    homes = next(
        ast.literal_eval(node.value)
        for node in ast.parse(MODULES["fewstep"].read_text("utf-8")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_HOMES"
    )
    for name, module in homes.items():
        if module in MODULES:  # a package may gather its names from its files; they are names in its __init__ all the same
            tree = ast.parse(MODULES[module].read_text("utf-8"))
            names = {n for node in tree.body for n in _bound(node)}
            assert name in names, f"fewstep.{name} should be in {module}"


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign):
        return {t.id for t in node.targets if isinstance(t, ast.Name)}
    return set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fewstep.schedules", "import fewstep.trainer"),
        ("fewstep.denoiser", "def f():\n    from fewstep.sampling import ddim"),
        ("fewstep.losses", "from . import trainer"),
        ("fewstep.objectives.dmd", "from ..trainer import fit"),
        ("fewstep.objectives.dmd", "from fewstep.data.prompts import read"),
        ("fewstep.evaluation.features", "from fewstep.objectives import base"),
        ("fewstep.sampling", "if TYPE_CHECKING:\n    from fewstep import distill"),
        ("fewstep.sampling", "from diffusers import DDIMScheduler"),
        ("fewstep.objectives.dmd", "import accelerate.utils"),
        ("fewstep.networks", "from accelerate import Accelerator"),
        ("fewstep.zoo.sprites", "from fewstep.zoo.build import main"),
        ("fewstep.newcomer", ""),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(list(faults(module, list(imports(source, module))))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fewstep.objectives.dmd",
            "from fewstep.objectives.base import Turn\nfrom .base import Turn\nfrom fewstep.losses import push",
        ),
        ("fewstep.trainer", "from accelerate import Accelerator"),
        ("fewstep.adapters", "import diffusers\nfrom fewstep import __version__\nimport torch"),
        ("fewstep.zoo.build", "from fewstep.zoo.sprites import draw"),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert list(faults(module, list(imports(source, module)))) == []
