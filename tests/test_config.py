"""Settings and command lines."""
import dataclasses
import inspect
import math
import re

import pytest
from common import error_line

from config import ARCHITECTURE, PRESETS, RETIRED, Config, UserError, get_config, parse_args
from utils import run_script

FIELDS = dataclasses.fields(Config)


def another(field):
    """A value of a field that is allowed and not its default."""
    if field.name == "precision":
        return "bfloat16"
    if field.type is str:
        return f"{field.default}2"
    if field.type is bool:
        return not field.default
    return field.default + 1 if field.type is int else field.default / 2


def settings_of(*argv):
    args = parse_args("A script.", argv=list(argv))
    return get_config(args.preset, args.flags)


def test_defaults_are_the_full_run():
    expected = dict(
        image_size=256, captions_per_image=5, max_len=40, min_word_freq=3, encoder="resnet101",
        encoder_weights="imagenet", encoded_image_size=14, emb_dim=512, attention_dim=512,
        decoder_dim=512, dropout=0.5, batch_size=32, epochs=120, encoder_lr=1e-4, decoder_lr=4e-4,
        grad_clip=5, alpha_c=1, lr_decay=0.8, lr_decay_epochs=8, early_stop_epochs=20,
        fine_tune_encoder=False, fast=True)
    assert vars(Config()).items() >= expected.items() and settings_of() == Config()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_precedence_over_the_defaults_and_a_flag_over_both(preset):
    expected = {**vars(Config()), **PRESETS[preset]}
    assert vars(get_config(preset)) == expected
    with_flag = settings_of("--image_size", "96", "--preset", preset)
    assert vars(with_flag) == {**expected, "image_size": 96}
    folder = "" if preset == "ai_challenger" else f"/{preset}"
    for name in ("data", "model", "log"):
        root = "data" if name == "data" else f"{name}s"
        assert expected[f"{name}_dir"] == f"{root}{folder}"


def test_a_checkpoint_takes_precedence_over_the_preset_and_a_flag_over_both():
    was = Config(emb_dim=64, dropout=0.25, data_dir="elsewhere")
    trained = dataclasses.asdict(was)
    del trained["print_freq"]  # which an older version did not have
    assert get_config("sample", trained=trained) == was
    config = get_config(flags={"data_dir": "here", "emb_dim": 64}, trained=trained)
    assert config == dataclasses.replace(was, data_dir="here")
    for field in FIELDS:
        if field.name in ARCHITECTURE:
            value = another(field)
            with pytest.raises(UserError, match=f"--{field.name} {value}.*{trained[field.name]}"):
                get_config(flags={field.name: value}, trained=trained)


def test_a_checkpoint_of_older_code_may_have_settings_that_are_no_more():
    trained = {**vars(Config(emb_dim=64)), **dict.fromkeys(RETIRED, 0.5)}
    assert get_config(trained=trained) == Config(emb_dim=64)


@pytest.mark.parametrize("trained", [{"colour": 1}, {"emb_dim": "64"}, {"dropout": 2.0}])
def test_a_checkpoint_with_impossible_settings_is_a_users_error(trained):
    with pytest.raises(UserError):
        get_config(trained=trained)


def test_every_field_is_a_flag_explained_beside_it_and_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_args("A script.", argv=["--help"])
    text = "".join(capsys.readouterr().out.split())
    source = inspect.getsource(Config)
    for field in FIELDS:
        value = another(field)
        typed = str(value).lower() if field.type is bool else str(value)
        args = parse_args("A script.", argv=[f"--{field.name}", typed])
        assert args.flags == {field.name: value}
        assert type(args.flags[field.name]) is field.type
        comment = re.search(rf"^    {field.name}: .* = .*  # (.+)$", source, re.MULTILINE)
        assert comment, f"{field.name} has no trailing comment"
        kind = "true|false" if field.type is bool else field.type.__name__.upper()
        assert "".join(f"--{field.name} {kind} {comment[1]}".split()) in text


@pytest.mark.parametrize("argv, name, value", [
    (["--dropout", "0"], "dropout", 0), (["--dropout", "1"], "dropout", 1),
    (["--workers", "0"], "workers", 0), (["--model_dir=a=b"], "model_dir", "a=b"),
    (["--data_dir", "我的 数据"], "data_dir", "我的 数据"),
    (["--decoder_lr", "1e-3"], "decoder_lr", 1e-3), (["--grad_clip", "inf"], "grad_clip", math.inf),
    (["--preset", "sample", "--fine_tune_encoder", "false"], "fine_tune_encoder", False),
    (["--seed", str(2**32 - 1)], "seed", 2**32 - 1),
    (["--epochs", "3", "--epochs", "4"], "epochs", 4),
])
def test_values_that_have_to_work(argv, name, value):
    assert getattr(settings_of(*argv), name) == value


def test_a_scripts_own_flags_are_not_settings():
    own = {"overwrite": dict(action="store_true")}
    args = parse_args("A script.", own, ["--overwrite", "--epochs", "3"])
    assert args.overwrite and args.flags == {"epochs": 3}
    with pytest.raises(UserError, match="--overwrite"):
        parse_args("A script.", argv=["--overwrite"])


AT_LEAST_ONE = ("captions_per_image", "max_len", "min_word_freq", "encoded_image_size", "emb_dim",
                "attention_dim", "decoder_dim", "epochs", "batch_size", "lr_decay_epochs",
                "early_stop_epochs", "print_freq")
FLOATS = [field.name for field in FIELDS if field.type is float]


@pytest.mark.parametrize("line, named", [
    ("--colour red", "--colour"), ("--epoch 3", "--epochs"), ("--epoch=3", "--epochs"),
    ("-epochs 3", "-epochs"), ("--lr 1e-3", "--decoder_lr"),
    ("--fine_tune_encoder", "--fine_tune_encoder: expected a value (of a switch true"),
    ("--image-size 64", "--image_size"), ("sample", "sample"), ("--epochs 3 4", "4"),
    ("--epochs", "--epochs"), ("--epochs=", "--epochs"), ("--epochs 2.5", "--epochs"),
    ("--decoder_lr 0,001", "--decoder_lr"), ("--fine_tune_encoder True", "true or false"),
    ("--preset simple", "sample"), ("--preset=", "--preset"),
    *((f"--{name} 0", name) for name in AT_LEAST_ONE),
    *((f"--{name} -1", name) for name in (*FLOATS, "seed", "workers")),
    *((f"--{name} nan", name) for name in FLOATS),
    *((f"--{name} 1.01", name) for name in ("max_bad_images", "dropout", "lr_decay")),
    ("--image_size 1", "image_size"), ("--image_size 1000000", "image_size"),
    (f"--seed {2**64}", "seed"), ("--workers 100000", "workers"), ("--max_len 201", "max_len"),
    ("--precision half", "bfloat16"), ("--length_penalty 700", "length_penalty"),
    ("--cache_features true --fine_tune_encoder true", "--fine_tune_encoder false"),
])
def test_a_mistake_is_one_line_that_names_the_flag(line, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: settings_of(*line.split(" ")))
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    assert named in error_line(captured.err)


# -------------------------------------------------------------------------------------------------
# run_script


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_an_error_is_one_line_that_names_the_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for fails, named in ((lambda: get_config(trained={"a\nb\u2028c": 1}), "a b c"),
                         (lambda: (file / "below").mkdir(), str(file / "below"))):
        with pytest.raises(SystemExit, match="2"):
            run_script(fails)
        assert named in error_line(capsys.readouterr().err)


def test_an_interrupted_script_ends_quietly(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_script(interrupted)
    assert not capsys.readouterr().err
