"""Import this first, and packages that are not installed are imported all the same: as
placeholders, whose use says what is missing. So a host without network runs what it can.

What is measured needs PyTorch, torchvision, NumPy, h5py, Pillow, Matplotlib and tqdm.
"""
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

# How a package is imported -> how pip calls it.
PACKAGES = {"jieba": "jieba", "nltk": "nltk", "mplfonts": "mplfonts", "fontTools": "fonttools",
            "pycocoevalcap": "pycocoevalcap", "filelock": "filelock", "skimage": "scikit-image",
            "timm": "timm", "tensorboard": "tensorboard", "google": "protobuf",
            "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}


def is_placeholder(package: str) -> bool:
    return isinstance(sys.modules.get(package), Placeholder)


class Missing:
    """Anything of a package that is not installed."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args, **keywords):
        package = self.name.partition(".")[0]
        raise ModuleNotFoundError(f"{PACKAGES[package]} is not installed", name=package)

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")


class Placeholder(ModuleType):
    __version__ = "99"  # more than anyone asks for

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder has found."""

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        is_part = name != package
        if package not in PACKAGES or is_part and not is_placeholder(package):
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=name, is_package=True)

    def create_module(self, spec):
        module = Placeholder(spec.name)
        module.__file__ = spec.name
        if spec.name == "jieba":
            module.setLogLevel = lambda level: None  # which datasets.py calls as it is imported
        return module

    def exec_module(self, module):
        pass


NOT_INSTALLED = [name for package, name in PACKAGES.items()
                 if importlib.util.find_spec(package) is None]  # as pip calls them
sys.meta_path.append(Finder())
