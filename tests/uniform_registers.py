"""Finds uniform registers that a kernel reads on a path on which nothing wrote them, in its machine code.

ptxas of CUDA 12.8 can compute the matrix descriptors of a tile for two loops before the first of them only,
which is skipped when it has nothing to do: the products of the second loop then read shared memory anywhere. No test of
results finds that reliably, since registers often hold what an earlier tile left in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?(\S+?)((?:\s[^;]*)?);(.*)")
_GUARD = re.compile(r"/\s+@")


def unwritten_reads(sass: str) -> list[str]:
    """The instructions of what ``nvdisasm -c`` printed that may read a uniform register before it is written."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif _INSTRUCTION.match(line):
            lines.append(line)
    reads, writes = zip(*map(_effects, lines))
    # The registers that every path to an instruction has written, as bits.
    written: list[int | None] = [None] * len(lines)
    written[0] = 0
    to_visit = [0]
    while to_visit:
        index = to_visit.pop()
        after = (written[index] or 0) | writes[index]
        for successor in _successors(lines, index, labels):
            before = written[successor]
            common = after if before is None else before & after
            if common != before:
                written[successor] = common
                to_visit.append(successor)
    return [line.strip() for line, known, read in zip(lines, written, reads) if known is not None and read & ~known]


def _effects(line: str) -> tuple[int, int]:
    """The uniform registers that an instruction reads and those that it writes, as bits."""
    match = _INSTRUCTION.match(line)
    assert match
    operation, operands = match[1], [operand.strip() for operand in re.split(r",(?![^\[]*\])", match[2])]
    writes = 0
    if operation.startswith(("U", "R2UR", "S2UR", "VOTEU", "REDUX")):
        # Predicates may come before and after the register that is written.
        position = next((i for i, operand in enumerate(operands) if not re.fullmatch(r"!?U?P[\dT]", operand)), 0)
        if destination := re.fullmatch(r"UR(\d+)", operands[position]):
            writes = _bits(int(destination[1]), 2 if re.search(r"WIDE|\.64", operation) else 1)
            operands.pop(position)
    reads = 0
    for position, operand in enumerate(operands):
        for kind, register, suffix in re.findall(r"(g?desc\[)?UR(\d+)(\.64)?", operand):
            first, width = int(register), {"gdesc[": 4, "desc[": 2}.get(kind, 2 if suffix else 1)
            if kind == "gdesc[" and re.fullmatch(r"R\d+", operands[1]):
                first, width = first + 2, 2  # The first factor comes from registers: only the second has a descriptor.
            if operation.startswith("SYNCS.EXCH.64") and position == len(operands) - 1:
                width = 2
            if dimensions := re.match(r"UTMALDG\.(\d)D", operation):
                width = 2 + int(dimensions[1]) if position == 0 else 2
            reads |= _bits(first, width)
    return reads, writes


def _bits(first: int, count: int) -> int:
    return (1 << count) - 1 << first


def _successors(lines: list[str], index: int, labels: dict[str, int]) -> Iterator[int]:
    match = _INSTRUCTION.match(lines[index])
    assert match
    operation = match[1].split(".")[0]
    targets = [labels[label] for label in re.findall(r"\.L_x_\d+", match[2] + match[3]) if label in labels]
    if operation in ("BRA", "BRX"):
        yield from targets
    ends = operation in ("BRA", "BRX", "EXIT", "RET") and not _GUARD.search(lines[index])
    # A branch may also name its predicate as an operand.
    if operation == "BRA" and "," in match[2]:
        ends = False
    if not ends and index + 1 < len(lines):
        yield index + 1
