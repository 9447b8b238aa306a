"""Files that carry their digest: whole, or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from leakatlas.sealed import DamagedFile, digest, seal, unseal, write_whole


def test_what_was_sealed_comes_back(tmp_path: Path) -> None:
    for content in (b"", b"\n", b"a\nb", bytes(range(256))):
        seal(tmp_path / "sub" / "file", content)
        assert unseal(tmp_path / "sub" / "file") == content
    assert unseal(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: content.replace(b"cat", b"cot"),
        lambda content: b"\xff" + content[1:],
        lambda content: content.partition(b"\n")[2],
    ],
    ids=["truncated", "longer", "empty", "altered", "no digits", "no digest"],
)
def test_what_was_damaged_is_discarded_with_a_warning(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "file"
    seal(file, b"a cat sat")
    assert callable(damage)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(DamagedFile, match=r"file was discarded: it fails its SHA-256\."):
        assert unseal(file) is None
    assert not file.exists()


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", b"before")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", b"")
    (tmp_path / "usual").write_bytes(b"")
    ours, usual = ((tmp_path / name).stat().st_mode for name in ("ours", "usual"))
    assert stat.S_IMODE(ours) == stat.S_IMODE(usual)


def test_the_digest_is_sha_256() -> None:
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
