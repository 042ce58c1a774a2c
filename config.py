"""Every setting of every script: one frozen dataclass, its presets, and the command line.

    python train.py --preset sample --batch_size 16 --fine_tune_encoder true
"""
import argparse
import dataclasses
import difflib
import inspect
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from utils import UserError, printable


@dataclass(frozen=True)
class Config:
    # data
    data_dir: str = "data"  # archives in, WORDMAP.json and {split}.h5 out
    image_size: int = 256  # pixels per side; pictures are resized to a square, as in the original
    captions_per_image: int = 5  # as many as the data set has; further ones are ignored
    max_len: int = 40  # words per caption; longer ones are truncated
    min_word_freq: int = 3  # a word that is rarer in the training captions becomes <unk>
    max_bad_images: float = 0.01  # share of unreadable pictures above which preprocessing stops

    # model
    encoder: str = "resnet101"  # torchvision's resnet18, 34, 50, 101, 152; a CNN or ViT of timm
    encoder_weights: str = "imagenet"  # imagenet (or timm's), none (random), or a state dict PATH
    encoder_stride: int = 32  # pixels per cell of the encoder's map: 16, 8; 32: of its last map
    encoded_image_size: int = 14  # the attention chooses among 14 x 14 = 196 pixels (section 4.3)
    emb_dim: int = 512  # word embedding
    attention_dim: int = 512  # hidden layer of the attention
    decoder_dim: int = 512  # LSTM state
    dropout: float = 0.5  # on the LSTM state, before the words are scored
    length_penalty: float = 0.0  # score = log-probability / tokens^this; 0 favours short captions

    # optimisation
    epochs: int = 120  # at most, of either phase; early stopping usually ends it earlier
    batch_size: int = 32  # pictures per step of all processes, each with all its captions
    fine_tune_encoder: bool = False  # train the encoder too: later stages, all of a random one
    encoder_lr: float = 1e-4  # Adam, when fine-tuning
    decoder_lr: float = 4e-4  # Adam
    grad_clip: float = 5.0  # each component of the gradient is clipped to +-5; 0: no clipping
    ema_decay: float = 0.0  # per step, of averaged weights, validated and kept as best; 0: none
    alpha_c: float = 1.0  # weight of the doubly stochastic term (eq. 14)
    lr_decay: float = 0.8  # both rates are multiplied by this ...
    lr_decay_epochs: int = 8  # ... after this many epochs in a row without a better score
    early_stop_epochs: int = 20  # the run ends after this many epochs without a better score

    # self-critical training: a second phase, which optimises the CIDEr-D of sampled captions
    self_critical: bool = False  # with --resume: begin it from the best checkpoint, or continue it
    samples: int = 5  # captions drawn per picture and step
    self_critical_lr: float = 5e-5  # Adam, begun anew, of the decoder and a fine-tuned encoder
    self_critical_clip: float = 0.1  # each component of the gradient is clipped to +-0.1; 0: none
    self_critical_xe: float = 0.0  # weight of the true captions' loss beside the policy gradient

    # run
    model_dir: str = "models"  # checkpoint.pth.tar, BEST_checkpoint.pth.tar
    log_dir: str = "logs"  # one folder per run: TensorBoard events, log.jsonl, config.json
    print_freq: int = 50  # steps between logging loss, gradient norm, speed; waits for the device
    checkpoint_minutes: float = 15.0  # between checkpoints; a killed run loses no more than that
    keep_previous: bool = False  # also the checkpoint before, for a disk that damages files
    seed: int = 0  # weights, shuffling, dropout
    precision: str = "auto"  # of training: float32, bfloat16, float16; auto: the best of a GPU
    device: str = "auto"  # auto (cuda if available, else cpu), cpu, cuda, cuda:1, mps (Apple's)
    workers: int = 4  # processes that load batches; 0 loads them in the training process
    fast: bool = True  # run fast/ where it gives the numbers of models.py; false: models.py itself
    cache_features: bool = False  # keep a frozen encoder's output in data_dir: 262 KB per picture

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name = field.name
            value = getattr(self, name)
            is_whole_float = field.type is float and type(value) is int
            if type(value) is not field.type and not is_whole_float:
                raise UserError(f"--{name} must be {field.type.__name__}, not {value!r:.200}")
            if field.type is str and printable(value) != value:
                raise UserError(f"--{name} cannot be {value!r:.200}")
            least = AT_LEAST.get(name, 0)
            if field.type in (int, float) and not value >= least:  # as nan is not
                raise UserError(f"--{name} must be at least {least}, not {value}")
            if name in AT_MOST and value > AT_MOST[name]:
                raise UserError(f"--{name} must be at most {AT_MOST[name]}, not {value}")
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"--precision must be auto, float32, bfloat16 or float16, "
                            f"not {self.precision!r}")
        if self.encoder_stride not in (8, 16, 32):
            raise UserError(f"--encoder_stride must be 32, 16 or 8, not {self.encoder_stride}")
        if self.cache_features and self.fine_tune_encoder:
            raise UserError("--cache_features true keeps features that --fine_tune_encoder true "
                            "changes at every step: give --cache_features false, or "
                            "--fine_tune_encoder false")


AT_LEAST = dict(image_size=32, captions_per_image=1, max_len=1, min_word_freq=1,
                encoded_image_size=1, emb_dim=1, attention_dim=1, decoder_dim=1, epochs=1,
                batch_size=1, lr_decay_epochs=1, early_stop_epochs=1, samples=2,
                print_freq=1)  # the others 0
AT_MOST = dict(max_bad_images=1, dropout=1, lr_decay=1, ema_decay=1, length_penalty=10,
               image_size=4096, max_len=200, encoded_image_size=256, workers=256,
               seed=2**32 - 1)  # epoch and rank are mixed in, within 64 bits

CHECKPOINT_VERSION = 3  # of the files that a Config is saved in
# Settings of older checkpoints that this version has not: diffs in benchmarks/changes.
RETIRED = ("embedding_dropout", "label_smoothing", "mirror")
# What a checkpoint's weights, or the pixels that they were trained on, depend on.
ARCHITECTURE = ("encoder", "encoder_stride", "encoded_image_size", "image_size", "emb_dim",
                "attention_dim", "decoder_dim")

DEFAULT_PRESET = "ai_challenger"
PRESETS = {
    "ai_challenger": {},
    # Three and a quarter minutes on two cores with bfloat16: a small ResNet from random weights
    # without its last stage, its own 8 x 8 grid, and averaged weights instead of a longer run.
    "sample": dict(
        data_dir="data/sample", model_dir="models/sample", log_dir="logs/sample",
        image_size=128, encoder="resnet18", encoder_weights="none", fine_tune_encoder=True,
        encoder_stride=16, encoded_image_size=8, emb_dim=128, attention_dim=256, decoder_dim=256,
        dropout=0.1, epochs=5, batch_size=10, encoder_lr=8e-4, decoder_lr=1e-3, ema_decay=0.99,
        alpha_c=0.1, lr_decay=0.5, lr_decay_epochs=1, self_critical_xe=1.0, precision="bfloat16",
        workers=0),
    # A few hundred pictures of one's own, laid out by data/own.py: the sizes of
    # models/photographs.pth.tar, so that --init can begin from it. Every word counts.
    "own": dict(
        data_dir="data/own", model_dir="models/own", log_dir="logs/own",
        image_size=260, encoder="tf_efficientnet_lite2", encoded_image_size=9, emb_dim=256,
        attention_dim=256, decoder_dim=384, cache_features=True, min_word_freq=1, alpha_c=0.0,
        ema_decay=0.99, batch_size=15, epochs=20, lr_decay=0.7, lr_decay_epochs=2,
        early_stop_epochs=6, length_penalty=1.0),
    # 6,000 photographs are overfitted soon: the rates fall and the run ends earlier. The default
    # min_word_freq keeps 2,109 words; 3.6 % of the words of the validation captions are others.
    "flickr8k_cn": dict(
        data_dir="data/flickr8k_cn", model_dir="models/flickr8k_cn", log_dir="logs/flickr8k_cn",
        epochs=50, lr_decay_epochs=3, early_stop_epochs=10),
}


def get_config(preset: str = DEFAULT_PRESET, flags: dict | None = None,
               trained: dict | None = None, initial: dict | None = None) -> Config:
    """The settings of a run: defaults < preset < flags, or defaults < trained < flags.

    Args:
        flags: what the user gave on the command line, field -> value.
        trained: the settings of a checkpoint, instead of a preset.
        initial: of a checkpoint whose model another run begins with: its architecture counts.
    Raises:
        UserError: unknown preset or field, value out of range, flag against the checkpoint.
    """
    flags = flags or {}
    if trained is None:
        if preset not in PRESETS:
            raise UserError(f"--preset must be one of {', '.join(PRESETS)}, not {preset!r}")
        architecture = architecture_of(initial, flags) if initial else {}
        return Config(**{**PRESETS[preset], **flags, **architecture})

    fields = {field.name for field in dataclasses.fields(Config)}
    unknown = sorted(map(str, trained.keys() - fields - {*RETIRED}))
    if unknown:
        raise UserError(f"the checkpoint has settings that this version does not know "
                        f"({', '.join(unknown)}): use the code that it was trained with")
    others = {"device", *RETIRED}  # of another machine, of another version
    known = {name: value for name, value in trained.items() if name not in others}
    return Config(**{**known, **flags, **architecture_of(known, flags)})


def architecture_of(trained: dict, flags: dict) -> dict:
    """What the settings of a checkpoint fix; UserError where a flag differs."""
    found = {}
    for name in ARCHITECTURE:
        default = getattr(Config, name)  # of a checkpoint that is older than the setting
        found[name] = trained.get(name, default)
        if name in flags and flags[name] != found[name]:
            raise UserError(f"--{name} {flags[name]} contradicts the checkpoint, which was trained "
                            f"with --{name} {found[name]}: omit the flag, or train another model")
    return found


def parse_args(description: str, own: dict[str, dict[str, Any]] | None = None,
               argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: --preset, --FIELD for every field of Config, the script's own flags.

    Args:
        description: the script's docstring, for --help.
        own: the script's own flags, name -> keyword arguments of argparse's add_argument.
        argv: instead of sys.argv[1:].
    Returns:
        `preset`, `flags` (only the fields that the user gave), and the script's own flags.
    Raises:
        UserError: unknown, abbreviated or mistyped flag, value that does not parse.
    """
    parser = new_parser(description)
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"one of {', '.join(PRESETS)}")
    for name, keywords in (own or {}).items():
        parser.add_argument(f"--{name}", **keywords)

    source = inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    fields = dataclasses.fields(Config)
    for field in fields:
        is_switch = field.type is bool
        text = f"{comments[field.name]} ({field.default})"
        parser.add_argument(f"--{field.name}", type=boolean if is_switch else field.type,
                            default=argparse.SUPPRESS,
                            metavar="true|false" if is_switch else field.type.__name__.upper(),
                            help=text.replace("%", "%%"))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_flag(unknown[0], parser)
    given = vars(args)
    args.flags = {field.name: given[field.name] for field in fields if field.name in given}
    return args


def refuse_flag(flag, parser):
    if not flag.startswith("-"):
        raise UserError(f"{flag!r} belongs to no flag, each of which takes one value: see --help")
    name = flag.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    # --lr is part of --decoder_lr
    close = [option for option in known if name.strip("-") in option.strip("-").split("_")]
    close = close or difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {', '.join(close)}?" if close else "; see --help"
    raise UserError(f"unknown flag {flag!r}{hint}")


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser that takes no abbreviated flags and raises UserError."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def boolean(text: str) -> bool:
    """true or false, for argparse."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text == "true"


def fail(message: str) -> NoReturn:
    """Raise UserError, for argparse's `parser.error`."""
    value = "expected a value (of a switch true or false)"
    raise UserError(message.replace("expected one argument", value))
