"""Oracle: one Explainer call per sample, everything kept, sorted and averaged in plain numpy; and an index of the same
data that was never interrupted."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="the index needs the extra [index]")

from onnxcrp import Explainer, NegativeLogitWarning
from onnxcrp.errors import InputError, OnnxcrpError, QuestionError
from onnxcrp.index import Index, build, merge
from tests.support import indexes

ROOT = Path(__file__).parent.parent
SMALL = {"k": 6, "batch_size": 4, "block": 8, "workers": 2}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return indexes.model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def whole(net, tmp_path_factory):
    return build(net, indexes.data(50), tmp_path_factory.mktemp("whole") / "index", **SMALL)


def brute_force(
    net: Path, x, targets: Mapping[int, list[int]], layers, *, normalize=True, composite="epsilon_plus_flat"
):
    """{(layer, criterion, aggregate): [(sample, target, scores [C], positions [C])]} by one call per row."""
    explainer = Explainer(net, composite)
    found: dict = {}
    for sample, several in targets.items():
        for number, target in enumerate(several):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NegativeLogitWarning)  # the index counts them instead
                result = explainer.explain(x[sample : sample + 1], int(target), record=layers, inputs=())
            for layer in layers:
                for criterion, arrays in (("relmax", result.relevance), ("actmax", result.activation)):
                    if criterion == "actmax" and number:
                        continue
                    flat = arrays[layer][0].astype(np.float64)
                    flat = flat.reshape(len(flat), -1)
                    for aggregate, score in (("sum", flat.sum(1)), ("max", flat.max(1))):
                        if normalize:
                            score = score / max(np.abs(score).sum(), 1e-300)
                        found.setdefault((layer, criterion, aggregate), []).append(
                            (sample, int(target), score, flat.argmax(1))
                        )
    return found


def check_top(frame, rows, channel: int, k: int, rtol=1e-5):
    """The scores of a list are the highest, and every entry is a row with just that score, place and target."""
    scores = {(sample, target): (score[channel], position[channel]) for sample, target, score, position in rows}
    scale = max(abs(score) for score, _ in scores.values()) + 1e-12
    best = sorted((score for score, _ in scores.values()), reverse=True)[:k]
    np.testing.assert_allclose(frame["score"], best, rtol=rtol, atol=rtol * scale)
    for row in frame.itertuples():
        score, position = scores[row.sample, row.target]
        assert row.score == pytest.approx(score, rel=rtol, abs=rtol * scale)
        assert row.position == position
    assert list(frame["rank"]) == list(range(len(best)))


# --------------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize("normalize", [True, False])
def test_index_equals_one_explainer_call_per_sample(net, tmp_path, normalize):
    x, labels = indexes.data(40)
    index = build(net, (x, labels), tmp_path / "i", normalize=normalize, **SMALL)
    assert list(index.layers) == ["first", "second"]  # the output's own layer is left out
    rows = brute_force(net, x, {i: [labels[i]] for i in range(40)}, ["first", "second"], normalize=normalize)
    for (layer, criterion, aggregate), of_layer in rows.items():
        for channel in (0, 3, 4):
            check_top(index.top(layer, channel, criterion, aggregate), of_layer, channel, 6)
            for cls in range(indexes.CLASSES):
                of_class = [row for row in of_layer if row[1] == cls]
                check_top(index.top(layer, channel, criterion, aggregate, cls=cls), of_class, channel, 6)
        edges, counts = index.histogram(layer, criterion=criterion, aggregate=aggregate)
        scores = np.stack([row[2] for row in of_layer])
        assert counts.shape == (scores.shape[1], len(edges) + 1)
        assert (counts.sum(1) == 40).all()
        for channel, mine in enumerate(counts):
            expected = np.bincount(np.searchsorted(edges, scores[:, channel], side="right"), minlength=len(mine))
            assert np.abs(expected - mine).sum() <= 2  # a score next to an edge may fall on the other side of it
        if (criterion, aggregate) == ("relmax", "sum"):
            for cls in range(indexes.CLASSES):
                of_class = np.stack([row[2] for row in of_layer if row[1] == cls])
                frame = index.statistics(layer)
                frame = frame[frame["class"] == cls].sort_values("channel")
                assert set(frame["count"]) == {len(of_class)}
                scale = np.abs(of_class).max()
                np.testing.assert_allclose(frame["mean"], of_class.mean(0), rtol=1e-5, atol=1e-6 * scale)
                np.testing.assert_allclose(frame["variance"], of_class.var(0), rtol=1e-3, atol=1e-5 * scale**2)
                highest = np.sort(of_class, axis=0)[::-1][:10].mean(0)
                np.testing.assert_allclose(frame["top_mean"], highest, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("target", ["predicted", "top2", "all"])
def test_targets_other_than_labels(net, tmp_path, target):
    x, _ = indexes.data(20)
    index = build(net, x, tmp_path / "i", target=target, **SMALL)
    explained = Explainer(net).explain(x, 0, inputs=(), seed="one").explained
    order = np.argsort(-explained, axis=1, kind="stable")
    chosen = {i: {"predicted": [order[i, 0]], "top2": order[i, :2], "all": range(3)}[target] for i in range(20)}
    rows = brute_force(net, x, {i: [int(t) for t in each] for i, each in chosen.items()}, ["second"])
    for (layer, criterion, aggregate), of_layer in rows.items():
        for channel in range(6):
            check_top(index.top(layer, channel, criterion, aggregate), of_layer, channel, 6)
    counts = index.statistics("second").groupby("class")["count"].first()
    expected = np.bincount(np.concatenate([list(each) for each in chosen.values()]), minlength=3)
    assert counts.to_dict() == {cls: n for cls, n in enumerate(expected) if n}
    assert index.manifest["negative"] == sum(int(explained[i, t] < 0) for i, each in chosen.items() for t in each)


@pytest.mark.parametrize("target", ["label", "predicted", "top2"])
def test_a_batch_that_cannot_be_freed_runs_in_its_size(net, tmp_path, target):
    import onnx

    from onnxcrp.canonize import canonize

    fixed = onnx.load(net)
    for port in (*fixed.graph.input, *fixed.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = 2
    data = indexes.data(13)
    canonical = canonize(fixed, free_batch=False)
    assert canonical.batch == "fixed"
    index = build(canonical, data, tmp_path / "fixed", target=target, **SMALL)
    free = build(net, data, tmp_path / "free", target=target, **SMALL)
    for layer in free.layers:
        for criterion in free.criteria:
            one, other = index.references(layer, criterion), free.references(layer, criterion)
            np.testing.assert_allclose(one.score, other.score, rtol=1e-5, atol=1e-6)
    assert index.manifest["rows"] == free.manifest["rows"]


def test_a_quantized_model_is_run_as_explain_runs_it(tmp_path):
    """The runtime's fusions would move activations by whole steps."""
    with np.load(ROOT / "fixtures" / "shapes" / "samples.npz") as stored:
        x, labels = stored["images"][:12], stored["labels"][:12]
    net, layers = ROOT / "fixtures" / "int8" / "net.onnx", ["layer1.0.conv2", "layer3.0.conv2"]
    index = build(net, (x, labels), tmp_path / "i", layers=layers, **SMALL)
    rows = brute_force(net, x, {i: [labels[i]] for i in range(12)}, layers)
    for (layer, criterion, aggregate), of_layer in rows.items():
        best = np.sort([scores for _, _, scores, _ in of_layer], axis=0)[::-1][:6]
        found = index.references(layer, criterion, aggregate)
        np.testing.assert_allclose(found.score.T, best, rtol=1e-5, atol=1e-6)


def test_fewer_criteria_and_layers(net, tmp_path):
    data = indexes.data(12)
    index = build(net, data, tmp_path / "i", layers="sec*", criteria="actmax", aggregate="max", **SMALL)
    assert list(index.layers) == ["second"]
    rows = brute_force(net, data[0], {i: [data[1][i]] for i in range(12)}, ["second"])
    check_top(index.top("second", 2, "actmax", "max"), rows["second", "actmax", "max"], 2, 6)
    with pytest.raises(QuestionError, match="built without relmax"):
        index.top("second", 2)
    with pytest.raises(QuestionError, match="statistics of classes need RelMax"):
        index.classes_served("second", 2)


def test_equal_scores_are_ordered_by_sample(net, tmp_path):
    x, labels = indexes.data(6)
    index = build(net, (np.concatenate([x, x]), np.concatenate([labels, labels])), tmp_path / "i", batch_size=6)
    frame = index.top("second", 0)
    for _, ties in frame.groupby("score"):
        assert list(ties["sample"]) == sorted(ties["sample"])


# ----------------------------------------------------------------------------------------- many classes, chosen by pilot


def test_with_many_classes_served_ones_are_complete_and_all_keep_ten(tmp_path):
    net = indexes.model(tmp_path / "tiny.onnx", classes=15)
    x, labels = indexes.data(120, classes=15)
    index = build(net, (x, labels), tmp_path / "i", full_classes=4, **{**SMALL, "k": 12})
    rows = brute_force(net, x, {i: [labels[i]] for i in range(120)}, ["second"])
    relmax = rows["second", "relmax", "sum"]
    for channel in range(6):
        served = index.classes_served("second", channel, 4)
        for cls in range(15):
            of_class = [row for row in relmax if row[1] == cls]
            full = cls in set(served["class"])  # here the pilot is a fair part of the data, and finds them
            frame = index.top("second", channel, cls=cls)
            as_array = index.references("second", cls=cls).sample[channel]
            assert as_array[as_array >= 0].tolist() == list(frame["sample"])
            check_top(frame, of_class, channel, max(len(frame), min(len(of_class), 10)))
            if full:
                check_top(frame, of_class, channel, 12)
                every = [row for row in rows["second", "actmax", "max"] if row[1] == cls]
                check_top(index.top("second", channel, "actmax", "max", cls=cls), every, channel, 12)
        highest = {
            c: np.mean(sorted((r[2][channel] for r in relmax if r[1] == c), reverse=True)[:10]) for c in range(15)
        }
        assert list(served["class"]) == sorted(highest, key=lambda c: -highest[c])[:4]


def test_many_classes_with_few_samples_each_are_complete_without_a_pilot(tmp_path):
    net = indexes.model(tmp_path / "tiny.onnx", classes=15)
    x, labels = indexes.data(40, classes=15)
    index = build(net, (x, labels), tmp_path / "i", **{**SMALL, "k": 12})
    assert index.manifest["served"] == "all"
    for cls in range(15):
        for criterion in ("relmax", "actmax"):
            of_class = index.references("second", criterion, "max", cls=cls).sample
            assert all(sorted(row[row >= 0]) == np.flatnonzero(labels == cls).tolist() for row in of_class)


def test_shards_with_many_classes_merge_to_the_whole(tmp_path):
    net = indexes.model(tmp_path / "tiny.onnx", classes=15)
    data = indexes.data(70, classes=15)
    options = {"full_classes": 3, **SMALL}
    whole = build(net, data, tmp_path / "whole", **options)
    for n in range(3):
        build(net, data, tmp_path / f"part{n}", shard=(n, 3), **options)
    merged = merge([tmp_path / "part2", tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")
    assert indexes.tables(merged) == indexes.tables(whole)


# -------------------------------------------------------------------------------------------- nothing is lost, or mixed


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from onnxcrp.index import build
from tests.support import indexes

renames = 0
def replace(self, target, real=Path.replace):
    global renames
    renames += 1
    if renames == {rename}:
        os.kill(os.getpid(), 9)
    return real(self, target)
Path.replace = replace

def progress(done, total, skipped):
    if done >= {samples}:
        os.kill(os.getpid(), 9)

build({net!r}, indexes.data(50), {out!r}, checkpoint=0, progress=progress, **{options!r})
"""


def killed_build(net, out, *, samples=10**9, rename=-1, options=SMALL) -> None:
    code = KILLED.format(root=str(ROOT), net=str(net), out=str(out), samples=samples, rename=rename, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_at_any_moment_and_run_again_equals_uninterrupted(net, whole, tmp_path):
    out = tmp_path / "i"
    killed_build(net, out, samples=20)  # between two blocks' batches
    with pytest.raises(InputError, match="unfinished"):
        Index.open(out)
    kept = sorted((out / "parts").iterdir())
    assert kept
    killed_build(net, out, samples=10**9, rename=2)  # while a part is renamed
    killed_build(net, out, samples=10**9, rename=7)  # while the finished tables move to their places
    seen = []
    index = build(net, indexes.data(50), out, progress=lambda *counts: seen.append(counts), **SMALL)
    assert indexes.tables(index) == indexes.tables(whole)
    assert index.manifest["complete"]
    assert sum(1 for _ in seen) < 14  # of 14 batches only those that were missing
    assert [p.name for p in out.iterdir() if p.suffix not in (".parquet", ".json")] == [".lock"]


def test_what_is_there_is_not_done_again(net, whole, tmp_path):
    def never(*_):
        raise AssertionError("a sample was run")

    index = build(net, indexes.data(50), whole.path, progress=never, **SMALL)
    assert index.manifest["samples"] == 50


def test_batches_workers_and_threads_do_not_matter(net, whole, tmp_path):
    other = build(net, indexes.data(50), tmp_path / "i", **{**SMALL, "workers": 5}, threads=1)
    assert indexes.tables(other) == indexes.tables(whole)
    other = build(net, indexes.data(50), tmp_path / "j", **{**SMALL, "batch_size": 7})
    for layer in whole.layers:
        one, two = whole.references(layer), other.references(layer)
        np.testing.assert_allclose(one.score, two.score, rtol=1e-6, atol=1e-7)


def test_shards_merge_to_the_whole_byte_for_byte(net, whole, tmp_path):
    parts = [build(net, indexes.data(50), tmp_path / f"part{n}", shard=f"{n}/3", **SMALL) for n in range(3)]
    assert not parts[0].manifest["complete"]
    one = merge([parts[0].path, parts[1].path], tmp_path / "one")
    merged = merge([parts[2].path, one.path], tmp_path / "merged")
    assert indexes.tables(merged) == indexes.tables(whole)
    assert merged.manifest["complete"]
    with pytest.raises(OnnxcrpError, match="both parts hold samples"):
        merge([parts[0].path, one.path], tmp_path / "twice")
    with pytest.raises(OnnxcrpError, match="holds an index"):
        merge([parts[0].path], whole.path)


def test_indexes_of_different_data_merge_to_that_of_both(net, tmp_path):
    one, two = indexes.data(21, seed=3), indexes.data(30, seed=4)
    np.savez(tmp_path / "one.npz", x=one[0], y=one[1])
    np.savez(tmp_path / "two.npz", x=two[0], y=two[1])
    both = build(net, [str(tmp_path / "one.npz"), str(tmp_path / "two.npz")], tmp_path / "both", **SMALL)
    parts = [build(net, tmp_path / f"{name}.npz", tmp_path / f"index-{name}", **SMALL) for name in ("one", "two")]
    merged = merge([part.path for part in parts], tmp_path / "merged")
    assert indexes.tables(merged) == indexes.tables(both)
    frame = merged.top("second", 1)
    assert set(frame["dataset"]) == {"one", "two"}  # which dataset each reference comes from
    for row in frame.itertuples():
        np.testing.assert_array_equal(
            merged.sample(row.sample).x[0], (one if row.dataset == "one" else two)[0][int(row.name[1:-1])]
        )
        assert row.label == (one if row.dataset == "one" else two)[1][int(row.name[1:-1])]


def test_another_model_composite_setting_or_data_refuses_to_mix(net, tmp_path):
    data = indexes.data(12)
    build(net, data, tmp_path / "i", **SMALL)
    before = {p.name: p.read_bytes() for p in (tmp_path / "i").iterdir()}
    other = indexes.model(tmp_path / "other.onnx", seed=9)
    with pytest.raises(OnnxcrpError, match="model_sha256 differ"):
        build(other, data, tmp_path / "i", **SMALL)
    with pytest.raises(OnnxcrpError, match="composite"):
        build(net, data, tmp_path / "i", composite="epsilon", **SMALL)
    with pytest.raises(OnnxcrpError, match="k differ"):
        build(net, data, tmp_path / "i", **{**SMALL, "k": 7})
    with pytest.raises(OnnxcrpError, match="other data: array changed"):
        build(net, indexes.data(13), tmp_path / "i", **SMALL)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "i").iterdir()}
    build(other, data, tmp_path / "j", **SMALL)
    with pytest.raises(OnnxcrpError, match="indexes of different things: model_sha256"):
        merge([tmp_path / "i", tmp_path / "j"], tmp_path / "k")


def test_an_unfinished_index_of_something_else_is_not_continued(net, tmp_path):
    killed_build(net, tmp_path / "i", samples=20)
    with pytest.raises(OnnxcrpError, match="composite"):
        build(net, indexes.data(50), tmp_path / "i", composite="epsilon", **SMALL)


def test_a_full_disk_is_a_clear_error_and_the_build_goes_on_later(net, whole, tmp_path):
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from onnxcrp.errors import OnnxcrpError
        from onnxcrp.index import build
        from tests.support import indexes
        data = indexes.data(50)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as if no more fitted
        try:
            build({str(net)!r}, data, {str(tmp_path / "i")!r}, **{SMALL!r})
        except OnnxcrpError as error:
            print(error)
            sys.exit(1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stdout
    assert "run the same command again" in done.stdout
    index = build(net, indexes.data(50), tmp_path / "i", **SMALL)
    assert indexes.tables(index) == indexes.tables(whole)


def test_two_builds_do_not_write_to_one_folder(net, tmp_path):
    from onnxcrp.index.builder import locked

    with locked(tmp_path / "i"), pytest.raises(OnnxcrpError, match="another build is writing"):
        build(net, indexes.data(8), tmp_path / "i", **SMALL)


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_broken_samples_are_named_skipped_and_counted(net, tmp_path):
    x, labels = indexes.data(10)
    folder = tmp_path / "data"
    for cls in range(3):
        (folder / f"class{cls}").mkdir(parents=True)
    for i, (each, label) in enumerate(zip(x, labels, strict=True)):
        np.save(folder / f"class{label}" / f"{i}.npy", each)
    whole = build(net, folder, tmp_path / "whole", **SMALL)
    assert whole.manifest["skipped"] == 0
    broken = folder / f"class{labels[4]}" / "4.npy"
    broken.write_bytes(broken.read_bytes()[:50])
    nan = np.load(folder / f"class{labels[7]}" / "7.npy")
    nan[0, 0, 0] = np.nan
    np.save(folder / f"class{labels[7]}" / "7.npy", nan)
    index = build(net, folder, tmp_path / "i", **SMALL)
    assert index.manifest["skipped"] == 2
    assert index.manifest["samples"] == 8
    assert set(index.skipped["name"]) == {f"class{labels[4]}/4.npy", f"class{labels[7]}/7.npy"}
    for row in index.skipped.itertuples():
        assert row.name in row.reason
    bad = set(index.skipped["sample"])
    one, two = whole.references("second"), index.references("second")
    for channel in range(6):
        kept = [s for s in one.sample[channel] if s >= 0 and s not in bad]
        assert two.sample[channel][: len(kept)].tolist() == kept


def test_errors_that_concern_every_sample_come_at_once(net, tmp_path):
    x, labels = indexes.data(8)
    out = tmp_path / "i"
    for arguments, message in (
        ({"data": x, "target": "label"}, "have no labels"),
        ({"data": (x, labels + 1)}, r"is 3, the model has classes 0 to 2"),
        ({"data": (x[:, :, :3], labels)}, "none of the first 8 samples can be read"),
        ({"data": str(tmp_path / "nothing")}, "no such dataset"),
        ({"data": []}, "there is no data"),
    ):
        with pytest.raises(InputError, match=message):
            build(net, out=out, **arguments)
    for options, message in (
        ({"target": "top9"}, "target is 'top9'"),
        ({"layers": ["nothere"]}, "no layer 'nothere'"),
        ({"criteria": ("best",)}, "criteria is best"),
        ({"k": 0}, "k is 0"),
        ({"shard": "3/3"}, "shard is '3/3'"),
        ({"colour": "red"}, "no setting 'colour'"),
        ({"engine": "cloud"}, "engine is 'cloud'"),
    ):
        with pytest.raises(QuestionError, match=message):
            build(net, (x, labels), out, **options)
    assert not (out / "manifest.json").exists()


def test_label_offset(net, tmp_path):
    x, labels = indexes.data(12)
    one = build(net, (x, labels), tmp_path / "i", **SMALL)
    two = build(net, (x, labels + 1), tmp_path / "j", label_offset=-1, **SMALL)
    np.testing.assert_array_equal(one.references("second").sample, two.references("second").sample)
    labels[7] = 0
    with pytest.raises(InputError, match=r"the label of .* is 0, label_offset -1 makes it negative"):
        build(net, (x, labels), tmp_path / "k", label_offset=-1, **SMALL)  # -1 says "no label" elsewhere


# ------------------------------------------------------------------------------------------------------------- reading


def test_the_index_knows_what_it_is_of(net, whole):
    assert [row.shape for row in whole.layers.values()] == [(5, 6, 6), (6, 6, 6)]
    y, x = whole.unravel("second", [7, 35])
    assert (y.tolist(), x.tolist()) == ([1, 5], [1, 5])
    explainer = whole.explainer()
    assert explainer.composite.text == Explainer(net).composite.text
    with pytest.raises(QuestionError, match="no layer 'secnd'"):
        whole.top("secnd", 0)
    with pytest.raises(QuestionError, match="no channel 6"):
        whole.top("second", 6)
    with pytest.raises(InputError, match="array in memory"):
        whole.sample(3)
    x, _ = indexes.data(50)
    whole.open_data(x)
    np.testing.assert_array_equal(whole.sample(3).x[0], x[3])


def test_rankings_of_classes_and_concepts(net, whole):
    frame = whole.statistics("second")
    table = frame.pivot_table(index="class", columns="channel", values="mean")
    assert list(whole.concepts_used(1, "second", None)["channel"]) == list(
        table.loc[1].sort_values(ascending=False).index
    )
    assert list(whole.classes_served("second", 2, by="mean")["class"]) == list(
        table[2].sort_values(ascending=False).index
    )
    everywhere = whole.concepts_used(1, k=None)
    assert len(everywhere) == 11
    assert (np.diff(everywhere["mean"]) <= 0).all()


def test_retrieve_is_the_inverse_search(whole):
    x, labels = indexes.data(50)
    rows = brute_force(Path(whole.manifest["model"]["path"]), x, {i: [labels[i]] for i in range(50)}, ["second"])
    scores = {row[0]: row[2][3] for row in rows["second", "relmax", "sum"]}
    found = whole.retrieve("second", 3)
    assert (found.classes["top_mean"] > 0).all()
    by_score = sorted((s for s in scores if scores[s] > 1e-6), key=lambda s: -scores[s])
    np.testing.assert_allclose(found.samples["score"][:6], [scores[s] for s in by_score[:6]], rtol=1e-5)
    assert set(found.samples["sample"]) <= set(by_score)
    assert found.samples["sample"].is_unique


def test_compare_counts_common_samples(whole):
    frame = whole.compare().set_index(["layer", "one", "other"])
    shares = []
    for channel in range(6):
        one, other = (whole.top("second", channel, "relmax", aggregate) for aggregate in ("sum", "max"))
        a, b = (set(each["sample"][each["score"] > 0]) for each in (one, other))  # without relevance it is not used
        shares += [len(a & b) / max(len(a), len(b))] if a | b else []
    assert len(shares) > 3
    assert frame.loc[("second", "relmax sum", "relmax max"), "overlap"] == pytest.approx(np.mean(shares))
    assert len(frame) == 2 * 4


def test_a_damaged_or_foreign_folder_is_an_error(whole, tmp_path):
    with pytest.raises(InputError, match="no index there"):
        Index.open(tmp_path)
    shutil.copytree(whole.path, tmp_path / "i")
    (tmp_path / "i" / "top.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged index"):
        Index.open(tmp_path / "i").top("second", 0)
    manifest = json.loads((tmp_path / "i" / "manifest.json").read_text())
    (tmp_path / "i" / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Index.open(tmp_path / "i")


assert os.name == "nt" or resource  # the tests above need a POSIX system
