"""The networks of the encoder: torchvision's ResNets, timm's, those of files; and where the cells of their maps lie.

models.py takes a network from here and does the rest, so only who adds a source of networks needs to read on.
"""
import difflib
import sys
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from utils import UserError

RESNETS = "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"  # torchvision's


def load_resnet(name, weights):
    """torchvision's ResNet with ImageNet weights (V1, the original's), random ones, or those of a file."""
    imagenet = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        resnet = torchvision.models.get_model(name, weights=imagenet if weights == "imagenet" else None)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(f"the ImageNet weights of {name} cannot be downloaded ({error}): fetch {imagenet.url} "
                        f"elsewhere and put it into {torch.hub.get_dir()}/checkpoints/, or name a state dict with "
                        f"--encoder_weights PATH, or train a smaller network from random weights: --encoder resnet18 "
                        f"--encoder_weights none --fine_tune_encoder true") from None
    resnet.fc = nn.Identity()  # it is not used: a file may have another one, or none
    if weights not in ("imagenet", "none"):
        load_file(resnet, weights, f"torchvision's {name}", unused=("fc.weight", "fc.bias"))
    return resnet


class TimmMap(nn.Module):
    """A network of timm up to the map that it would pool itself, or up to an earlier one.

    Args: net (nn.Module). stage (int): of net.feature_info; None for the map that it pools. dim (int): D.
    """

    def __init__(self, net, stage, dim):
        super().__init__()
        self.net, self.stage, self.dim = net, stage, dim

    def forward(self, x):
        """Args: x: (B, 3, S, S). Returns: (B, D, h, w)."""
        if self.stage is not None:
            return self.net.forward_intermediates(x, indices=[self.stage], stop_early=True, intermediates_only=True)[0]
        side = -(-x.shape[2] // self.net.feature_info[-1]["reduction"])
        x = self.net.forward_features(x)
        if x.ndim == 3:  # (B, tokens, D); those that stand for no place of the picture come first
            x = x[:, -side ** 2:].unflatten(1, (side, side))
        return x if x.shape[1] == self.dim else x.permute(0, 3, 1, 2)


def timm_network(name, weights, stride, image_size):
    """Any convolutional network or ViT of timm, https://github.com/huggingface/pytorch-image-models.

    Fine-tuning leaves what comes before a quarter of the size as it is, as with the ResNets; of a ViT, whose maps all
    have one size, a quarter of its blocks.

    Returns: see backbone.
    """
    import timm  # here, as it takes a second, and no ResNet needs it

    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, [*RESNETS, *timm.list_models()]))
        raise UserError(f"--encoder must be {', '.join(RESNETS)} or a network of timm, not {name!r}"
                        + (f": did you mean {close}?" if close else ""))
    try:
        known = timm.get_pretrained_cfg(name)
        has_size = known.fixed_input_size and known.input_size[1] != image_size
        size = dict(img_size=image_size) if has_size else {}
        net = timm.create_model(name, pretrained=weights == "imagenet", **size).eval()
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm cannot build --encoder {name} for --encoder_weights {weights} and --image_size "
                        f"{image_size} ({' '.join(str(error).split()):.300})") from None
    except Exception as error:  # of the hub: a network may fail in many ways
        raise UserError(
            f"timm's weights of {name} cannot be downloaded ({' '.join(str(error).split()):.200}): let the environment "
            f"variable HF_ENDPOINT name a mirror of the hub, or fetch model.safetensors of {known.hf_hub_id} elsewhere "
            f"and give --encoder_weights PATH") from None
    reductions = [stage["reduction"] for stage in net.feature_info]
    stage, dim = None, net.num_features
    if stride not in (32, reductions[-1]):
        if stride not in reductions:
            raise UserError(f"--encoder_stride {stride}: the maps of {name} have {sorted({*reductions})} pixels per "
                            f"cell; 32, the default, stands for the last one")
        stage = len(reductions) - 1 - reductions[::-1].index(stride)
        dim = net.feature_info[stage]["num_chs"]
    else:
        stride = reductions[-1]
    network = TimmMap(net, stage, dim)
    unused = drop_unused(network, (dim, -(-image_size // stride)), image_size, name)
    if weights not in ("imagenet", "none"):
        adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # to another number of tokens
        load_file(net, weights, f"timm's {name}", unused, adapt)
    names = [name for name, _ in net.named_modules()][1:]
    stages = [stage for stage in net.feature_info if stage["module"] in names]  # a few have a name of old
    early = [stage for stage in stages if stage["reduction"] <= 4] or stages[:len(stages) // 4]
    top = early[-1]["module"] if early else names[0]
    facts = timm.data.resolve_model_data_config(net)
    return network, dict(
        dim=dim, stride=stride, top=f"net.{top}",
        mean=[255 * x for x in facts["mean"]], std=[255 * x for x in facts["std"]])


def drop_unused(network, map_shape, image_size, name):
    """Take out the parameters that the map does not depend on, such as the classifier's. Nothing is computed: tensors
    on the meta device have a size only.

    Args: network (TimmMap), in eval mode. map_shape (tuple): D and h of the map to be. image_size (int). name (str).
    Returns: set of str: their names in network.net.
    Raises: UserError: the network has no such map.
    """
    dim, side = map_shape
    parameters = {key: x.detach().to("meta").requires_grad_() for key, x in network.named_parameters()}
    buffers = {key: x.to("meta") for key, x in network.named_buffers()}
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        with torch.enable_grad():
            grid = torch.func.functional_call(network, {**parameters, **buffers}, (images,))
            gradients = torch.autograd.grad(grid.sum(), [*parameters.values()], allow_unused=True)
        if grid.shape != (1, dim, side, side):
            raise ValueError(f"it gives {tuple(grid.shape)}")
    except Exception as error:  # whatever one of a thousand networks makes of it
        raise UserError(f"--encoder {name} gives no map of {side} x {side} cells of --image_size {image_size} "
                        f"({' '.join(str(error).split()):.200}): let the size be a multiple of its cells', or take "
                        f"another network") from None
    unused = [key for key, gradient in zip(parameters, gradients) if gradient is None]
    for key in unused:
        module, _, own = key.rpartition(".")
        setattr(network.get_submodule(module), own, None)
    return {key.removeprefix("net.") for key in unused}


def load_file(network, path, what, unused, adapt=None):
    """Load a network's weights from a state dict (.pth, .safetensors), of DataParallel or not.

    Args:
        network (nn.Module). path (str). what (str): the network, for the message. unused (set of str): parameters that
        it does without. adapt (function): of a state dict of other shapes and the network, gives one that fits.
    Raises:
        UserError
    """
    wanted = network.state_dict()
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file as read  # which comes with timm
            state = read(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if adapt and any(state[name].shape != wanted[name].shape for name in state.keys() & wanted.keys()):
            state = adapt(state, network)
        network.load_state_dict({name: tensor for name, tensor in state.items() if name not in unused})
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise ValueError("some of its numbers are not finite")
    except Exception as error:  # a broken file may lead to anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--encoder_weights {path} cannot be read as a state dict of {what} ({reason:.300})") from None


def measure_offset(encoder):
    """Encoder.offset, by the gradient of a cell in the middle, which shows where it looks, weights aside.

    Returns: float, pixels. Where a cell looks everywhere, as with some kinds of attention, the one that spreads the
    cells evenly over the picture.
    """
    size, stride, was_training = encoder.image_size, encoder.stride, encoder.training
    middle = size // stride // 2
    # So dark that nothing saturates, yet not black, where a relu has no gradient.
    image = torch.full((1, 3, size, size), 1e-15, device=encoder.mean.device, requires_grad=True)
    with torch.enable_grad(), WhereItLooks():
        cell = encoder.eval().resnet(image)[0, :, middle, middle].sum()
    encoder.train(was_training)
    seen = torch.autograd.grad(cell, image)[0].abs().sum(dim=(0, 1, 2)).double()  # of each column
    distance = torch.arange(size, device=seen.device) - stride * middle
    mean = (seen * distance).sum() / seen.sum()
    spread = (seen * (distance - mean) ** 2).sum() / seen.sum()
    return round(mean.item(), 2) if spread < stride ** 2 else (stride - 1) / 2


class WhereItLooks(TorchFunctionMode):
    """Within its context a convolution sees the centre of its kernel only, and all channels alike; pooling takes means,
    norms change nothing, and in attention every token looks at itself.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.conv2d:
            x, weight, *others = args  # the first of which is the bias
            kernel = torch.zeros_like(weight)
            rows, columns = (slice((size - 1) // 2, size // 2 + 1) for size in kernel.shape[2:])  # two if it is even
            kernel[:, :, rows, columns] = 1
            return F.conv2d(x, kernel / kernel[0].sum(), None, *others[1:], **kwargs)
        if function is F.max_pool2d:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("dilation", "return_indices")}
            return F.avg_pool2d(*args, **kwargs)
        if function in (F.batch_norm, F.layer_norm, F.group_norm):
            return args[0].clone()  # what follows may write into it
        if function is F.scaled_dot_product_attention and args[0].shape == args[2].shape:
            return args[2]
        return function(*args, **kwargs)
