"""Which precision each part gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlm_edge.errors import SettingError
from vlm_edge.export.precision import PrecisionPlan

PARTS = {"vision": False, "connector": False, "llm": True}  # weight-only or not


def of(plan: PrecisionPlan) -> tuple[str, ...]:
    plan.check(PARTS)
    return tuple(plan.of(name, weight_only) for name, weight_only in PARTS.items())


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (PrecisionPlan(), ("fp32", "fp32", "fp32")),
        (PrecisionPlan.uniform("fp32"), ("fp32", "fp32", "fp32")),
        (PrecisionPlan.uniform("int8"), ("int8", "int8", "int8")),
        (PrecisionPlan.uniform("int4"), ("int8", "int8", "int4")),
        (PrecisionPlan.parse("llm=int4"), ("fp32", "fp32", "int4")),
        (PrecisionPlan.parse(" vision = int8 ,llm=int8"), ("int8", "fp32", "int8")),
        (PrecisionPlan.parse("vision=int8,connector=fp32,llm=int4"), ("int8", "fp32", "int4")),
        (PrecisionPlan("int4", {"vision": "fp32"}), ("fp32", "int8", "int4")),
    ],
)
def test_precisions_by_part(plan: PrecisionPlan, expected: tuple[str, ...]) -> None:
    assert of(plan) == expected


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PrecisionPlan.uniform("int2"), ("'int2'", "fp32, int8, int4")),
        (lambda: PrecisionPlan.parse("vision=int16"), ("vision", "'int16'", "fp32, int8, int4")),
        (lambda: PrecisionPlan.parse("int8"), ("'int8'", "vision=int8")),
        (lambda: PrecisionPlan.parse(""), ("''", "PART=PRECISION")),
        (lambda: PrecisionPlan.parse("vision=int8,"), ("PART=PRECISION",)),
        (lambda: PrecisionPlan.parse("=int8"), ("'=int8'",)),
        (lambda: PrecisionPlan.parse("llm=int8,llm=int4"), ("llm", "twice")),
        (lambda: of(PrecisionPlan.parse("lm=int8")), ("no part lm", "vision, connector, llm")),
        (lambda: of(PrecisionPlan.parse("vision=int4")), ("vision=int4", "vision=int8")),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], said: tuple[str, ...]) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    for word in said:
        assert word in str(caught.value)
