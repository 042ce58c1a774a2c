"""What is prepared for a GPU: a part that is cut short leaves the rest, tables have it all."""
import json
import os
import sys

import pytest
from common import call

from benchmarks import absent, gpu, tables
from benchmarks.gpu import PARTS


def test_a_part_that_is_cut_short_leaves_the_rest(tmp_path):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    assert gpu.run_part("steps", tmp_path, 0.5, environment)["state"].startswith("cut short")
    printed = call(gpu.main, "--out", tmp_path, "--device", "cpu", "--parts", "memory").out
    assert "memory: whole" in printed and "steps" not in printed
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["notes"] == ["needs a GPU"] and written["is_rehearsal"]
    found = tables.tables(tmp_path)
    assert "A rehearsal on a CPU" in found and "- steps: cut short" in found


def test_tables_have_new_figures_beside_old_ones(tmp_path):
    row = dict(reference_s=0.09, product_s=0.0101, ratio=8.9, ratio_min=8.8, ratio_max=9.0,
               memory_ratio=0.3, busy=0.75, agreement="agree (loss by 1e-7)")
    two_sizes = {f"{n} pictures": dict(ms=ms, start_s=30.0, busy=None)
                 for n, ms in ((32, 6.25), (128, 9.75))}
    rows = dict(steps={"train_decoder, 32": row, "train_decoder, 128": dict(error="no memory")},
                form={"kernels and graphs": dict(two_sizes, lines=613)},
                memory={"frozen, bfloat16": {"8 GiB": 301, "80 GiB": None}},
                epoch=dict(kept=dict(pictures=26250, seconds=2.5, images_per_s=10500,
                                     whole_epoch_s=20.0, whole_validation_s=9.0)))
    for part, of_part in rows.items():
        content = dict(part=part, state="whole", seconds=9.0, chip="X1", rows=of_part, notes=[])
        gpu.write_json(tmp_path / f"{part}.json", content)
    found = tables.tables(tmp_path)
    # The second and third are of README.md.
    assert "| train_decoder, 32 | 0.090 | 0.010 | 8.9 (8.8-9.0) | 0.30 | 75% | 0.012 | 7.1" in found
    assert "| kernels and graphs | 6.2 | - | 6.8 | 9.8 | - | 10.3 | 30.0 | 613 |" in found
    assert "| frozen, bfloat16 | 301 | 332 | - | 731 |" in found
    assert "| 20.0 | 10,500 | 9.0 | 26,250 | 19.8 | 10,603 |" in found
    assert "| train_decoder, 128 | no memory |" in found and "agree (loss by 1e-7)" in found
    assert set(rows) < set(PARTS)


def test_a_package_that_is_missing_says_so_where_it_is_used(monkeypatch):
    monkeypatch.setitem(absent.PACKAGES, "surely_missing", "surely-missing")
    from surely_missing.part import function

    for name in ("surely_missing", "surely_missing.part"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="surely-missing is not installed"):
        function.of_it(1)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import no_such_package  # noqa: F401
