"""Reference nets in torch with seeded random weights, and their export by both of torch's exporters.

`build` gives the net as people export it (functional adds and pooling, in-place ReLU); `modular` gives a copy in which
every operation that zennit must see is a module of its own, since zennit assigns rules to modules only.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from pathlib import Path

from . import peers
from .cases import HIGH, LOW, NETS

peers.load()

import torch  # noqa: E402
import torchvision.models  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.models import densenet, mobilenetv2, resnet, vgg  # noqa: E402
from torchvision.models.googlenet import BasicConv2d  # noqa: E402
from zennit.layer import Sum  # noqa: E402

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Linear)
scale = 1.0
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d)


class ECGBlock(nn.Module):
    """[B, in, L] -> [B, 64, ~L/2]: Conv1d of width 7, ReLU, MaxPool 3/2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, 64, 7, padding=3)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool1d(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.relu(self.conv(x)))


class ECGNet(nn.Module):
    """The CRP paper's 1-D net, [B, 1, 150] -> [B, 5]."""

    def __init__(self):
        super().__init__()
        self.block1, self.block2, self.block3 = ECGBlock(1), ECGBlock(64), ECGBlock(64)
        self.pool = nn.AvgPool1d(7)
        self.fc1, self.relu, self.fc2 = nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.block3(self.block2(self.block1(x))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


def samples(name: str, count: int, seed: int = 0) -> torch.Tensor:
    """Smooth signals plus noise inside [LOW, HIGH]: [count, *shape] float32."""
    shape = NETS[name].shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], *(max(2, size // 8) for size in shape[1:]), generator=generator)
    smooth = nn.functional.interpolate(coarse, shape[1:], mode="linear" if len(shape) == 2 else "bilinear")
    return (1.2 * smooth + 0.4 * torch.randn(count, *shape, generator=generator)).clamp(LOW, HIGH)


def calm_samples(net: nn.Module, name: str, count: int) -> torch.Tensor:
    """The `count` samples of a few dozen on which float32 can answer a question about the net, [count, *shape].

    LRP-epsilon is discontinuous where a ReLU's input crosses 0 and every rule is where two inputs of a max pooling tie.
    Nets with a million units always have some within float32's rounding of that, and one such unit costs 1e-3 of the
    relevance: in zennit's float32 against its own float64 as much as in ours. So each candidate is scored by the
    units that rounding can flip, weighted by the size of their layer, and the calmest candidates are taken.
    """
    candidates = samples(name, 8 if name.startswith("vgg") else 48, seed=3)
    exact, rounded = modular(net), modular(net).float()
    score = torch.cat([_flips(exact, rounded, x) for x in candidates.split(4)])
    return candidates[score.argsort()[:count].sort().values]


def _flips(exact: nn.Module, rounded: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Expected squared error of relevance from flipped ReLU and pooling: [B]."""
    kinds = (nn.ReLU, nn.ReLU6, nn.MaxPool1d, nn.MaxPool2d)
    score = torch.zeros(len(x), dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}

    def remember(name):
        return lambda _, args: seen.__setitem__(name, args[0])

    def compare(name):
        def hook(module, args):
            z = args[0]
            error = 5 * (z - seen.pop(name)).std()
            if isinstance(module, nn.ReLU | nn.ReLU6):
                margin = z.abs()
            else:
                size, stride, pad = module.kernel_size, module.stride, module.padding
                windows = nn.functional.pad(z, [pad, size] * (z.ndim - 2), value=-1e30)
                for axis in range(2, z.ndim):
                    windows = windows.unfold(axis, size, stride)
                first, second = windows.flatten(z.ndim).topk(2).values.unbind(-1)
                margin = torch.where(first == second, torch.inf, first - second)  # 0 and 0: the first index wins
            likely = (error / margin).clamp(max=1.0) ** 4
            score.add_(likely.flatten(1).sum(1) / margin[0].numel())

        return hook

    handles = [m.register_forward_pre_hook(remember(n)) for n, m in rounded.named_modules() if isinstance(m, kinds)]
    handles += [m.register_forward_pre_hook(compare(n)) for n, m in exact.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        rounded(x)
        exact(x.double())
    for handle in handles:
        handle.remove()
    return score


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The net in float32 and eval mode, every parameter random but fixed by its name, and samples to ask it about."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        if name == "ecg":
            net: nn.Module = ECGNet()
        else:
            options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
            net = getattr(torchvision.models, name)(weights=None, **options)
        net.eval().requires_grad_(False)
        randomise(net, samples(name, 4, seed=1), scale=3.0 if name == "mobilenet_v2" else 10.0)
    return net, _settle(net, name)


def _settle(net: nn.Module, name: str) -> torch.Tensor:
    """Shift biases until float32 can answer questions about some samples, and return these samples [B, *shape].

    LRP-epsilon jumps where the output of a layer crosses 0, the share of a sum does where the sum crosses 0, and every
    rule does where two inputs of a max pooling change places. In nets with a million units some are always within
    float32's rounding of that, and one of them moves 1e-3 of the relevance: zennit's own float32 misses its float64 by
    as much. So each channel's bias is shifted by up to 1/20 of a deviation to put 0 into the widest gap between the
    values the channel takes. Pooling cannot be mended that way; of a few samples the one with the fewest near-ties is
    taken.
    """
    exact, biases, chosen, fewest = modular(net), {}, None, float("inf")
    pairs = neighbours(exact, samples(name, 1).double())
    merged, followers = ({pair[i] for pair in pairs} for i in (0, 1))
    carriers = {
        n: m
        for n, m in exact.named_modules()
        if isinstance(m, (*LINEAR, *BATCHNORM)) and m not in merged and m.bias is not None
    }
    start = {n: module.bias.detach().clone() for n, module in carriers.items()}
    for seed in range(6 if name.startswith("vgg") else 3):
        x = samples(name, NETS[name].samples, seed=10 + seed)
        for n, module in carriers.items():
            module.bias.data = start[n].clone()
        if (ties := _shift_biases(exact, x, set(carriers.values()), followers)) < fewest:
            fewest, chosen, biases = ties, x, {n: module.bias.detach().clone() for n, module in carriers.items()}
    for n, bias in biases.items():
        net.get_submodule(n).bias.data = bias.float()
    assert chosen is not None
    return chosen


def _shift_biases(net: nn.Module, x: torch.Tensor, carriers: set[nn.Module], followers: set[nn.Module]) -> float:
    """Shift biases of the float64 `net` so that no layer and no sum is near 0 on x; returns the weighted pooling near-ties."""
    ties, carrier, written = 0.0, net, x

    def away_from_0(z, *also):
        """z shifted by the carrier's bias; `also` are shifted alike and keep away from 0 as well."""
        reach = 0.05 * z.std()
        values = torch.cat([each.transpose(0, 1).flatten(1) for each in (z, *also)], 1)
        values = nn.functional.pad(values, (1, 0), value=-reach.item())
        values = nn.functional.pad(values, (0, 1), value=reach.item()).sort(1).values
        gaps, middles = values.diff(dim=1), (values[:, 1:] + values[:, :-1]) / 2
        low = 0.0 if isinstance(carrier, BATCHNORM) and carrier not in followers else -reach
        width, at = gaps.where((middles > low) & (middles < reach), 0.0).max(1)
        shift = middles.gather(1, at[:, None])[:, 0].where(width > 0, 0.0)
        carrier.bias.data -= shift
        return z - shift.reshape(-1, *[1] * (z.ndim - 2))

    def layer(module, _, z):
        nonlocal carrier, written
        carrier = module
        written = away_from_0(z)
        return written

    def add(_, args, z):
        assert any(term is written for term in args)
        return away_from_0(z, written)

    def pool(module, args):
        nonlocal ties
        z, size = args[0], module.kernel_size
        windows = nn.functional.pad(z, [module.padding, size] * (z.ndim - 2), value=-1e30)
        for axis in range(2, z.ndim):
            windows = windows.unfold(axis, size, module.stride)
        first, second = windows.flatten(z.ndim).topk(2).values.unbind(-1)
        margin = torch.where(first == second, torch.inf, first - second)  # 0 and 0: the first index wins
        ties += ((2e-6 * z.std() / margin) ** 4).clamp(max=1.0).sum().item() / first[0].numel()

    hooks = []
    for module in net.modules():
        if module in carriers:
            hooks.append(module.register_forward_hook(layer))
        elif isinstance(module, Add):
            hooks.append(module.register_forward_hook(add))
        elif isinstance(module, nn.MaxPool1d | nn.MaxPool2d):
            hooks.append(module.register_forward_pre_hook(pool))
    with torch.no_grad():
        net(x.double())
    for hook in hooks:
        hook.remove()
    return ties


def randomise(net: nn.Module, x: torch.Tensor, scale: float) -> None:
    """Set weights, biases and BatchNorm to random values of the size of what flows through, layer by layer as x passes.

    Random statistics that have nothing to do with the data would blow up or silence nets of 50 layers. So each layer
    takes the statistics it sees, then disturbs them. Three things keep float32 able to answer: most ReLU are open and
    residual branches are the smaller part of their sum (else random nets amplify rounding tenfold every ten layers),
    and a BatchNorm that stays in the graph (densenet) only opens where its input is not near 0 (else R/x explodes:
    it passes R on, whatever it shifted).
    """

    def remember(module, args):
        inputs[module] = args[0]

    def linear(module, _, z):
        if module not in merged:
            module.weight.data *= scale / z.std()
        if module.bias is not None:
            module.bias.data = 0.1 * scale * torch.randn_like(module.bias)
        return module.forward(inputs[module])

    def batchnorm(module, args):
        z = args[0]
        axes = [0, *range(2, z.ndim)]
        mean, deviation = z.mean(axes), z.std(axes).clamp(min=0.1 * z.std())
        module.running_mean.data = mean + 0.2 * deviation * torch.randn_like(mean)
        module.running_var.data = deviation**2 * (0.5 + torch.rand_like(mean))
        gain = scale * (0.5 + torch.rand_like(mean)) * torch.where(torch.rand_like(mean) < 0.1, -1.0, 1.0)
        module.weight.data = 0.4 * gain if module in branch_ends else gain
        if module in followers:
            module.bias.data = scale * (0.8 + 0.2 * torch.randn_like(mean))
        else:
            centre = gain * module.running_mean / (module.running_var + module.eps).sqrt()
            module.bias.data = centre - 0.1 * scale * torch.rand_like(mean)

    inputs: dict[nn.Module, torch.Tensor] = {}
    merged, followers = ({pair[i] for pair in neighbours(net, x)} for i in (0, 1))
    branch_ends = _branch_ends(net)
    hooks = []
    for module in net.modules():
        if isinstance(module, LINEAR):
            hooks += [module.register_forward_pre_hook(remember), module.register_forward_hook(linear)]
        elif isinstance(module, BATCHNORM):
            hooks.append(module.register_forward_pre_hook(batchnorm))
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()


def _branch_ends(net: nn.Module) -> set[nn.Module]:
    """The BatchNorms at the end of residual branches."""
    ends: set[nn.Module] = set()
    for block in net.modules():
        if isinstance(block, resnet.BasicBlock):
            ends.add(block.bn2)
        elif isinstance(block, resnet.Bottleneck):
            ends.add(block.bn3)
        elif isinstance(block, mobilenetv2.InvertedResidual) and block.use_res_connect:
            ends.add(block.conv[-1])
    return ends


def neighbours(net: nn.Module, x: torch.Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs (linear layer, BatchNorm) where the very tensor that the layer writes is what the BatchNorm reads."""
    writer: dict[int, nn.Module] = {}
    alive, pairs = [], []

    def written(module, _, z):
        writer[id(z)] = module
        alive.append(z)  # or ids would be given out again

    def read(module, args):
        if id(args[0]) in writer:
            pairs.append((writer[id(args[0])], module))

    hooks = [m.register_forward_hook(written) for m in net.modules() if isinstance(m, LINEAR)]
    hooks += [m.register_forward_pre_hook(read) for m in net.modules() if isinstance(m, BATCHNORM)]
    with torch.no_grad():
        net(x[:1])
    for hook in hooks:
        hook.remove()
    return pairs


def first_layers(net: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the linear layers that read the input itself."""
    x, names = x[:1], []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: names.append(name) if args[0] is x else None)
        for name, module in net.named_modules()
        if isinstance(module, LINEAR)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return names


# What follows turns functions into modules for zennit. A ReLU module that a block calls twice becomes two, since
# zennit keeps one tensor per module.


class Add(nn.Module):
    """a + b as zennit's Sum over a stacked axis, to which its composites give the Norm rule."""

    def __init__(self):
        super().__init__()
        self.sum = Sum(dim=-1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.sum(torch.stack([a, b], dim=-1))


class ModularBasicBlock(resnet.BasicBlock):
    def grow(self):
        self.relu1, self.relu2, self.add = nn.ReLU(), nn.ReLU(), Add()

    def forward(self, x):
        z = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(z, x if self.downsample is None else self.downsample(x)))


class ModularBottleneck(resnet.Bottleneck):
    def grow(self):
        self.relu1, self.relu2, self.relu3, self.add = nn.ReLU(), nn.ReLU(), nn.ReLU(), Add()

    def forward(self, x):
        z = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.relu3(self.add(self.bn3(self.conv3(z)), x if self.downsample is None else self.downsample(x)))


class ModularInvertedResidual(mobilenetv2.InvertedResidual):
    def grow(self):
        self.add = Add()

    def forward(self, x):
        return self.add(x, self.conv(x)) if self.use_res_connect else self.conv(x)


class ModularMobileNetV2(mobilenetv2.MobileNetV2):
    def grow(self):
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


class ModularDenseNet(densenet.DenseNet):
    def grow(self):
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.classifier(self.pool(self.relu(self.features(x))).flatten(1))


class ModularBasicConv2d(BasicConv2d):
    def grow(self):
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class ModularVGG(vgg.VGG):
    def grow(self):
        # at 224 pixels this pooling maps 7x7 to 7x7; exporters drop it, and Norm on it would cost an epsilon
        self.avgpool = nn.Identity()

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


MODULAR = {
    resnet.BasicBlock: ModularBasicBlock,
    resnet.Bottleneck: ModularBottleneck,
    mobilenetv2.InvertedResidual: ModularInvertedResidual,
    mobilenetv2.MobileNetV2: ModularMobileNetV2,
    densenet.DenseNet: ModularDenseNet,
    BasicConv2d: ModularBasicConv2d,
    vgg.VGG: ModularVGG,
}


def modular(net: nn.Module) -> nn.Module:
    """A float64 copy with the same outputs in which zennit finds a module for every operation that needs a rule."""
    net = copy.deepcopy(net).double()
    for module in list(net.modules()):
        if (kind := MODULAR.get(type(module))) is not None:
            module.__class__ = kind
            module.grow()
    for module in net.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return net.eval().requires_grad_(False)


def export(net: nn.Module, name: str, exporter: str, folder: Path) -> Path:
    """Write the net with a dynamic batch by the TorchScript-based ("torchscript") or the dynamo-based exporter."""
    path = folder / f"{name}.{exporter}.onnx"
    x = samples(name, 2, seed=2)
    with warnings.catch_warnings():
        # both exporters warn about themselves and about parts of torch that they use; nothing of ours raises these
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.|copyreg|(tests\.)?support\.nets")
        if exporter == "torchscript":
            kept = torch.onnx.TrainingMode.EVAL if NETS[name].fused else torch.onnx.TrainingMode.PRESERVE
            options = {
                "dynamo": False,
                "training": kept,
                "dynamic_axes": {"input": {0: "batch"}, "logits": {0: "batch"}},
            }
            options["do_constant_folding"] = NETS[name].fused  # it would fold what PRESERVE keeps apart, and warns
        else:
            options = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
        torch.onnx.export(net, (x,), str(path), input_names=["input"], output_names=["logits"], **options)
    return path
