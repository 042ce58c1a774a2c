"""A frozen encoder's grids, computed once and kept: data_dir/{split}_features.npy, fp16 (N, h, w, D), for np.load.

{split}_features.json beside it says what they depend on and how many rows are done; until all are, both names end in
.tmp.
"""
import hashlib
import itertools
import json
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from utils import UserError, autocast_dtype, from_first_process, gather_lists, need_space, reason_of, write_text

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

SYNC_ROWS = 2048  # rows that a killed run may lose; each synchronisation waits for the disk


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

    They are computed in float32, whatever the precision of training. All processes encode; the first one writes, in the
    order of the rows, so that a run of any number of processes resumes what another left. A GPU holds them all where a
    quarter of its memory stays free for training.

    Args:
        dataset (CaptionDataset): its batches change. encoder (Encoder): its weights and buffers identify the features.
        runs (Module): what computes them: the same function, in float32. config (Config). rank, world_size (int).
    Returns:
        KeptFeatures, in the encoder's place.
    Raises:
        UserError: not enough disk space, another run is writing them, a value beyond fp16.
    """
    device, n, size = next(encoder.parameters()).device, len(dataset), config.batch_size
    runs.eval()
    # The first picture's grid gives the shape, and shows whether the code still gives what is kept.
    first = encode(runs, dataset, range(1), device)[0]
    store = FeatureStore(dataset.path.with_name(f"{dataset.path.stem}_features.npy"),
                         features_key(dataset, encoder, config), (n, *first.shape))
    done = from_first_process(store.begin(first) if rank == 0 else None)
    with tqdm(total=n, initial=done, desc=store.path.stem, unit="picture", disable=rank > 0 or done == n) as bar:
        while done < n:
            rows = range(done, n)[rank * size:(rank + 1) * size]
            for grid in gather_lists([encode(runs, dataset, rows, device)] if rows else []):
                if rank == 0:
                    store.write(done, grid)
                done += len(grid)
                bar.update(len(grid))
    from_first_process(None)  # by now it has renamed the file
    dataset.use_features(store.path)
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return KeptFeatures(dataset.hold_features(device, free - total // 4))


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
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(encoder.named_parameters(), encoder.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.detach().cpu().numpy().tobytes())
    return {"encoder": config.encoder, "image size": config.image_size, "pictures": dataset.images_digest,
            "encoder weights": digest.hexdigest()}


class FeatureStore:
    """The features of one split on the disk, as the first process reads and writes them.

    Args:
        path (Path): of the array. key (dict): of features_key. shape (tuple): (N, h, w, D).
    """

    def __init__(self, path, key, shape):
        self.path, self.key_path, self.key, self.shape = path, path.with_suffix(".json"), key, shape
        self.temporary, self.temporary_key = (p.with_name(f"{p.name}.tmp") for p in (path, self.key_path))

    def begin(self, first):
        """Find out how many rows are done; unless all are, open the temporary file for `write`.

        Args: first: the first picture's grid, fp16 (h, w, D). Returns: int.
        Raises: UserError: not enough disk space, or not writable; another run is writing it.
        """
        n = self.shape[0]
        try:
            if not self.temporary.exists() and not self.key_path.exists() and self.temporary_key.exists():
                os.replace(self.temporary_key, self.key_path)  # a run was killed between its two renames
            what, done = self.examine(self.path, self.key_path, first)
            if done == n:
                return n
            self.open_alone()
            if self.path.exists():
                print(f"{self.path} {what or 'is not complete'}: computing new features")
            what, done = self.examine(self.temporary, self.temporary_key, first)
            if what and self.temporary.stat().st_size:
                print(f"{self.temporary} {what}: starting again")
            done = min(done, n - 1)  # writing the last row renames the file
            need_space(self.path.parent, 2 * math.prod(self.shape) * (1 - done / n), f"for {self.path}")
            if not done:
                self.write_key(0)  # first: what is there now must not be counted
                np.lib.format.open_memmap(self.temporary, "w+", np.float16, shape=self.shape)
            return done
        except OSError as error:
            raise self.not_written(error) from None

    def open_alone(self):
        """Open the temporary file, a new one or what a killed run left, unless another run has it open."""
        self.temporary.touch()
        self.file = open(self.temporary, "r+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = os.path.samestat(os.fstat(self.file.fileno()), self.temporary.stat())
        except (BlockingIOError, FileNotFoundError):  # the latter: it has just been renamed
            is_free = False
        if not is_free:
            raise UserError(f"{self.temporary}: another run is writing these features; start again when it is done")

    def write(self, start, grid):
        """Write rows; they count as done once they are safely on the disk. The last ones rename the file.

        Args: start (int). grid: fp16 array (B, h, w, D).
        Raises: UserError: the disk is full, or the like; what is done is kept for the next run.
        """
        stop, n = start + len(grid), self.shape[0]
        try:
            self.file.seek(-grid[0].nbytes * (n - start), os.SEEK_END)
            self.file.write(grid.tobytes())
            if start // SYNC_ROWS < stop // SYNC_ROWS or stop == n:
                self.file.flush()
                os.fsync(self.file.fileno())  # before the count, which must not outlive the rows
                self.write_key(stop)
            if stop == n:
                if not fcntl:
                    self.file.close()  # Windows renames no open file; elsewhere it stays locked until it is renamed
                self.key_path.unlink(missing_ok=True)  # the old array's must never be beside the new one
                os.replace(self.temporary, self.path)
                os.replace(self.temporary_key, self.key_path)
                self.file.close()
        except OSError as error:
            raise UserError(f"{self.not_written(error)}: what is done is kept, so start again once that is fixed"
                            ) from None

    def examine(self, path, key_path, first):
        """Compare an array and its key with what is wanted.

        Returns: str, why it cannot be used, or None; int: how many rows of it can.
        """
        try:
            found = json.loads(key_path.read_text(encoding="utf-8"))
            for name, value in self.key.items():
                if found[name] != value:
                    return f"does not fit this run's {name}", 0
            array = np.lib.format.open_memmap(path, mode="r")
            rows = max(int(found["rows"]), 0)
            if array.shape != self.shape or array.dtype != np.float16:
                return "is of another shape", 0
            # Devices and batch sizes round differently, but not by a hundredth.
            if rows and not np.allclose(array[0], first, rtol=0, atol=1e-2 * np.abs(first).max()):
                return "does not hold what this encoder gives for the first picture", 0
            return None, rows
        except Exception as error:  # NumPy and JSON raise anything on a file that is not theirs
            return f"cannot be used ({' '.join(str(error).split())})", 0

    def write_key(self, rows):
        write_text(self.temporary_key, json.dumps({**self.key, "rows": rows}, indent=1))

    def not_written(self, error):
        return UserError(f"{self.path} could not be written ({reason_of(error)})")
