"""What a request did, written and read back: the same sets, verdicts and tokens; and files that are not whole."""

import io
import resource
import zipfile
from dataclasses import replace
from math import nan

import msgspec
import numpy as np
import pytest
import torch

from sglang_mm.errors import ConfigError
from sglang_mm.patterns.boundary import Boundary2D, NoBoundary, QBoundary
from sglang_mm.patterns.catalog import AShape, Blocks, Dense, Grid, VerticalSlash
from sglang_mm.patterns.chosen import BlockSet, Lines, Panel, Selection, Unit
from sglang_mm.patterns.program import Shard
from sglang_mm.patterns.select import Trial, Verdict, auto_select, select
from sglang_mm.patterns.selection_file import KeptLayer, KeptRequest, file_name, load, pack, save
from sglang_mm.patterns.selection_tables import narrow
from sglang_mm.types import Axis, Modality
from sglang_mm.types.tokens import COLUMNS
from tests.patterns.maps import Media, Text, token_map
from tests.patterns.planted import Line, Noise, plant

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = token_map(Text(40), Media(1, 6, 8), Text(12), Media(60, 4, 6, newline=True), Text(30))
GRID = Grid(axis="frame", sink=8, window=64, slash=1)
PLANS = [
    ((0, 1), NoBoundary(VerticalSlash(9, 200, 8, 64))),
    ((2,), QBoundary(text=Blocks(0.5), image=AShape(8, 64), video=GRID)),
    ((3,), Boundary2D({"video-video": GRID, "text-video": VerticalSlash(5, 0, 8, 64), "image-text": Blocks(0.5)})),
]
CHUNKS = (range(300, 900), range(900, len(TOKENS)))


def kept_layers(chunk):
    """Layer 0 with a plan, layer 5 without."""
    q, k = plant(TOKENS, [Line(Axis.FRAME, 7), Line(Axis.FRAME, 7), Line(Axis.FRAME, 20), Noise()], group=2, noise=1.0)
    shards = Shard(TOKENS, torch.arange(chunk.start, chunk.stop)), Shard(TOKENS, torch.arange(chunk.stop))
    part = q[chunk.start : chunk.stop], k[: chunk.stop]
    planned = select(PLANS, *part, *shards, scale=1.0, theta=0.5, chunk=chunk)
    auto = auto_select([(0, 1), (2,), (3,)], 5, *part, *shards, scale=1.0, chunk=chunk)
    return tuple(
        KeptLayer(layer, selection, report.verdicts, report.densities)
        for layer, (selection, report) in ((0, planned), (5, auto))
    )


@pytest.fixture(scope="module")
def kept(one_thread):
    return KeptRequest("chat/7: äöü", TOKENS, CHUNKS, 2, "auto", tuple(map(kept_layers, CHUNKS)))


def small(**changes) -> KeptRequest:
    """One layer of columns and one list of blocks."""
    lines = Lines(torch.tensor([3, 300]), torch.tensor([1]))
    blocks = BlockSet(torch.tensor([0, 9]), torch.tensor([0, 1, 3]), torch.tensor([0, 0, 9]))
    panels = Panel(Modality.TEXT, None, VerticalSlash(), lines), Panel(Modality.VIDEO, None, Blocks(), blocks)
    layer = KeptLayer(0, Selection((Unit((0,), panels),), 1), (), (0.5,))
    return replace(KeptRequest("a", TOKENS, (range(len(TOKENS)),), 1, "plan", ((layer,),)), **changes)


def lists(chosen: BlockSet) -> list:
    return [chosen.row_blocks.tolist(), chosen.ptr.tolist(), chosen.key_blocks.tolist()]


def same_selection(one: Selection, other: Selection) -> bool:
    blocks = [
        [lists(panel.chosen) for unit in each.units for panel in unit.panels if isinstance(panel.chosen, BlockSet)]
        for each in (one, other)
    ]
    return one.digest() == other.digest() and blocks[0] == blocks[1]


@pytest.mark.parametrize("how", ["as kept", "packed before"])
def test_a_request_comes_back_as_it_was(tmp_path, kept, how):
    given = kept
    if how == "packed before":
        given = replace(kept, layers=tuple(tuple(map(pack, of_chunk)) for of_chunk in kept.layers))
    file = save(tmp_path / file_name(kept.request), given)
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    found = load(file)
    assert (found.request, found.plan, found.group, found.chunks) == ("chat/7: äöü", "auto", 2, CHUNKS)
    assert found.tokens.grids == TOKENS.grids
    for name in COLUMNS:
        there, here = getattr(found.tokens, name), getattr(TOKENS, name)
        assert there.dtype == here.dtype and torch.equal(there, here)
    kinds = set()
    for of_chunk, expected in zip(found.layers, kept.layers, strict=True):
        for layer, like in zip(of_chunk, expected, strict=True):
            assert (layer.layer, layer.densities, layer.verdicts) == (like.layer, like.densities, like.verdicts)
            assert same_selection(layer.selection, like.selection)
            kinds |= {type(panel.chosen).__name__ for unit in layer.selection.units for panel in unit.panels}
    assert kinds == {"Nothing", "Lines", "Phases", "BlockSet"}


def test_recalls_that_are_no_numbers(tmp_path):
    trial = Trial(((None, AShape()),), nan)
    verdict = Verdict((0,), None, ((None, Dense()),), 1.0, (trial,), "dense: scores are no numbers")
    ((layer,),) = small().layers
    file = save(tmp_path / "a.npz", small(layers=((replace(layer, verdicts=(verdict,)),),)))
    assert str(load(file).layers[0][0].verdicts[0]) == str(verdict) and "a_shape nan" in str(verdict)


def test_a_newer_file_takes_the_place_of_the_old_one(tmp_path):
    save(tmp_path / "a.npz", small())
    save(tmp_path / "a.npz", small(plan="other"))
    assert load(tmp_path / "a.npz").plan == "other" and len(list(tmp_path.iterdir())) == 1


def test_a_file_without_room_leaves_the_old_one_as_it_was(tmp_path, kept):
    file = save(tmp_path / "a.npz", small())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"a\.npz: File too large\. Allowed: a place for a file"):
            save(file, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(file).plan == "plan" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"absent/a\.npz: No such file"):
        save(tmp_path / "absent" / "a.npz", small())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder: Is a directory"):
        save(tmp_path / "folder", small())
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_no_damage_goes_unseen(tmp_path):
    """Any byte changed, any end cut off: an error that names the file, or what was written (a date, say)."""
    file = save(tmp_path / "a.npz", small())
    whole, damaged, refused = file.read_bytes(), tmp_path / "damaged.npz", 0
    draw = np.random.default_rng(0)
    places = draw.choice(len(whole), 300, replace=False).tolist()
    versions = [whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :] for at in places]
    for version in [*versions, *(whole[:at] for at in places[:60])]:
        damaged.write_bytes(version)
        try:
            found = load(damaged)
        except ConfigError as error:
            assert str(error).startswith(f"{damaged}: ")
            refused += 1
        else:
            assert same_selection(found.layers[0][0].selection, small().layers[0][0].selection)
            assert torch.equal(found.tokens.place, TOKENS.place)
    assert refused > 200


def rewritten(file, **changes):
    """The file with other arrays; None leaves one out."""
    with np.load(file) as arrays:
        new = {name: each for name, each in ({**arrays} | changes).items() if each is not None}
    np.savez(file, **new)
    return file


def with_header(file, **changes):
    with np.load(file) as arrays:
        header = msgspec.json.decode(arrays["header"].tobytes()) | changes
    return rewritten(file, header=np.frombuffer(msgspec.json.encode(header), dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": None}, "header: Input data was truncated"),
        ({"tokens_frame": None}, "no tokens_frame"),
        ({"tokens_frame": np.zeros(3, dtype=np.uint8)}, "columns of "),
        ({"columns": None}, "columns: 0 numbers. Allowed: more"),
        ({"columns": np.array([3])}, "columns: 1 numbers. Allowed: more"),
        ({"columns": np.array([3, 4, 5])}, "columns: 3 numbers. Allowed: 2."),
        ({"strangers": np.array([3])}, "strangers: 1 numbers. Allowed: 0."),
        ({"columns": np.array([3, 99999])}, "layer 0: column 99999"),
        ({"columns": np.array([3, 2])}, "layer 0: columns [3, 2].."),
        ({"row_blocks": np.array([0, 500])}, "layer 0: 3 bytes for the lists of 2 row blocks. Allowed: 64."),
        ({"row_blocks": np.array([14, 15]), "bits": np.zeros(3, np.uint8)}, "layer 0: 3 bytes for the lists"),
        ({"columns": np.array([[object()]])}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    file = save(tmp_path / "a.npz", small())
    if any(each is not None and each.dtype == object for each in change.values()):
        return check_pickles(file, message)
    with pytest.raises(ConfigError) as raised:
        _ = load(rewritten(file, **change)).layers[0][0].selection
    assert str(raised.value).startswith(f"{file}: {message}") and "Remedy: " in str(raised.value)


def check_pickles(file, message):
    """Nothing in a file is ever run."""
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other.npy", stream.getvalue())
    with pytest.raises(ConfigError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: 2. Allowed: 1."),
        ({"plan": 3}, "header: Expected `str`, got `int` - at `$.plan`"),
        ({"chunks": []}, "0 chunks with [1] layers"),
        ({"chunks": [[9, 3]]}, "chunks [(9, 3)]"),
        ({"chunks": [[0, 99999]]}, "chunks [(0, 99999)]"),
        ({"layers": [[]]}, "columns: 2 numbers. Allowed: 0."),
    ],
)
def test_headers_that_do_not_fit(tmp_path, change, message):
    file = with_header(save(tmp_path / "a.npz", small()), **change)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert str(raised.value).startswith(f"{file}: {message}")


def test_files_of_something_else(tmp_path):
    for name, content in (("absent", None), ("empty", b""), ("text", b"{}"), ("plan", b"PK\x03\x04" + b"x" * 99)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{tmp_path / name}: "):
            load(tmp_path / name)
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_requests_that_cannot_be():
    ((layer,),) = small().layers
    with pytest.raises(ConfigError, match=r"groups of \[1\] heads. Allowed: 7"):
        small(group=7)
    with pytest.raises(ConfigError, match="2 chunks with"):
        small(chunks=(range(5), range(5, 9)))
    with pytest.raises(ConfigError, match=r"chunks \[\(5, 9\), \(0, 5\)\]"):
        small(chunks=(range(5, 9), range(5)), layers=((layer,), (layer,)))
    late = BlockSet(torch.tensor([2]), torch.tensor([0, 1]), torch.tensor([3]))
    with pytest.raises(ConfigError, match="key blocks after their row block"):
        pack(replace(layer, selection=Selection((Unit((0,), (Panel(None, None, Blocks(), late),)),), 1)))


def test_names_of_files():
    assert file_name("chatcmpl-7f.3_A") == "chatcmpl-7f.3_A.npz"
    odd = ["", ".", "..", "../../etc/passwd", "a/b", "a b", "a_b" + "c" * 300, "a_b" + "c" * 301, "ä", "ö", ".hidden"]
    names = [file_name(each) for each in odd]
    assert len(set(names)) == len(names) and all(len(each) < 120 and "/" not in each for each in names)
    assert all(not each.startswith(".") and each.isascii() for each in names)


def test_the_smallest_integers():
    cases = [([], "uint8"), ([0, 255], "uint8"), ([-1, 127], "int8"), ([-6, 200], "int16"), ([0, 70000], "uint32")]
    for numbers, dtype in cases:
        array = narrow(np.array(numbers, dtype=np.int64))
        assert array.dtype == dtype and array.tolist() == numbers


def test_a_long_video_takes_little_room(tmp_path):
    """28 layers of 28 heads: 1000 columns for each, and the tokens of 1000 frames."""
    tokens = token_map(Text(20), Media(1000, 16, 16), Text(40))
    draw = np.random.default_rng(0)
    columns = [torch.from_numpy(np.sort(draw.choice(len(tokens), 1000, replace=False))) for _ in range(28)]
    none = torch.zeros(0, dtype=torch.int64)
    units = tuple(
        Unit((head,), (Panel(None, None, VerticalSlash(), Lines(columns[head], none)),)) for head in range(28)
    )
    layers = tuple(KeptLayer(layer, Selection(units, 7), (), (0.1,) * 28) for layer in range(28))
    file = save(tmp_path / "a.npz", KeptRequest("a", tokens, (range(len(tokens)),), 7, "auto", (layers,)))
    assert file.stat().st_size < 28 * 28 * 1000 * 4
