"""Export a checkpoint as ONNX, for programs without PyTorch.

    python deploy/export.py models/photographs.pth.tar --out exported

FOLDER then has all that deploy/captioner.py needs; docs/deploy.md. B pictures, K beams of each:

    encoder.onnx  images, uint8 (B, S, S, 3) -> features_0, features_1, h, c
    decoder.onnx  words, int32 (B, K), the last of each beam; h, c (B, K, H); features_0, features_1
                  -> log_probs (B, K, V), h_next, c_next, alpha (B, K, P)
    model.json    words by id, and all else that making a caption takes
"""
import contextlib
import json
import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

from utils import UserError, one_line, reason_of, run_script  # noqa: E402

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import RELEASED, open_checkpoint  # noqa: E402
from config import Config, new_parser  # noqa: E402
from datasets import (END, PICTURE_SUFFIXES, START, is_picture_name, kind_of,  # noqa: E402
                      read_image, word_list)
from decoding import generate, never_generated  # noqa: E402
from deploy.captioner import FORMAT_VERSION, Captioner  # noqa: E402
from models import pixel_positions  # noqa: E402
from visualize import heat_weights  # noqa: E402

OPSET = 18
BEAM_SIZE = 3  # of captioner.py, unless told otherwise; demo.py's and eval.py's
RANDOM_PICTURES = 4
COMPARED_STEPS = 3
TOLERANCE = 1e-3  # of float32; on models/photographs.pth.tar it is 1e-5
HALF_TOLERANCE = 0.1  # of log-probabilities with weights in float16; on that model it is 1e-2


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help="the folder to write; a new one, or empty")
    parser.add_argument("--half", action="store_true",
                        help="weights in float16: half the size; all is still computed in float32")
    parser.add_argument("--image", type=Path, metavar="FILE_OR_FOLDER",
                        help=f"pictures to compare captions on ({RANDOM_PICTURES} random ones)")
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint} is not a file: name a checkpoint, as "
                        f"models/BEST_checkpoint.pth.tar or {RELEASED}")

    opened = Namespace(checkpoint=args.checkpoint, preset=None, flags={"device": "cpu"})
    with new_folder(args.out) as folder:
        checkpoint, config, _, encoder, decoder = open_checkpoint(opened)
        images = pictures_of(args.image, config.image_size)
        export(encoder, decoder, config.image_size, folder)
        if args.half:
            for name in ("encoder", "decoder"):
                halve_weights(folder / f"{name}.onnx")
        facts = facts_of(checkpoint, config, encoder, args.half)
        text = json.dumps(facts, ensure_ascii=False, indent=1)
        (folder / "model.json").write_text(text, encoding="utf-8")
        compare(folder, encoder, decoder, images)
        sizes = [f"{path.name} {path.stat().st_size / 2**20:.2f} MiB"
                 for path in sorted(folder.iterdir())]
    print(f"Wrote {args.out}: {', '.join(sizes)}")


# -------------------------------------------------------------------------------------------------
# The graphs


class Start(nn.Module):
    """encoder.onnx: what is known before the first word, with one beam."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, h, c = self.decoder.start(self.encoder(images), 1)
        return *features, h, c


class Step(nn.Module):
    """decoder.onnx: one time step."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, words: Tensor, h: Tensor, c: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        h, c, alpha = self.decoder.step(features, self.decoder.embedding(words), h, c)
        log_probs = F.log_softmax(self.decoder.fc(h), dim=2)
        return log_probs, h, c, alpha


@torch.no_grad()
def export(encoder: nn.Module, decoder: nn.Module, image_size: int, folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx."""
    B = torch.export.Dim("B")
    K = torch.export.Dim("K")
    start = Start(encoder, decoder)
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    *features, h, c = start(images)
    names = [f"features_{number}" for number in range(len(features))]
    write_graph(start, (images,), folder / "encoder.onnx", ["images"], [*names, "h", "c"],
                ({0: B},))

    words = torch.zeros(2, 3, dtype=torch.int32)
    h, c = h.repeat(1, 3, 1), c.repeat(1, 3, 1)
    beams = {0: B, 1: K}
    write_graph(Step(decoder), (words, h, c, *features), folder / "decoder.onnx",
                ["words", "h", "c", *names], ["log_probs", "h_next", "c_next", "alpha"],
                (beams, beams, beams, tuple({0: B} for _ in features)))


def write_graph(module, inputs, path, input_names, output_names, dynamic_shapes):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that two axes have one name
            torch.onnx.export(module.eval(), inputs, path, dynamo=True, verbose=False,
                              opset_version=OPSET, input_names=input_names,
                              output_names=output_names, dynamic_shapes=dynamic_shapes,
                              external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"this model cannot be exported as {path.name} ({reason:.300}): its code "
                        f"in models.py or its encoder does what ONNX has no operators for"
                        ) from None


def halve_weights(path: Path) -> None:
    """Keep the weights of a graph in float16, in its file: they become float32 when it is loaded.
    Biases, which are few, stay as they are."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        cast = onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name],
                                     to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{tensor.name}.half"))
    onnx.save(model, path)


def facts_of(checkpoint: dict, config: Config, encoder: nn.Module, half: bool) -> dict:
    """What model.json holds; docs/deploy.md has each field."""
    word_map = checkpoint["word_map"]
    words = word_list(word_map)
    positions = pixel_positions(encoder, config.image_size, config.encoded_image_size)
    return dict(
        format_version=FORMAT_VERSION,
        image_size=config.image_size,
        encoded_image_size=config.encoded_image_size,
        positions=positions.tolist(),
        heat_weights=heat_weights(positions).round(4).tolist(),
        start=word_map[START],
        end=word_map[END],
        never=never_generated(word_map, torch.device("cpu")).tolist(),
        max_len=config.max_len,
        beam_size=BEAM_SIZE,
        length_penalty=config.length_penalty,
        weights="float16" if half else "float32",
        encoder=config.encoder,
        epoch=checkpoint["epoch"],
        command=checkpoint.get("command"),
        git_revision=checkpoint.get("git_revision"),
        note=checkpoint.get("note"),  # what it has seen, and the licence
        protocol=checkpoint.get("protocol"),
        scores=checkpoint.get("scores"),
        words=words,
        function_words=[number for number, word in enumerate(words)
                        if kind_of(word) == "function word"])


# -------------------------------------------------------------------------------------------------
# The comparison


def pictures_of(image: Path | None, image_size: int) -> np.ndarray:
    """The pictures to compare on, uint8 (N, S, S, 3)."""
    if image is None:
        shape = RANDOM_PICTURES, image_size, image_size, 3
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    paths = [image]
    if image.is_dir():
        paths = [path for path in sorted(image.rglob("*"))
                 if is_picture_name(path) and path.is_file()]
    if not paths:
        raise UserError(f"{image} has no pictures: --image takes one, or a folder of "
                        f"{' '.join(PICTURE_SUFFIXES)}")
    return np.stack([read_image(path, image_size) for path in paths])


def compare(folder: Path, encoder: nn.Module, decoder: nn.Module, images: np.ndarray) -> None:
    """Say how far the graphs are from the checkpoint's models, in numbers and in captions of the
    pictures, uint8 (N, S, S, 3). UserError where that is too far: float16 may change captions, but
    not log-probabilities by much; float32 neither."""
    try:
        captioner = Captioner(folder)
    except ValueError as error:
        raise UserError(f"onnxruntime does not take what was exported: {error}") from None
    is_half = captioner.model["weights"] == "float16"

    found = largest_differences(captioner, encoder, decoder, images[:RANDOM_PICTURES])
    print("Largest differences from PyTorch:",
          ", ".join(f"{name} {most:.1e}" for name, most in found.items()))
    allowed = dict.fromkeys(found, TOLERANCE)
    if is_half:
        allowed = {"log-probabilities": HALF_TOLERANCE}
    for name, most in allowed.items():
        if not found[name] <= most:  # as nan is not
            raise UserError(f"the exported graphs give other {name} than the checkpoint's models: "
                            f"they differ by {found[name]:.2g}, {most} is allowed")

    for beam_size in (1, BEAM_SIZE):
        differ, wrong = count_other_captions(captioner, encoder, decoder, images, beam_size)
        print(f"Beam {beam_size}: {differ} of {len(images)} captions differ")
        if wrong and not is_half:
            raise UserError(f"the exported graphs give {wrong} of {len(images)} pictures another "
                            f"caption than the checkpoint's models, at beam {beam_size}")


@torch.no_grad()
def largest_differences(captioner: Captioner, encoder: nn.Module, decoder: nn.Module,
                        images: np.ndarray) -> dict[str, float]:
    """Of the graphs from the models, over a few steps of a batch with random words: features as
    a share of the largest, log-probabilities and attention as they are."""
    start, step = Start(encoder, decoder), Step(decoder)
    *features, h, c = start(torch.from_numpy(images))
    names = captioner.encoder_outputs
    found = dict(zip(names, captioner.encoder.run(None, {"images": images})))
    differences = {"features": [], "log-probabilities": [], "attention": []}
    for name, expected in zip(names, (*features, h, c)):
        largest = expected.abs().numpy().max(initial=1.0)
        differences["features"].append(difference(found[name], expected) / largest)

    h, c = h.repeat(1, BEAM_SIZE, 1), c.repeat(1, BEAM_SIZE, 1)
    for name in ("h", "c"):
        found[name] = found[name].repeat(BEAM_SIZE, axis=1)
    random = np.random.default_rng(0)
    for _ in range(COMPARED_STEPS):
        words = random.integers(0, len(captioner.model["words"]), h.shape[:2], dtype=np.int32)
        log_probs, h, c, alpha = step(torch.from_numpy(words), h, c, *features)
        outputs = captioner.decoder.run(None, {"words": words, **found})
        found["h"], found["c"] = outputs[1:3]
        differences["log-probabilities"].append(difference(outputs[0], log_probs))
        differences["attention"].append(difference(outputs[3], alpha))
    return {name: float(np.max(values)) for name, values in differences.items()}


def difference(found: np.ndarray, expected: Tensor) -> float:
    # An edited model may have no c, as a GRU.
    return float(np.abs(found - expected.numpy()).max(initial=0.0))


@torch.no_grad()
def count_other_captions(captioner: Captioner, encoder: nn.Module, decoder: nn.Module,
                         images: np.ndarray, beam_size: int) -> tuple[int, int]:
    """How many pictures captioner.py gives another caption than decoding.py, and how many of these
    are no tie that rounding decides."""
    model = captioner.model
    word_map = {word: number for number, word in enumerate(model["words"])}

    def rank(score, words, ended):
        return score / (len(words) + ended) ** model["length_penalty"]

    differ = wrong = 0
    for image in tqdm(images, f"beam {beam_size}", unit="picture", leave=False):
        grid = encoder(torch.from_numpy(image[None]))
        expected, = generate(decoder, grid, word_map, model["max_len"], beam_size,
                             model["length_penalty"])
        found = captioner(image, beam_size)
        if found.words != expected["words"]:
            differ += 1
            gap = (rank(found.score, found.words, found.ended)
                   - rank(expected["score"], expected["words"], expected["ended"]))
            wrong += not abs(gap) <= TOLERANCE
    return differ, wrong


# -------------------------------------------------------------------------------------------------
# The folder


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The one way to write a folder whole or not at all: yields a temporary one beside it, which
    becomes `path` once all is on the disk. UserError where that exists or cannot be written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists: remove it, or name another folder with --out")
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file_path in temporary.iterdir():
            with open(file_path, "r+b") as file:
                os.fsync(file.fileno())
        if path.exists():  # empty; Windows replaces no folder
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({reason_of(error)}): name another folder "
                        f"with --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
