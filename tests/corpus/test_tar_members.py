"""Tars that lie, break off or hide members are refused with a code; plain ones give what is in them."""

import gzip
import io
import tarfile

import pytest

from acsr_ray.corpus.container_errors import ContainerError
from acsr_ray.corpus.tar_members import TarLimits, read_body, tar_members

END = bytes(1024)


def header(name=b"a.png", size=b"00000000003", kind=b"0", magic=b"ustar\x0000", prefix=b"", link=b""):
    """Return a header block with a right checksum."""
    block = bytearray(512)
    for start, field in ((0, name), (100, b"0000644\0"), (124, size), (156, kind), (157, link), (257, magic)):
        block[start : start + len(field)] = field
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(data=b"abc", **fields):
    """Return a member: header and padded body."""
    block = header(size=b"%011o" % len(data), **fields)
    return block + data + bytes(-len(data) % 512)


def pax(*records, kind=b"x"):
    """Return an extended header of (key, value) pairs."""
    body = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest)
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        body += b"%d" % length + rest
    return entry(body, name=b"PaxHeaders/a.png", kind=kind)


def long_name(name, kind=b"L"):
    return entry(name + b"\0", name=b"././@LongLink", kind=kind, magic=b"ustar  \0")


def names(data, **options):
    return [member.name for member in tar_members(io.BytesIO(data), "x.tar", **options)]


def code(data, **options):
    with pytest.raises(ContainerError) as error_info:
        names(data, **options)
    assert "x.tar" in str(error_info.value)
    return error_info.value.code


GOOD = {
    "plain": (entry() + END, ["a.png"]),
    "padded to a record": (entry() + bytes(10240), ["a.png"]),
    "empty": (bytes(10240), []),
    "no bytes": (entry(b"") + END, ["a.png"]),
    "before ustar": (entry(kind=b"\0", magic=b"") + END, ["a.png"]),
    "gnu": (entry(magic=b"ustar  \0") + END, ["a.png"]),
    "prefix": (entry(prefix=b"dir/sub") + END, ["dir/sub/a.png"]),
    "all 100 bytes of a name": (entry(name=b"n" * 100) + END, ["n" * 100]),
    "long name": (long_name(b"n" * 300) + entry() + END, ["n" * 300]),
    "extended name": (pax((b"path", "ä.png".encode())) + entry() + END, ["ä.png"]),
    "extended time": (
        pax((b"mtime", b"1.5"), (b"SCHILY.xattr.user.x", b"a=b\nc")) + entry() + END,
        ["a.png"],
    ),
    "global comment": (pax((b"comment", b"1234"), kind=b"g") + entry() + END, ["a.png"]),
    "folder": (entry(b"", name=b"dir/", kind=b"5") + entry() + END, ["a.png"]),
    "dot": (entry(name=b"./a.png") + END, ["./a.png"]),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_read(case):
    data, expected = GOOD[case]
    assert names(data) == expected
    # The same as the standard library says.
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [member for member in tar if member.isfile()]
        assert [member.name.removeprefix("./") for member in files] == [
            n.removeprefix("./") for n in expected
        ]
        bodies = [tar.extractfile(member).read() for member in files]
    assert [read_body(io.BytesIO(data), m) for m in tar_members(io.BytesIO(data), "x.tar")] == bodies


BAD = {
    "nothing": (b"", "truncated"),
    "short": (b"hello", "not_tar"),
    "another format": (b"PAR1" * 1000, "not_tar"),
    "gzip": (gzip.compress(entry() + END) + bytes(1000), "not_tar"),
    "no end mark": (entry(), "truncated"),
    "half an end mark": (entry() + bytes(512), "truncated"),
    "cut in the body": (header(size=b"00000000700"), "truncated"),
    "cut in the padding": ((entry())[:-1], "truncated"),
    "cut in a header": (entry() + entry()[:100], "truncated"),
    "cut in an extended header": (pax((b"path", b"n" * 600))[:700], "truncated"),
    "ends after an extended header": (pax((b"path", b"a")) + END, "unreadable"),
    "hidden behind the end": (entry() + END + entry() + END, "trailing_data"),
    "zeros without end": (entry() + bytes(2**20 + 512), "trailing_data"),
    "damaged later": (entry() + b"x" * 512 + END, "unreadable"),
    "hard link": (entry(b"", kind=b"1", link=b"a.png") + END, "unsafe_member"),
    "symbolic link": (entry(b"", kind=b"2", link=b"/etc/passwd") + END, "unsafe_member"),
    "character device": (entry(b"", kind=b"3") + END, "unsafe_member"),
    "block device": (entry(b"", kind=b"4") + END, "unsafe_member"),
    "fifo": (entry(b"", kind=b"6") + END, "unsafe_member"),
    "contiguous": (entry(kind=b"7") + END, "unsafe_member"),
    "sparse": (entry(kind=b"S", magic=b"ustar  \0") + END, "unsafe_member"),
    "several volumes": (entry(kind=b"M", magic=b"ustar  \0") + END, "unsafe_member"),
    "volume label": (entry(b"", kind=b"V", magic=b"ustar  \0") + END, "unsafe_member"),
    "long link": (long_name(b"/etc/passwd", b"K") + entry(b"", kind=b"2") + END, "unsafe_member"),
    "folder with bytes": (entry(name=b"dir/", kind=b"5") + END, "unsafe_member"),
    "extended size": (pax((b"size", b"1024")) + entry() + END, "unsafe_member"),
    "extended link": (pax((b"linkpath", b"/etc")) + entry() + END, "unsafe_member"),
    "extended sparse": (pax((b"GNU.sparse.major", b"1")) + entry() + END, "unsafe_member"),
    "another charset": (pax((b"hdrcharset", b"BINARY")) + entry() + END, "unsafe_member"),
    "named twice": (pax((b"path", b"a"), (b"path", b"b")) + entry() + END, "unsafe_member"),
    "two extended headers": (pax((b"path", b"a")) + long_name(b"b") + entry() + END, "unsafe_member"),
    "global name": (pax((b"path", b"a"), kind=b"g") + entry() + END, "unsafe_member"),
    "size of 256s": (header(size=b"\x80" + bytes(10) + b"\x03") + bytes(512) + END, "unsafe_member"),
    "negative size": (header(size=b"-0000000001") + END, "unsafe_member"),
    "prefix of another kind": (entry(magic=b"ustar  \0", prefix=b"dir") + END, "unsafe_member"),
    "damaged record": (entry(b"99 path=a\n", kind=b"x") + entry() + END, "unreadable"),
    "record without a key": (entry(b"5 =a\n", kind=b"x") + entry() + END, "unreadable"),
    "absolute": (entry(name=b"/etc/passwd.png") + END, "unsafe_name"),
    "climbing": (entry(name=b"a/../../b.png") + END, "unsafe_name"),
    "climbing by prefix": (entry(prefix=b"..") + END, "unsafe_name"),
    "climbing by extension": (pax((b"path", b"../a.png")) + entry() + END, "unsafe_name"),
    "climbing by a long name": (long_name(b"../a.png") + entry() + END, "unsafe_name"),
    "no UTF-8": (entry(name=b"\xff.png") + END, "unsafe_name"),
    "NUL": (entry(name=b"a.png\0.txt") + END, "unsafe_name"),
    "NUL by extension": (pax((b"path", b"a.png\0.txt")) + entry() + END, "unsafe_name"),
    "no name": (entry(name=b"") + END, "unsafe_name"),
    "slash": (entry(name=b"a.png/") + END, "unsafe_name"),
    "long": (pax((b"path", b"n" * 2000)) + entry() + END, "unsafe_name"),
    "huge extended header": (header(size=b"77777777777", kind=b"x") + END, "too_large"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    data, expected = BAD[case]
    assert code(data) == expected


def test_a_folder_that_climbs_is_refused_too():
    assert code(entry(b"", name=b"../dir/", kind=b"5") + END) == "unsafe_name"


def test_the_number_of_members_has_a_limit():
    assert names(entry() * 3 + END, limits=TarLimits(max_members=3)) == ["a.png"] * 3
    assert code(entry() * 4 + END, limits=TarLimits(max_members=3)) == "too_large"


def test_a_cut_at_any_byte_is_noticed():
    whole = pax((b"mtime", b"1.5")) + entry() + entry(name=b"b.txt") + END
    for length in range(len(whole)):
        assert code(whole[:length]) in ("truncated", "not_tar")


def test_a_changed_bit_of_a_header_is_noticed():
    data = entry() + entry(name=b"b.txt") + END
    for position in range(1024, 1536):
        broken = bytearray(data)
        broken[position] ^= 1
        assert code(bytes(broken)) == "unreadable"


def test_a_store_that_delivers_less_is_at_fault_itself():
    class Short(io.BytesIO):
        def read(self, size=-1):
            return super().read(size)[:-1]

    with pytest.raises(OSError, match="is being changed"):
        list(tar_members(Short(entry() + END), "x.tar"))


def test_a_part_is_read_from_where_a_member_begins():
    data = entry() + pax((b"path", b"long.png")) + entry() + entry(name=b"c.png") + END
    second = list(tar_members(io.BytesIO(data), "x.tar"))[1]
    assert (second.name, second.start) == ("long.png", 1024)
    assert names(data, start=second.start, end=second.end) == ["long.png"]
    # What is outside of it is not looked at.
    dark = bytes(1024) + data[second.start : second.end] + b"x" * 512
    assert names(dark, start=second.start, end=second.end) == ["long.png"]
