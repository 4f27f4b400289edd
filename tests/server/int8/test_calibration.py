"""What int8 is fitted to, and how the settings lead there."""

import gc
import gzip
import io
import itertools
import tarfile
import weakref

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from server.int8.calibration import PICTURES, Calibration
from server.models import graphs, loading
from server.models.graphs import Forward, Graphs
from server.models.loading import load_models
from tests.server.conftest import picture, png
from tests.server.models.test_graphs import Changes, at_once, wait_for_compiler
from tests.tocom_models import pictures, small_model
from tocom import ConfigError, FoldedWeights, Variant
from tocom.adapter import Adapter
from tocom.delta import LowRank, target_layers


class Engine:
    """Takes note of what is measured."""

    def __init__(self):
        self.measured = []

    def measure(self, model, variant, batches, threads):
        self.measured.append((variant, [tuple(batch.shape) for batch in batches]))
        return {"layer": (0.0, float(len(self.measured)))}


@pytest.fixture
def folder(tmp_path):
    for index in range(10):
        path = tmp_path / f"pictures/class{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(index)))
    (tmp_path / "pictures/labels.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture
def model():
    model = small_model()
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 64, 64)}
    return model


def jpeg():
    file = io.BytesIO()
    picture(0).save(file, "JPEG")
    return file.getvalue()


def delta(model):
    return FoldedWeights({name: x.weight + 0.01 for name, x in target_layers(model).items()})


def test_a_folder_and_a_tar_file_of_it_are_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        tar.add(folder, "pictures")
    files = [Calibration(path)._files for path in (folder, tmp_path / "pictures.tar")]
    assert len(files[0]) == 10
    assert files[0] == files[1]


def test_of_many_pictures_some_are_taken_from_everywhere(folder):
    content = png(picture(0))
    for index in range(2 * PICTURES - 11):
        (folder / f"z{index:03}.png").write_bytes(content + bytes([index]))
    there = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    places = [there.index(data) for data in Calibration(folder)._files]
    assert (len(there), len(places), places[0]) == (2 * PICTURES - 1, PICTURES, 0)
    assert {after - before for before, after in itertools.pairwise(places)} == {1, 2}
    assert places[-1] >= len(there) - 2


def test_a_folder_that_is_called_like_a_picture_is_none(folder):
    (folder / "x.jpg").mkdir()
    assert len(Calibration(folder)._files) == 10


def test_pictures_are_seen_as_in_service(tmp_path, model):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    plain, odd = tmp_path / "plain", tmp_path / "odd"
    for folder in (plain, odd):
        folder.mkdir()
    picture(0).save(plain / "a.png")
    picture(0).rotate(180).save(odd / "a.png", exif=turned)
    Image.fromarray(grey).save(plain / "b.png")
    Image.fromarray(grey.astype(np.uint16) << 8).save(odd / "b.png")
    images = [Calibration(folder)._images(model) for folder in (plain, odd)]
    assert torch.equal(*images)


def test_each_forward_is_measured_once_on_whole_batches(folder, model):
    engine, calibration = Engine(), Calibration(folder)
    first, other = delta(model), delta(model)
    for variant in (
        Variant(0),
        Variant(0),
        Variant(3, first),
        Variant(3, other),
        Variant(3, first),
    ):
        ranges = calibration(engine, Forward(model, variant))
    assert ranges == {"layer": (0.0, 2.0)}
    assert [variant.delta for variant, _ in engine.measured] == [None, first, other]
    assert engine.measured[0][1] == [(8, 3, 64, 64)]
    assert len(Calibration()._files) == 6  # the bundled samples


def test_a_delta_is_not_kept_for_its_ranges(folder, model):
    calibration = Calibration(folder)
    gone = delta(model)
    calibration(Engine(), Forward(model, Variant(3, gone)))
    gone = weakref.ref(gone)
    gc.collect()
    assert gone() is None


def test_branches_that_are_gone_are_not_taken_for_new_ones(folder, model):
    engine, calibration = Engine(), Calibration(folder)
    for count in range(1, 4):
        # Often in the place in memory where the last ones were.
        branches = Adapter([LowRank(torch.ones(1, 192), torch.ones(192, 1))])
        calibration(engine, Forward(model, Variant(0, adapter=branches)))
        calibration(engine, Forward(model, Variant(0, adapter=branches)))
        assert len(engine.measured) == count
        engine.measured[-1] = None  # which keeps them
        gone = weakref.ref(branches)
        del branches
        assert gone() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "expected a folder of pictures or a tar file"),
        (lambda path: path.mkdir(), "there are no JPEG, PNG or WebP files in"),
        (lambda path: path.write_bytes(b"no tar"), "expected a folder of pictures or a tar file"),
        (
            lambda path: path.mkdir() or (path / "a.png").write_bytes(b"no picture"),
            "int8_pictures: a.png in .* cannot identify image file",
        ),
        (
            lambda path: path.mkdir() or (path / "a.jpg").write_bytes(jpeg()[:-200]),
            "int8_pictures: a.jpg in .* truncated",
        ),
        (
            lambda path: path.write_bytes(gzip.compress(bytes(10240))[:-20]),
            "expected a folder of pictures or a tar file",
        ),
    ],
)
def test_pictures_that_cannot_be_read_are_refused(tmp_path, make, message):
    make(tmp_path / "there")
    with pytest.raises(ConfigError, match=message):
        Calibration(tmp_path / "there")


@pytest.fixture
def in_int8(settings, folder, monkeypatch):
    """Settings of a server whose graphs are in int8, on a processor that has it."""
    monkeypatch.setattr(loading, "lacks_int8", lambda: False)
    asked = {"max_graphs": 9, "graph_dtype": "int8", "int8_pictures": folder}
    return settings.model_copy(update=asked)


def test_a_processor_without_int8_computes_in_float32(in_int8, monkeypatch, caplog):
    monkeypatch.setattr(loading, "lacks_int8", lambda: True)
    assert load_models(in_int8)[0].graphs._measure is None
    assert "graph_dtype=int8 is not used: this processor has neither VNNI nor AMX" in caplog.text


def test_a_server_has_a_graph_in_int8_for_each_bank(in_int8, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(graphs, "WORTH", 0.0)
    monkeypatch.setattr(graphs, "PAUSE", 0.0)
    monkeypatch.setattr(Graphs, "_compare", lambda *_: (0.0, 1.0))
    model, _ = load_models(in_int8)
    images = pictures(model.backbone.model, 1)

    def logits(model):
        with torch.inference_mode():
            (output,) = model.at(3, compensate=True)(images)
        wait_for_compiler()
        return output.logits

    cells = model.graphs._cells
    eager, bare = logits(model), model.with_bank(None)
    changes = Changes()
    model.graphs.start(at_once, changes)
    assert torch.equal(logits(model), eager)  # the graph is made now
    rounded = logits(model)
    assert not torch.equal(rounded, eager)
    assert (rounded - eager).norm() < 0.1 * eager.norm()
    assert [bool(cell.graph) for cell in cells.values()].count(True) == 1
    logits(bare)
    assert not torch.equal(logits(bare), rounded)
    assert [bool(cell.graph) for cell in cells.values()].count(True) == 2
    del model
    gc.collect()
    with torch.inference_mode():
        bare.at(1, compensate=True)(images)
    assert [owner for *_, owner, _ in cells if owner[0] is not None] == []
    assert changes.rates == [3, 3, 3]  # two graphs are taken, one is lost
