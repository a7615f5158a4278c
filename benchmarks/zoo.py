"""Trace every model of torchvision, and see that random rescalings keep its function.

    python benchmarks/zoo.py [NAME ...]      prints a table and writes benchmarks/results/zoo.json

Classification, segmentation and video models at their usual input sizes. A random rescaling by powers of two must
leave the eval outputs bitwise equal and the train outputs within 1e-4 relative. The exit code is 1 if any function
changed, or if a model could not be captured. Models above ``--largest`` million parameters (default 250) are left out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings

import torch
from torch import Tensor

import dagpath
from dagpath.graph.explanation import table

from common import save
from vision import build, models, outputs, relative


def names() -> list[str]:
    return [
        *models.list_models(module=models),
        *models.list_models(module=models.segmentation),
        *models.list_models(module=models.video),
    ]


def example(name: str) -> Tensor:
    if name in models.list_models(module=models.video):
        frames, size = (16, 224) if name.startswith(("mvit", "swin3d", "s3d")) else (8, 112)
        return torch.randn(1, 3, frames, size, size)
    if name in models.list_models(module=models.segmentation):
        return torch.randn(1, 3, 128, 128)
    sizes = {"inception_v3": 299, "vit_h_14": 224}
    return torch.randn(1, 3, sizes.get(name, 224), sizes.get(name, 224))


def examine(name: str) -> dict[str, object]:
    model, x = build(name), example(name)
    batch = torch.cat([x, x.flip(-1)])
    before = [outputs(model, batch, training) for training in (False, True)]
    start = time.perf_counter()
    try:
        traced = dagpath.trace(model, x)
    except dagpath.CaptureError as error:
        return {"captured": False, "error": str(error)}
    seconds = time.perf_counter() - start
    dagpath.random_rescaling(traced, power_of_two=True, generator=torch.Generator().manual_seed(2)).apply_()
    after = [outputs(model, batch, training) for training in (False, True)]
    return {
        "captured": True,
        "parameters": traced.graph.num_parameters,
        "neurons": traced.graph.num_neurons,
        "free groups": traced.graph.num_groups,
        "eval bitwise": all(map(torch.equal, after[0], before[0])),
        "train": relative(after[1], before[1]),
        "seconds": seconds,
        "without rule": sorted({site.operation for site in traced.graph.without_rule}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--largest", type=float, default=250, help="million parameters")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    results: dict[str, object] = {}
    rows, changed, left_out = [], [], []
    for name in arguments.names or names():
        weights = next(iter(models.get_model_weights(name)))
        if weights.meta["num_params"] > 1e6 * arguments.largest:
            left_out.append(name)
            continue
        found = examine(name)
        gc.collect()
        results[name] = found
        kept = found["captured"] and found["eval bitwise"] and found["train"] <= 1e-4
        if not kept:
            changed.append(name)
        cells = (
            ("NO", "", "", "", "", "")
            if not found["captured"]
            else (
                "yes",
                f"{found['neurons']:,}",
                f"{found['free groups']:,}",
                "bitwise" if found["eval bitwise"] else "CHANGED",
                f"{found['train']:.0e}",
                f"{found['seconds']:.2f}",
            )
        )
        rows.append((name, *cells))
        without = ", ".join(found.get("without rule", []))
        print(f"{len(rows):3d}  {'ok     ' if kept else 'CHANGED'}  {name:24s}  {without}", flush=True)
    print()
    print(table(("model", "captured", "neurons", "free groups", "eval", "train", "seconds"), rows))
    if left_out:
        print(f"left out, above {arguments.largest:g} million parameters: {', '.join(left_out)}")
    if not arguments.names:
        save("zoo", "python benchmarks/zoo.py", {"models": results, "left out": left_out})
    if changed:
        print(f"function changed or not captured: {', '.join(changed)}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
