"""Follows what Hopper's asynchronous matrix products are told of their operands, through a kernel's machine code.

A product (HGMMA) finds an operand in shared memory by a descriptor: 64 bits in two of the 63 registers that a warp's
threads share, of which the low word says where, and the high word is a constant of how it lies there. Where those
registers are short, ptxas 12.8 has been seen to make wrong ones. It handed two products the same base, which it also
read as the 0 of the high word::

    UIADD3   UR14, UP0, UR4, 0x40          low words of two descriptors, of different tensors
    UIADD3   UR18, UP1, UR4, 0x40
    UIADD3.X UR15, UR4, -0x7fffffe0, UP0   their high words

And in a loop it took what the round before had left, which in the first round is nothing::

    R2UR     UR44, R222                    nothing has written R222 yet
    UIADD3   UR6, UP1, UR44, 0x40
    ...
    IMAD.U32 R222, RZ, RZ, UR34            at the loop's end

The products then read other memory than they should, with no error or with an illegal address. PTX is right, the
interpreter is right, and so is memcheck where the wrong address happens to exist. So each descriptor is worked out as
the code does, in the order of the listing, once through every loop: its high word must be a constant, and nothing in it
may come from a register that nothing has written. Other instructions than those that descriptors are made by give
"something", which a low word may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORD = 2**32
SUMS = {"UIADD3", "UIADD3.X"}
"""Addresses of shared memory are far from the end of a word, so none of these carries."""
MOVES = {"MOV", "UMOV", "IMAD.MOV.U32", "IMAD.U32", "R2UR"}


@dataclass(frozen=True)
class Word:
    """What a register holds: a constant, something (None), or nothing that this code wrote."""

    value: int | None = None
    unset: bool = False


SOMETHING, NOTHING = Word(), Word(unset=True)


def wrong_descriptors(sass: str) -> tuple[str, ...]:
    """Asynchronous products of a listing with a descriptor that can't be right."""
    registers: dict[str, Word] = {}
    wrong = []
    for place, operation, operands in _instructions(sass):
        if operation.startswith("HGMMA"):
            bad = [name for low, high in _descriptors(operands) for name in _strange(registers, low, high)]
            if bad:
                wrong.append(f"{place}: {operation} {', '.join(operands)}: {', '.join(bad)}")
        _follow(registers, operation, operands)
    return tuple(wrong)


def _instructions(sass: str) -> Iterator[tuple[str, str, list[str]]]:
    """Where each stands, its operation and its operands; that it may be left out by a predicate is left out here."""
    for found in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Za-z0-9_.]+)(?: ([^;]*?))? ?;", sass):
        operands = [text.strip().replace(".reuse", "") for text in (found[3] or "").split(",")]
        yield found[1], found[2], operands


def _descriptors(operands: list[str]) -> list[tuple[str, str]]:
    """The pairs of uniform registers that a product reads: of both operands, or of the second alone."""
    first = next((int(found[1]) for text in operands if (found := re.match(r"gdesc\[UR(\d+)\]", text))), None)
    if first is None:
        return []
    from_registers = re.fullmatch(r"R\d+", operands[1]) is not None
    pairs = [(first + 2, first + 3)] if from_registers else [(first, first + 1), (first + 2, first + 3)]
    return [(f"UR{low}", f"UR{high}") for low, high in pairs]


def _strange(registers: dict[str, Word], low: str, high: str) -> list[str]:
    """What is wrong with a descriptor."""
    found = [f"{name} was never written" for name in (low, high) if registers.get(name, NOTHING).unset]
    if not found and registers[high].value is None:
        found.append(f"{high} is no constant")
    return found


def _follow(registers: dict[str, Word], operation: str, operands: list[str]) -> None:
    """Do what an instruction does to the registers that it writes."""
    targets = _targets(operation, operands)
    if not targets:
        return
    base = operation.split(".", 1)[0]
    sources = [text for text in operands[1:] if not re.fullmatch(r"!?U?P(?:T|\d+)", text)]
    uniform = targets[0].startswith("U")
    if operation == "UIADD3.64":
        pairs = [_pair(registers, text) for text in sources]
        for i, target in enumerate((targets[0], _after(targets[0], 1))):
            registers[target] = _sum([pair[i] for pair in pairs])
    elif operation in SUMS:
        registers[targets[0]] = _sum([_read(registers, text) for text in sources])
    elif operation in MOVES and all(text in ("RZ", "URZ") for text in sources[:-1]):
        registers[targets[0]] = _read(registers, sources[-1])
    elif base == "CS2R":
        for target in targets:
            registers[target] = Word(0)
    elif uniform:
        words = [_read(registers, text) for text in sources if re.match(r"-?[~|]?UR", text)]
        for target in targets:
            registers[target] = NOTHING if any(word.unset for word in words) else SOMETHING
    else:
        # What else a thread's own registers hold is no descriptor, unless a register is read before it is written.
        for target in targets:
            registers[target] = SOMETHING


def _targets(operation: str, operands: list[str]) -> list[str]:
    """The registers that an instruction writes; a few more of a thread's own where it may be wide."""
    if operation.startswith(("ST", "RED", "BAR", "MEMBAR", "UTMA", "UBLKCP")):
        return []
    target = next((text for text in operands[:2] if not re.fullmatch(r"!?U?P(?:T|\d+)", text)), "")
    if not re.fullmatch(r"U?R\d+", target):
        return []
    if target.startswith("U"):
        return [target, *([_after(target, 1)] if ".64" in operation and operation != "UIADD3.64" else [])]
    product = re.match(r"HGMMA\.64x(\d+)x", operation)
    count = int(product[1]) // 2 if product else 4 if _is_wide(operation) else 1
    return [_after(target, i) for i in range(count)]


def _is_wide(operation: str) -> bool:
    return re.search(r"\.128|\.64|WIDE|^HMMA|^LDSM|^CS2R", operation) is not None


def _after(register: str, count: int) -> str:
    return re.sub(r"\d+", lambda found: str(int(found[0]) + count), register)


def _pair(registers: dict[str, Word], text: str) -> tuple[Word, Word]:
    """Both words of a 64-bit operand, the low one first."""
    if not re.fullmatch(r"-?UR\d+", text):
        low = _read(registers, text)
        return low, Word(WORD - 1) if text.startswith("-") else Word(0)
    name = text.removeprefix("-")
    low, high = _read(registers, name), _read(registers, _after(name, 1))
    if name == text or low.value is None or high.value is None:
        return low, high
    negative = -(high.value * WORD + low.value) % WORD**2
    return Word(negative % WORD), Word(negative // WORD)


def _read(registers: dict[str, Word], text: str) -> Word:
    if text in ("RZ", "URZ"):
        return Word(0)
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Word(int(text, 16) % WORD)
    if re.fullmatch(r"U?R\d+", text):
        return registers.get(text, NOTHING)
    return SOMETHING


def _sum(words: list[Word]) -> Word:
    if any(word.unset for word in words):
        return NOTHING
    values = [word.value for word in words]
    return Word(sum(value for value in values if value is not None) % WORD) if None not in values else SOMETHING
