"""The pipeline of NVIDIA DALI: files in, squares out. No random number, no file, no shard in it.

Everything that differs from sample to sample is fed in as numbers of a `Cut`, so an image looks the
same whatever the batch, the number of ranks or the threads. DALI's readers and its random operators
are not used: they know neither sample ids nor where an epoch stopped.

    encoded       uint8 [bytes]          a JPEG or PPM file
    start, shape  int32 [2] each         top, left and height, width of the decoded area
    resized       float32 [2]            height, width that it is resized to, antialiased
    corner        int32 [2]              top, left of the square in that
    flip          int32                  1: mirror left-right
    ->            uint8 [size, size, 3]  RGB

Pillow's resize is INTERP_LINEAR with antialias and without `subpixel_scale`; without
`adjust_orientation` EXIF is left alone, as torchvision leaves it.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.data.sources.cuts import Cut
from fastkd.errors import UserError

__all__ = ["FILTERS", "build_graph", "inputs_of", "outcome_of", "require_dali"]

FILTERS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}
"""Filters of Pillow that DALI has too; images with another one are resized by Pillow."""


def require_dali() -> None:
    """UserError without DALI."""
    try:
        import_module("nvidia.dali")
    except ImportError as error:
        raise UserError(
            'data.backend=dali needs NVIDIA DALI: pip install "fastkd[dali]" (CUDA 13) or '
            f'"fastkd[dali-cuda12]", or set data.backend=torch ({error})'
        ) from None


def build_graph(
    *, size: int, interpolation: str, rows: int, threads: int, device_id: int | None
) -> Any:
    """A built pipeline for batches of at most `rows`; device_id None: on the CPU.

    size: side of the squares in pixels.
    """
    # Its stubs do not know its types, and without it there are none.
    dali: Any = import_module("nvidia.dali")
    fn, types = dali.fn, dali.types

    # One batch at a time: a deeper queue wants several to be fed before the first comes out.
    @dali.pipeline_def(
        batch_size=rows, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )
    def graph() -> Any:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
        shape = fn.external_source(name="shape", ndim=1, dtype=types.INT32)
        resized = fn.external_source(name="resized", ndim=1, dtype=types.FLOAT)
        corner = fn.external_source(name="corner", ndim=1, dtype=types.INT32)
        flip = fn.external_source(name="flip", ndim=0, dtype=types.INT32)
        pictures = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        pictures = fn.resize(
            pictures,
            size=resized,
            interp_type=getattr(types, FILTERS[interpolation]),
            antialias=True,
            subpixel_scale=False,
        )
        pictures = fn.slice(pictures, start=corner, shape=[size, size], axes=[0, 1])
        return fn.flip(pictures, horizontal=flip)

    pipeline = graph()
    pipeline.build()
    return pipeline


def outcome_of(pipeline: Any, device: torch.device) -> Tensor:
    """The next batch of a pipeline, uint8 [N, size, size, 3], where it was made.

    RuntimeError: DALI cannot decode one of the files.
    """
    # In the order of torch's stream, which reads them: also their memory is given back in it.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (pictures,) = pipeline.share_outputs(cuda_stream=stream)
    try:
        # A copy: DALI writes the next batch into the same memory.
        return torch.from_dlpack(pictures.as_tensor()).clone()
    finally:
        pipeline.release_outputs()


def inputs_of(contents: Sequence[bytes], cuts: Sequence[Cut]) -> dict[str, list[np.ndarray]]:
    """A batch as the graph's inputs."""
    return {
        "encoded": [np.frombuffer(content, np.uint8) for content in contents],
        "start": [np.array([cut.box[1], cut.box[0]], np.int32) for cut in cuts],
        "shape": [np.array([cut.box[3], cut.box[2]], np.int32) for cut in cuts],
        "resized": [np.array([cut.resized[1], cut.resized[0]], np.float32) for cut in cuts],
        "corner": [np.array([cut.corner[1], cut.corner[0]], np.int32) for cut in cuts],
        "flip": [np.array(int(cut.flip), np.int32) for cut in cuts],
    }
