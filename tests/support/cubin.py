"""What a file of machine code for a GPU says of its kernel."""

from __future__ import annotations

import struct


def parameters_of(cubin):
    """Return offset and size of each parameter in the machine code: EIATTR_KPARAM_INFO of .nv.info.KERNEL."""
    header = struct.unpack_from("<16sHHIQQQIHHHHHH", cubin)
    start, size, count, names = header[6], header[11], header[12], header[13]
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length, *_ in sections:
        text = cubin[sections[names][4] + name :].split(b"\0", 1)[0]
        if not text.startswith(b".nv.info."):
            continue
        at = offset
        while at < offset + length:
            form, attribute, size = struct.unpack_from("<BBH", cubin, at)
            if (form, attribute) == (4, 0x17):
                _, ordinal, place, flags = struct.unpack_from("<IHHI", cubin, at + 4)
                found[ordinal] = place, flags >> 18
            at += 4 + (size if form == 4 else 0)
    return [found[i] for i in sorted(found)]
