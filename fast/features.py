"""A frozen encoder's grids, computed once and kept: data_dir/{split}_features.npy, fp16 (N, h, w, D), for np.load.

{split}_features.json beside it says what they depend on.
"""
import collections
import json
import math

import numpy as np
import torch
from tqdm import tqdm

from utils import (UserError, alone, autocast_dtype, from_first_process, gather_lists, need_space, replacing,
                   weights_digest, write_text)


class KeptFeatures(torch.nn.Module):
    """Stands in for the encoder where batches begin with kept features, or with their rows, instead of pictures.

    Args:
        held: fp16 (N, h, w, D) on the device, of all pictures; None where the batches bring their own.
    """

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, given):
        """Args: fp16 (B, h, w, D), or where all are held rows int64 (B,). Returns: (B, h, w, D), as the encoder's."""
        return (given if self.held is None else self.held[given]).to(autocast_dtype(given.device))


def keep_features(dataset, encoder, runs, config, rank=0, world_size=1):
    """Let a data set give the frozen encoder's grids instead of pictures, computing those that are not kept yet.

    They are computed in float32, whatever the precision of training. All processes encode; the first one writes. A GPU
    holds them all where a quarter of its memory stays free for training.

    Args:
        dataset (CaptionDataset): its batches change. encoder (Encoder): its weights and buffers identify the features.
        runs (Module): what computes them: the same function, in float32. config (Config). rank, world_size (int).
    Returns:
        KeptFeatures, in the encoder's place.
    Raises:
        UserError: not enough disk space, another run is writing them, a value beyond fp16.
    """
    device = next(encoder.parameters()).device
    runs.eval()
    # The first picture's grid gives the shape, and shows whether the code still gives what is kept.
    first = encode(runs, dataset, range(1), device)[0]
    path, shape = dataset.path.with_name(f"{dataset.path.stem}_features.npy"), (len(dataset), *first.shape)
    key = features_key(dataset, encoder, config)
    reason = from_first_process(why_not_kept(path, key, shape, first) if rank == 0 else None)
    if reason:
        grids = encode_all(runs, dataset, config.batch_size, device, rank, world_size)
        if rank == 0:
            if path.exists():
                print(f"{path} {reason}: computing new features")
            write_features(path, key, shape, tqdm(grids, path.stem, -(-len(dataset) // config.batch_size)))
        else:
            collections.deque(grids, maxlen=0)
    from_first_process(None)  # by now it has named the file
    dataset.use_features(path)
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return KeptFeatures(dataset.hold_features(device, free - total // 4))


def encode_all(encoder, dataset, batch_size, device, rank, world_size):
    """The grids of all rows in their order, from all processes. Yields: fp16 arrays (B, h, w, D)."""
    for start in range(0, len(dataset), batch_size * world_size):
        rows = range(start, len(dataset))[rank * batch_size:(rank + 1) * batch_size]
        yield from gather_lists([encode(encoder, dataset, rows, device)] if rows else [])


@torch.no_grad()
def encode(encoder, dataset, rows, device):
    """The grids of consecutive rows (range). Returns: fp16 array (B, h, w, D). Raises: UserError: beyond fp16."""
    images = torch.from_numpy(dataset.images[rows.start:rows.stop].copy())
    grid = encoder(images.to(device)).half()
    if not grid.isfinite().all():
        names = ", ".join(dataset.image_ids[row] for row in rows)
        raise UserError(f"the encoder gives values that fp16 cannot hold (beyond 65504) for one of the pictures "
                        f"{names}: give --cache_features false")
    return grid.cpu().numpy()


def features_key(dataset, encoder, config):
    """What kept features depend on, besides the code: the encoder's weights and buffers, the pictures, their size."""
    return {"encoder": config.encoder, "image size": config.image_size, "pictures": dataset.images_digest,
            "encoder weights": weights_digest(encoder)}


def why_not_kept(path, key, shape, first):
    """Why a file of features cannot be used, in words; None where it can.

    Args:
        path (Path): of the array. key (dict): of features_key. shape (tuple): (N, h, w, D).
        first: the first picture's grid, fp16 (h, w, D).
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
        return f"cannot be used ({' '.join(str(error).split())})"


def write_features(path, key, shape, grids):
    """Write a file of features, and then its key: without that they do not count.

    Args:
        path (Path). key (dict), shape (tuple): see why_not_kept. grids: iterable of fp16 arrays (B, h, w, D), all rows.
    Raises:
        UserError: not enough disk space, or another run is writing them; nothing is left then.
    """
    size = 2 * math.prod(shape)
    with alone(path.with_suffix(".lock"), "--data_dir"), replacing(path, size) as temporary:
        need_space(path.parent, size, f"for {path}")
        path.with_suffix(".json").unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            header = dict(descr="<f2", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            for grid in grids:
                file.write(grid.tobytes())
    write_text(path.with_suffix(".json"), json.dumps(key, indent=1))
