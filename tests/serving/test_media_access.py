"""Which files requests may name, and how names reach SGLang's loaders."""

import base64
import os
import shutil
from pathlib import Path

import pytest

from sglang_mm.config import Config
from sglang_mm.launch.summary import topology
from sglang_mm.serving import media_access
from sglang_mm.serving.exposure import Exposure
from sglang_mm.serving.media_access import RequestError, resolve

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.fixture
def allowed(tmp_path):
    """A directory with a file `in.png`, below which names are allowed; `out.png` lies beside it."""
    inside = tmp_path / "allowed"
    inside.mkdir()
    for path in (inside / "in.png", tmp_path / "out.png", inside / "with space#1?.png"):
        path.write_bytes(PICTURE)
    media_access.allow([str(inside)])
    yield inside
    media_access.allow([media_access.ANYWHERE])


def read(resolved: str) -> bytes:
    from urllib.parse import unquote, urlparse

    return Path(unquote(urlparse(resolved).path)).read_bytes()


@pytest.mark.parametrize("name", ["in.png", "with space#1?.png", "../allowed/in.png"])
def test_files_below_are_read_whatever_they_are_called(allowed, name):
    assert read(resolve(f"{allowed}/{name}", "image")) == PICTURE
    assert read(resolve(Path(f"{allowed}/{name}").as_uri(), "image")) == PICTURE


def test_a_second_directory(allowed, tmp_path):
    media_access.allow([str(allowed), str(tmp_path)])
    assert read(resolve(f"{tmp_path}/out.png", "image")) == PICTURE


@pytest.mark.parametrize(
    "name",
    ["out.png", "allowed/../out.png", "allowed/link.png", "allowed/up/out.png", "allowed-too/in.png", "gone.png"],
)
@pytest.mark.parametrize("form", ["{}", "file://{}", "file://elsewhere{}"])
def test_outside_is_refused_in_the_same_words_whether_it_is_there_or_not(allowed, tmp_path, name, form):
    shutil.copytree(allowed, tmp_path / "allowed-too")
    (allowed / "link.png").symlink_to(tmp_path / "out.png")
    (allowed / "up").symlink_to(tmp_path)
    given = form.format(tmp_path / name if "/.." not in name else f"{tmp_path}/{name}")
    with pytest.raises(RequestError) as refused:
        resolve(given, "image")
    assert str(refused.value) == (
        f"image {media_access.shown(given)}. Allowed: files below {allowed}. Remedy: send the image itself as a data: "
        "address, or start the server with --allow-local-media DIR."
    )


def test_links_within_are_followed(allowed):
    (allowed / "link.png").symlink_to("in.png")
    assert resolve(f"{allowed}/link.png", "image").endswith("/in.png")


def test_an_open_server_reads_none(tmp_path):
    media_access.allow([])
    try:
        with pytest.raises(RequestError, match="no local file: the server listens beyond this machine"):
            resolve(f"{tmp_path}/gone.png", "image")
        assert resolve("https://host/x.png", "image") == "https://host/x.png"
    finally:
        media_access.allow([media_access.ANYWHERE])


@pytest.mark.parametrize("start", [b"\xff\xd8\xff\xe0", b"\x89PNG", b"\0\0\0\x20ftyp"], ids=["jpeg", "png", "mp4"])
def test_bare_base64_is_data(start):
    """SGLang takes a JPEG's base64, which begins with a slash, for a path."""
    text = base64.b64encode(start + os.urandom(90)).decode()
    assert resolve(text, "image") == f"data:;base64,{text}"
    assert resolve(f"{text[:40]}\n{text[40:]}", "image") == f"data:;base64,{text}"


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        ("", "an empty address"),
        ("ftp://host/x.mp4", "video ftp://host/x.mp4. Allowed: http"),
        ("file:///x\0y", "no path"),
        ("/" + "x" * 5000 + ".mp4", "no path"),
        ([["a.png"], "b.png"], "a list of names as one video"),
        ({"url": "ftp://x"}, "video ftp://x"),
        ({"image": "ftp://x"}, "video ftp://x"),
    ],
)
def test_what_is_no_name_of_a_medium(medium, message):
    with pytest.raises(RequestError, match=f"{message}.*Remedy: ") as refused:
        resolve(medium, "video")
    assert len(str(refused.value)) < 400


def test_what_names_nothing_passes():
    for medium in (b"bytes", 5, {"format": "processor_output", "x": [1]}, [[1, 2]], None):
        assert resolve(medium, "image") is medium or resolve(medium, "image") == medium


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("localhost", False), ("::1", False), ("0.0.0.0", True),
     ("::", True), ("", True), ("192.0.2.1", True), ("no.such.host.invalid", True)],
)  # fmt: skip
def test_who_may_reach_the_server(host, is_open):
    exposure = Exposure(host, False, False, ())
    assert exposure.is_open == is_open and bool(exposure.warnings) == is_open
    assert exposure.directories == (() if is_open else ("/",))
    assert Exposure(host, False, False, ("/data",)).directories == ("/data",)


def test_an_open_server_warns_of_each_thing_that_is_missing(tmp_path):
    said = topology(Config(cp=2), "M", "cpu", Exposure("0.0.0.0", False, False, ()))
    assert said.count("WARNING") == 2 and "--api-key" in said and "--allowed-media-domains" in said
    assert "files      requests may name no local files (--allow-local-media DIR)" in said
    assert "WARNING" not in topology(Config(), "M", "cpu", Exposure("0.0.0.0", True, True, ()))
    assert "any file this user can read" in topology(Config(), "M", "cpu", Exposure("localhost", False, False, ()))
