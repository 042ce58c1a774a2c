"""A frozen encoder, faster: batch norms folded into the convolutions, cuDNN's fused kernels."""
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fast.graphs import Recorded
from models import Encoder


class FoldedEncoder(nn.Module):
    """The same function as an Encoder of torchvision's ResNet in eval mode, without gradients.

    In bfloat16 it gives a grid of that type. The encoder is left as it is.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.mean, self.std, self.dtype = encoder.mean, encoder.std, dtype
        network = copy.deepcopy(encoder.resnet).eval()
        fold_batch_norms(network)
        conv1, _, _, maxpool, *layers = network
        blocks = [fused(block) for layer in layers for block in layer]
        self.stages = nn.Sequential(FusedBlock([conv1]), maxpool, *blocks)
        self.stages.requires_grad_(False).to(dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """As Encoder.forward."""
        x = images.permute(0, 3, 1, 2)  # channels last in memory, as the convolutions like it
        x = (x.float() - self.mean) / self.std
        return self.stages(x.to(self.dtype)).permute(0, 2, 3, 1)


def fold_batch_norms(module: nn.Module) -> None:
    """Let each convolution do the work of the batch norm after it: in eval mode both are linear."""
    previous = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, previous, fuse_conv_bn_eval(getattr(module, previous), child))
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norms(child)
        previous = name


class FusedBlock(nn.Module):
    """Convolutions in a row, each with its relu; before the last one adds `shortcut` of the input.

    On NVIDIA's GPUs from Ampere on convolution, addition and relu are one kernel of cuDNN's.
    """

    def __init__(self, convolutions: list[nn.Conv2d], shortcut: nn.Module | None = None):
        super().__init__()
        self.convolutions, self.shortcut = nn.ModuleList(convolutions), shortcut

    def forward(self, x: Tensor) -> Tensor:
        added = None if self.shortcut is None else self.shortcut(x)
        for convolution in self.convolutions[:-1]:
            x = convolve(convolution, x)
        return convolve(self.convolutions[-1], x, added)


def fused(block: nn.Module) -> FusedBlock:
    """torchvision's BasicBlock or Bottleneck, its batch norms folded."""
    convolutions = [child for name, child in block.named_children() if name.startswith("conv")]
    shortcut = nn.Identity() if block.downsample is None else block.downsample
    return FusedBlock(convolutions, shortcut)


def convolve(convolution: nn.Conv2d, x: Tensor, added: Tensor | None = None) -> Tensor:
    """relu(convolution(x) + added)"""
    is_cuda = x.is_cuda and torch.version.cuda  # not AMD's
    if not is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        x = convolution(x)
        return (x if added is None else x.add_(added)).relu_()
    how = (convolution.bias, convolution.stride, convolution.padding, convolution.dilation,
           convolution.groups)
    if added is None:
        return torch.cudnn_convolution_relu(x, convolution.weight, *how)
    return torch.cudnn_convolution_add_relu(x, convolution.weight, added, 1.0, *how)


class Replayed(nn.Module):
    """A module without gradients as a CUDA graph, for inputs of the first one's shape only."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.input, self.recorded = module, None, Recorded()

    def fill_output(self) -> None:
        self.output = self.module(self.input)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.input is None:
            self.input = torch.empty_like(x)
        if x.shape != self.input.shape:
            return self.module(x)
        self.input.copy_(x)
        self.recorded(self.fill_output)
        return self.output.clone()
