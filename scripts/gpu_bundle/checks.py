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


def row_errors(got, exact):
    """Largest difference of each row relative to the largest magnitude of all; infinite for other shapes or values that are not
    finite."""
    rows, columns = exact[0]
    if got[0] != exact[0]:
        return [float("inf")] * rows
    scale = max(map(abs, exact[1]))
    errors = []
    for row in range(rows):
        span = slice(row * columns, (row + 1) * columns)
        differences = [abs(a - b) for a, b in zip(got[1][span], exact[1][span])]
        errors.append(max(differences) / scale if all(d <= 1e30 for d in differences) else float("inf"))
    return errors


# As Golden::assert_close_in_bf16 of crates/testkit: rounding decides which expert a row visits whose router all but ties.
ROUTER_TIE, ROUTER_TIE_LIMIT = 0.03, 0.2


def within(errors, margins, tolerance):
    """Whether each row's error is within the tolerance, or the wider one of a row whose router margin is a tie."""
    limits = (max(tolerance, ROUTER_TIE_LIMIT) if margin < ROUTER_TIE else tolerance for margin in margins)
    return all(error <= limit for error, limit in zip(errors, limits, strict=True))


def test_summary(output):
    """`(passed, failed, names that failed)` of what a Rust test program prints."""
    passed = failed = 0
    for match in re.finditer(r"^test result: \w+\. (\d+) passed; (\d+) failed", output, re.MULTILINE):
        passed, failed = passed + int(match[1]), failed + int(match[2])
    names = re.findall(r"^test (\S+) \.\.\. FAILED$", output, re.MULTILINE)
    return passed, failed, names
