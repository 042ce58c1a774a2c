"""The networks of the encoder: torchvision's ResNets, timm's, those of files; where cells look.

models.py takes a network from here and does the rest, so only who adds a source of networks needs
to read on.
"""
import difflib
import sys
from collections.abc import Callable, Iterable
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from utils import UserError, one_line

RESNETS = "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"  # torchvision's


def load_resnet(name: str, weights: str) -> nn.Module:
    """torchvision's ResNet with ImageNet weights (V1, the original's), random ones ("none"), or
    those of a file.
    """
    imagenet = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        resnet = torchvision.models.get_model(
            name, weights=imagenet if weights == "imagenet" else None)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(f"the ImageNet weights of {name} cannot be downloaded ({error}): fetch "
                        f"{imagenet.url} elsewhere and put it into {torch.hub.get_dir()}"
                        f"/checkpoints/, or name a state dict with --encoder_weights PATH, or "
                        f"train a smaller network from random weights: --encoder resnet18 "
                        f"--encoder_weights none --fine_tune_encoder true") from None
    resnet.fc = nn.Identity()  # it is not used: a file may have another one, or none
    if weights not in ("imagenet", "none"):
        load_file(resnet, weights, f"torchvision's {name}", unused=("fc.weight", "fc.bias"))
    return resnet


# -------------------------------------------------------------------------------------------------
# timm


class TimmMap(nn.Module):
    """A network of timm up to the map of D channels that it would pool itself, or up to that of an
    earlier stage, a number within net.feature_info.
    """

    def __init__(self, net: nn.Module, stage: int | None, dim: int):
        super().__init__()
        self.net = net
        self.stage = stage
        self.dim = dim

    def forward(self, x):  # (B, 3, S, S) -> (B, D, h, w)
        if self.stage is not None:
            maps = self.net.forward_intermediates(x, indices=[self.stage], stop_early=True,
                                                  intermediates_only=True)
            return maps[0]
        side = -(-x.shape[2] // self.net.feature_info[-1]["reduction"])
        x = self.net.forward_features(x)
        if x.ndim == 3:  # (B, tokens, D); those that stand for no place of the picture come first
            x = x[:, -side ** 2:].unflatten(1, (side, side))
        return x if x.shape[1] == self.dim else x.permute(0, 3, 1, 2)


def timm_network(name: str, weights: str, stride: int, image_size: int) -> tuple[TimmMap, dict]:
    """Any convolutional network or ViT of https://github.com/huggingface/pytorch-image-models, and
    its facts: see models.backbone.

    Fine-tuning leaves what comes before a quarter of the size as it is, as with the ResNets; of a
    ViT, whose maps all have one size, a quarter of its blocks.
    """
    import timm  # here, as it takes a second, and no ResNet needs it

    net = create_timm(name, weights, image_size)
    reductions = [stage["reduction"] for stage in net.feature_info]
    if stride in (32, reductions[-1]):
        stride = reductions[-1]
        network = TimmMap(net, None, net.num_features)
    elif stride in reductions:
        stage = max(i for i, reduction in enumerate(reductions) if reduction == stride)
        network = TimmMap(net, stage, net.feature_info[stage]["num_chs"])
    else:
        raise UserError(f"--encoder_stride {stride}: the maps of {name} have "
                        f"{sorted({*reductions})} pixels per cell; 32, the default, stands for the "
                        f"last one")

    map_side = -(-image_size // stride)
    unused = drop_unused(network, map_side, image_size, name)
    if weights not in ("imagenet", "none"):
        module = sys.modules[type(net).__module__]
        adapt = getattr(module, "checkpoint_filter_fn", None)  # to another number of tokens
        load_file(net, weights, f"timm's {name}", unused, adapt)
    facts = timm.data.resolve_model_data_config(net)
    return network, dict(dim=network.dim, stride=stride, top=f"net.{last_early_module(net)}",
                         mean=[255 * x for x in facts["mean"]], std=[255 * x for x in facts["std"]])


def create_timm(name, weights, image_size):
    import timm

    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, [*RESNETS, *timm.list_models()]))
        hint = f": did you mean {close}?" if close else ""
        raise UserError(f"--encoder must be {', '.join(RESNETS)} or a network of timm, "
                        f"not {name!r}{hint}")
    try:
        known = timm.get_pretrained_cfg(name)
        size = {}
        if known.fixed_input_size and known.input_size[1] != image_size:
            size["img_size"] = image_size
        return timm.create_model(name, pretrained=weights == "imagenet", **size).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm cannot build --encoder {name} for --encoder_weights {weights} and "
                        f"--image_size {image_size} ({one_line(error):.300})") from None
    except Exception as error:  # of the hub: a network may fail in many ways
        raise UserError(f"timm's weights of {name} cannot be downloaded ({one_line(error):.200}): "
                        f"let the environment variable HF_ENDPOINT name a mirror of the hub, or "
                        f"fetch model.safetensors of {known.hf_hub_id} elsewhere and give "
                        f"--encoder_weights PATH") from None


def last_early_module(net):
    """The name of the last module that fine-tuning leaves as it is."""
    names = [name for name, _ in net.named_modules()][1:]
    stages = [stage for stage in net.feature_info if stage["module"] in names]  # few: old names
    early = [stage for stage in stages if stage["reduction"] <= 4] or stages[:len(stages) // 4]
    return early[-1]["module"] if early else names[0]


def drop_unused(network: TimmMap, map_side: int, image_size: int, name: str) -> set[str]:
    """Take out the parameters that the map does not depend on, such as the classifier's, and give
    their names in network.net. Nothing is computed: tensors on the meta device have a size only.

    Raises:
        UserError: the network, in eval mode, has no map of map_side x map_side cells.
    """
    parameters = {key: x.detach().to("meta").requires_grad_()
                  for key, x in network.named_parameters()}
    buffers = {key: x.to("meta") for key, x in network.named_buffers()}
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        with torch.enable_grad():
            grid = torch.func.functional_call(network, {**parameters, **buffers}, (images,))
            gradients = torch.autograd.grad(grid.sum(), [*parameters.values()], allow_unused=True)
        if grid.shape != (1, network.dim, map_side, map_side):
            raise ValueError(f"it gives {tuple(grid.shape)}")
    except Exception as error:  # whatever one of a thousand networks makes of it
        raise UserError(f"--encoder {name} gives no map of {map_side} x {map_side} cells of "
                        f"--image_size {image_size} ({one_line(error):.200}): let the size be a "
                        f"multiple of its cells', or take another network") from None
    unused = [key for key, gradient in zip(parameters, gradients) if gradient is None]
    for key in unused:
        module, _, own_name = key.rpartition(".")
        setattr(network.get_submodule(module), own_name, None)
    return {key.removeprefix("net.") for key in unused}


# -------------------------------------------------------------------------------------------------
# Files


def load_file(network: nn.Module, path: str, what: str, unused: Iterable[str],
              adapt: Callable[[dict, nn.Module], dict] | None = None) -> None:
    """Load a network's weights from a state dict (.pth, .safetensors), of DataParallel or not;
    UserError where that is impossible.

    Args:
        what: the network, for the message.
        unused: parameters that it does without.
        adapt: of a state dict of other shapes and the network, gives one that fits.
    """
    wanted = network.state_dict()
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file as read  # which comes with timm

            state = read(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        common = state.keys() & wanted.keys()
        if adapt and any(state[name].shape != wanted[name].shape for name in common):
            state = adapt(state, network)
        network.load_state_dict({name: x for name, x in state.items() if name not in unused})
    except Exception as error:  # a broken file may lead to anything
        raise UserError(f"--encoder_weights {path} cannot be read as a state dict of {what} "
                        f"({one_line(error):.300})") from None


# -------------------------------------------------------------------------------------------------
# Where a cell looks


def measure_offset(encoder: nn.Module) -> float:
    """Encoder.offset, pixels, by the gradient of a cell in the middle, which shows where it looks,
    weights aside. Where a cell looks everywhere, as with some kinds of attention, the offset that
    spreads the cells evenly over the picture.
    """
    size, stride = encoder.image_size, encoder.stride
    middle = size // stride // 2
    was_training = encoder.training
    # So dark that nothing saturates, yet not black, where a relu has no gradient.
    image = torch.full((1, 3, size, size), 1e-15, device=encoder.mean.device, requires_grad=True)
    with torch.enable_grad(), WhereItLooks():
        cell = encoder.eval().resnet(image)[0, :, middle, middle].sum()
    encoder.train(was_training)

    gradient, = torch.autograd.grad(cell, image)
    seen = gradient.abs().sum(dim=(0, 1, 2)).double()  # of each column
    distance = torch.arange(size, device=seen.device) - stride * middle
    mean = (seen * distance).sum() / seen.sum()
    spread = (seen * (distance - mean) ** 2).sum() / seen.sum()
    return round(mean.item(), 2) if spread < stride ** 2 else (stride - 1) / 2


class WhereItLooks(TorchFunctionMode):
    """Within its context a convolution sees the centre of its kernel only, and all channels alike;
    pooling takes means, norms change nothing, and in attention every token looks at itself.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.conv2d:
            x, weight, _, *others = args  # the third is the bias
            return F.conv2d(x, central(weight), None, *others, **kwargs)
        if function is F.max_pool2d:
            not_taken = ("dilation", "return_indices")
            kwargs = {name: value for name, value in kwargs.items() if name not in not_taken}
            return F.avg_pool2d(*args, **kwargs)
        if function in (F.batch_norm, F.layer_norm, F.group_norm):
            return args[0].clone()  # what follows may write into it
        if function is F.scaled_dot_product_attention and args[0].shape == args[2].shape:
            return args[2]
        return function(*args, **kwargs)


def central(weight):
    """A kernel of the same shape that takes the mean of its centre, two cells where it is even."""
    height, width = weight.shape[2:]
    kernel = torch.zeros_like(weight)
    kernel[:, :, (height - 1) // 2:height // 2 + 1, (width - 1) // 2:width // 2 + 1] = 1
    return kernel / kernel[0].sum()
