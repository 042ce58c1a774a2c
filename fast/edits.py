"""Whether the model's code is the code that fast/ was written for.

An edit is believed even where it changes no number yet. What is compared is what Python executes:
syntax trees, which have no comments, without docstrings and type annotations.
"""
import ast
import hashlib
import inspect
import sys
import textwrap

from torch import nn

from fast.written_for import WRITTEN_FOR

FUNCTIONS = {"encoder": ("models.backbone", "backbones.load_resnet"), "decoder": ()}
LIBRARIES = "builtins", "torch", "torchvision"
NOT_EXECUTED = "annotation", "returns", "type_params", "type_comment", "kind", "ctx"


def edits(half: str, model: nn.Module) -> list[str]:
    """The names of what is not as fast/ knows it, of a half of the model: encoder or decoder."""
    found, known = digests(half, model), WRITTEN_FOR[half]
    return sorted(name for name in {*found, *known} if found.get(name) != known.get(name))


def digests(half: str, model: nn.Module) -> dict[str, str]:
    """What the code of all classes that the model's modules are of, and of FUNCTIONS, comes to."""
    found = {}
    for name in FUNCTIONS[half]:
        module, _, function = name.partition(".")
        found[name] = digest(getattr(sys.modules[module], function, None))
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in LIBRARIES:
                found[f"{kind.__module__}.{kind.__qualname__}"] = digest(kind)
        if is_patched(module):
            found["a hook or method of one module"] = ""
    return found


def digest(thing: object) -> str:
    """Of a class or function; empty where its code cannot be read, or is not all there is to it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return ""
    if inspect.isclass(thing) and has_foreign_methods(thing):
        return ""
    return hashlib.sha256(repr(executed(tree)).encode()).hexdigest()[:16]


def executed(node: object) -> object:
    """A syntax tree as nested tuples, which all versions of Python build alike."""
    if isinstance(node, list):
        return [executed(child) for child in node if not is_docstring(child)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        node = ast.Assign([node.target], node.value)
    fields = [(name, executed(value)) for name, value in ast.iter_fields(node)
              if name not in NOT_EXECUTED and value not in (None, [])]
    return type(node).__name__, fields


def is_docstring(node: object) -> bool:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def has_foreign_methods(kind: type) -> bool:
    """Whether a function was put into a class from elsewhere."""
    file = inspect.getsourcefile(kind)
    lines, first = inspect.getsourcelines(kind)
    for member in vars(kind).values():
        if inspect.isfunction(member):
            code = member.__code__
            if code.co_filename != file or not first <= code.co_firstlineno < first + len(lines):
                return True
    return False


def is_patched(module: nn.Module) -> bool:
    """Whether one module does what its class does not: it has hooks, or a method of its own."""
    return any(callable(value) or "hooks" in name and value for name, value in vars(module).items())
