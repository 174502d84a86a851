"""Files on their way to their names: written by several at once, left by the killed, refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dfq.runtime.files import write_atomic
from dfq.runtime.unfinished import unfinished_folder


def test_several_writers_of_one_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    errors: list[BaseException] = []
    texts = [bytes([65 + writer]) * 100_000 for writer in range(4)]
    start = threading.Barrier(len(texts))

    def write(text: bytes) -> None:
        start.wait()
        try:
            for _ in range(15):
                write_atomic(path, text)
                # Whosever it is, it is whole.
                assert path.read_bytes() in texts
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for leave in (
        lambda place: place.write_text("half"),
        lambda place: place.symlink_to(mine),
        lambda place: os.link(mine, place),
        lambda place: os.mkfifo(place),
    ):
        leave(tmp_path / ".a.json.tmp")
        write_atomic(tmp_path / "a.json", b"whole")
        assert (tmp_path / "a.json").read_bytes() == b"whole"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "mine"]
    assert mine.read_text() == "mine"


def test_a_folder_of_a_killed_process_is_swept_and_one_in_use_is_not(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\n"
        "from dfq.runtime.unfinished import unfinished_folder\n"
        "with unfinished_folder(Path(sys.argv[1]), 'a') as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    (tmp_path / ".ab.dfq-00000000").mkdir()
    with unfinished_folder(tmp_path, "a") as folder:
        assert not left.exists()
        with unfinished_folder(tmp_path, "a") as other:
            assert folder.is_dir()
            assert other != folder
    # Of another name.
    assert [path.name for path in tmp_path.iterdir()] == [".ab.dfq-00000000"]


def test_an_error_names_the_file_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="o") as caught:
            write_atomic(tmp_path / "a.json", b"text")
    assert caught.value.filename == str(tmp_path / "a.json")
    with (
        pytest.raises(OSError, match="o") as caught,
        unfinished_folder(tmp_path, "a.onnx") as folder,
    ):
        (folder / "b" / "c").write_text("text")
    assert caught.value.filename == str(tmp_path / "a.onnx")
    with pytest.raises(OSError, match="o") as caught, unfinished_folder(tmp_path, "a.onnx"):
        (tmp_path / "input").read_text()
    assert caught.value.filename == str(tmp_path / "input")
    assert list(tmp_path.iterdir()) == []
