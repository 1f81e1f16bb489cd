"""Reads which symbols a shared object (ELF, 64 bits, little-endian) needs and defines, and writes small stub
libraries.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_PAIR = struct.Struct("<QQ")
_RELOCATION = struct.Struct("<QQq")
_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA = 0, 1, 4, 5, 6, 7
_DT_RELASZ, _DT_RELAENT, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 8, 9, 10, 11, 14
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_STB_GLOBAL = 1
_EXECUTE, _WRITE, _READ = 1, 2, 4
_ET_DYN, _SEGMENTS = 3, 4
_TYPEINFO_BYTES = 16
_PAGE = 4096
_MAGIC = b"\x7fELF\x02\x01\x01"
_X86_64 = 62
_LEA, _STORE, _RETURN = b"\x48\x8d\x05", b"\x48\x89\x07", b"\xc3"  # lea ...(%rip), %rax; mov %rax, (%rdi); ret
_TO_SYMBOL, _TO_PLACE = 1, 8  # relocations of x86-64: the address of a symbol, an address in this file
_CLASS = "_ZTVN10__cxxabiv117__class_type_infoE"
_ZEROS = 1 << 12
_OBJECT = "_ZTI8tightfit"
"""typeinfo of the objects that `stub_library`'s constructors make"""
_VIRTUAL = 32
"""virtual functions of such an object"""


@dataclass(frozen=True, kw_only=True)
class SharedObject:
    """What the dynamic linker reads of a shared object."""

    machine: int
    """ELF's number of the processor architecture"""
    needed: tuple[str, ...]
    """names (SONAME) of the libraries that it loads"""
    undefined: frozenset[str]
    """symbols that another library must define; weak ones, which may be missing, are left out"""
    defined: frozenset[str]
    """symbols that it defines itself"""


def read_shared_object(path: Path) -> SharedObject:
    """Read the shared object at `path`. Raises OSError, and ValueError if the file is not a shared object, or not
    whole.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:7] != _MAGIC:
            raise ValueError(f"{path} is no shared object of 64 bits, little-endian")
        try:
            return _read(data)
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(f"{path} is no whole shared object: {error}") from error


def _read(data: mmap.mmap) -> SharedObject:
    _, _, machine, _, _, _, table_offset, _, _, _, _, size, count, _ = _HEADER.unpack_from(data)
    sections = [_SECTION.unpack_from(data, table_offset + number * size) for number in range(count)]

    def content(section: tuple[int, ...]) -> bytes:
        return data[section[4] : section[4] + section[5]]

    def name(strings: bytes, offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    needed: list[str] = []
    undefined, defined = set(), set()
    for section in sections:
        if section[1] == _SHT_DYNAMIC:
            strings = content(sections[section[6]])
            for tag, value in _PAIR.iter_unpack(content(section)):
                if tag == _DT_NULL:
                    break
                if tag == _DT_NEEDED:
                    needed.append(name(strings, value))
        elif section[1] == _SHT_DYNSYM:
            strings = content(sections[section[6]])
            for offset, info, _, index, _, _ in _SYMBOL.iter_unpack(content(section)):
                if index:
                    defined.add(name(strings, offset))
                elif info >> 4 == _STB_GLOBAL:
                    undefined.add(name(strings, offset))
    return SharedObject(
        machine=machine, needed=tuple(needed), undefined=frozenset(undefined), defined=frozenset(defined)
    )


def stub_library(
    soname: str,
    *,
    needed: Sequence[str] = (),
    symbols: Sequence[str] = (),
    references: Collection[str] = (),
    constructors: Collection[str] = (),
) -> bytes:
    """The bytes of an x86-64 shared object named `soname` that loads the libraries `needed` and defines `symbols`.

    A C++ typeinfo (``_ZTI...``) becomes the typeinfo of a class without bases. A symbol of `references` becomes a
    function that returns the address of `_ZEROS` zero bytes, one of `constructors` the constructor of a class whose
    virtual functions return at once. Every other symbol has that address itself: read as data it is zero; called as a
    function it ends the process (SIGSEGV).
    """
    strings = bytearray(b"\0")

    def put(text: str) -> int:
        offset = len(strings)
        strings.extend(text.encode() + b"\0")
        return offset

    used_constructors = set(constructors) & set(symbols)
    symbols = [*symbols, *([_OBJECT] if used_constructors else [])]
    types = [name for name in symbols if name.startswith("_ZTI")]
    names = [*([_CLASS] if types else []), *symbols]
    name_offsets = [put(name) for name in names]
    dynamic = [(_DT_NEEDED, put(name)) for name in needed]
    dynamic.append((_DT_SONAME, put(soname)))
    hashes = _hash_table(names)

    # Layout: code and tables, mapped read-only; then what the dynamic linker writes, in a page of its own.
    headers = _HEADER.size + _SEGMENTS * _SEGMENT.size
    at_code = _aligned(headers)
    at_return, at_constructor = at_code + 7, at_code + 16
    at_symbols = at_code + 32
    at_hash = at_symbols + (len(names) + 1) * _SYMBOL.size
    at_relocations = _aligned(at_hash + len(hashes))
    count = 2 * len(types) + (1 + _VIRTUAL if used_constructors else 0)
    at_strings = at_relocations + count * _RELOCATION.size
    read_only = _aligned(at_strings + len(strings))
    at_dynamic = read_only + _PAGE
    at_types = at_dynamic + (len(dynamic) + 9) * _PAIR.size
    at_virtual = at_types + len(types) * _TYPEINFO_BYTES
    at_zeros = at_virtual + (8 * (2 + _VIRTUAL) if used_constructors else 0)
    size = at_zeros - _PAGE

    dynamic += [
        (_DT_HASH, at_hash),
        (_DT_STRTAB, at_strings),
        (_DT_SYMTAB, at_symbols),
        (_DT_STRSZ, len(strings)),
        (_DT_SYMENT, _SYMBOL.size),
        (_DT_RELA, at_relocations),
        (_DT_RELASZ, count * _RELOCATION.size),
        (_DT_RELAENT, _RELOCATION.size),
        (_DT_NULL, 0),
    ]
    address = {name: at_types + number * _TYPEINFO_BYTES for number, name in enumerate(types)}
    functions = dict.fromkeys(references, at_code) | dict.fromkeys(used_constructors, at_constructor)
    table, relocations = bytearray(_SYMBOL.size), bytearray()
    for name, name_offset in zip(names, name_offsets, strict=True):
        defined_here = name != _CLASS  # which libstdc++ defines
        value = functions.get(name, address.get(name, at_zeros)) if defined_here else 0
        table += _SYMBOL.pack(name_offset, _STB_GLOBAL << 4, 0, defined_here, value, 0)
        if name in address:
            relocations += _RELOCATION.pack(value, 1 << 32 | _TO_SYMBOL, 16)
            relocations += _RELOCATION.pack(value + 8, _TO_PLACE, at_strings + name_offset + len("_ZTI"))
    if used_constructors:
        # The virtual table: no offset to the whole object, its typeinfo, the functions.
        relocations += _RELOCATION.pack(at_virtual + 8, _TO_PLACE, address[_OBJECT])
        for number in range(_VIRTUAL):
            relocations += _RELOCATION.pack(at_virtual + 16 + 8 * number, _TO_PLACE, at_return)

    def segment(kind: int, flags: int, offset: int, address: int, inside: int, more: int = 0) -> bytes:
        return _SEGMENT.pack(kind, flags, offset, address, address, inside, inside + more, _PAGE)

    segments = (
        segment(_PT_LOAD, _READ | _EXECUTE, 0, 0, read_only)
        + segment(_PT_LOAD, _READ | _WRITE, read_only, at_dynamic, size - read_only, _ZEROS)
        + segment(_PT_DYNAMIC, _READ | _WRITE, read_only, at_dynamic, len(dynamic) * _PAIR.size)
        + segment(_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0)
    )
    header = _HEADER.pack(
        _MAGIC + bytes(9), _ET_DYN, _X86_64, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _SEGMENT.size, _SEGMENTS, 0, 0, 0
    )
    code = _LEA + (at_zeros - at_return).to_bytes(4, "little") + _RETURN
    constructor = _LEA + (at_virtual + 16 - at_constructor - 7).to_bytes(4, "little") + _STORE + _RETURN
    content = bytearray(size)
    for offset, part in (
        (0, header + segments),
        (at_code, code),
        (at_constructor, constructor),
        (at_symbols, table),
        (at_hash, hashes),
        (at_relocations, relocations),
        (at_strings, strings),
        (read_only, b"".join(_PAIR.pack(*entry) for entry in dynamic)),
    ):
        content[offset : offset + len(part)] = part
    return bytes(content)


def _aligned(place: int) -> int:
    return -(-place // 16) * 16


def _hash_table(names: Sequence[str]) -> bytes:
    """The System V hash table by which the dynamic linker finds a symbol."""
    buckets, chains = [0] * max(1, len(names)), [0] * (len(names) + 1)
    for number, name in enumerate(names, 1):
        value = 0
        for byte in name.encode():
            value = (value << 4) + byte
            high = value & 0xF0000000
            value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
        chains[number], buckets[value % len(buckets)] = buckets[value % len(buckets)], number
    return struct.pack(f"<{2 + len(buckets) + len(chains)}I", len(buckets), len(chains), *buckets, *chains)
