"""Settings and command lines."""
import dataclasses
import inspect
import math
import re

import pytest
from conftest import error_line, script

from config import ARCHITECTURE, ENCODERS, PRESETS, Config, UserError, get_config, parse_args, run

FIELDS = dataclasses.fields(Config)
NAMES = [field.name for field in FIELDS]


def another(field):
    """A value of a field that is allowed and not its default."""
    if field.name == "encoder":
        return "resnet18"
    if field.name == "precision":
        return "bfloat16"
    if field.type is str:
        return f"{field.default}2"
    if field.type is bool:
        return not field.default
    return field.default + 1 if field.type is int else field.default / 2


def on_the_command_line(value):
    return str(value).lower() if type(value) is bool else str(value)


def settings_of(*argv):
    args = parse_args("A script.", argv=list(argv))
    return get_config(args.preset, args.flags)


# ---------------------------------------------------------------------------------------------------------------------
# Precedence


def test_defaults_are_the_full_run():
    config = settings_of()
    assert config == Config() == get_config("ai_challenger")
    assert (config.data_dir, config.model_dir, config.log_dir) == ("data", "models", "logs")
    assert (config.image_size, config.captions_per_image, config.max_len, config.min_word_freq) == (256, 5, 40, 3)
    assert (config.encoder, config.encoder_weights, config.encoded_image_size) == ("resnet101", "imagenet", 14)
    assert (config.emb_dim, config.attention_dim, config.decoder_dim, config.dropout) == (512, 512, 512, 0.5)
    assert (config.epochs, config.encoder_lr, config.decoder_lr, config.grad_clip) == (120, 1e-4, 4e-4, 5)
    assert (config.alpha_c, config.lr_decay, config.lr_decay_epochs, config.early_stop_epochs) == (1, 0.8, 8, 20)
    assert config.fine_tune_encoder is False


def test_a_preset_stands_over_the_defaults_and_a_flag_over_both():
    assert settings_of("--preset", "sample").image_size == PRESETS["sample"]["image_size"] != Config().image_size
    config = settings_of("--preset", "sample", "--image_size", "96")
    assert config.image_size == 96
    assert config.encoder == PRESETS["sample"]["encoder"]
    untouched = vars(Config()).keys() - PRESETS["sample"].keys() - {"image_size"}
    assert all(getattr(config, name) == getattr(Config(), name) for name in untouched)
    assert settings_of("--image_size", "96", "--preset", "sample") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert dataclasses.asdict(get_config(preset)).items() >= PRESETS[preset].items()


def test_the_sample_keeps_to_itself():
    config = get_config("sample")
    assert (config.data_dir, config.model_dir, config.log_dir) == ("data/sample", "models/sample", "logs/sample")


def test_a_checkpoint_stands_over_the_defaults_and_a_flag_over_both():
    trained = dataclasses.asdict(Config(emb_dim=64, dropout=0.25, data_dir="elsewhere"))
    assert get_config(trained=trained) == Config(emb_dim=64, dropout=0.25, data_dir="elsewhere")
    assert get_config("sample", trained=trained).image_size == Config().image_size
    config = get_config(flags={"data_dir": "here", "emb_dim": 64}, trained=trained)
    assert (config.data_dir, config.emb_dim, config.dropout) == ("here", 64, 0.25)


def test_a_checkpoint_without_a_newer_setting_gets_its_default():
    trained = dataclasses.asdict(Config(emb_dim=64))
    del trained["print_freq"]
    assert get_config(trained=trained) == Config(emb_dim=64)


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_a_flag_that_contradicts_the_checkpoint_is_an_error(name):
    field, = (field for field in FIELDS if field.name == name)
    value = another(field)
    trained = dataclasses.asdict(Config())
    with pytest.raises(UserError, match=f"--{name} {value}.*{field.default}"):
        get_config(flags={name: value}, trained=trained)
    assert get_config(flags={name: field.default}, trained=trained) == Config()


@pytest.mark.parametrize("trained", [{"colour": 1}, {1: 1, "colour": 2}, {"emb_dim": "64"}, {"dropout": 2.0}])
def test_a_checkpoint_with_other_settings_is_a_users_error(trained):
    with pytest.raises(UserError):
        get_config(trained=trained)


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("field", FIELDS, ids=NAMES)
def test_every_field_is_a_flag(field):
    value = another(field)
    for argv in ([f"--{field.name}", on_the_command_line(value)], [f"--{field.name}={on_the_command_line(value)}"]):
        args = parse_args("A script.", argv=argv)
        assert args.flags == {field.name: value}
        assert type(args.flags[field.name]) is field.type
        assert get_config(flags=args.flags) == dataclasses.replace(Config(), **{field.name: value})


@pytest.mark.parametrize("field", FIELDS, ids=NAMES)
def test_every_field_is_explained_beside_it_and_in_the_help(field, capsys):
    comment = re.search(rf"^    {field.name}: .* = .*  # (.+)$", inspect.getsource(Config), re.MULTILINE)
    assert comment, f"{field.name} has no trailing comment"
    with pytest.raises(SystemExit) as exit:
        parse_args("A script.", argv=["--help"])
    assert exit.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    assert "".join(f"--{field.name} {field.type.__name__.upper()} {comment[1]}".split()) in text


@pytest.mark.parametrize("argv, name, value", [
    (["--dropout", "0"], "dropout", 0),
    (["--model_dir", "a=b"], "model_dir", "a=b"),
    (["--model_dir=a=b"], "model_dir", "a=b"),
    (["--data_dir", "我的 数据"], "data_dir", "我的 数据"),
    (["--decoder_lr", "1e-3"], "decoder_lr", 1e-3),
    (["--workers", "0"], "workers", 0),
    (["--fine_tune_encoder", "false"], "fine_tune_encoder", False),
    (["--preset", "sample", "--fine_tune_encoder", "false"], "fine_tune_encoder", False),
    (["--epochs", "3", "--epochs", "4"], "epochs", 4),
])
def test_values_that_have_to_work(argv, name, value):
    assert getattr(settings_of(*argv), name) == value


def test_a_scripts_own_flags_are_not_settings():
    args = parse_args("A script.", {"overwrite": dict(action="store_true")}, ["--overwrite", "--epochs", "3"])
    assert args.overwrite and args.flags == {"epochs": 3}
    with pytest.raises(UserError, match="--overwrite"):
        parse_args("A script.", argv=["--overwrite"])


OUT_OF_RANGE = [
    *((name, "0") for name in ("captions_per_image", "max_len", "min_word_freq", "encoded_image_size", "emb_dim",
                               "attention_dim", "decoder_dim", "epochs", "batch_size", "lr_decay_epochs",
                               "early_stop_epochs", "print_freq")),
    *((name, "-1") for name in ("image_size", "max_bad_images", "dropout", "encoder_lr", "decoder_lr", "grad_clip",
                                "alpha_c", "lr_decay", "seed", "workers")),
    *((name, "1.01") for name in ("max_bad_images", "dropout", "lr_decay")),
    *((field.name, "nan") for field in FIELDS if field.type is float),
    ("image_size", "1"), ("image_size", "1000000"), ("seed", str(2**64)), ("workers", "100000"),
    ("max_len", "201"), ("encoder", "vgg16"), ("encoder", "ResNet101"),
]


@pytest.mark.parametrize("argv, named", [
    (["--colour", "red"], "--colour"),
    (["--epoch", "3"], "--epochs"),
    (["--epoch=3"], "--epochs"),
    (["--batchsize", "3"], "--batch_size"),
    (["--Epochs", "3"], "--epochs"),
    (["-epochs", "3"], "-epochs"),
    (["sample"], "sample"),
    (["--epochs", "3", "4"], "4"),
    (["--epochs"], "--epochs"),
    (["--epochs", ""], "--epochs"),
    (["--epochs", "many"], "--epochs"),
    (["--epochs", "2.5"], "--epochs"),
    (["--epochs", "1e3"], "--epochs"),
    (["--dropout", "half"], "--dropout"),
    (["--decoder_lr", "0,001"], "--decoder_lr"),
    (["--decoder_lr", "-1e-4"], "--decoder_lr"),
    (["--fine_tune_encoder"], "--fine_tune_encoder"),
    (["--fine_tune_encoder", "True"], "--fine_tune_encoder"),
    (["--fine_tune_encoder", "1"], "--fine_tune_encoder"),
    (["--fine_tune_encoder", "yes"], "--fine_tune_encoder"),
    (["--preset", "simple"], "--preset"),
    (["--preset", ""], "--preset"),
    *(([f"--{name}", value], f"--{name}") for name, value in OUT_OF_RANGE),
], ids=" ".join)
def test_a_mistake_is_one_line_that_names_the_flag(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        run(lambda: settings_of(*argv))
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    assert named in error_line(captured.err)


@pytest.mark.parametrize("argv, named", [(["--image-size", "64"], "--image_size"), (["--max_len", "ten"], "--max_len")])
def test_a_script_ends_with_that_line(argv, named, tmp_path):
    done = script("pre_process.py", *argv, cwd=tmp_path, check=2)
    assert not done.stdout and len(done.stderr.splitlines()) == 1
    assert named in error_line(done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_a_name(name):
    assert settings_of("--encoder", name).encoder == name


def test_boundary_values_are_allowed():
    assert settings_of("--dropout", "1", "--max_bad_images", "1", "--image_size", "32", "--seed", str(2**32 - 1),
                       "--grad_clip", "inf").grad_clip == math.inf


# ---------------------------------------------------------------------------------------------------------------------
# run


def test_run_leaves_bugs_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_run_makes_an_error_one_line_whatever_is_in_it(capsys):
    with pytest.raises(SystemExit):
        run(lambda: get_config(trained={"a\nb\u2028c": 1}))
    assert error_line(capsys.readouterr().err).endswith("a b c")


def test_run_names_the_file_that_the_system_refuses(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit:
        run(lambda: (tmp_path / "file" / "below").mkdir())
    assert exit.value.code == 2
    assert str(tmp_path / "file" / "below") in error_line(capsys.readouterr().err)


def test_run_ends_quietly_when_interrupted(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run(interrupted)
    assert exit.value.code == 130
    assert not capsys.readouterr().err
