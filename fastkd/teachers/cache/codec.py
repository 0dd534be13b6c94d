"""Answers of a teacher as bytes: whole in one of three types, or the top classes of each row.

Shape suffixes: N rows, B bytes, C classes, K classes that are kept. Both directions are torch
operations, so they run where the answers are.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fastkd.errors import UserError

__all__ = ["FORMATS", "CacheFormat", "Codec", "Column", "codec_of"]

CacheFormat = Literal["full", "fp16", "bf16", "top16", "top8"]
"""How answers are kept; `full`: in the type in which the teacher gives them, without loss."""
FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)

_STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPES = {str(kind): kind for kind in (torch.float32, torch.float16, torch.bfloat16)}
_LARGEST = 1 << 28
"""Numbers of an answer to one image."""
_LEAST = 1e-7
"""Of the probability that is spread over the classes that are not kept."""


_Side = Annotated[int, Field(ge=1, le=1 << 24)]


class Column(BaseModel):
    """One kind of answer, such as the logits of x, as the manifest of a cache describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[_Side, ...] = Field(min_length=1, max_length=8)
    """Of the answer to one image."""
    dtype: Literal["torch.float32", "torch.float16", "torch.bfloat16"]
    """Type in which the teacher gives it."""
    channels_last: bool = False
    """Memory layout of maps."""
    images: int = Field(default=1, ge=1)
    """Images of this view for each of the batch: more than one in a pool of x'."""
    format: CacheFormat = "full"
    top: int | None = Field(default=None, ge=1)
    """Classes kept by `top16` and `top8`."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if math.prod(self.shape) > _LARGEST:
            raise ValueError(f"answers of {math.prod(self.shape):,} numbers")
        if (self.top is not None) != self.format.startswith("top"):
            raise ValueError(f"top={self.top} with the format {self.format}")
        if self.top is not None and (self.shape[1:] or self.top >= math.prod(self.shape)):
            raise ValueError(f"top={self.top} of {list(self.shape)}")
        if self.channels_last and len(self.shape) != 3:
            raise ValueError(f"channels_last, and {list(self.shape)} is no map")
        return self

    @property
    def type(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return _DTYPES[self.dtype]

    @classmethod
    def of(
        cls, answers: Tensor, *, images: int = 1, format: CacheFormat = "full", top: int = 0
    ) -> "Column":
        """The column of some answers [N, ...].

        UserError if `top` is no part of their classes, or for numbers of another type.
        """
        shape = tuple(answers.shape[1:])
        if str(answers.dtype) not in _DTYPES:
            raise UserError(
                f"the teacher answers in {answers.dtype}, and a cache keeps {', '.join(_DTYPES)}: "
                f"leave out teacher.cache"
            )
        if format in ("top16", "top8") and not 0 < top < math.prod(shape):
            raise UserError(
                f"teacher.cache_top={top} of {math.prod(shape)} classes: keep at least one and not "
                f"all, or keep all with teacher.cache_format=full, fp16 or bf16"
            )
        return cls.model_validate(
            {
                "shape": shape,
                "dtype": str(answers.dtype),
                "channels_last": answers.dim() == 4
                and answers.is_contiguous(memory_format=torch.channels_last),
                "images": images,
                "format": format,
                "top": top if format in ("top16", "top8") else None,
            }
        )


class Codec(Protocol):
    """Rows <-> bytes."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        ...

    def encode(self, rows_N: Tensor) -> Tensor:
        """Rows [N, ...] -> uint8 [N, B]."""
        ...

    def decode(self, bytes_NB: Tensor) -> Tensor:
        """uint8 [N, B] -> rows [N, ...], on the same memory where nothing is converted."""
        ...


def codec_of(column: Column) -> Codec:
    """The codec of a column."""
    return _Whole(column) if column.top is None else _Top(column, column.top)


@dataclass(frozen=True)
class _Whole:
    column: Column

    @property
    def stored(self) -> torch.dtype:
        return _STORED.get(self.column.format, self.column.type)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.column.shape) * self.stored.itemsize

    def encode(self, rows_N: Tensor) -> Tensor:
        flat_NV = rows_N.reshape(len(rows_N), -1).to(self.stored)
        return flat_NV.contiguous().view(torch.uint8)

    def decode(self, bytes_NB: Tensor) -> Tensor:
        rows_N = bytes_NB.view(self.stored).view(len(bytes_NB), *self.column.shape)
        rows_N = rows_N.to(self.column.type)
        if self.column.channels_last:
            return rows_N.contiguous(memory_format=torch.channels_last)
        return rows_N


@dataclass(frozen=True)
class _Top:
    """The K largest probabilities of each row; what is left is spread evenly over the others.

    Marginal smoothing of FKD (Shen and Xing 2022, arXiv:2112.01528). Logits come back
    as natural logarithms of probabilities, fp32. `top8` keeps the logarithms as 256 levels between
    the largest and the smallest that is kept, which are fp16.
    """

    column: Column
    top: int

    @property
    def num_classes(self) -> int:
        return self.column.shape[0]

    @property
    def _index(self) -> torch.dtype:
        if self.num_classes <= 1 << 8:
            return torch.uint8
        return torch.int16 if self.num_classes <= 1 << 15 else torch.int32

    @property
    def _parts(self) -> tuple[int, int]:
        """Bytes of the values and of the class numbers of a row."""
        values = 2 * self.top if self.column.format == "top16" else 4 + self.top
        # Rows begin at a multiple of four bytes, as the class numbers do.
        return values + -values % 4, self.top * self._index.itemsize

    @property
    def row_bytes(self) -> int:
        row = sum(self._parts)
        return row + -row % 4

    def encode(self, rows_N: Tensor) -> Tensor:
        log_p_NK, class_NK = rows_N.float().log_softmax(1).topk(self.top, dim=1)
        values, classes = self._parts
        row_NB = rows_N.new_zeros(len(rows_N), self.row_bytes, dtype=torch.uint8)
        kept = _bytes(log_p_NK.half()) if self.column.format == "top16" else _levels(log_p_NK)
        row_NB[:, : kept.shape[1]] = kept
        row_NB[:, values : values + classes] = _bytes(class_NK.to(self._index))
        return row_NB

    def decode(self, bytes_NB: Tensor) -> Tensor:
        values, classes = self._parts
        class_NK = bytes_NB[:, values : values + classes].contiguous().view(self._index).long()
        # A file may hold any number.
        class_NK = class_NK.clamp(0, self.num_classes - 1)
        if self.column.format == "top16":
            log_p_NK = bytes_NB[:, : 2 * self.top].contiguous().view(torch.float16).float()
        else:
            ends_N2 = bytes_NB[:, :4].contiguous().view(torch.float16).float()
            level_NK = bytes_NB[:, 4 : 4 + self.top].float() / 255
            log_p_NK = ends_N2[:, :1] + level_NK * (ends_N2[:, 1:] - ends_N2[:, :1])
        left_N = (1.0 - log_p_NK.exp().sum(1)).clamp(min=_LEAST)
        each_N = (left_N / (self.num_classes - self.top)).log()
        log_p_NC = each_N[:, None].repeat(1, self.num_classes)
        return log_p_NC.scatter_(1, class_NK, log_p_NK)


def _bytes(rows_NV: Tensor) -> Tensor:
    return rows_NV.contiguous().view(torch.uint8)


def _levels(log_p_NK: Tensor) -> Tensor:
    """Largest and smallest as fp16, then 256 levels between them, uint8 [N, 4 + K]."""
    ends_N2 = torch.stack([log_p_NK[:, 0], log_p_NK[:, -1]], 1).half()
    first_N1, last_N1 = ends_N2.float().split(1, 1)
    share_NK = (log_p_NK - first_N1) / (last_N1 - first_N1).clamp(max=-1e-6)
    return torch.cat([_bytes(ends_N2), (share_NK * 255).round().clamp(0, 255).byte()], 1)
