"""`onnxcrp index` and `onnxcrp concepts`, end to end. Oracles: the Python API, exit codes and streams; every example."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from fixtures.digits import make as digits
from fixtures.shapes import make as shapes
from onnxcrp.cli.concepts import command as concepts
from onnxcrp.cli.index import COMMANDS, command
from onnxcrp.index import Index, build
from tests.support.cli import done, run
from tests.support.indexes import tables

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures"
SHAPES = ("fixtures/shapes/net.onnx", "fixtures/shapes/scenes.tar")
DIGITS = ("fixtures/digits/net.onnx", "ink.npz", "--layer", "features.8")
LAYER = "layer2.0.conv1"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder that shows the fixtures, with the indexes that examples are about."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "fixtures").symlink_to(FIXTURES)
    found = digits.digits("test")
    np.savez(folder / "ink.npz", x=digits.prepare(found.images[:400]), y=found.labels[:400])
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_text("no picture")
    (folder / "kinds" / "parts").mkdir(parents=True)  # a class may be called what a build calls its own
    (folder / "kinds" / "parts" / "a.png").write_bytes((FIXTURES / "shapes" / "sample.png").read_bytes())
    (folder / "foreign").mkdir()
    (folder / "foreign" / "manifest.json").write_text('["of something else"]')
    (folder / "notes.csv").write_text("file,class_index\n")
    (folder / "cut.tar").write_bytes((ROOT / SHAPES[1]).read_bytes()[:20_000])
    (folder / "packed.tar.gz").write_bytes(gzip.compress((ROOT / SHAPES[1]).read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("index", "build", *SHAPES, "-o", "shapes.index", "-q")
        done("index", "build", "fixtures/ecg/net.onnx", "fixtures/ecg/samples.npz", "-o", "beats.index", "--k", 20)
        for number in range(2):
            done("index", "build", *DIGITS, "--shard", f"{number}/2", "-o", f"part{number}.index")
    return folder


@pytest.fixture(autouse=True)
def there(home, tmp_path, monkeypatch) -> Path:
    """Commands run in a folder of their own, with all that is in `home`."""
    for entry in home.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------------- help


def commands() -> dict[str, click.Command]:
    found = {f"index {name}": command.get_command(None, name) for name in COMMANDS}  # type: ignore[arg-type]
    return {**found, "concepts": concepts}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", commands())
def test_examples_run_and_options_say_what_they_do(name, there):
    found = commands()[name]
    assert found.examples  # type: ignore[attr-defined]
    for option in found.params:
        assert isinstance(option, click.Argument) or option.help, option.name  # type: ignore[attr-defined]
    assert "Example" in done(*name.split(), "--help").stdout
    for number, line in enumerate(found.examples):  # type: ignore[attr-defined]
        words = line.split()
        assert words[: 1 + len(name.split())] == ["onnxcrp", *name.split()]
        if "-o" in words and (there / words[words.index("-o") + 1]).exists():
            words[words.index("-o") + 1] = f"new{number}.index"  # indexes that other examples read
        done(*(word.strip("'") for word in words[1:]))
        if "-o" in words:
            out = there / words[words.index("-o") + 1]
            assert (out / "manifest.json").is_file() if out.suffix == ".index" else out.stat().st_size > 5000


def test_a_typo_names_the_command():
    result = run("index", "shwo")
    assert result.exit_code == 2
    assert "Did you mean show?" in result.stderr


# -------------------------------------------------------------------------------------------------------------- build


def test_every_setting_reaches_the_build(there):
    done("index", "build", *SHAPES, "-o", "cli.index", "--layer", "layer1*", "--layer", "conv1", "-t", "top2",
         "-c", "epsilon", "--k", 5, "--criteria", "relmax", "--aggregate", "max", "--no-normalize", "--bypass", "keep",
         "--full-classes", 3, "--batch-size", 7, "--workers", 1, "--threads", 1, "--provider", "cpu", "--output",
         "logits", "--checkpoint", 1, "-q")  # fmt: skip
    expected = build(*SHAPES, "api.index", layers=["layer1*", "conv1"], target="top2", composite="epsilon", k=5,
                     criteria="relmax", aggregate="max", normalize=False, bypass="keep", full_classes=3, batch_size=7,
                     threads=1)  # fmt: skip
    found = Index.open("cli.index")
    assert tables(found) == tables(expected)
    differ = {key for key, value in found.manifest.items() if expected.manifest[key] != value}
    assert differ <= {"versions"}


def test_labels_offset_and_several_datasets(there):
    """Two folders whose labels.csv count from 1: datasets are told apart."""
    scenes = shapes.scenes(8, seed=9)
    for half in (0, 1):
        (there / f"set{half}").mkdir()
        for i in range(4):
            Image.fromarray(scenes.images[4 * half + i]).save(there / f"set{half}" / f"{i}.png")
        rows = [f"{i}.png,{scenes.labels[4 * half + i] + 1}" for i in range(4)]
        (there / f"set{half}" / "labels.csv").write_text("\n".join(["file,class_index", *rows]))
    done("index", "build", SHAPES[0], "first=set0", "second=set1", "--label-offset", -1, "--layer", "conv1",
         "--k", 4, "-o", "two.index")  # fmt: skip
    index = Index.open("two.index")
    assert index.samples["label"].tolist() == scenes.labels.tolist()
    assert index.samples["dataset"].tolist() == ["first"] * 4 + ["second"] * 4
    shown = done("index", "show", "two.index", "--layer", "conv1", "-C", 3).stdout
    assert re.search(r"^  0  (first|second)/\d\.png", shown, re.MULTILINE)
    (there / "mine.csv").write_text("file,class_index\n0.png,5\n2.png,4\n")
    done("index", "build", SHAPES[0], "set0", "--labels", "mine.csv", "--layer", "conv1", "-o", "mine.index")
    assert Index.open("mine.index").samples["label"].tolist() == [5, 4]


def test_merged_shards_are_the_whole(there):
    done("index", "build", *DIGITS, "-o", "whole.index")
    result = done("index", "merge", "part0.index", "part1.index", "-o", "merged.index", "--json")
    assert json.loads(result.stdout)["samples"] == 400
    assert "400 samples, target label" in result.stderr
    assert tables(Index.open("merged.index")) == tables(Index.open("whole.index"))
    assert run("index", "merge", "part0.index", "shapes.index", "-o", "mixed.index").exit_code == 1
    part = json.loads(done("index", "stats", "part0.index", "--json").stdout)
    assert part["index"]["complete"] is False


def test_samples_without_a_label_are_said(there):
    (there / "pictures").mkdir()
    scenes = shapes.scenes(4, seed=9)
    for i in range(4):
        Image.fromarray(scenes.images[i]).save(there / "pictures" / f"{i}.png")
    rows = [f"{i}.png,{scenes.labels[i] if i else -1}" for i in range(4)]
    (there / "pictures" / "labels.csv").write_text("\n".join(["file,class_index", *rows]))
    build = ("index", "build", SHAPES[0], "pictures", "--layer", "conv1", "-o")
    said = "1 of 4 samples have no label"
    found = done(*build, "a.index").stderr
    assert said in found
    assert found.endswith("4 samples, target predicted\n")
    assert said not in done(*build, "b.index", "--target", "predicted").stderr
    left_out = done(*build, "c.index", "--target", "label").stderr
    assert said not in left_out
    assert "3 samples, target label" in left_out


def test_a_broken_sample_is_named_and_the_build_goes_on(there):
    (there / "pictures").mkdir()
    scenes = shapes.scenes(4, seed=9)
    for i in range(4):
        Image.fromarray(scenes.images[i]).save(there / "pictures" / f"{i}.png")
    (there / "pictures" / "2.png").write_bytes(b"no picture")
    result = done("index", "build", SHAPES[0], "pictures", "--layer", "conv1", "-o", "broken.index")
    assert re.search(r"^skipped pictures/2\.png", result.stderr, re.MULTILINE)
    assert "3 samples, target predicted, 1 skipped" in result.stderr
    assert "2.png" in done("index", "stats", "broken.index").stdout
    again = done("index", "build", SHAPES[0], "pictures", "--layer", "conv1", "-o", "broken.index", "-q")
    assert (again.stdout, again.stderr) == ("", "")


def test_an_interrupted_build_says_how_to_go_on(there, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onnxcrp.index.builder.Work.run", stop)
        result = run("index", "build", *SHAPES, "--layer", "conv1", "-o", "stopped.index")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the same command goes on from what was written last\n"
    assert run("index", "show", "stopped.index", "--layer", "conv1", "-C", 1).exit_code == 1
    done("index", "build", *SHAPES, "--layer", "conv1", "-o", "stopped.index")
    assert Index.open("stopped.index").manifest["complete"]


def test_a_process_of_its_own_keeps_stdout_for_data(there):
    """Through the installed entry point, on a terminal that is none: no bar, messages on stderr."""
    script = [sys.executable, "-m", "onnxcrp.cli", "index", "build", *SHAPES, "--layer", "conv1", "-o", "i.index"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([*script, "--json"], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(found.stdout)["samples"] == shapes.TAR_SCENES
    assert found.stderr == f"wrote i.index: 1 layers, 16 concepts, {shapes.TAR_SCENES} samples, target label\n"


def test_a_terminal_sees_a_bar_with_rate_and_time_left(there):
    pty = pytest.importorskip("pty")
    main_end, other_end = pty.openpty()
    script = [sys.executable, "-m", "onnxcrp.cli", "index", "build", *SHAPES, "--layer", "conv1", "-o", "i.index"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    with subprocess.Popen(script, stderr=other_end, stdout=subprocess.PIPE, env=environment) as process:
        os.close(other_end)
        seen = b""
        while True:
            try:
                part = os.read(main_end, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(main_end)
    assert process.returncode == 0
    text = seen.decode()
    assert f"{shapes.TAR_SCENES}/{shapes.TAR_SCENES}" in text
    assert re.search(r"\d samples/s", text)
    assert re.search(r"\d:\d\d:\d\d", text)


# ---------------------------------------------------------------------------------------------------- reading an index


def test_show_lists_and_draws_what_the_index_holds(there):
    result = done("index", "show", "shapes.index", "--layer", LAYER, "-C", "2,10", "-C", 5, "--k", 3, "--json",
                  "--criterion", "actmax", "--aggregate", "max", "--class", "hexagon", "-o", "a.png")  # fmt: skip
    report = json.loads(result.stdout)
    assert [group["channel"] for group in report] == [2, 10, 5]
    index = Index.open("shapes.index")
    for group in report:
        frame = index.top(LAYER, group["channel"], "actmax", "max", cls=5, k=3)
        assert [row["sample"] for row in group["samples"]] == frame["sample"].tolist()
        assert {row["target"] for row in group["samples"]} == {5}
    with Image.open("a.png") as three:
        done("index", "show", "shapes.index", "--layer", LAYER, "-C", 2, "--k", 3, "-o", "b.png", "--style", "masked")
        with Image.open("b.png") as one:
            assert three.height > 6 * one.height / 2  # three groups of four strips against one of one
    text = done("index", "show", "shapes.index", "--layer", LAYER, "-C", 2, "--k", 2).stdout
    first = index.top(LAYER, 2, k=2).iloc[0]
    assert re.search(rf"^  0  {first['name']}\s+hexagon\s+{first['score']:.1%}", text, re.MULTILINE)


def test_the_start_changes_the_heatmaps(there):
    for start in ("activation", "relevance"):
        done("index", "show", "shapes.index", "--layer", LAYER, "-C", 2, "--style", "heatmap", "--start", start,
             "-o", f"{start}.png")  # fmt: skip
    one, other = (np.asarray(Image.open(f"{start}.png"), np.int16) for start in ("activation", "relevance"))
    assert one.shape == other.shape
    assert (np.abs(one - other) > 60).any(-1).mean() > 0.01


def test_moved_data_and_models_are_found_again(there):
    (there / "old").mkdir()
    for name in ("net.onnx", "net.preprocessing.json", "labels.txt", "scenes.tar"):
        (there / "old" / name).write_bytes((FIXTURES / "shapes" / name).read_bytes())
    done("index", "build", "old/net.onnx", "old/scenes.tar", "--layer", "conv1", "-o", "moved.index", "--k", 2)
    (there / "old").rename(there / "new")
    asked = ("index", "show", "moved.index", "--layer", "conv1", "-C", 1, "-o", "a.png")
    assert run(*asked).exit_code == 1
    told = run(*asked, "--model", "new/net.onnx").stderr
    assert re.fullmatch(r"error: the data of moved.index cannot be read where it was: .*\nhint: --data PATH.*\n", told)
    done(*asked, "--model", "new/net.onnx", "--data", "new/scenes.tar")
    assert (there / "a.png").stat().st_size > 5000


def test_stats_are_those_of_the_api(there):
    index = Index.open("shapes.index")
    report = json.loads(done("index", "stats", "shapes.index", "--layer", LAYER, "-C", 2, "--k", 3, "--json").stdout)
    assert [row["class"] for row in report["classes"]] == index.classes_served(LAYER, 2, 3)["class"].tolist()
    report = json.loads(done("index", "stats", "shapes.index", "--class", "hexagon", "--by", "top", "--json").stdout)
    used = index.concepts_used(5, by="top")
    assert [(r["layer"], r["channel"]) for r in report["concepts"]] == list(
        zip(used["layer"], used["channel"], strict=True)
    )
    report = json.loads(
        done("index", "stats", "shapes.index", "--layer", LAYER, "-C", 2, "--retrieve", "--k", 4, "--json").stdout
    )
    assert [row["sample"] for row in report["samples"]] == index.retrieve(LAYER, 2, 4).samples["sample"].tolist()
    text = done("index", "stats", "shapes.index", "--layer", LAYER, "-C", 2).stdout
    assert re.search(r"Classes that layer2\.0\.conv1 channel 2 serves most", text)
    assert re.search(r"^  5\s+hexagon\s+12\s+10\.\d%", text, re.MULTILINE)


def test_classes_by_other_names(there):
    Path("names.txt").write_text("\n".join("uvwxyz"))
    asked = ("--class-names", "names.txt", "-q")
    shown = done("index", "show", "shapes.index", "--layer", LAYER, "-C", 2, "--k", 1, "--class", "Z", *asked)
    assert re.search(r"hexagon\.png +z +12\.\d%", shown.stdout)
    assert "z uses most" in done("index", "stats", "shapes.index", "--class", "z", *asked[:2]).stdout
    assert re.search(r"explained  z ", done(*GLOCAL, "--k-concepts", 1, *asked).stdout)
    Path("names.txt").write_text("u\nv")
    short = run("index", "stats", "shapes.index", "--class", "u", *asked[:2])
    assert (short.exit_code, "holds 2 class names" in short.stderr) == (1, True)


def test_what_a_build_leaves_out_and_finds_done_is_told(there):
    folder = there / "some"
    folder.mkdir()
    (folder / "a.png").write_bytes((ROOT / "fixtures/shapes/sample.png").read_bytes())
    (folder / "b.png").write_text("no picture")
    (folder / "notes.txt").write_text("of something else")
    (folder / "plan.doc").write_text("of something else")
    build = ("index", "build", SHAPES[0], "some", "--layer", "conv1", "-o", "some.index")
    said = done(*build).stderr
    assert "warning: some: passed over 2 files without a sample: notes.txt ...\n" in said
    assert "skipped some/b.png: not a picture that Pillow can read" in said
    assert "wrote some.index: 1 layers, 16 concepts, 1 sample, target predicted" in said
    again = done(*build).stderr
    assert "some.index is of this data already: 1 layers" in again
    assert "wrote" not in again


def test_compare_prints_and_plots(there):
    result = done("index", "compare", "shapes.index", "--layer", LAYER, "--layer", "conv1", "--k", 5, "-o", "a.png")
    frame = Index.open("shapes.index").compare([LAYER, "conv1"], 5)
    rows = re.findall(r"^  (\S+) +(\w+ \w+) +(\w+ \w+) +([\d.]+) +[\d.]+ +([\d.]+)$", result.stdout, re.MULTILINE)
    assert rows == [(r.layer, r.one, r.other, f"{r.overlap:.3f}", f"{r.jaccard:.3f}") for r in frame.itertuples()]
    assert (there / "a.png").stat().st_size > 5000


def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("index", "compare", "shapes.index", "-o", "a.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "plots need matplotlib" in result.stderr


def test_one_criterion_has_nothing_to_compare(there):
    done("index", "build", *SHAPES, "--layer", "conv1", "--criteria", "relmax", "--aggregate", "sum", "-o", "one.index")
    result = run("index", "compare", "one.index")
    assert result.exit_code == 1
    assert "has one criterion" in result.stderr


# ------------------------------------------------------------------------------------------------------------ concepts

GLOCAL = ("concepts", SHAPES[0], "fixtures/shapes/watermark.png", "--index", "shapes.index", "--layer", LAYER)


def test_concepts_are_those_of_explain(there):
    report = json.loads(done(*GLOCAL, "--k-concepts", 3, "--k", 2, "--json", "-o", "a.png").stdout)
    explained = json.loads(
        done("explain", SHAPES[0], "fixtures/shapes/watermark.png", "--top-concepts", f"{LAYER}:3", "--json").stdout
    )
    answers = explained["samples"][0]["answers"]
    assert report["target"]["value"] == pytest.approx(answers[0]["value"])
    for mine, theirs in zip(report["concepts"], answers[1:], strict=True):
        assert mine["index"] == theirs["concept"]["index"]
        assert mine["share"] == pytest.approx(theirs["concept"]["share"], rel=1e-4)
    index = Index.open("shapes.index")
    first = report["concepts"][0]
    assert [r["sample"] for r in first["references"]] == index.top(LAYER, first["index"], k=2)["sample"].tolist()
    with Image.open("a.png") as three:
        done(*GLOCAL, "--k-concepts", 1, "--k", 2, "-o", "b.png")
        with Image.open("b.png") as one:
            assert three.height > one.height + 300
    text = done(*GLOCAL, "--k-concepts", 1, "-t", "disc", "--by", "abs").stdout
    assert re.search(r"explained  disc  3\.01", text)


def test_reference_samples_of_the_explained_class_only(there):
    asked = (*GLOCAL, "--k-concepts", 2, "--k", 2, "--same-class", "-t", "star", "--style", "full", "--style", "crop",
             "--criterion", "actmax", "--json", "-o", "a.png")  # fmt: skip
    for concept in json.loads(done(*asked).stdout)["concepts"]:
        assert [row["target"] for row in concept["references"]] == [4, 4]
    result = run(*GLOCAL, "--same-class", "-t", "4-0")
    assert (result.exit_code, "no single class" in result.stderr) == (1, True)


def test_another_model_is_refused(there):
    result = run("concepts", "fixtures/digits/net.onnx", "fixtures/digits/sample.png", *GLOCAL[3:], "-o", "a.png")
    assert result.exit_code == 1
    assert re.match(r"error: fixtures/digits/net\.onnx is not the model of shapes\.index\nhint: ", result.stderr)
    assert not (there / "a.png").exists()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["show", "nothing", "--layer", "a", "-C", 1], "nothing: no index there", "onnxcrp index build"),
        (["show", "shapes.index", "--layer", "conv2", "-C", 1], "no layer 'conv2'", "conv1"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 32], "no channel 32", "0 to 31"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 1, "--class", "cube"], "no class 'cube'", "0 to 5"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 1, "-o", "a.doc"], "a.doc: cannot write", ".png"),
        (["show", "shapes.index", "--layer", LAYER, "-C", ",".join(["1"] * 25), "--k", 1, "-o", "a.png"], "25 concepts", "24"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 1, "-o", "no/a.png"], "there is no folder no", "mkdir"),
        (["compare", "shapes.index", "-o", "no/a.png"], "there is no folder no", "mkdir"),
        (["build", SHAPES[0], "nothing", "-o", "x.index"], "nothing: no such dataset", "folder"),
        (["build", SHAPES[0], "fixtures/shapes/sample.png", "-o", "x.index"], "one file is no dataset", "a folder"),
        (["build", SHAPES[0], "empty", "-o", "x.index"], "the folder holds no pictures", ".png"),
        (["build", SHAPES[0], "bad", "-o", "x.index"], "the one sample cannot be read: bad/a.png", "pictures"),
        (["build", SHAPES[0], "cut.tar", "-o", "x.index"], "cut.tar: cut off at byte 20000", "copy it"),
        (["build", SHAPES[0], "packed.tar.gz", "-o", "x.index"], "not an uncompressed tar", "gunzip"),
        (["build", SHAPES[0], "kinds", "--labels", "nope.csv", "-o", "x.index"], "nope.csv: no such file", "check"),
        (["build", SHAPES[0], "kinds", "--labels", "notes.csv", "-o", "x.index"], "lists no files", "a/1.png,0"),
        (["build", *DIGITS[:2], "--labels", "nope.npy", "-o", "x.index"], "nope.npy: no such file", "check"),
        (["build", *DIGITS[:2], "--labels", "bad/a.png", "-o", "x.index"], "has columns no picture", "class_index"),
        (["build", *SHAPES, "-o", "bad"], "cannot write bad: the folder holds a.png", "NAME.index"),
        (["build", *SHAPES, "-o", "kinds"], "cannot write kinds: the folder holds parts/a.png", "NAME.index"),
        (["build", *SHAPES, "-o", "foreign"], "manifest.json: not the manifest of an index", "another"),
        (["build", *SHAPES, "-o", "cut.tar/x.index"], "cannot write cut.tar/x.index: Not a directory", "may write"),
        (["build", *SHAPES, "-o", "cut.tar"], "cannot write cut.tar: it is a file", "NAME.index"),
        (["merge", "shapes.index", "-o", "bad"], "cannot write bad: the folder holds a.png", "NAME.index"),
        (["build", *SHAPES, "-o", "shapes.index", "-c", "epsilon"], "index of something else: composite", "another"),
        (["build", *SHAPES, "-o", "x.index", "--criteria", "best"], "criteria is best", "relmax, actmax"),
        (["build", *SHAPES, "-o", "x.index", "--shard", "8/8"], "shard is '8/8'", "0/8"),
        (["build", *SHAPES, "-o", "x.index", "--layer", "nope*"], "nope", ""),
        (["stats", "shapes.index", "--class", "9"], "no class '9'", "0 to 5"),
        (["compare", "shapes.index", "-o", "a.doc"], "ending .doc", ".png"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_a_hint(arguments, said, hint):
    result = run("index", *arguments)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "shapes.index", "--layer", LAYER, "-C", "a"], "channels are numbers"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 1, "--style", "full"], "--style does nothing without -o"),
        (["show", "shapes.index", "--layer", LAYER, "-C", 1, "--provider", "cpu"], "--provider does nothing without"),
        (["build", *SHAPES, "-o", "x.index", "--actors", 2], "--actors does nothing without --engine ray"),
        (["stats", "shapes.index", "-C", 1], "--channel needs --layer"),
        (["stats", "shapes.index", "--layer", LAYER, "--retrieve"], "--retrieve is about one concept"),
        (["stats", "shapes.index", "--k", 3], "--k does nothing without"),
    ],
)
def test_usage(arguments, said):
    result = run("index", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
