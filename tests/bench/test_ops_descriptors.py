"""Descriptors of asynchronous products, followed through listings: pieces of ptxas 12.8's, and right ones."""

from __future__ import annotations

import pytest

from bench.ops.descriptors import wrong_descriptors

BASE = """
/*0100*/ S2UR UR4, SR_CgaCtaId ;
/*0110*/ UMOV UR5, 0x400 ;
/*0120*/ ULEA UR50, UR4, UR5, 0x18 ;
/*0130*/ USHF.R.U32.HI UR6, URZ, 0x4, UR50 ;
/*0140*/ USGXT.U32 UR6, UR6, 0xe ;
"""
RIGHT = (
    BASE
    + """
/*0150*/ UMOV UR7, 0x80000020 ;
/*0160*/ HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4].tnspB, RZ, !UPT ;
/*0170*/ UIADD3 UR10, UP1, UR6, 0x40, URZ ;
/*0180*/ UMOV UR6, URZ ;
/*0190*/ UIADD3.X UR7, UR6, -0x7fffffe0, URZ, UP1, !UPT ;
/*01a0*/ UMOV UR6, UR10 ;
/*01b0*/ HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR4].tnspB, R24 ;
/*01c0*/ UIADD3.64 UR10, UR6, 0x40, URZ ;
/*01d0*/ @P0 HGMMA.64x32x16.F32.BF16 R24, R48, gdesc[UR8].tnspB, R24, gsb0 ;
"""
)


def test_descriptors_that_are_right_are_taken() -> None:
    assert wrong_descriptors(RIGHT) == ()


# From a listing of gradient_kernel whose products read wrong operands on an H100.
SAME_BASE = """
/*0150*/ UMOV UR4, UR6 ;
/*53c0*/ UIADD3 UR14, UP0, UR4, 0x40, URZ ;
/*53e0*/ UIADD3 UR18, UP1, UR4, 0x40, URZ ;
/*5570*/ ULDC UR32, c[0x0][0x2dc] ;
/*5680*/ UIADD3.X UR15, UR4, -0x7fffffe0, URZ, UP0, !UPT ;
/*56a0*/ UIADD3.X UR19, UR4, -0x7fffffe0, URZ, UP1, !UPT ;
/*56c0*/ HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR12].tnspB, R24 ;
/*56d0*/ HGMMA.64x32x16.F32.BF16 R56, R40, gdesc[UR16].tnspB, R56 ;
"""


def test_a_low_word_taken_for_the_base_of_a_high_one_is_found() -> None:
    found = wrong_descriptors(BASE + SAME_BASE)
    assert [line.split(":")[0] for line in found] == ["56c0", "56d0"]
    assert found[0].endswith("UR15 is no constant")
    # With a 0 written in between the high words are right.
    assert wrong_descriptors(BASE + SAME_BASE.replace("ULDC UR32, c[0x0][0x2dc]", "UMOV UR4, URZ")) == ()


# From a listing of a kernel that ended in an illegal access on an H100: what it reads is written at the loop's end.
FROM_THE_ROUND_BEFORE = """
/*7ac0*/ R2UR UR45, R223 ;
/*7af0*/ R2UR UR44, R222 ;
/*aeb0*/ UIADD3 UR6, UP1, UR44, 0x40, URZ ;
/*aec0*/ UIADD3.X UR7, UR45, -0x7fffffe0, URZ, UP1, !UPT ;
/*aee0*/ HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR4].tnspB, R24 ;
/*bc50*/ UMOV UR35, URZ ;
/*bc70*/ IMAD.U32 R222, RZ, RZ, UR6 ;
/*bc80*/ IMAD.U32 R223, RZ, RZ, UR35 ;
/*bcc0*/ BRA 0x670 ;
"""
BEFORE = """
/*0150*/ IMAD.U32 R222, RZ, RZ, UR6 ;
/*0160*/ IMAD.MOV.U32 R223, RZ, RZ, RZ ;
"""


def test_what_only_the_round_before_has_written_is_found() -> None:
    (found,) = wrong_descriptors(BASE + FROM_THE_ROUND_BEFORE)
    assert found.endswith("UR6 was never written, UR7 was never written")
    assert wrong_descriptors(BASE + BEFORE + FROM_THE_ROUND_BEFORE) == ()
    # Something else has been there before.
    (found,) = wrong_descriptors(BASE + BEFORE.replace("RZ, RZ, RZ", "RZ, RZ, R9") + FROM_THE_ROUND_BEFORE)
    assert "UR7" in found
    other = "/*0150*/ FADD R222, R8, R9 ;\n/*0160*/ FADD R223, R8, R9 ;"
    (found,) = wrong_descriptors(BASE + other + FROM_THE_ROUND_BEFORE)
    assert found.endswith("UR7 is no constant")


@pytest.mark.parametrize(
    ("operands", "reads"),
    [("R24, R44, gdesc[UR8], R24", "UR10"), ("R24, gdesc[UR8], R24, gsb0", "UR8")],
)
def test_a_product_reads_one_descriptor_or_two(operands: str, reads: str) -> None:
    (found,) = wrong_descriptors(f"/*0100*/ HGMMA.64x64x16.F32.BF16 {operands} ;")
    assert found.split(": ")[2].startswith(f"{reads} was never written")


def test_a_difference_of_64_bits_keeps_its_high_word() -> None:
    code = """
/*0150*/ UMOV UR7, URZ ;
/*0160*/ UMOV UR14, 0xfffffffe ;
/*0170*/ UMOV UR15, 0x7fffffdf ;
/*0180*/ UIADD3.64 UR14, UR6, -UR14, URZ ;
/*0190*/ HGMMA.64x64x16.F32.BF16 R24, R68, gdesc[UR12], R24, gsb0 ;
"""
    assert wrong_descriptors(BASE + code) == ()
    assert wrong_descriptors(BASE + code.replace("UMOV UR15, 0x7fffffdf", "ULDC UR15, c[0x0][0x210]"))
