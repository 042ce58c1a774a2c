"""Make a checkpoint small enough to be given away: weights in half precision, without optimizers.

    python deploy/release.py BEST_checkpoint.pth.tar --results RESULTS.json --note "..." --out FILE

demo.py, eval.py and train.py --init take such a file as any other; it cannot be resumed.
"""
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

from checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from config import Config, new_parser  # noqa: E402
from utils import UserError, run_script  # noqa: E402

OF_THIS_MACHINE = ("data_dir", "model_dir", "log_dir", "cache_features", "workers")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=Path,
                        help="BEST_checkpoint.pth.tar; checkpoint.pth.tar: the last epoch")
    parser.add_argument("--results", type=Path, required=True,
                        help="what eval.py wrote of its recipe")
    parser.add_argument("--note", required=True,
                        help="what the model has seen, in a sentence, and the licence")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()

    trained = load_checkpoint(args.checkpoint)
    if not trained["encoder"] or "encoder" in trained["optimizers"]:
        raise UserError(f"{args.checkpoint} has no encoder, or one that is being trained: take "
                        f"BEST_checkpoint.pth.tar")
    if trained["optimizers"]:
        put_averages(trained["decoder"], trained["optimizers"]["decoder"])
    results = json.loads(args.results.read_text(encoding="utf-8"))

    kept = ("version", "epoch", "word_map", "command", "git_revision")
    released = {name: trained[name] for name in kept}
    released["config"] = dict(trained["config"])
    for field in fields(Config):
        if field.name in OF_THIS_MACHINE:
            released["config"][field.name] = field.default
    # It captions as it was scored.
    released["config"]["length_penalty"] = results["protocol"]["length_penalty"]
    for half in ("encoder", "decoder"):
        released[half] = {name: halved(tensor) for name, tensor in trained[half].items()}
    released.update(optimizers={}, progress=None, world_size=1, note=args.note,
                    protocol=results["protocol"], scores=results["scores"])
    save_checkpoint(released, args.out)
    print(f"Wrote {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")


def put_averages(weights: dict, optimizer: dict):
    """Put the averages that a run's last checkpoint may have into the place of the weights.

    These are state dicts, of a decoder, which is all trained, and of its optimizer.
    """
    for name, number in zip(weights, optimizer["param_groups"][0]["params"]):
        state = optimizer["state"].get(number, {})
        weights[name] = state.get("average", weights[name])


def halved(tensor):
    """Biases and what batch norms hold, which are few and of any size, stay as they are."""
    return tensor.half() if tensor.ndim > 1 and tensor.is_floating_point() else tensor


if __name__ == "__main__":
    run_script(main)
