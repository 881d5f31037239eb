"""Which precision each part is exported in, and how far that may move its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from vlm_edge.errors import SettingError
from vlm_edge.runtime.manifest import Precision

KNOWN: tuple[Precision, ...] = get_args(Precision)
LANGUAGE_ONLY = ("int4", "w8a8")  # other parts are W8A8 under int8


@dataclass(frozen=True)
class PrecisionPlan:
    """A precision for every part, and exceptions by name.

    INT4 is for language models (weights only); under a default of int4 other parts get int8.
    """

    default: Precision = "fp32"
    parts: Mapping[str, Precision] = field(default_factory=dict)

    @classmethod
    def uniform(cls, precision: str) -> PrecisionPlan:
        return cls(_known(precision, "the precision"))

    @classmethod
    def parse(cls, text: str) -> PrecisionPlan:
        """From `vision=int8,connector=fp32,llm=int4`; parts left out stay in full precision.

        Raises:
            SettingError: not of this form, or a precision we do not have.
        """
        parts: dict[str, Precision] = {}
        for item in text.split(","):
            name, equals, precision = (piece.strip() for piece in item.partition("="))
            if not name or not equals:
                raise SettingError(f"{item!r} is not PART=PRECISION, such as vision=int8")
            if name in parts:
                raise SettingError(f"{name} is given twice")
            parts[name] = _known(precision, name)
        return cls("fp32", parts)

    def of(self, part: str, weight_only: bool) -> Precision:
        """The precision of a part; `weight_only` as in `Part`."""
        if part not in self.parts and self.default == "int4" and not weight_only:
            return "int8"
        return self.parts.get(part, self.default)

    def check(self, parts: Mapping[str, bool]) -> None:
        """Is every exception a part of the architecture, in a precision it has?

        Args:
            parts: by name, whether the part is weight-only (`Part.weight_only`).

        Raises:
            SettingError: no.
        """
        unknown = self.parts.keys() - parts.keys()
        if unknown:
            raise SettingError(
                f"no part {', '.join(sorted(unknown))}; this architecture has {', '.join(parts)}"
            )
        for name, precision in self.parts.items():
            if precision in LANGUAGE_ONLY and not parts[name]:
                raise SettingError(
                    f"{name}={precision}: only language models have {precision}; use {name}=int8"
                )


@dataclass(frozen=True)
class Budgets:
    """How far quantization may move what the parts give; None is the part's own default.

    Attributes:
        max_error: relative error (root mean square) of the features that the vision encoder and the
            connector give, each by itself (`static.MAX_ERROR`).
        kl: KL divergence of the language model's next token, nats (`BUDGET` in
            `weight_only_int4`, `weight_only_int8` and `w8a8`).

    Raises:
        SettingError: one is not above 0.
    """

    max_error: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-error", self.max_error), ("--budget", self.kl)):
            if value is not None and not value > 0:  # NaN too
                raise SettingError(
                    f"{option} is {value:g}: it has to be above 0, since every quantized layer adds "
                    "some error; for none, export in full precision"
                )

    def check(self, parts: Mapping[str, tuple[Precision, bool]]) -> None:
        """Is there a part for each budget?

        Args:
            parts: by name, its precision and whether it is weight-only (`Part.weight_only`).

        Raises:
            SettingError: no.
        """
        quantized = {
            weight_only for precision, weight_only in parts.values() if precision != "fp32"
        }
        if self.max_error is not None and False not in quantized:
            raise SettingError(
                "--max-error was given, but neither vision nor connector is quantized; use --int8"
            )
        if self.kl is not None and True not in quantized:
            raise SettingError(
                "--budget was given, but the language model is not quantized; use --int8 or --int4"
            )


def _known(precision: str, what: str, known: Iterable[Precision] = KNOWN) -> Precision:
    for name in known:
        if name == precision:
            return name
    raise SettingError(f"{what} is {precision!r}; known are {', '.join(KNOWN)}")
