"""Full-size models of torchvision: the function is kept, the freedom found, the optimum reached."""

import pytest
import torch

import dagpath

from vision import build, outputs, relative

# name -> (least number of free groups, input shape)
MODELS: dict[str, tuple[int, tuple[int, ...]]] = {
    "alexnet": (9_344, (3, 224, 224)),
    "vgg11_bn": (10_944, (3, 224, 224)),
    "vgg16": (12_416, (3, 224, 224)),
    "resnet18": (2_880, (3, 224, 224)),
    "resnet50": (11_456, (3, 224, 224)),
    "resnext50_32x4d": (19_008, (3, 224, 224)),
    "wide_resnet50_2": (19_008, (3, 224, 224)),
    "densenet121": (41_760, (3, 224, 224)),
    "googlenet": (7_280, (3, 224, 224)),
    "inception_v3": (17_000, (3, 299, 299)),
    "squeezenet1_1": (2_944, (3, 224, 224)),
    "shufflenet_v2_x1_0": (8_090, (3, 224, 224)),
    "mnasnet1_0": (18_000, (3, 224, 224)),
    "regnet_x_400mf": (12_848, (3, 224, 224)),
    "r3d_18": (2_880, (3, 8, 112, 112)),
    "fcn_resnet50": (11_456, (3, 112, 112)),
}


def in_both_modes(model, batch):
    return [outputs(model, batch, training) for training in (False, True)]


def rescale_by_powers_of_two(model, example, least_groups):
    traced = dagpath.trace(model, example)
    assert traced.graph.num_groups >= least_groups
    dagpath.random_rescaling(traced, power_of_two=True, generator=torch.Generator().manual_seed(2)).apply_()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_rescaling_keeps_the_function_and_reaches_the_optimum(name):
    least_groups, shape = MODELS[name]
    model = build(name)
    batch = torch.randn(2, *shape)
    example = batch[:1]
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    evaluated, trained = in_both_modes(model, batch)

    rescale_by_powers_of_two(model, example, least_groups)
    assert all(map(torch.equal, outputs(model, batch, False), evaluated))
    assert all(map(torch.equal, outputs(model, batch, True), trained))
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), saved, strict=True):
            parameter.copy_(values)

    first = dagpath.rescale_(model, example)
    assert first.converged
    assert first.optimality <= 1e-9
    assert relative(outputs(model, batch, False), evaluated) <= 1e-4
    assert relative(outputs(model, batch, True), trained) <= 1e-4
    second = dagpath.rescale_(model, example)
    assert float(second.log_scales.abs().max()) < 1e-6


# benchmarks/zoo.py runs the same over every model that torchvision defines
SMALL: dict[str, tuple[int, tuple[int, ...]]] = {
    "convnext_tiny": (14_688, (3, 64, 64)),
    "deeplabv3_mobilenet_v3_large": (1, (3, 64, 64)),
    "efficientnet_b0": (784, (3, 64, 64)),
    "lraspp_mobilenet_v3_large": (1, (3, 64, 64)),
    "maxvit_t": (18_000, (3, 224, 224)),
    "mc3_18": (2_880, (3, 8, 56, 56)),
    "mnasnet0_5": (1_000, (3, 64, 64)),
    "mobilenet_v2": (1, (3, 64, 64)),
    "mobilenet_v3_small": (1_152, (3, 64, 64)),
    "r2plus1d_18": (2_880, (3, 8, 56, 56)),
    "regnet_y_400mf": (5_000, (3, 64, 64)),
    "s3d": (1_000, (3, 16, 224, 224)),
    "shufflenet_v2_x0_5": (1_000, (3, 64, 64)),
    "swin_t": (16_704, (3, 64, 64)),
    "swin_v2_t": (12_000, (3, 64, 64)),
    "vit_b_32": (28_416, (3, 224, 224)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SMALL)
def test_a_power_of_two_rescaling_is_exact(name):
    least_groups, shape = SMALL[name]
    model = build(name)
    batch = torch.randn(2, *shape)
    evaluated, trained = in_both_modes(model, batch)
    rescale_by_powers_of_two(model, batch, least_groups)
    assert all(map(torch.equal, outputs(model, batch, False), evaluated))
    assert relative(outputs(model, batch, True), trained) <= 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_rescaling_in_float64_is_exact_to_1e_10(name):
    model = build(name).double()
    batch = torch.randn(2, *MODELS[name][1], dtype=torch.float64)
    before = in_both_modes(model, batch)
    dagpath.rescale_(model, batch[:1])
    for found, expected in zip(in_both_modes(model, batch), before, strict=True):
        assert relative(found, expected) <= 1e-10


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5"])
def test_unrolled_architectures_have_the_quantities_of_the_lifting_pass(name):
    traced = dagpath.trace(build(name).double(), torch.zeros(1, 3, 32, 32).double())
    graph = traced.unroll()
    assert graph.path_norm(2) == pytest.approx(dagpath.path_norm(traced, 2), rel=1e-12)
    expected = dagpath.gram_diagonal(traced)
    for name_of, values in graph.gram_diagonal().items():
        largest = float(expected[name_of].max())
        torch.testing.assert_close(values, expected[name_of], rtol=1e-11, atol=1e-14 * largest)
