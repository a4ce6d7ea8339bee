"""Reading what the programs of the bundle write, with nothing but Python's own library."""

import array
import json
import re
import struct

TYPES = {"F32": "f", "F64": "d", "I32": "i", "I64": "q"}


def read_safetensors(path):
    """`(shape, values)` by name."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        values = array.array(TYPES[info["dtype"]])
        values.frombytes(data[begin:end])
        tensors[name] = (info["shape"], values)
    return tensors


def relative_error(got, exact):
    """Largest difference relative to the largest magnitude; infinite for other shapes or values that are not finite."""
    if got[0] != exact[0]:
        return float("inf")
    scale = max(map(abs, exact[1]))
    worst = 0.0
    for a, b in zip(got[1], exact[1]):
        difference = abs(a - b)
        if not difference <= 1e30:
            return float("inf")
        worst = max(worst, difference)
    return worst / scale


def test_summary(output):
    """`(passed, failed, names that failed)` of what a Rust test program prints."""
    passed = failed = 0
    for match in re.finditer(r"^test result: \w+\. (\d+) passed; (\d+) failed", output, re.MULTILINE):
        passed, failed = passed + int(match[1]), failed + int(match[2])
    names = re.findall(r"^test (\S+) \.\.\. FAILED$", output, re.MULTILINE)
    return passed, failed, names
