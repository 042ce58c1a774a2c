"""A frozen encoder's grids, computed once and kept: data_dir/{split}_features.npy.

They are fp16 (N, h, w, D), for np.load. {split}_features.json beside it says what they depend on.
"""
import collections
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from datasets import CaptionDataset
from models import Encoder
from utils import (UserError, alone, autocast_dtype, from_first_process, gather_lists,
                   is_first_process, need_space, one_line, rank, replacing, weights_digest,
                   world_size, write_text)


class KeptFeatures(nn.Module):
    """Stands in for the encoder where batches begin with kept features, or their rows.

    `held` are those of all pictures, (N, h, w, D), on the device; None where batches have them.
    """

    def __init__(self, held: Tensor | None):
        super().__init__()
        self.held = held

    def forward(self, given: Tensor) -> Tensor:
        """fp16 (B, h, w, D), or where all are held rows, int64 (B,) -> (B, h, w, D)."""
        features = given if self.held is None else self.held[given]
        return features.to(autocast_dtype(given.device))


def keep_features(dataset: CaptionDataset, encoder: Encoder, runs_encoder: nn.Module,
                  config: Config) -> KeptFeatures:
    """Let a data set give the frozen encoder's grids instead of pictures, computed where need be.

    Features are known by the encoder's weights and computed by what runs in its place, in float32,
    whatever the precision of training. All processes encode; the first one writes. A GPU holds them
    all where a quarter of its memory stays free for training.

    Returns what runs in the encoder's place.

    Raises:
        UserError: not enough disk space, another run is writing them, a value beyond fp16.
    """
    device = next(encoder.parameters()).device
    runs_encoder.eval()
    # The first picture's grid gives the shape, and shows whether the code still gives what is kept.
    first = encode(runs_encoder, dataset, range(1), device)[0]
    path = dataset.path.with_name(f"{dataset.path.stem}_features.npy")
    shape = (len(dataset), *first.shape)
    key = features_key(dataset, encoder, config)
    reason = why_not_kept(path, key, shape, first) if is_first_process() else None
    reason = from_first_process(reason)
    if reason:
        grids = encode_all(runs_encoder, dataset, config.batch_size, device)
        if is_first_process():
            if path.exists():
                print(f"{path} {reason}: computing new features")
            batches = -(-len(dataset) // config.batch_size)
            write_features(path, key, shape, tqdm(grids, path.stem, batches))
        else:
            collections.deque(grids, maxlen=0)
    from_first_process(None)  # by now it has named the file
    dataset.use_features(path)
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return KeptFeatures(dataset.hold_features(device, free - total // 4))


def encode_all(encoder: nn.Module, dataset: CaptionDataset, batch_size: int,
               device: torch.device) -> Iterator[np.ndarray]:
    """The grids of all rows in their order, from all processes, in batches."""
    for start in range(0, len(dataset), batch_size * world_size()):
        rows = range(start, len(dataset))[rank() * batch_size:(rank() + 1) * batch_size]
        yield from gather_lists([encode(encoder, dataset, rows, device)] if rows else [])


@torch.no_grad()
def encode(encoder: nn.Module, dataset: CaptionDataset, rows: range,
           device: torch.device) -> np.ndarray:
    """The grids of consecutive rows, fp16 (B, h, w, D). Raises UserError beyond fp16."""
    images = torch.from_numpy(dataset.images[rows.start:rows.stop].copy())
    grid = encoder(images.to(device)).half()
    if not grid.isfinite().all():
        names = ", ".join(dataset.image_ids[row] for row in rows)
        raise UserError(f"the encoder gives values that fp16 cannot hold (beyond 65504) for one of "
                        f"the pictures {names}: give --cache_features false")
    return grid.cpu().numpy()


def features_key(dataset: CaptionDataset, encoder: Encoder, config: Config) -> dict:
    """What kept features depend on besides the code."""
    return {"encoder": config.encoder, "image size": config.image_size,
            "pictures": dataset.images_digest, "encoder weights": weights_digest(encoder)}


def why_not_kept(path: Path, key: dict, shape: tuple, first: np.ndarray) -> str | None:
    """Why a file of features cannot be used, in words; None where it can.

    `key` is of features_key, `shape` (N, h, w, D), `first` the first picture's grid.
    """
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for name, value in key.items():
            if found[name] != value:
                return f"does not fit this run's {name}"
        array = np.lib.format.open_memmap(path, mode="r")
        if array.shape != shape or array.dtype != np.float16:
            return "is of another shape"
        # Devices and batch sizes round differently, but not by a hundredth.
        if not np.allclose(array[0], first, rtol=0, atol=1e-2 * np.abs(first).max()):
            return "does not hold what this encoder gives for the first picture"
        return None
    except Exception as error:  # NumPy and JSON raise anything on a file that is not theirs
        return f"cannot be used ({one_line(error)})"


def write_features(path: Path, key: dict, shape: tuple, grids: Iterable[np.ndarray]) -> None:
    """Write a file of features, and then its key: without that they do not count.

    Raises:
        UserError: not enough disk space, or another run is writing them; nothing is left then.
    """
    size = 2 * math.prod(shape)
    with alone(path.with_suffix(".lock"), "--data_dir"), replacing(path, size) as temporary:
        need_space(path.parent, size, f"for {path}")
        path.with_suffix(".json").unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for grid in grids:
                file.write(grid.tobytes())
    write_text(path.with_suffix(".json"), json.dumps(key, indent=1))
