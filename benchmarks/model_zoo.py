"""Is every model explained? Random weights, the smallest input, a heatmap, and a student's gradient.

    pip install -e ".[benchmarks,clip]" && python benchmarks/model_zoo.py --library torchvision --out zoo.md

A model passes where its heatmap is finite and not zero, and, in training mode, the gradient of the heatmap loss is
finite, and not zero for every parameter tensor that the heatmap depends on. Where a gradient is zero, the
parameter is changed at random and the heatmap has to stay as it is.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import copy
import gc
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import ModelError, RelevanceError, build_network, explain
from pipeline.device import pick_device
from trainer import heatmap_loss

CLASSES, BATCH = 10, 4
SIDES = (28, 32, 64, 75, 96, 128, 224, 256)

TIMM = """resnet50d resnetv2_50 resnest14d resnet26t seresnet50 skresnet18 ecaresnet26t res2net50_26w_4s repvgg_a0 dpn68
densenet121 vgg11_bn hrnet_w18_small darknet53 cspresnet50 dla34 selecsls42b nfnet_l0 dm_nfnet_f0 regnety_004
efficientnet_lite0 tf_efficientnet_b0 mixnet_s mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small ghostnet_100
mobileone_s0 rexnet_100 tinynet_e lcnet_050 inception_v4 xception41 convnext_atto convnextv2_atto convmixer_768_32
poolformer_s12 caformer_s18 edgenext_xx_small fastvit_t8 repvit_m1 vit_tiny_patch16_224 vit_base_patch32_clip_224
deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 levit_128s
crossvit_tiny_240 coat_tiny coatnet_0_rw_224 pvt_v2_b0 twins_pcpvt_small swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 mvitv2_tiny maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 mobilevit_s mobilevitv2_050
efficientformer_l1 focalnet_tiny_srf gcvit_xxtiny davit_tiny nest_tiny tnt_s_patch16_224 visformer_tiny volo_d1_224
xcit_nano_12_p16_224 pit_ti_224 convit_tiny mixer_s32_224 gmixer_12_224 gmlp_ti16_224 resmlp_12_224 sequencer2d_s
samvit_base_patch16 vit_small_patch14_dinov2 hiera_tiny_224 tiny_vit_5m_224 vit_relpos_small_patch16_224""".split()  # noqa: SIM905

OPEN_CLIP = """RN50 RN50x4 ViT-B-32 ViT-B-32-quickgelu ViT-B-16 ViT-B-16-SigLIP convnext_base coca_ViT-B-32 EVA02-B-16
ViTamin-S MobileCLIP-S1 ViT-B-32-plus-256""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Result:
    side: int
    parameters: int
    reached: int  # parameter tensors with a gradient
    constant: int  # parameter tensors that the heatmap does not depend on
    cost: float  # of the step, in forward passes
    trouble: str = ""


class ZeroShot(nn.Module):
    """A CLIP model as a classifier: the cosine of its image features with fixed text features."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip
        for name in ("transformer", "text", "text_decoder", "token_embedding"):
            if isinstance(getattr(clip, name, None), nn.Module):
                setattr(clip, name, None)
        for parameter in ("positional_embedding", "text_projection"):
            if isinstance(getattr(clip, parameter, None), nn.Parameter):
                setattr(clip, parameter, None)
        with torch.no_grad():
            side = clip.visual.image_size
            self.side = side[0] if isinstance(side, tuple) else side
            width = clip.encode_image(torch.rand(1, 3, self.side, self.side)).shape[1]
        self.register_buffer("text_features", nn.functional.normalize(torch.randn(width, CLASSES), dim=0))

    def forward(self, images: Tensor) -> Tensor:
        return 100 * self.clip.encode_image(images, normalize=True) @ self.text_features


def torchvision_models() -> Iterator[tuple[str, Callable[[int], nn.Module], tuple[int, ...]]]:
    for name in torchvision.models.list_models(module=torchvision.models):

        def build(side: int, name: str = name) -> nn.Module:
            return build_network(name, CLASSES, (3, side, side), free_of_biases=False)[0]

        yield name, build, SIDES


def timm_models() -> Iterator[tuple[str, Callable[[int], nn.Module], tuple[int, ...]]]:
    import timm

    for name in TIMM:

        def build(side: int, name: str = name) -> nn.Module:
            try:
                model = timm.create_model(name, pretrained=False, num_classes=CLASSES, img_size=side)
            except TypeError:  # it takes images of any size
                model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
            model.eval()(torch.rand(2, 3, side, side))
            return model

        cfg = timm.get_pretrained_cfg(name)
        yield name, build, (64, 112, cfg.input_size[1] if cfg else 224)


def open_clip_models() -> Iterator[tuple[str, Callable[[int], nn.Module], tuple[int, ...]]]:
    import open_clip

    for name in OPEN_CLIP:

        def build(side: int, name: str = name) -> nn.Module:
            model = ZeroShot(open_clip.create_model(name, pretrained=None))
            model.eval()(torch.rand(1, 3, side, side))
            return model

        size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
        yield name, build, (size[0] if isinstance(size, tuple | list) else size,)


LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models, "open_clip": open_clip_models}


def smallest(build: Callable[[int], nn.Module], sides: tuple[int, ...]) -> tuple[nn.Module, int]:
    """The model, and the smallest side that it takes in training mode too."""
    reason: Exception | None = None
    for side in sorted(set(sides)):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                model = build(side)
                model.train()(torch.rand(BATCH, 3, side, side))
            return model, side
        except (ModelError, RuntimeError, ValueError, AssertionError, IndexError, TypeError, OSError) as error:
            reason = error
    raise ModelError(f"takes none of {sides}: {str(reason).splitlines()[0][:80]}")


@torch.no_grad()
def adapt_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the running statistics that training would: with others the signal dies in a deep network."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def seconds(run: Callable[[], object]) -> float:
    """The shorter of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def examine(model: nn.Module, side: int, rules: str, device: torch.device) -> Result:
    """Explain a model in both modes; raises RelevanceError where an operation has no rule."""
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # heads and last norms of blocks often start at zero, where nothing has influence
                nn.init.normal_(parameter, std=0.02)
    images, epsilon = torch.rand(BATCH, 3, side, side, device=device), torch.linspace(0.01, 0.1, BATCH)
    adapt_batch_norms(model, images)
    with torch.no_grad():
        targets = model.eval()(images).argmax(1)
    teacher = torch.randn(images.shape, device=device)
    trouble = []

    _, heatmaps = explain(model.eval(), images, targets, epsilon, rules=rules)
    if not torch.isfinite(heatmaps).all():
        trouble.append("heatmap not finite")
    if not (heatmaps.flatten(1) != 0).any(1).all():
        trouble.append("heatmap zero")

    def student_maps(create_graph: bool = False, model: nn.Module = model, images: Tensor = images) -> Tensor:
        torch.manual_seed(1)  # dropout and stochastic depth as in the other call
        return explain(model.train(), images, targets, epsilon, create_graph, rules=rules)[1]

    def step() -> None:
        model.zero_grad()
        heatmap_loss(student_maps(True), teacher).mean().backward()

    forward = seconds(lambda: model.train()(images))
    cost = seconds(step) / forward

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    trouble += [f"gradient of {name} not finite" for name, g in gradients.items() if not torch.isfinite(g).all()]
    without = [name for name in parameters if name not in gradients]
    if without:  # in double precision, where rounding cannot be taken for influence
        exact = copy.deepcopy(model).double()
        before = student_maps(model=exact, images=images.double())
        for name in without:
            parameter = exact.get_parameter(name)
            value = parameter.detach().clone()
            with torch.no_grad():
                parameter += torch.randn_like(parameter) * (0.1 + value.abs().mean())
            changed = (student_maps(model=exact, images=images.double()) - before).norm() / before.norm()
            with torch.no_grad():
                parameter.copy_(value)
            if changed > 1e-6:
                trouble.append(f"no gradient for {name}, on which the heatmap depends")
    count = sum(parameter.numel() for parameter in parameters.values())
    return Result(side, count, len(gradients), len(without), cost, "; ".join(trouble[:3]))


def line(name: str, build: Callable[[int], nn.Module], sides: tuple[int, ...], rules: str, device: torch.device) -> str:
    """One row of the table."""
    try:
        model, side = smallest(build, sides)
        result = examine(model, side, rules, device)
    except (RelevanceError, ModelError) as error:
        return f"| {name} | | | | | | **refused**: {re.sub(r': the heatmap would be wrong.*', '', str(error))} |"
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        return f"| {name} | | | | | | **{type(error).__name__}**: {(str(error).splitlines() or [''])[0][:120]} |"
    verdict = f"**{result.trouble}**" if result.trouble else "explained"
    return (
        f"| {name} | {result.side} | {result.parameters / 1e6:.1f} | {result.reached} | {result.constant} | "
        f"{result.cost:.1f} | {verdict} |"
    )


@click.command()
@click.option("--library", "libraries", multiple=True, type=click.Choice(list(LIBRARIES)), help="All unless given.")
@click.option("--models", help="Only those whose name this regular expression matches.")
@click.option("--rules", default="flex", show_default=True, help="The rule set.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the tables here, as Markdown.")
def main(libraries: tuple[str, ...], models: str | None, rules: str, device: str, out: Path | None) -> None:
    """Sweep over the models of torchvision, timm and open_clip."""
    torch_device = pick_device(device)
    versions = f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    text = [f"Rule set `{rules}`, batch of {BATCH}, random weights, float32, on {torch_device.type}. {versions}."]
    for library in libraries or LIBRARIES:
        lines = []
        entries = [entry for entry in LIBRARIES[library]() if models is None or re.search(models, entry[0])]
        for name, build, sides in tqdm(entries, unit="model", desc=library, disable=None):
            lines.append(line(name, build, sides, rules, torch_device))
            print(lines[-1], flush=True)
            gc.collect()
        explained = sum(row.endswith("| explained |") for row in lines)
        text += [
            f"\n## {library}: {explained} of {len(lines)} explained\n",
            "| model | side | parameters, 10⁶ | tensors with a gradient | without, and without influence | "
            "step, in forward passes | |\n| --- | --- | --- | --- | --- | --- | --- |",
            *lines,
        ]
        print(text[-len(lines) - 2])
    if out is not None:
        out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
