"""Oracles: the arrays of `Explainer` itself, sums by hand, exit codes and streams; every example of every help is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcrp import Explainer
from onnxcrp.cli import COMMANDS, main
from tests.support.cli import done, run

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures"
SHAPES = [str(FIXTURES / "shapes" / "net.onnx"), str(FIXTURES / "shapes" / "sample.png")]
ECG = [str(FIXTURES / "ecg" / "net.onnx"), str(FIXTURES / "ecg" / "sample.csv")]
LAYER = "layer2.0.conv2"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Commands run in an empty folder that shows the fixtures."""
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shapes_sample() -> np.ndarray:
    """The sample as its preprocessing file says: (pixel - 128) / 64."""
    picture = Image.open(SHAPES[1]).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    return ((np.asarray(picture, np.float32) - 128) / 64).transpose(2, 0, 1)[None]


# --------------------------------------------------------------------------------------------------------------- help


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = """
import sys
from click.testing import CliRunner
from onnxcrp.cli import main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
print(*[name for name in ("numpy", "onnx", "onnxruntime", "torch", "PIL", "rich", "matplotlib") if name in sys.modules])
"""
    start = time.perf_counter()
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert imported.split() == []
    assert time.perf_counter() - start < 1.5


def test_help_names_every_command():
    text = done("--help").stdout
    for name, what in COMMANDS.items():
        assert re.search(rf"^  {name}\s+{what.split()[0]}", text, re.MULTILINE)
    assert run().exit_code == 2
    assert done("--version").stdout.startswith("onnxcrp, version")


def examples() -> list[str]:
    found = []
    for name in ("", *COMMANDS):
        text = done(*name.split(), "--help").stdout
        lines = re.findall(r"^  (onnxcrp .+)$", text.partition("Example")[2], re.MULTILINE)
        assert lines, f"{name} has no example"
        found += [line for line in lines if "index" not in line]  # tests/test_cli_index.py runs those
    return sorted(set(found))


@pytest.mark.parametrize("line", examples())
def test_examples_of_help_run(line, folder):
    words = line.split()
    done(*words[1:])
    for option in ("-o",):
        if option in words:
            assert (folder / words[words.index(option) + 1]).stat().st_size > 1000


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    from onnxcrp.cli import Commands

    assert isinstance(main, Commands)
    command = main.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, f"{name} {option.name}"  # type: ignore[attr-defined]


def test_the_installed_script_runs(folder):
    """Through a process of its own: exit codes, and stdout that holds data only."""
    script = [sys.executable, "-m", "onnxcrp.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    good = subprocess.run(
        [*script, "explain", *SHAPES, "--json", "-o", "a.png"], capture_output=True, text=True, env=environment
    )
    assert good.returncode == 0
    assert json.loads(good.stdout)["files"] == ["a.png"]
    assert good.stderr == "wrote a.png\n"
    bad = subprocess.run(
        [*script, "explain", SHAPES[0], "nothing.png"], capture_output=True, text=True, env=environment
    )
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == "error: nothing.png: no such file\nhint: check the path\n"


# ------------------------------------------------------------------------------------------------------------ explain


def test_explain_finds_what_the_explainer_finds():
    done("explain", *SHAPES, "--target", "1", "-o", "out.npz")
    expected = Explainer(SHAPES[0]).explain(shapes_sample(), target=1)
    with np.load("out.npz") as found:
        assert set(found) == {"heatmap", "output", "explained", "targets", "conditions", "relevance/input"}
        np.testing.assert_array_equal(found["heatmap"], expected.heatmap)
        np.testing.assert_array_equal(found["explained"], expected.explained)
        assert found["targets"].tolist() == [1]
        assert json.loads(str(found["conditions"])) == [{}]


def test_targets_and_conditions_become_questions_in_order():
    done("explain", *SHAPES, "-t", "top2", "-t", "1-0", "--condition", f"{LAYER}=3,7", "--condition", f"y=4+{LAYER}=5",
         "--record", "layer1.0", "-o", "out.npz", "--seed", "one")  # fmt: skip
    masked = {LAYER: [3, 7]}
    expected = Explainer(SHAPES[0]).explain(
        shapes_sample(),
        conditions=[{"y": 1}, {"y": 1, **masked}, {"y": 2}, {"y": 2, **masked}, {"y": {1: 1, 0: -1}},
                    {"y": {1: 1, 0: -1}, **masked}, {"y": 4, LAYER: [5]}],
        record=["layer1.0"], seed="one",
    )  # fmt: skip
    with np.load("out.npz") as found:
        np.testing.assert_allclose(found["heatmap"], expected.heatmap, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found["relevance/layer1.0"], expected.relevance["layer1.0"], rtol=1e-5, atol=1e-7)
        assert json.loads(str(found["targets"])) == [[1, 1, 2, 2, {"1": 1.0, "0": -1.0}, {"1": 1.0, "0": -1.0}, 4]]
        assert json.loads(str(found["conditions"])) == [{}, {LAYER: "=3,7"}] * 3 + [{LAYER: "=5"}]


@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_bypass(bypass):
    done("explain", *SHAPES, "-t", "1", "--condition", f"{LAYER}=3", "--bypass", bypass, "-o", "out.npz")
    expected = Explainer(SHAPES[0]).explain(shapes_sample(), conditions=[{"y": 1, LAYER: [3]}], bypass=bypass)
    with np.load("out.npz") as found:
        np.testing.assert_allclose(found["heatmap"][0, 1], expected.heatmap[0, 0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("by", ["relevance", "abs"])
def test_top_concepts_are_ranked_with_their_share(by):
    report = json.loads(
        done("explain", *SHAPES, "-t", "1", "--top-concepts", f"{LAYER}:32", "--by", by, "--record", LAYER,
             "-c", "epsilon", "-o", "out.npz", "--json", "-q").stdout
    )  # fmt: skip
    with np.load("out.npz") as found:
        R_c = found[f"relevance/{LAYER}"][0, 0].astype(np.float64).sum((1, 2))
        heatmaps = found["heatmap"][0]
    concepts = [answer["concept"] for answer in report["samples"][0]["answers"][1:]]
    order = np.argsort(-(np.abs(R_c) if by == "abs" else R_c))
    assert [concept["index"] for concept in concepts] == order.tolist()
    np.testing.assert_allclose([concept["relevance"] for concept in concepts], R_c[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([c["share"] for c in concepts], R_c[order] / np.abs(R_c).sum(), rtol=1e-5, atol=1e-6)
    assert (R_c < 0).any()
    first = Explainer(SHAPES[0], composite="epsilon").explain(shapes_sample(), 1, conditions=[{LAYER: [int(order[0])]}])
    np.testing.assert_allclose(heatmaps[1], first.heatmap[0, 0], rtol=1e-4, atol=1e-7)


def test_top_concepts_default_to_five_and_are_drawn():
    plain = done("explain", *SHAPES, "-o", "plain.png")
    ranked = done("explain", *SHAPES, "--top-concepts", LAYER, "-o", "ranked.png")
    assert len(ranked.stdout.splitlines()) == len(plain.stdout.splitlines()) + 5
    assert re.search(rf"{LAYER}=\d+ .*\+\d+\.\d%", ranked.stdout)
    with Image.open("plain.png") as small, Image.open("ranked.png") as large:
        assert large.height > small.height + 300
        assert large.width > small.width


def test_a_hidden_start():
    done("explain", *SHAPES, "--start", f"{LAYER}=3", "--start-from", "one", "-o", "one.npz")
    done("explain", *SHAPES, "-t", "1", "--start", f"{LAYER}=3", "--start-from", "relevance", "-o", "cut.npz")
    explainer = Explainer(SHAPES[0])
    expected = explainer.explain(shapes_sample(), start=[{LAYER: [3]}], start_from="one")
    cut = explainer.explain(shapes_sample(), conditions=[{"y": 1, LAYER: [3]}])
    with np.load("one.npz") as one, np.load("cut.npz") as found:
        np.testing.assert_allclose(one["heatmap"], expected.heatmap, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(found["heatmap"], cut.heatmap, rtol=1e-5, atol=1e-8)


def test_the_summary_names_classes():
    text = done("explain", *SHAPES, "-t", "1-0").stdout
    assert re.search(r"predicted\s+ball\s+class 1", text)
    assert "ball - disc" in text
    Path("names.txt").write_text("\n".join("uvwxyz"))
    assert re.search(r"predicted\s+v\s+class 1", done("explain", *SHAPES, "--labels", "names.txt").stdout)


def test_json_is_all_that_stdout_holds():
    report = json.loads(done("explain", *SHAPES, "--json", "-o", "a.png").stdout)
    [sample] = report["samples"]
    assert sample["predictions"][0]["name"] == "ball"
    [answer] = sample["answers"]
    assert (answer["target"], answer["name"], answer["condition"], answer["concept"]) == (1, "ball", None, None)
    expected = Explainer(SHAPES[0]).explain(shapes_sample(), target=1)
    assert answer["relevance"] == pytest.approx(float(expected.heatmap.sum()), rel=1e-4)
    assert answer["value"] == pytest.approx(float(expected.explained[0, 1]), rel=1e-5)


def test_a_negative_output_is_a_warning_on_stderr():
    result = done("explain", *SHAPES, "-t", "0")
    assert re.search(r"^warning: the explained output .*negative", result.stderr, re.MULTILINE)
    assert "warning" not in result.stdout
    assert done("explain", *SHAPES, "-t", "0", "--seed", "abs").stderr == ""


def test_warnings_name_each_negative_target_once():
    result = done(
        "explain", *SHAPES, "-t", "top3", "-t", "2", "--top-concepts", f"{LAYER}:2", "--condition", f"{LAYER}=3"
    )
    told = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    assert [re.findall(r"target (\w+) is negative \((\S+), (.+?)\)", line) for line in told] == [
        [("triangle", "-0.603", SHAPES[1])], [("hexagon", "-2.56", SHAPES[1])]]  # fmt: skip
    for target in ("0+1", "1-0"):
        assert done("explain", *SHAPES, "-t", target).stderr == ""
    assert "target triangle - ball is negative (-8.79, " in done("explain", *SHAPES, "-t", "2-1").stderr
    assert done("explain", *SHAPES, "-t", "0", "-q").stderr == ""


def test_a_target_by_its_class_name():
    one = done("explain", *SHAPES, "-t", "BALL", "--json").stdout
    assert one == done("explain", *SHAPES, "-t", "1", "--json").stdout
    assert json.loads(done("verify", *SHAPES, "-t", "ball", "--json").stdout)["target"] == "1"


def test_relevance_that_biases_absorb_is_told(folder):
    """y = x0 + x1 + 100 at x = 0.1: of 100.2 epsilon passes on 0.2."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        net (float[N, 2] x) => (float[N, 2] y) <float[2, 2] W = {1, 0, 1, 1}, float[2] b = {100, 0}> {
          y = Gemm(x, W, b) }"""
    )
    onnx.save(model, "net.onnx")
    np.save("x.npy", np.full((2, 2), 0.1, np.float32))
    told = done("explain", "net.onnx", "x.npy", "-t", "0", "-t", "1", "-c", "epsilon(epsilon=1e-4)").stderr
    assert told.count("\n") == 1
    assert "target 0: only 0.2 of 100 arrives" in told
    assert "onnxcrp verify" in told
    call = re.findall(r'--composite "(.+)" shares', told)[0]
    assert call == "epsilon(epsilon=0.0001, bias='drop')"
    for arguments in (["-c", call], ["-c", "gradient"], ["-t", "1", "-c", "epsilon"], ["-q"]):
        assert done("explain", "net.onnx", "x.npy", *arguments).stderr == ""


def test_relevance_that_no_input_can_take_is_told(folder):
    """y = 100 - x0 - x1 at x = 0.1: z+ without its bias has nobody to give 99.8 to."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        net (float[N, 2] x) => (float[N, 1] y) <float[2, 1] W = {-1, -1}, float[1] b = {100}> { y = Gemm(x, W, b) }"""
    )
    onnx.save(model, "net.onnx")
    np.save("x.npy", np.full((1, 2), 0.1, np.float32))
    told = done("explain", "net.onnx", "x.npy", "-c", "alpha1_beta0(bias='drop')").stderr
    assert "only 0 of 99.8 arrives at the inputs, the rest comes to outputs that no input speaks for" in told


def test_recorded_sums_are_in_the_json():
    report = json.loads(done("explain", *SHAPES, "-t", "1", "--record", LAYER, "--json").stdout)
    expected = Explainer(SHAPES[0]).explain(shapes_sample(), target=1, record=[LAYER]).relevance[LAYER].sum()
    assert report["samples"][0]["answers"][0]["recorded"] == {LAYER: pytest.approx(float(expected), rel=1e-4)}


def test_a_composite_line_that_fits_nothing_is_told(folder):
    (folder / "mine.toml").write_text('extends = "epsilon_plus"\n\n[[layer]]\nname = "nosuchlayer*"\nrule = "zplus"\n')
    line = "lines that fit nothing: table 1 (line 3) name = nosuchlayer*"
    assert f"  {line}\n" in done("inspect", SHAPES[0], "-c", "mine.toml").stdout
    for arguments in (["explain", *SHAPES], ["compile", SHAPES[0], "-o", "a.onnx"]):
        assert done(*arguments, "-c", "mine.toml").stderr.count(line) == 1
    assert "fit nothing" not in done("inspect", SHAPES[0], "-c", "epsilon_gamma_box").stdout
    (folder / "mine.toml").write_text(f'extends = "epsilon_plus"\n\n[[layer]]\nname = "{LAYER}"\nrule = "gamma"\n')
    assert done("explain", *SHAPES, "-c", "mine.toml").stderr == ""


def test_a_colormap_of_matplotlib_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "hint: one of bwr" in (told := run("explain", *SHAPES, "--cmap", "plasma").stderr)
    assert "is not installed" in told


def test_preprocessing_gives_the_bounds_that_a_composite_needs():
    done("explain", *SHAPES, "-t", "1", "-c", "epsilon_gamma_box", "-o", "a.npz")
    done("explain", *SHAPES, "-t", "1", "-c", "epsilon_gamma_box(low=-2, high=1.984375)", "-o", "b.npz")
    with np.load("a.npz") as a, np.load("b.npz") as b:
        np.testing.assert_allclose(a["heatmap"], b["heatmap"], rtol=1e-5, atol=1e-8)


def test_int8_nhwc_pictures():
    done("explain", "fixtures/int8/net.onnx", "fixtures/int8/sample.png", "-o", "a.png", "-o", "a.npz")
    with np.load("a.npz") as found:
        assert found["heatmap"].shape == (1, 64, 64)
        assert found["relevance/image"].shape == (1, 64, 64, 3)
        np.testing.assert_allclose(found["heatmap"], found["relevance/image"].sum(-1), rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------- where answers go


def test_pictures_hold_a_panel_for_each_condition():
    widths = []
    for number in range(3):
        conditions = [word for c in range(number) for word in ("--condition", f"{LAYER}={c}")]
        done("explain", *SHAPES, *conditions, "-o", f"{number}.png")
        with Image.open(f"{number}.png") as picture:
            widths.append(picture.width)
    assert widths[1] - widths[0] == widths[2] - widths[1] > 224


def test_normalize_joint_has_one_scale():
    for normalize in ("each", "joint"):
        done("explain", *SHAPES, "--condition", f"{LAYER}=3", "--normalize", normalize, "-o", f"{normalize}.png")
    with Image.open("each.png") as each, Image.open("joint.png") as joint:
        strongest = [int((np.asarray(p.convert("RGB")) == (255, 0, 0)).all(-1).sum()) for p in (each, joint)]
    assert strongest[0] > strongest[1]


def test_a_folder_gets_files_for_every_sample(folder):
    pictures = folder / "pictures"
    (pictures / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "more/a.png"):
        Image.open(SHAPES[1]).save(pictures / name)
    done("explain", SHAPES[0], "pictures", "pictures/more/a.png", "-o", "out/", "--top-concepts", LAYER)
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "a.npz",
        "a.png",
        "a~2.npz",
        "a~2.png",
        "b.npz",
        "b.png",
    ]


def test_samples_are_stacked_in_one_file():
    done("explain", ECG[0], "fixtures/ecg/sample.npy", ECG[1], "-t", "top", "-o", "out.npz", "-o", "out.png")
    with np.load("out.npz") as found:
        assert found["heatmap"].shape == (2, 150)
        assert found["explained"].shape == (2, 5)
        np.testing.assert_allclose(found["heatmap"], found["relevance/input"].sum(1), rtol=1e-5)
        assert found["targets"].shape == (2,)


def test_concepts_of_several_samples_do_not_go_into_one_file(folder):
    beats = np.random.default_rng(0).random((4, 1, 150)).astype(np.float32)
    np.save("beats.npy", beats)
    result = run("explain", ECG[0], "beats.npy", "--top-concepts", "6:2", "-o", "out.npz")
    assert result.exit_code == 1
    assert "hint: write one file each: -o DIRECTORY" in result.stderr
    assert not (folder / "out.npz").exists()
    done("explain", ECG[0], "beats.npy[1:3]", "--top-concepts", "6:2", "-o", "out")
    assert sorted(p.name for p in (folder / "out").glob("*.png")) == ["beats[1].png", "beats[2].png"]


def test_signals_are_drawn_one_panel_per_question():
    done("explain", *ECG, "-o", "one.png")
    done("explain", *ECG, "--condition", "6=3", "-o", "two.png")
    with Image.open("one.png") as one, Image.open("two.png") as two:
        assert one.width == two.width > 900
        assert two.height > one.height + 150


def test_what_is_read_is_never_written(folder):
    model, picture = folder / "net.onnx", folder / "mine.png"
    model.write_bytes(Path(SHAPES[0]).read_bytes())
    picture.write_bytes(Path(SHAPES[1]).read_bytes())
    (folder / "link.png").symlink_to(picture)
    (folder / "weights.npz").write_bytes((FIXTURES / "ecg" / "samples.npz").read_bytes())
    before = {path: path.read_bytes() for path in (model, picture, folder / "weights.npz")}
    tf = ["--preprocess", "tf"]
    for arguments in (
        ["compile", "net.onnx", "-o", "net.onnx"],
        ["explain", "net.onnx", "mine.png", *tf, "-o", "mine.png"],
        ["explain", "net.onnx", "mine.png", *tf, "-o", "link.png"],
        ["explain", "net.onnx", "mine.png", *tf, "-o", "./"],
        ["explain", ECG[0], "weights.npz[0]", "-o", "weights.npz"],
        ["verify", ECG[0], "weights.npz[0]", "--spread-bias", "-o", "weights.npz"],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "would overwrite what is read" in result.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_nothing_else_is_left_behind(folder):
    done("explain", *SHAPES, "-o", "a.png", "-o", "a.npz")
    done("compile", SHAPES[0], "-o", "a.onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["a.npz", "a.onnx", "a.png", "fixtures"]


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_reader_that_leaves_does_not_cost_the_file(folder):
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has seen enough
    script = [sys.executable, "-m", "onnxcrp.cli", "explain", *SHAPES, "-o", "a.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(script, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, "wrote a.png\n")
    assert (folder / "a.png").exists()


# ------------------------------------------------------------------------------------------------------------ inspect


def test_inspect_tells_what_the_file_is():
    found = json.loads(done("inspect", SHAPES[0], "--json").stdout)
    source = onnx.load(SHAPES[0])
    assert list(found["inputs"]) == [port.name for port in source.graph.input]
    assert found["opset"] == source.opset_import[0].version
    layers = {layer["name"]: layer for layer in found["layers"]}
    weights = {w.name: w.dims for w in source.graph.initializer}
    for name in ("conv1", LAYER, "layer3.0.conv1"):
        assert layers[name]["channels"] == weights[f"{name}.weight"][0]
    assert layers["conv1"]["rule"] == "flat"
    assert layers[LAYER]["rule"] == "zplus"
    text = done("inspect", SHAPES[0]).stdout
    assert "every operator is supported" in text
    assert "share its forward pass" in text
    assert re.search(rf"^  {LAYER} +Conv .*\[batch, 32, 16, 16\] +32 .*zplus$", text, re.MULTILINE)
    assert "relu" not in text
    assert len(done("inspect", SHAPES[0], "--all").stdout.splitlines()) > len(text.splitlines())


def test_inspect_is_brief():
    from onnxcrp.cli.inspect import _brief

    assert _brief("Relu a, b, c, d, e, f stay") == "Relu a, b, c, d, e, f stay"
    assert _brief("Relu a, b, c, d, e, f, g, h stay") == "Relu a, b, c, d, e, f and 2 more stay"
    long = _brief("onnxruntime failed:\n" + "Status Message: no\n" * 40)
    assert len(long) <= 160
    assert "\n" not in long


def test_inspect_names_what_is_unsupported(folder):
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        net (float[N, 3, 8, 8] x) => (float[N, 3] y) { a = Relu(x)
          y = Det(a) }"""
    )
    onnx.save(model, "odd.onnx")
    text = done("inspect", "odd.onnx").stdout
    assert "--preprocess has to say how" in text
    assert re.search(r"no relevance passes these operators:\s+\S+ +Det", text)
    assert json.loads(done("inspect", "odd.onnx", "--json").stdout)["unsupported"][0]["op"] == "Det"
    assert "Det" in run("compile", "odd.onnx", "-o", "a.onnx").stderr


# ------------------------------------------------------------------------------------------------------------ compile


def test_compile_writes_the_model_that_was_asked_for():
    import onnxruntime

    report = json.loads(
        done("compile", SHAPES[0], "-o", "a.onnx", "--condition", LAYER, "--record", LAYER, "--json").stdout
    )
    onnx.checker.check_model("a.onnx", full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession("a.onnx", options, providers=["CPUExecutionProvider"])
    assert sorted(port.name for port in session.get_inputs()) == ["input", "target"]  # the mask has a default
    mask = np.zeros((1, 32, 1, 1), np.float32)
    mask[0, 3] = 1
    names = [report["map"]["inputs"]["input"], report["map"]["relevance"][LAYER]]
    feeds = {"input": shapes_sample(), "target": np.eye(6, dtype=np.float32)[1:2], report["map"]["masks"][LAYER]: mask}
    R, hidden = session.run(names, feeds)
    expected = Explainer(SHAPES[0]).explain(shapes_sample(), 1, conditions=[{LAYER: [3]}], record=[LAYER])
    np.testing.assert_allclose(R, expected.relevance["input"][0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(hidden, expected.relevance[LAYER][0], rtol=1e-4, atol=1e-7)


def test_compile_options_reach_the_model():
    done("compile", SHAPES[0], "-o", "a.onnx", "--condition", LAYER, "--record", LAYER, "--reduce", "sum", "--activation",
         "conv1", "--no-inputs", "--masks", "required", "--opset", "20", "--ir-version", "9", "-q")  # fmt: skip
    model = onnx.load("a.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (20, 9)
    assert f"mask.{LAYER}" not in {w.name for w in model.graph.initializer}
    outputs = {port.name for port in model.graph.output}
    assert {f"relevance.{LAYER}.sum", "activation.conv1.sum"} <= outputs
    assert "relevance.input" not in outputs
    started = json.loads(
        done("compile", SHAPES[0], "-o", "b.onnx", "--start", LAYER, "--start-from", "one", "--json").stdout
    )
    assert started["map"]["seeds"] == {LAYER: f"seed.{LAYER}"}
    assert run("compile", SHAPES[0], "-o", "b.onnx", "--no-inputs", "--input", "input").exit_code == 2


# ------------------------------------------------------------------------------------------------------------- verify


def test_verify_holds_for_the_fixtures():
    text = done("verify", *ECG, "--composite", "epsilon").stdout
    assert "FAILS" not in text
    assert re.search(r"canonical outputs +holds", text)
    report = json.loads(done("verify", SHAPES[0], "--json").stdout)
    assert report["ok"] is True
    assert {check["name"] for check in report["checks"]} >= {"canonical outputs", "conservation"}


def test_verify_exits_with_1_when_something_does_not_hold(monkeypatch):
    from onnxcrp.analysis import verify

    monkeypatch.setattr(verify, "SUM_TOLERANCE", -1.0)
    result = run("verify", *ECG)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: conservation")


def test_verify_writes_relevance_with_spread_biases():
    report = json.loads(done("verify", *ECG, "-c", "epsilon", "--spread-bias", "-o", "s.npz", "--json").stdout)
    with np.load("s.npz") as found:
        R = found["relevance/input"]
    explained = Explainer(ECG[0]).explain(np.loadtxt(ECG[1], np.float32)[None, None], "top").explained.max()
    assert R.sum() == pytest.approx(explained, rel=1e-2)  # all of it arrives, but for stabilizers and borders
    assert report["spread"]["input"] == pytest.approx(R.sum(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["explain", "nope.onnx", SHAPES[1]], "nope.onnx", "path"),
        (["explain", SHAPES[1], SHAPES[1]], "is not an ONNX model but a PNG picture", "an .onnx file is expected"),
        (["inspect", "fixtures/README.md"], "README.md' is not an ONNX model but a text", "an .onnx file is expected"),
        (["explain", "fixtures", SHAPES[1]], "'fixtures' is a folder", "an .onnx file is expected"),
        (["explain", SHAPES[0], "nope.png"], "nope.png: no such file", "check the path"),
        (["explain", *SHAPES, "nope.png", "-o", "all"], "nope.png: no such file", "check the path"),
        (["explain", *SHAPES, "fixtures", "-o", "all"], "fixtures: the folder holds no pictures", "name files"),
        (["explain", SHAPES[0], "fixtures/shapes/sampel.png"], "no such file", "fixtures/shapes/sample.png"),
        (["explain", SHAPES[0], ECG[1]], "a table holds 1-D signals", "pass a picture"),
        (["explain", ECG[0], SHAPES[1]], "the model takes 1-D signals", ".csv"),
        (["explain", *SHAPES, "-t", "9"], "target class 9 is out of range", "from 0"),
        (["explain", *SHAPES, "-t", "sphere"], 'target "sphere" cannot be read', "207-281"),
        (["explain", *SHAPES, "-t", "banana"], 'target "banana" cannot be read', "a class name: disc, ball, "),
        (["explain", *SHAPES, "-t", "bal"], 'target "bal" cannot be read', "'ball'"),
        (["explain", *SHAPES, "-t", ""], 'target "" cannot be read', "208"),
        (["explain", *SHAPES, "--condition", ""], 'condition "" cannot be read', "LAYER=3,7"),
        (["explain", *SHAPES, "-o", "-"], "cannot be written to stdout", "NAME.png"),
        (["explain", *SHAPES, "-o", "/dev/null"], "cannot write /dev/null: it is no regular file", "folder"),
        (["compile", SHAPES[0], "-o", "-"], "cannot be written to stdout", "NAME.onnx"),
        (["compile", SHAPES[0], "-o", "foo.txt"], "foo.txt: a relevance model is an .onnx file", "foo.onnx"),
        (["verify", *SHAPES, "--spread-bias", "-o", "x.png"], "is an .npz file", "x.npz"),
        (["verify", *SHAPES, "--spread-bias", "-o", "/dev/null"], "it is no regular file", "NAME.npz"),
        (["explain", *SHAPES, "-t", "top9"], "has 6 entries only", "top6"),
        (["explain", *SHAPES, "--condition", f"{LAYER}=99"], "channel 99 is out of range", "from 0"),
        (["explain", *SHAPES, "--condition", "layer2.0.conv9=1"], "there is no layer 'layer2.0.conv9'", LAYER),
        (["explain", *SHAPES, "--condition", "layer2"], "cannot be read", "LAYER=3,7"),
        (["explain", *SHAPES, "--condition", f"y=1+{LAYER}=1", "--start", f"{LAYER}=2"], "has no start", "apart"),
        (["explain", *SHAPES, "--top-concepts", "layer9:3"], "there is no layer 'layer9'", ""),
        (["explain", *SHAPES, "--top-concepts", f"{LAYER}:0"], "'0' is no number of concepts", f"{LAYER}:5"),
        (["explain", *SHAPES, "--top-concepts", f"{LAYER}:x"], "'x' is no number of concepts", f"{LAYER}:5"),
        (["explain", *SHAPES, "--top-concepts", f"{LAYER}:33"], "the layer has 32 concepts only", f"{LAYER}:32"),
        (["explain", *SHAPES, "--condition", f"{LAYER}@head=3"], "has no attention heads", f"{LAYER}=3 keeps channel 3"),
        (["explain", *SHAPES, "--condition", f"{LAYER}@pos=3"], "@pos takes 2 numbers, got 3", f"{LAYER}@pos=0:0"),
        (["explain", *SHAPES, "--condition", f"{LAYER}@pos=3:99"], "@pos=3:99 is out of range", "count from 0"),
        (["explain", *SHAPES, "--condition", f"y=ball+{LAYER}=3"], 'the target "y=ball" cannot be read', "y=208 (class)"),
        (["explain", *ECG, "--condition", "99=1"], "there is no layer '99'", "layers: 0, 1, 2"),
        (["explain", *SHAPES, "--record", "layer9", "--json"], "there is no layer 'layer9'", ""),
        (["explain", *SHAPES, "-c", "epsilonn"], 'composite "epsilonn" is unknown', "presets"),
        (["explain", *SHAPES, "-c", "epsilon(gamma=3)"], 'no rule of this composite has a parameter "gamma"', "there are epsilon"),
        (["explain", *SHAPES, "--cmap", "blub"], "unknown colormap 'blub'", "bwr"),
        (["explain", *SHAPES, "-o", "out.xyz"], "cannot write a picture with the ending .xyz", ".png"),
        (["explain", *SHAPES, "-o", "nowhere/out.png"], "there is no folder nowhere", "mkdir"),
        (["explain", *SHAPES, "--labels", "nope.txt"], "nope.txt: no such file", ""),
        (["explain", *SHAPES, "--labels", "fixtures/ecg/labels.txt"], "holds 5 class names", ""),
        (["explain", *SHAPES, "--preprocess", "imgnet"], "neither a preset", "imagenet"),
        (["explain", *SHAPES, "--provider", "tpu"], "offers no 'tpu'", "its short names: "),
        (["explain", *SHAPES, "--output", "nope"], "the model has no output 'nope'", "logits"),
        (["compile", SHAPES[0], "-o", "x.onnx", "--condition", "layer7"], "there is no layer 'layer7'", "nearest"),
        (["compile", SHAPES[0], "-o", "nowhere/x.onnx"], "cannot write nowhere/x.onnx", ""),
        (["verify", ECG[0], "fixtures/ecg/samples.npz"], "holds several samples", "[0]"),
        (["verify", ECG[0], "nope.csv"], "nope.csv: no such file", ""),
        (["inspect", "nope.onnx"], "nope.onnx", ""),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_hint(arguments, message, hint, folder):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert len(rest) <= 1
    assert all(line.startswith("hint: ") for line in rest)
    assert hint in "".join(rest)
    assert [p.name for p in folder.iterdir()] == ["fixtures"]


def test_a_relevance_model_is_not_compiled_again(folder):
    done("compile", SHAPES[0], "-o", "relevance.onnx")
    commands = (["compile", "-o", "again.onnx"], ["explain", SHAPES[1]], ["verify", SHAPES[1]], ["bench"], ["inspect"])
    for command, *arguments in commands:
        result = run(command, "relevance.onnx", *arguments)
        assert result.exit_code == 1
        assert re.match("error: 'relevance.onnx' is a relevance model already.*\nhint: name the model", result.stderr)
    assert not (folder / "again.onnx").exists()


def test_a_target_is_answered_once(folder):
    """By its name, by its number and among the top three; what is told of it calls it by its name."""
    result = done("explain", *SHAPES, "-t", "hexagon", "-t", "5", "-t", "top3", "--json")
    answers = json.loads(result.stdout)["samples"][0]["answers"]
    assert [answer["name"] for answer in answers] == ["hexagon", "ball", "triangle"]
    assert "the explained output of target hexagon is negative" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explian"], "Did you mean explain?"),
        (["explain", SHAPES[0]], "Missing argument 'INPUT...'"),
        (["explain", *SHAPES, "--memory-limit", "many"], "'many' is no size"),
        (["explain", *SHAPES, "--seed", "two"], "'two' is not one of"),
        (["explain", *SHAPES, "--start", f"{LAYER}=3", "-t", "1"], "no --target"),
        (["explain", *SHAPES, "--percentile", "0"], "--percentile"),
        (["explain", *SHAPES, "--percentile", "nan"], "'nan' is no number"),
        (["explain", *SHAPES, "--record", LAYER], "--record does nothing without"),
        (["explain", *SHAPES, "--record", LAYER, "-o", "a.png"], "--record does nothing without"),
        (["explain", *SHAPES, "--start-from", "one"], "--start-from does nothing without --start"),
        (["explain", *SHAPES, "--by", "abs"], "--by does nothing without --top-concepts"),
        (["explain", *SHAPES, "--bypass", "keep"], "--bypass does nothing without"),
        (["compile", SHAPES[0], "-o", "a.onnx", "--start-from", "one"], "--start-from does nothing without --start"),
        (["compile", SHAPES[0], "-o", "a.onnx", "--reduce", "sum"], "--reduce does nothing without --record"),
        (["compile", SHAPES[0], "-o", "a.onnx", "--masks", "required"], "--masks does nothing without --condition"),
        (["compile", SHAPES[0], "-o", "a.onnx", "--no-inputs"], "--no-inputs without --record"),
        (["compile", SHAPES[0]], "Missing option '-o'"),
        (["verify", SHAPES[0], "-o", "x.npz"], "--spread-bias"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_model_without_preprocessing_asks(folder):
    (folder / "net.onnx").write_bytes(Path(SHAPES[0]).read_bytes())
    result = run("explain", "net.onnx", SHAPES[1])
    assert result.exit_code == 1
    assert "nothing says which values the model's float32 input expects" in result.stderr
    assert "--preprocess" in result.stderr.splitlines()[1]
    done("explain", "net.onnx", SHAPES[1], "--preprocess", "tf")
    result = run("compile", "net.onnx", "-o", "a.onnx", "-c", "epsilon_gamma_box")
    assert "needs low and high" in result.stderr


def test_too_many_samples_for_one_picture():
    np.save("beats.npy", np.zeros((25, 1, 150), np.float32))
    result = run("explain", ECG[0], "beats.npy", "-t", "1", "--seed", "one", "-o", "a.png")
    assert result.exit_code == 1
    assert "hint: write one each: -o FOLDER" in result.stderr


def test_an_interrupt_is_quiet(monkeypatch):
    from onnxcrp.analysis import explanation

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explanation, "open_model", interrupted)
    result = run("explain", *SHAPES)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2GB", 2 * 10**9), ("2GiB", 2**31), ("512 mib", 2**29), ("1e9", 10**9), ("1.5k", 1500)],
)
def test_sizes(text, size):
    from onnxcrp.cli.options import Bytes

    assert Bytes().convert(text, None, None) == size
