"""Members of a tar file, read header by header with every check that the format allows.

`tarfile` takes a damaged header for the end of an archive. Here the end is two blocks of zeros with nothing but zeros
behind them. A header has a checksum. The names and sizes that PAX and GNU tar keep in extended headers have none: a
damage that leaves such a header well formed gives its own member another name.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE

_GNU_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, *_GNU_NAMES)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)

_RECORD = re.compile(rb"(\d{1,12}) ([^=]+)=")
_KEYWORDS = ("path", "linkpath", "size")
"""PAX keywords that are used."""
_NAMES = ("GNU.sparse.name", "path")
"""Keywords of names; the first one counts."""

_NUMBER, _LARGE_NUMBER = rb"[0-7]{6}(?:[0-7][\0 ]| \0)", rb"[0-7]{11}[\0 ]"
# Mode, owner and group, size, time, checksum, and the type of a file or a PAX header.
_USUAL_NUMBERS = re.compile(
    rb"(?:%b){3}(%b)%b([0-7]{6}\0 |%b)([0x])" % (_NUMBER, _LARGE_NUMBER, _LARGE_NUMBER, _NUMBER)
)
_USUAL_DEVICE = re.compile(rb"(?:%b|\0{8}){2}" % _NUMBER)

_CHUNK = 2**20
_LARGEST_OCTAL = 8**11
"""File size from which on a header cannot hold it."""


class TarMember(NamedTuple):
    """A file or a link."""

    name: str
    """Name as it was written."""
    type: bytes
    """Type of the header: a regular file, `tarfile.LNKTYPE` or `tarfile.SYMTYPE`."""
    target: str
    """Target of a link."""
    start: int
    """Offset of the first header, extended headers included, in bytes."""
    offset: int
    """Offset of the data in bytes."""
    size: int
    """Size of the data in bytes."""
    is_sparse: bool
    """True if the data was stored without the holes of the file."""


class _Header(NamedTuple):
    """A header of 512 bytes."""

    name: str
    type: bytes
    size: int
    linkname: str
    has_data: bool
    """True if blocks of data follow."""


class TarDamageError(Exception):
    """A tar file is damaged.

    Attributes:
        offset: of the damaged header, or of the header of the damaged member, in bytes.
        problem: the defect, as a clause.
    """

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(offset, problem)
        self.offset, self.problem = offset, problem


def read_members(file: BinaryIO) -> Iterator[TarMember]:
    """Read the files and links of an archive, in order; other members are passed over.

    Raises:
        TarDamageError: the archive is damaged, or its end marker is missing.
    """
    end = file.seek(0, os.SEEK_END)
    defaults: dict[str, str] = {}
    start = 0
    while (header := _read_header(file, start, end)) is not None:
        # --- extended headers in front of the member's own header
        records, offset = dict[str, str](), start
        while header.type in _EXTENDED:
            found = _read_records(file, header, offset, end)
            if header.type == tarfile.XGLTYPE:
                defaults |= found
            else:
                records = found | records  # where two name a member, the first one counts
            offset += BLOCK + _padded(header.size)
            header = _read_header(file, offset, end)
            if header is None:
                raise TarDamageError(start, "no member follows the extended header")
        if defaults:
            records = defaults | records

        # --- the member
        has_data = header.has_data
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records)
        data = offset + BLOCK + (_sparse_map_size(file, offset) if header.type == tarfile.GNUTYPE_SPARSE else 0)
        size = _size(header.size, records.get("size"), start)
        if has_data and data + size > end:
            raise TarDamageError(start, f"the file ends at byte {end}, inside the member that begins there")
        if has_data or header.type in _LINKS:
            name = next((records[key] for key in _NAMES if key in records), header.name) if records else header.name
            yield TarMember(
                name=name.rstrip("/"),
                type=header.type,
                target=records.get("linkpath", header.linkname),
                start=start,
                offset=data,
                size=size,
                is_sparse=is_sparse,
            )
        start = data + (_padded(size) if has_data else 0)
    _check_end(file, start, end)


def sparse_extent(file: BinaryIO, member: TarMember) -> tuple[int, int] | None:
    """Offset and size in bytes of a sparse member's content; None if the file had holes, or its map is damaged."""
    file.seek(member.start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            info = tar.next()
    except (tarfile.TarError, OSError, ValueError):
        return None
    parts: Any = info.sparse if info is not None else None
    if info is None or not parts:
        return None
    position = 0
    for at, length in parts:
        if length and at != position:
            return None
        position += length
    return (info.offset_data, info.size) if position == info.size else None


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    """Bytes of the blocks that hold `size` bytes."""
    return -(-size // BLOCK) * BLOCK


def _read_header(file: BinaryIO, offset: int, end: int) -> _Header | None:
    """The header at an offset; None for a block of zeros, or at the end of the file."""
    file.seek(min(offset, end))
    block = file.read(BLOCK)
    if (usual := _usual_header(block)) is not None:
        return usual
    if block.count(0) == len(block):
        return None
    if len(block) < BLOCK:
        raise TarDamageError(offset, f"the file ends at byte {end}, inside a header")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarDamageError(offset, f"the header is damaged ({error})") from None
    if header.size < 0:
        raise TarDamageError(offset, "the header is damaged (negative size)")
    if block[257:265] == tarfile.GNU_MAGIC:  # has times where tarfile reads the beginning of a POSIX name
        header.name = _text(block[:100])
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    return _Header(header.name, header.type, header.size, header.linkname, has_data)


def _usual_header(block: bytes) -> _Header | None:
    """The header of a file or a PAX header as nearly all are written; None for any other, which `tarfile` reads.

    It is the header that `tarfile` reads, in less time: all fields that it checks are checked. Indexing a tar file of
    10,000 images takes 0.33 instead of 0.57 seconds of a CPU core.
    """
    numbers = _USUAL_NUMBERS.match(block, 100)
    if numbers is None or len(block) != BLOCK or _USUAL_DEVICE.match(block, 329) is None:
        return None
    # The lower half of Adler-32 is 1 + the sum of up to 256 bytes.
    sums = (zlib.adler32(part) & 0xFFFF for part in (block[:148], block[156:412], block[412:]))
    if sum(sums) - 3 + 8 * ord(" ") != int(numbers[2].rstrip(b"\0 "), 8):
        return None
    name = _text(block[:100])
    if block[345] and block[257:265] != tarfile.GNU_MAGIC:
        name = f"{_text(block[345:500])}/{name}"
    kind, target = numbers[3], _text(block[157:257]) if block[157] else ""
    return _Header(name, kind, int(numbers[1][:11], 8), target, kind == tarfile.REGTYPE)


def _text(field: bytes) -> str:
    return _decode(field.partition(b"\0")[0])


def _read_records(file: BinaryIO, header: _Header, offset: int, end: int) -> dict[str, str]:
    """Records of an extended header: PAX keywords and their values."""
    if offset + BLOCK + header.size > end:
        raise TarDamageError(offset, f"the file ends at byte {end}, inside an extended header")
    file.seek(offset + BLOCK)
    payload = file.read(header.size).rstrip(b"\0")
    if header.type not in _GNU_NAMES:
        return _parse_records(payload, offset)
    if not payload or b"\0" in payload:
        raise TarDamageError(offset, "the extended header is damaged (name with a NUL byte)")
    return {_GNU_NAMES[header.type]: _decode(payload)}


def _parse_records(payload: bytes, offset: int) -> dict[str, str]:
    """Records `length keyword=value` of a PAX header."""
    records: dict[str, str] = {}
    position = 0
    while position < len(payload):
        match = _RECORD.match(payload, position)
        stop = position + int(match[1]) if match is not None else 0
        if match is None or not match.end() < stop <= len(payload) or payload[stop - 1] != ord("\n"):
            raise TarDamageError(offset, "the extended header is damaged (bad record)")
        key, value = _decode(match[2]), payload[match.end() : stop - 1]
        if key in _KEYWORDS and b"\0" in value:
            raise TarDamageError(offset, f"the extended header is damaged ({key} with a NUL byte)")
        records[key] = _decode(value)
        position = stop
    return {key: value for key, value in records.items() if value}  # an empty value is none


def _size(stored: int, record: str | None, start: int) -> int:
    """Size of a member's data; a PAX record replaces that of the header, which cannot hold 8 GiB."""
    if record is None:
        return stored
    if not (record.isascii() and record.isdigit()) or (int(record) < _LARGEST_OCTAL and stored not in {0, int(record)}):
        raise TarDamageError(start, f"the extended header is damaged (size {record!r})")
    return int(record)


def _sparse_map_size(file: BinaryIO, offset: int) -> int:
    """Bytes of the blocks behind an old GNU sparse header that go on with its map."""
    flag, size = 482, 0
    while True:
        file.seek(offset + size + flag)
        if file.read(1) in {b"", b"\0"}:
            return size
        flag, size = 504, size + BLOCK


def _check_end(file: BinaryIO, offset: int, end: int) -> None:
    """Raise an error unless two blocks of zeros or more are all that is left of the file."""
    position = min(offset, end)
    file.seek(position)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            at = position + len(chunk) - len(rest)
            hint = f"unpack joined archives with tar --ignore-zeros; cut remains off: truncate --size={at} FILE"
            raise TarDamageError(offset, f"the header is zeros, but data follows at byte {at} ({hint})")
        position += len(chunk)
    if end - offset < 2 * BLOCK:
        hint = "if the archive is whole, append one: head -c 10240 /dev/zero >> FILE"
        raise TarDamageError(min(offset, end), f"the end marker, two blocks of zeros, is missing ({hint})")
