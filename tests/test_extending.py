"""Oracle: the formulas of the operator in docs/extending.md, in numpy; what must not be registered; one-line errors."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import onnxcrp
from onnxcrp import plugins
from onnxcrp.cli import main
from onnxcrp.index import Index
from onnxcrp.lrp import RULES
from onnxcrp.ops import CARRIES_NONE, OPS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
BLOCK = re.compile(r"^```(?P<kind>\w+)(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
P = np.array([[1, 0], [0, 2], [-1, -1]], np.float64)
W = np.array([[-1, 0.5, 0.5], [0.5, -1, 0.5]], np.float64)
X = np.array([[0.3, -0.7]], np.float32)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    tables: list[dict] = [OPS, CARRIES_NONE, RULES, plugins._files]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page, the model made, and a sample."""
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["text"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile((tmp_path / "make_model.py").read_text(), "make_model.py", "exec"), {})
    np.save(tmp_path / "sample.npy", X)
    return tmp_path


def ask(*words: str, code: int = 0):
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == code, done.output
    return done


def by_hand(x: np.ndarray) -> np.ndarray:
    """Class 0 under prototypes.toml: epsilon through the dense layer, shares of squared distances below it."""
    squares = (x[0] - P) ** 2
    d = squares.sum(1)
    R = d * W[0]
    return (squares / d[:, None] * R[:, None]).sum(0)


def test_the_page_runs(page: Path) -> None:
    """Every command of the page, by the page's own words."""
    shell = next(block["text"] for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if block["kind"] == "sh")
    said = {}
    for line in shell.strip().splitlines():
        words = shlex.split(line)
        if words[0] == "onnxcrp":
            said[words[1]] = ask(*words[1:])
    assert "acme::Prototypes" in said["inspect"].stdout
    assert "distance" in said["inspect"].stdout
    assert "not supported" not in said["inspect"].stdout
    answer = json.loads(said["explain"].stdout)["samples"][0]["answers"][0]
    assert answer["relevance"] == pytest.approx(by_hand(X.astype(np.float64)).sum(), rel=1e-5)
    exec(compile((page / "check.py").read_text(), "check.py", "exec"), {})


def test_relevance_is_that_of_the_formula(page: Path) -> None:
    onnxcrp.load_plugin("acme.py")
    result = onnxcrp.Explainer("prototypes.onnx", "prototypes.toml").explain(X, target=0)
    np.testing.assert_allclose(result.relevance["x"], by_hand(X.astype(np.float64))[None], rtol=1e-5)
    conditional = onnxcrp.Explainer("prototypes.onnx", "prototypes.toml").explain(
        X, target=0, conditions=[{"d": [0]}, {"d": [1, 2]}]
    )
    np.testing.assert_allclose(conditional.relevance["x"].sum(1), result.relevance["x"], rtol=1e-5)


def test_without_the_plugin_the_function_is_inlined_as_ever(page: Path) -> None:
    canonical = onnxcrp.Explainer("prototypes.onnx").canonical
    assert "Prototypes" not in {node.op for node in canonical.graph.nodes}
    assert not canonical.to_onnx().functions


def test_the_compiled_model_runs_without_us(page: Path) -> None:
    import onnxruntime

    ask("compile", "prototypes.onnx", "--plugin", "acme.py", "-c", "prototypes.toml", "-o", "relevance.onnx")
    session = onnxruntime.InferenceSession("relevance.onnx", providers=["CPUExecutionProvider"])
    (R,) = session.run(["relevance.x"], {"x": X, "target": np.array([[1, 0]], np.float32)})
    np.testing.assert_allclose(R, by_hand(X.astype(np.float64))[None], rtol=1e-5)


def test_an_index_with_the_plugin(page: Path) -> None:
    """Scores of relevance and activation against the formula; another plugin may not go on with the index."""
    x = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
    np.savez("data.npz", x)
    build = ("index", "build", "prototypes.onnx", "data.npz", "--plugin", "acme.py", "-c", "prototypes.toml")
    ask(*build, "--layer", "d", "--target", "predicted", "--no-normalize", "--k", "6", "-o", "i", "--checkpoint", "0")
    index = Index.open("i")
    (layer,) = index.layers
    d = ((x[:, None, :] - P) ** 2).sum(2)
    scores = {"actmax": d, "relmax": d * W[(d @ W.T).argmax(1)]}
    for criterion, expected in scores.items():
        found = index.top(layer, 1, criterion, "sum")
        np.testing.assert_allclose(found["score"], np.sort(expected[:, 1])[::-1], rtol=1e-4)
    done = ask("concepts", "prototypes.onnx", "sample.npy", "--plugin", "acme.py", "--index", "i", "--layer", layer)
    assert layer in done.stdout
    Path("acme.py").write_text(Path("acme.py").read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert "plugins" in ask(*build, "--layer", "d", "--no-normalize", "--k", "6", "-o", "i", code=1).stderr


def test_bench_measures_memory_with_the_plugin(page: Path) -> None:
    """In a process of its own, which has to run the plugin as well."""
    told = ask("bench", "prototypes.onnx", "--plugin", "acme.py", "-c", "prototypes.toml", "--rounds", "1", "--json")
    assert json.loads(told.stdout)["memory"]["one heatmap"] > 0


def test_plugins_are_run_once_by_many_threads(page: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(onnxcrp.load_plugin, ["acme.py"] * 8))
    assert all(module is modules[0] for module in modules)


def test_local_functions_beside_a_claimed_one_are_inlined_or_carried_along() -> None:
    """The claimed one calls a function; another function calls the claimed one; the file is of an older opset."""
    import onnxruntime

    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 15, "a" : 1]>
        net (float[N, 3] x) => (float[N, 3] y) { y = a.Outer (x) }
        <domain: "a", opset_import: ["" : 15, "a" : 1]> Outer (x) => (y) { z = a.Claimed (x) y = Neg (z) }
        <domain: "a", opset_import: ["" : 15, "a" : 1]> Claimed (x) => (y) { z = a.Inner (x) y = Relu (z) }
        <domain: "a", opset_import: ["" : 15]> Inner (x) => (y) { y = Mul (x, x) }
    """)
    onnxcrp.transpose("Claimed", family="activation")(lambda op, node, s: 2.0 * s * node.input(0))
    explainer = onnxcrp.Explainer(model, "gradient")
    assert [node.op for node in explainer.canonical.graph.nodes] == ["Claimed", "Neg"]
    assert {function.name for function in explainer.canonical.to_onnx().functions} == {"Claimed", "Inner"}
    x = np.array([[1, -2, 3]], np.float32)
    result = explainer.explain(x, target=1)
    np.testing.assert_array_equal(result.relevance["x"], [[0, 4, 0]])  # of -x^2
    np.testing.assert_array_equal(result.output, -(x**2))
    newer = onnxcrp.compile(model, "gradient", opset=20)
    assert {function.name for function in newer.functions} == {"Claimed", "Inner"}
    onnxruntime.InferenceSession(newer.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_cache_on_disk_never_answers_for_another_plugin(page: Path) -> None:
    """A plugin that was changed is another question: with plugins nothing is stored."""
    onnxcrp.load_plugin("acme.py")
    ask_it = lambda: onnxcrp.Explainer("prototypes.onnx", "prototypes.toml", cache=page / "cache").explain(X, target=0)  # noqa: E731
    first, again = ask_it(), ask_it()
    np.testing.assert_array_equal(first.relevance["x"], again.relevance["x"])
    for table in (OPS, RULES, plugins._files):
        for name in [name for name in table if name in ("acme::Prototypes", "distance") or table is plugins._files]:
            del table[name]
    text = (page / "acme.py").read_text()
    (page / "acme.py").write_text(text.replace("s = R / layer.stab(layer.z)", "s = 2.0 * R / layer.stab(layer.z)"))
    onnxcrp.load_plugin("acme.py")
    np.testing.assert_allclose(ask_it().relevance["x"], 2 * first.relevance["x"], rtol=1e-5)
    assert not list((page / "cache").rglob("about.json"))


# ------------------------------------------------------------------------------------------------- unknown operators

UNKNOWN = """
    <ir_version: 10, opset_import: ["" : 18, "acme" : 1]>
    net (float[N, 3] x) => (float[N, 3] y) <float[N, 3] a, float[N, 3] b, float[N, 3] c, float[N, 3] d>
    {
        a = acme.Odd (x)
        b = acme.Odd (a)
        c = acme.Relu (b)
        d = acme.Strange (c)
        y = Identity (d)
    }
"""


def test_unknown_operators_are_one_error_that_names_every_node() -> None:
    model = onnx.parser.parse_model(UNKNOWN)
    with pytest.raises(onnxcrp.UnsupportedError) as caught:
        onnxcrp.compile(model)
    assert "4 nodes have no transpose: " in str(caught.value)
    for part in ("acme::Odd (", "acme::Relu (", "acme::Strange (", "onnxcrp.transpose", "--plugin", 'rule = "pass"'):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    onnxcrp.transpose("Odd", family="activation")(lambda op, node, s: s)
    with pytest.raises(onnxcrp.UnsupportedError, match=r"2 nodes have no transpose: acme::Relu .*; acme::Strange "):
        onnxcrp.compile(model)


def test_a_composite_passes_what_nobody_registered(tmp_path: Path) -> None:
    """By the operator's name; not by its family alone, and not by a rule that needs a transpose."""
    lines = 'extends = "base"\n' + "".join(
        f'[[layer]]\nop = "acme::{name}"\nrule = "pass"\n' for name in ("Odd", "Relu", "Strange")
    )
    (tmp_path / "pass.toml").write_text(lines)
    model = onnx.parser.parse_model(UNKNOWN)
    written = onnxcrp.compile(model, tmp_path / "pass.toml")
    assert [node.op_type for node in written.graph.node if node.domain == "acme"] == ["Odd", "Odd", "Relu", "Strange"]
    explainer_rules = json.loads({p.key: p.value for p in written.metadata_props}["onnxcrp.facts"])["rules"]
    assert set(explainer_rules.values()) == {"pass"}
    for other in ('op = "other"\nrule = "pass"', 'op = "acme::Odd"\nrule = "norm"'):
        (tmp_path / "other.toml").write_text(f'extends = "base"\n[[layer]]\n{other}\n')
        with pytest.raises(onnxcrp.UnsupportedError, match="4 nodes have no transpose"):
            onnxcrp.compile(model, tmp_path / "other.toml")


def test_an_operator_of_another_domain_is_not_the_standards() -> None:
    """acme::Relu is known only as such: a plain name never stands for an operator that the standard has."""
    with pytest.raises(onnxcrp.PluginError, match="Relu is registered already"):
        onnxcrp.transpose("Relu")(lambda op, node, s: s)
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18, "acme" : 1]>
        net (float[N, 3] x) => (float[N, 3] y) { y = acme.Relu (x) }
        <domain: "acme", opset_import: ["" : 18]> Relu (x) => (y) { y = Mul (x, x) }
    """)
    onnxcrp.transpose("acme::Relu", family="activation")(lambda op, node, s: 2.0 * s * node.input(0))
    result = onnxcrp.Explainer(model, "gradient").explain(np.array([[1, -2, 3]], np.float32), target=1)
    np.testing.assert_array_equal(result.relevance["x"], [[0, -4, 0]])


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import onnxcrp\n@onnxcrp.transpose('Conv')\ndef f(op, node, s): ...\n", "operator Conv is registered already"),
        ("import onnxcrp\n@onnxcrp.rule('dense')\ndef epsilon(layer, R): ...\n", "rule epsilon is registered already"),
        ("import onnxcrp\nonnxcrp.carries_none('Shape', why='')\n", "operator Shape is registered already"),
        ("import onnxcrp\n@onnxcrp.rule('dens')\ndef mine(layer, R): ...\n", "rule for unknown family 'dens'"),
        ("import onnxcrp\n@onnxcrp.transpose('A', family='b')\ndef f(op, node, s): ...\n", "unknown family 'b'"),
        ("x = 1\ny = z\n", "line 2: NameError: name 'z' is not defined"),
        ("x = (\n", "line 1: SyntaxError: '(' was never closed"),
        ("raise ValueError('first\\nsecond')\n", "line 1: ValueError: first"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ],
)  # fmt: skip
def test_errors_of_a_plugin_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    done = ask("inspect", "fixtures/digits/net.onnx", "--plugin", str(file), code=1)
    first, *hints = done.stderr.strip().splitlines()
    assert first.startswith(f"error: plugin {file}: ")
    assert said in first
    assert all(line.startswith("hint: ") for line in hints)
    assert len(hints) <= 1


@pytest.mark.parametrize(("name", "said"), [("missing.py", "there is no plugin file"), ("net.txt", "is no .py file")])
def test_a_plugin_is_a_file(tmp_path: Path, name: str, said: str) -> None:
    if name == "net.txt":
        (tmp_path / name).touch()
    assert said in ask("inspect", "x.onnx", "--plugin", str(tmp_path / name), code=1).stderr


def test_a_plugin_that_fails_registers_nothing_and_can_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    good = "import onnxcrp\n@onnxcrp.transpose('Late')\ndef late(op, node, s): return s\n"
    file.write_text(f"{good}1 / 0\n")
    with pytest.raises(onnxcrp.PluginError, match="ZeroDivisionError"):
        onnxcrp.load_plugin(file)
    assert "Late" not in OPS
    file.write_text(good)
    assert onnxcrp.load_plugin(file) is onnxcrp.load_plugin(file)
    assert "Late" in OPS


@pytest.mark.parametrize("body", ["undefined(s)", "s @ node.input(7)"])
def test_errors_inside_its_functions_name_plugin_and_line(tmp_path: Path, body: str) -> None:
    file = tmp_path / "acme.py"
    file.write_text(
        f"import onnxcrp\n@onnxcrp.transpose('Odd', family='activation')\ndef odd(op, node, s):\n    return {body}\n"
    )
    model = onnx.parser.parse_model(UNKNOWN.replace("Relu", "Odd").replace("Strange", "Odd"))
    onnx.save(model, tmp_path / "odd.onnx")
    done = ask("compile", str(tmp_path / "odd.onnx"), "-c", "gradient", "--plugin", str(file), "-o", str(tmp_path / "r.onnx"),
               code=1)  # fmt: skip
    assert re.match(rf"error: operator Odd of plugin {re.escape(str(file))}: line 4: \w+Error: ", done.stderr)
    assert not (tmp_path / "r.onnx").exists()


def test_entry_points_of_installed_packages(tmp_path: Path) -> None:
    """A package beside the checkout: a module, a function, and one that fails."""
    (tmp_path / "acme_explain.py").write_text(
        "import onnxcrp\n"
        "onnxcrp.activation('ByModule')(lambda op, node, x, y: x)\n"
        "def register():\n    onnxcrp.carries_none('ByFunction', why='test')\n"
        "def fail():\n    raise OSError('no disk')\n"
    )
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    script = (
        "import onnxcrp; from onnxcrp.ops import OPS, CARRIES_NONE; onnxcrp.load_composite('epsilon'); "
        "print('ByModule' in OPS, 'ByFunction' in CARRIES_NONE)"
    )
    root = Path(__file__).resolve().parent.parent

    def run(entries: str) -> subprocess.CompletedProcess[str]:
        (info / "entry_points.txt").write_text(f"[onnxcrp.plugins]\n{entries}\n")
        path = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin"}
        return subprocess.run([sys.executable, "-c", script], env=path, capture_output=True, text=True, check=False)

    assert run("a = acme_explain\nb = acme_explain:register").stdout.split() == ["True", "True"]
    failed = run("broken = acme_explain:fail")
    assert "plugin broken of acme: OSError: no disk (hint: update or uninstall acme)" in failed.stderr
