"""Oracle: the files and arrays that the tests write themselves."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcrp.errors import InputError
from onnxcrp.index.dataset import NO_LABEL, Port, open_data
from onnxcrp.preprocessing import for_model

PICTURE = ("B", 3, 8, 8)
SIGNAL = ("B", 1, 8)


def port(shape=PICTURE, spec="unit") -> Port:
    return Port(for_model(spec, shape, np.float32), shape, np.dtype(np.float32), "x")


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def expected(picture: np.ndarray) -> np.ndarray:
    """What the preset `unit` makes of an 8 x 8 picture: resized to 9 and cropped again."""
    return for_model("unit", PICTURE, np.float32).apply(Image.fromarray(picture))[0]


@pytest.fixture
def folder(tmp_path):
    """Pictures in subfolders b, a: names, and which picture is where."""
    pictures = pixels(5)
    names = ["b/0.png", "a/one/1.png", "b/2.png", "a/3.PNG", "a/4.png"]
    for name, picture in zip(names, pictures, strict=True):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture))
    return tmp_path / "data", dict(zip(names, pictures, strict=True))


def test_folders_are_classes_in_sorted_order(folder):
    path, pictures = folder
    data = open_data(str(path), port())
    samples = data.datasets[0]
    assert samples.name == "data"
    assert [samples.title(i) for i in range(5)] == ["a/3.PNG", "a/4.png", "a/one/1.png", "b/0.png", "b/2.png"]
    assert samples.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.labelled
    for i in range(5):
        np.testing.assert_array_equal(data.load(i).x, expected(pictures[samples.title(i)]))
    assert open_data(path, port(), label_offset=3).datasets[0].labels.tolist() == [3, 3, 3, 4, 4]


def test_labels_csv_names_files_and_classes(folder, tmp_path):
    path, pictures = folder
    (path / "labels.csv").write_text('file,name,class_index\nb/2.png,"x, y",7\na/4.png,z,2\nb/gone.png,z,1\n')
    data = open_data(str(path), port())
    assert [data.datasets[0].title(i) for i in range(3)] == ["a/4.png", "b/2.png", "b/gone.png"]
    assert data.datasets[0].labels.tolist() == [2, 7, 1]
    np.testing.assert_array_equal(data.load(1).x, expected(pictures["b/2.png"]))
    with pytest.raises(InputError, match=r"gone\.png"):
        data.load(2)
    (path / "labels.csv").write_text("picture,class\nb/2.png,7\n")
    with pytest.raises(InputError, match="has columns picture, class"):
        open_data(str(path), port())
    (tmp_path / "other.csv").write_text("file,class_index\na/4.png,seven\n")
    with pytest.raises(InputError, match=r"gone\.csv: no such file"):
        open_data(str(path), port(), labels=tmp_path / "gone.csv")
    with pytest.raises(InputError, match="line 2: class_index is 'seven'"):
        open_data(str(path), port(), labels=tmp_path / "other.csv")


def test_a_class_folder_without_samples_is_an_error_rather_than_a_shift_of_labels(folder):
    path, _ = folder
    (path / ".cache").mkdir()
    (path / "aa").mkdir()
    (path / "aa" / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match="aa holds no samples"):
        open_data(str(path), port())
    (path / "labels.csv").write_text("file,class_index\nb/2.png,7\n")
    assert open_data(str(path), port()).label(0) == 7
    (path / "labels.csv").write_text("file,class_index\nb/2.png,7\nb/2.png,8\n")
    with pytest.raises(InputError, match=r"line 3: b/2\.png is of class 7 as well as 8"):
        open_data(str(path), port())


def test_pictures_without_subfolders_have_no_labels(tmp_path):
    (tmp_path / "1.png").write_bytes(png(pixels(1)[0]))
    (tmp_path / ".hidden.png").write_bytes(b"")
    data = open_data(str(tmp_path), port())
    assert len(data) == 1
    assert data.label(0) == NO_LABEL
    assert not data.labelled


def test_arrays_are_mapped_and_labels_come_along(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(12, 1, 8)).astype(np.float32), np.arange(12)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "stored.npz", signals=x, y=y, other=np.zeros(3))
    np.savez_compressed(tmp_path / "packed.npz", x=x, labels=y)
    np.savez(tmp_path / "two.npz", a=x, b=x)
    shape = port(SIGNAL, None)
    for spec, labelled, mapped in (
        ("x.npy", False, True),
        ("stored.npz", True, True),
        ("packed.npz", True, False),
        ("two.npz:b", False, True),
    ):
        data = open_data(str(tmp_path / spec), shape)
        samples = data.datasets[0]
        assert isinstance(samples.x, np.memmap) == mapped
        assert data.labelled == labelled
        for i in (0, 7, 11):
            np.testing.assert_array_equal(data.load(i).x, x[i : i + 1])
            assert samples.title(i) == f"[{i}]"
            assert data.label(i) == (i if labelled else NO_LABEL)
    assert open_data(str(tmp_path / "x.npy"), shape, labels=y).labelled
    with pytest.raises(InputError, match="which are the samples"):
        open_data(str(tmp_path / "two.npz"), shape)
    with pytest.raises(InputError, match="12 samples and 5 labels"):
        open_data((x, y[:5]), shape)


def test_float64_and_fortran_order_are_read_as_they_are(tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(4, 1, 8)))
    np.savez(tmp_path / "x.npz", x=x)
    data = open_data(str(tmp_path / "x.npz"), port(SIGNAL, None))
    np.testing.assert_array_equal(data.load(2).x, x[2:3].astype(np.float32))
    assert data.load(2).x.dtype == np.float32


def test_signals_in_a_folder(tmp_path):
    for cls in ("n", "v"):
        (tmp_path / cls).mkdir()
    x = np.round(np.random.default_rng(0).normal(size=(2, 8)), 3)
    np.savetxt(tmp_path / "n" / "0.csv", x[0])
    np.save(tmp_path / "v" / "1.npy", x[1][None])
    data = open_data(str(tmp_path), port(SIGNAL, None))
    np.testing.assert_allclose(data.load(0).x[0, 0], x[0], rtol=1e-6)
    np.testing.assert_allclose(data.load(1).x[0, 0], x[1], rtol=1e-6)


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    pictures = pixels(6)
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        entries = []
        for i in range(3 * shard, 3 * shard + 3):
            label = (".cls", str(i).encode()) if shard else (".json", json.dumps({"label": i}).encode())
            entries += [(f"sub/{i:04d}{label[0]}", label[1]), (f"sub/{i:04d}.png", png(pictures[i]))]
        write_tar(tmp_path / "tars" / f"shard-{shard:03d}.tar", entries)
    return tmp_path / "tars", pictures


def test_webdataset_tars(tars):
    path, pictures = tars
    single = open_data(str(path / "shard-001.tar"), port())
    assert single.datasets[0].title(1) == "sub/0004.png"
    assert single.datasets[0].labels.tolist() == [3, 4, 5]
    for spec in (str(path), str(path / "shard-{000..001}.tar")):
        data = open_data(spec, port())
        assert data.datasets[0].labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert data.datasets[0].title(4) == "shard-001.tar/sub/0004.png"
        for i in range(6):
            np.testing.assert_array_equal(data.load(i).x, expected(pictures[i]))
    (path / "about.txt").write_text("of the tars")
    assert open_data(str(path), port()).datasets[0].left_out == ["about.txt"]
    with tarfile.open(path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(InputError, match="not an uncompressed tar"):
        open_data(str(path / "packed.tar"), port())


def test_tars_that_webdataset_wrote_read_alike(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the package webdataset writes the tars of this test")
    pictures = pixels(4)
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        for i, picture in enumerate(pictures):
            sink.write({"__key__": f"sample{i}", "png": png(picture), "cls": i % 3})
    data = open_data(str(tmp_path / "w.tar"), port())
    assert data.datasets[0].labels.tolist() == [0, 1, 2, 0]
    np.testing.assert_array_equal(data.load(3).x, expected(pictures[3]))


def test_urls_through_fsspec(folder, tars, tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="URLs need fsspec")
    fs = fsspec.filesystem("memory")
    path, _ = folder
    for source, name in ((path, "pictures"), (tars[0], "tars")):
        for file in source.rglob("*.*"):
            if file.is_file():
                fs.pipe_file(f"/{name}/{file.relative_to(source).as_posix()}", file.read_bytes())
    try:
        here, there = open_data(str(path), port()), open_data("memory://pictures", port())
        assert there.datasets[0].sha256 == here.datasets[0].sha256
        for i in range(5):
            np.testing.assert_array_equal(there.load(i).x, here.load(i).x)
        data = open_data(["memory://tars", "b=memory://tars/shard-001.tar"], port())
        np.testing.assert_array_equal(data.load(4).x, data.load(7).x)
        np.save(file := io.BytesIO(), np.ones((3, 1, 8), np.float32))
        fs.pipe_file("/x.npy", file.getvalue())
        assert len(open_data("memory://x.npy", port(SIGNAL, None))) == 3
        with pytest.raises(InputError, match="no such dataset"):
            open_data("memory://nothing", port())
    finally:
        fs.rm("/pictures", recursive=True)
        fs.rm("/tars", recursive=True)


def test_several_datasets_are_numbered_through_and_named_apart(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(5, 1, 8)
    np.save(tmp_path / "x.npy", x)
    path = str(tmp_path / "x.npy")
    data = open_data([path, f"mine={path}", path, (x[:2], None)], port(SIGNAL, None))
    assert [samples.name for samples in data.datasets] == ["x", "mine", "x~2", "array"]
    assert len(data) == 17
    assert data.locate(11)[0].name == "x~2"
    np.testing.assert_array_equal(data.load(16).x, x[1:2])
    with pytest.raises(InputError, match="no sample 17"):
        data.load(17)


def test_the_listing_hash_sees_names_sizes_labels_and_values(folder):
    path, _ = folder

    def listing():
        return open_data(str(path), port()).datasets[0].sha256

    before = listing()
    assert listing() == before
    (path / "a" / "4.png").rename(path / "b" / "4.png")
    moved = listing()
    assert moved != before
    (path / "a" / "3.PNG").write_bytes(b"")
    assert listing() not in (before, moved)
    x = np.zeros((200, 1, 8), np.float32)
    y = np.zeros(200, int)
    one = open_data((x, y), port(SIGNAL, None)).datasets[0].sha256
    assert open_data((x, y + 1), port(SIGNAL, None)).datasets[0].sha256 != one
    assert open_data((x + 1, y), port(SIGNAL, None)).datasets[0].sha256 != one


@pytest.mark.parametrize(("content", "name"), [(b"", "e.png"), (b"not a picture", "n.png"), (b"\x93NUMPY", "s.npy")])
def test_what_cannot_be_read_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    data = open_data(str(tmp_path), port())
    with pytest.raises(InputError, match=name):
        data.load(0)


def test_truncated_pictures_and_wrong_members_in_tars_are_named(tmp_path):
    whole = png(pixels(1)[0])
    write_tar(tmp_path / "t.tar", [("a.png", whole[: len(whole) // 2]), ("b.npy", b"\x93NUMPY"), ("c.png", whole)])
    data = open_data(str(tmp_path / "t.tar"), port())
    for number, name in ((0, r"a\.png"), (1, r"b\.npy")):
        with pytest.raises(InputError, match=name):
            data.load(number)
    assert data.load(2).x.shape == (1, 3, 8, 8)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no such dataset"):
        open_data(str(tmp_path / "nowhere"), port())
    with pytest.raises(InputError, match="holds no pictures"):
        open_data(str(tmp_path), port())
    with pytest.raises(InputError, match="is no dataset"):
        open_data(3, port())
    Path(tmp_path / "x.npz").write_bytes(b"zip")
    with pytest.raises(InputError, match="not a readable"):
        open_data(str(tmp_path / "x.npz"), port())
