"""The zip archive that a PyTorch checkpoint is: whether it is whole, and what it holds."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import torch

from ..errors import UserError
from ..runtime.limits import MOST_UNPACKED

MAGIC = b"PK\x03\x04"
_SMALL = 1 << 28


def storages_of(path: Path, data: bytes) -> dict[str, int]:
    """How many bytes an archive holds of each storage, every record of it checked.

    torch does not compare records with their checksums. What is compared is what torch's own reader
    gives: another one might list a crafted archive differently.

    Args:
        path: of the file, for messages.
        data: its content.

    Raises:
        UserError: a record is damaged, the archive is a TorchScript one, or unpacks to many times
            its size.
        Exception: whatever the readers make of what is no archive.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        listed = [record for record in archive.infolist() if not record.is_dir()]
    if sum(record.file_size for record in listed) > max(MOST_UNPACKED * len(data), _SMALL):
        raise UserError(f"{path} unpacks to over {MOST_UNPACKED} times its size: refused")
    checksums = {record.filename.partition("/")[2]: record.CRC for record in listed}
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    names = [name for name in reader.get_all_records() if name and not name.endswith("/")]
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript archive (an exported program), which cannot be quantized: "
            "name the training checkpoint (.pt) it was exported from"
        )
    if len(checksums) != len(listed) or sorted(names) != sorted(checksums):
        raise UserError(f"{path} is damaged: its records are listed twice, or not all of them are")
    # torch leaves them out where it was told to (`torch.serialization.set_crc32_options`).
    written = any(checksums.values())
    sizes = {}
    for name in names:
        content = reader.get_record(name)
        if written and zlib.crc32(content) != checksums[name]:
            raise UserError(
                f"{path} is damaged: its record {name} does not fit its checksum; download or copy "
                "it again"
            )
        folder, _, key = name.partition("/")
        if folder == "data":
            sizes[key] = len(content)
    return sizes
