"""A few of fuzz.py's inputs of every kind; `make fuzz` tries many more."""
from conftest import script


def test_damaged_and_hostile_files_are_refused_or_used_rightly():
    result = script("tests/fuzz.py", "--inputs", 56)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "0 findings over 56 inputs" in result.stdout
