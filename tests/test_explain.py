"""What explain() says: what is free, what is tied to what, and for everything fixed the call that fixed it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dagpath

import vision
from networks import Net


def test_explain_as_a_dictionary_has_every_module_and_cause():
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 1, 1), nn.Tanh())
    traced = dagpath.trace(net, torch.zeros(2, 2, 8, 8))
    facts = traced.explain(format="dict")
    assert facts["modules"]["1"] == {"neurons": 5, "free": 5, "tied": 0, "fixed": 0, "tied_with": []}
    assert {cause["module"]: cause["neurons"] for cause in facts["causes"]} == {"1": 5, "4": 1}
    first = facts["causes"][0]
    assert (first["operation"], first["of"], first["tied_to"]) == ("batch_norm", ["0"], [])
    assert facts["without_rule"] == []
    with pytest.raises(ValueError, match="format must be 'text' or 'dict', got 'html'"):
        traced.explain(format="html")


def test_explain_names_the_modules_that_share_a_scale():
    def forward(m, x):
        x = F.relu(m.stem(x))
        return m.head(F.relu(x + m.second(F.relu(m.first(x)))))

    net = Net(forward, stem=nn.Linear(3, 6), first=nn.Linear(6, 5), second=nn.Linear(5, 6), head=nn.Linear(6, 2))
    modules = dagpath.trace(net, torch.zeros(1, 3)).explain(format="dict")["modules"]
    assert modules["stem"]["tied_with"] == ["second"]
    assert modules["second"]["tied"] == 6
    assert modules["first"] == {"neurons": 5, "free": 5, "tied": 0, "fixed": 0, "tied_with": []}


def fixed(function, module: str = "a", **parts) -> list[dict]:
    """What fixed the neurons of a module, in a net of two layers of six units and a head."""
    buffers = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    layers = {"a": nn.Linear(5, 6), "b": nn.Linear(5, 6), "head": nn.Linear(6, 2)}
    net = Net(lambda m, x: m.head(function(m, x)), **{**layers, **{k: p for k, p in parts.items() if k not in buffers}})
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    traced = dagpath.trace(net, torch.zeros(2, 5))
    assert len(traced.explain().splitlines()) < 50
    return [cause for cause in traced.explain(format="dict")["causes"] if module in cause["of"]]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@pytest.mark.parametrize(
    ("function", "tied_to"),
    [
        (lambda m, x: F.relu(m.a(x)) + F.pad(x, (0, 1)), ["the model's input"]),
        (lambda m, x: F.relu(m.a(x)) + (2 * x.abs()).mean(1, keepdim=True), ["the model's input"]),
        (lambda m, x: F.relu(m.a(x)) + m.shift, ["a constant"]),
        (lambda m, x: F.relu(m.a(x)) + torch.arange(6.0), ["a constant"]),
        (lambda m, x: torch.maximum(m.a(x), torch.ones(())), ["a constant"]),
        (lambda m, x: m.a(x) + m.gate(m.b(x)).flip(1), ["what sigmoid in gate returns"]),
        (
            lambda m, x: m.a(x) + torch.cat([m.gate(m.b(x)), x], 1)[:, 2:8],
            ["the model's input", "what sigmoid in gate returns"],
        ),
        (lambda m, x: m.a(x) + torch.cat([m.b(x), x], 1)[:, 2:8], ["something fixed"]),
    ],
)
def test_what_is_tied_to_something_fixed_says_to_what(function, tied_to):
    [cause] = fixed(function, gate=Gate(), shift=torch.randn(6))
    assert cause["tied_to"] == tied_to
    assert cause["reason"].startswith("tied by ")
    assert cause["source"].startswith(f"{vision.__file__[: -len('benchmarks/vision.py')]}tests/")


def test_a_chain_of_ties_leads_to_what_is_fixed_for_its_own_sake():
    def forward(m, x):
        return F.layer_norm(m.a(x) + m.b(x), [6]) + m.c(x)

    causes = {module: fixed(forward, module, c=nn.Linear(5, 6)) for module in "abc"}
    assert [(cause["reason"], cause["tied_to"]) for cause in causes["a"]] == [("feeds a normalization", [])]
    assert [(cause["reason"], cause["tied_to"]) for cause in causes["b"]] == [("tied by a sum", ["a"])]
    assert [cause["tied_to"] for cause in causes["c"]] == [["what layer_norm returns"]]


def test_shared_memory_and_unfollowed_parameters_are_named():
    net = Net(lambda m, x: m.head(F.relu(m.a(x)) + m.b(x)), a=nn.Linear(5, 6), b=nn.Linear(5, 6), head=nn.Linear(6, 2))
    net.b.weight.data = net.a.weight.data
    assert (
        "tied by the memory that a.weight shares with other tensors" in dagpath.trace(net, torch.zeros(2, 5)).explain()
    )
    [cause] = fixed(lambda m, x: m.a(x) + m.a.weight.softmax(1).sum())
    assert cause["operation"] in ("softmax", "add")


def test_an_output_has_the_module_and_line_that_returns_it():
    [cause] = fixed(lambda m, x: m.a(x), "head")
    assert (cause["reason"], cause["operation"], cause["module"]) == ("is an output of the model", "linear", "head")
    assert f"{__file__.rsplit('/', 1)[0]}/networks.py:" in cause["source"]


@torch.library.custom_op("dagpath_tests::squashed", mutates_args=())
def squashed(x: Tensor) -> Tensor:
    return x.tanh()


squashed.register_fake(torch.empty_like)


def test_an_operation_outside_of_aten_has_its_namespace():
    net = Net(lambda m, x: m.head(squashed(m.a(x)) + squashed(x)), a=nn.Linear(6, 6), head=nn.Linear(6, 2))
    text = dagpath.trace(net, torch.zeros(2, 6)).explain()
    assert "enters an operation without a rule (dagpath_tests::squashed)" in text
    assert (
        "Operations without a rule: what they touch is fixed (dagpath.register_op gives one)\ndagpath_tests::sq" in text
    )


@pytest.mark.parametrize("name", ["resnet50", "googlenet", "vit_b_16"])
def test_the_text_fits_a_screen(name):
    size = 224 if name == "vit_b_16" else 64
    traced = dagpath.trace(vision.build(name), torch.zeros(1, 3, size, size))
    lines = traced.explain().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
    facts = traced.explain(format="dict")
    assert sum(module["fixed"] for module in facts["modules"].values()) == facts["fixed"]
    assert sum(cause["neurons"] for cause in facts["causes"]) == facts["fixed"]
    assert all(cause["module"] and cause["source"] and cause["operation"] for cause in facts["causes"])
