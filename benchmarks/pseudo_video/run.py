"""Does it help image models to be trained on pseudo-videos? All families, controls and seeds, by one command.

python -m benchmarks.pseudo_video.run [--device cuda --size large --autocast] [--steps N] [--seeds 3] [--out FILE]

A run that was stopped goes on: each contender is kept for as long as neither its settings nor the code change. The file
is written anew after each of them. Whole data sets come from the folder that GPSEQ_DATA names.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import examples.generative.frames as example
import gpseq
from benchmarks.pseudo_video import families
from benchmarks.pseudo_video.families import Fitted
from benchmarks.pseudo_video.pictures import pack
from benchmarks.pseudo_video.settings import DATASETS, FAMILIES, SIZES, Size
from examples.generative.frames import Judge, fit_features, judge
from gpseq.datasets import Images, load_images
from gpseq.generative import ImageFeatures
from gpseq.storage import load, replace_file, save

CACHE = Path("build/generative/pseudo_videos")
#: Images, and videos, of each contender of the first seed that are drawn in the report.
SHOWN, SHOWN_VIDEOS = 10, 3


@dataclass(frozen=True)
class Store:
    """Results as small files, under the names of what they depend on; without a folder nothing is kept."""

    folder: Path | None
    device: str

    def file(self, name: str, depends: Any, suffix: str = "json") -> Path | None:
        """Where something is kept."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([depends, self.device, _code()], sort_keys=True, default=str)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.{suffix}"

    def kept(self, name: str, depends: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives, made once."""
        file = self.file(name, depends)
        if file is not None and file.exists():
            return json.loads(file.read_text())
        begun = time.perf_counter()
        made = make()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        if file is not None:
            replace_file(file, json.dumps(made).encode())
        return made


def experiment(
    size: Size,
    seeds: int,
    datasets: Sequence[str] = DATASETS,
    chosen: Sequence[str] = FAMILIES,
    device: str = "cpu",
    folder: Path | None = CACHE,
) -> Iterator[dict[str, Any]]:
    """All contenders, seed by seed, so that a run that is stopped has whole comparisons.

    Args:
        size: of everything.
        seeds: how many.
        datasets: names.
        chosen: families.
        device: of torch.
        folder: where what is done is kept; ``None`` keeps nothing.

    Yields:
        What is known, after each contender; the last one is complete.
    """
    store = Store(folder, device)
    result: dict[str, Any] = {
        "settings": json.loads(json.dumps(asdict(size))),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "seeds": seeds,
        "datasets": {},
    }
    sets = {}
    for dataset in datasets:
        data = load_images(dataset, full=size.full)
        network, seconds = _features(dataset, data, size, device, store)
        judging = judge(network, data, size.reference, max(size.samples.values()), size.held)
        sets[dataset] = (data.x_train.unsqueeze(1).to(device), judging)
        result["datasets"][dataset] = {
            "title": data.name,
            "train": len(data),
            "classifier": {"accuracy": judging.accuracy, "seconds": seconds},
            "floor": {family: judging.floor(size.samples[family]) for family in chosen},
            "information": store.kept(
                f"{dataset}-information", asdict(size.recipe), lambda data=data: _information(size, data)
            ),
            "families": {family: {name: [] for name in families.ORDERS[family]} for family in chosen},
        }
    for seed in range(seeds):
        for dataset, (images, judging) in sets.items():
            for family in chosen:
                for name in families.ORDERS[family]:
                    label = f"{dataset}-{family}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"

                    def make(family: str = family, name: str = name, images: Tensor = images, seed: int = seed,
                             judging: Judge = judging) -> dict[str, Any]:  # fmt: skip
                        return measure(families.fit(family, name, size, images, seed), family, size, judging, seed)

                    found = store.kept(label, _settings(size, family), make)
                    result["datasets"][dataset]["families"][family][name].append(found)
                    yield result


def measure(fitted: Fitted, family: str, size: Size, judging: Judge, seed: int) -> dict[str, Any]:
    """All scores of a contender; and, of the first seed, pictures."""
    generator = torch.Generator(judging.held.device).manual_seed(1000 + seed)
    begun = time.perf_counter()
    images = draw(fitted, size.samples[family], size.chunk, generator).clamp(0, 1)
    scores = judging.scores(images)
    found: dict[str, Any] = scores | {"sampling": time.perf_counter() - begun}
    for key in ("parameters", "tokens", "frames", "loss", "seconds"):
        found[key] = getattr(fitted, key)
    number, draws = size.bound
    found["error"] = None if fitted.reconstruct is None else fitted.reconstruct(judging.held, generator)
    found["bound"] = None if fitted.bound is None else fitted.bound(judging.held[:number], draws, generator)
    if seed == 0:
        found["images"] = pack(images[:SHOWN])
        found["videos"] = pack(fitted.sample(SHOWN_VIDEOS, False, generator).flatten(0, 1))
    return found


def draw(fitted: Fitted, n: int, chunk: int, generator: torch.Generator) -> Tensor:
    """Images, some at a time."""
    sizes = [min(chunk, n - start) for start in range(0, n, chunk)]
    return torch.cat([fitted.sample(part, True, generator) for part in sizes])


def _settings(size: Size, family: str) -> dict[str, Any]:
    """What the results of a family depend on."""
    whole = asdict(size)
    parts = {"hvae": ["hvae", "bound"], "vq": ["vq", "prior"], "diffusion": ["diffusion", "average", "diffusion_steps"]}
    common = ["recipe", "chunk", "reference", "held", "epochs", "full"]
    stages = ["vq", "prior"] if family == "vq" else [family]
    found = {key: whole[key] for key in (*common, *parts[family])}
    return found | {"training": [whole["training"][key] for key in stages], "samples": size.samples[family]}


def _information(size: Size, data: Images) -> dict[str, Any]:
    reports = size.recipe.information(data.x_train[:6000].unsqueeze(1))
    return {report.order: asdict(report) | {"gain": report.gain} for report in reports}


def _features(dataset: str, data: Images, size: Size, device: str, store: Store) -> tuple[ImageFeatures, float]:
    """The classifier, trained once."""
    epochs = size.epochs[dataset]
    file = store.file(f"{dataset}-classifier", [epochs, size.full], "safetensors")
    if file is not None and file.exists():
        tensors, about = load(file)
        network = ImageFeatures(len(data.classes), device=device)
        network.load_state_dict(tensors)
        return network.eval(), about["seconds"]
    begun = time.perf_counter()
    network = fit_features(data, epochs, device)
    seconds = time.perf_counter() - begun
    if file is not None:
        save(file, network.state_dict(), {"seconds": seconds})
    return network, seconds


@cache
def _code() -> str:
    """A hash of the code that results depend on, but for its layout and comments."""
    package = Path(gpseq.__file__).parent
    names = ("frames", "corruptions", "corruption_base", "schedules", "hvae", "hvae_stage", "image_nets", "draws")
    names += ("video_vq", "quantiser", "token_prior", "two_stage", "diffusion", "noise_schedule", "unet", "averaging")
    files = [package / "generative" / f"{name}.py" for name in (*names, "image_features")]
    files += [package / "metrics" / "generation.py", package / "training.py"]
    files += [Path(str(module.__file__)) for module in (example, families)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(ast.dump(ast.parse(file.read_text())).encode())
    return digest.hexdigest()


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of torch (cpu)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of models and sets")
    parser.add_argument("--steps", type=int, help="of the optimiser, for all families and stages (those of the size)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--autocast", action="store_true", help="train in mixed precision, bfloat16")
    parser.add_argument("--out", type=Path, default=Path("build/generative/pseudo_videos.json"), help="the JSON")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of what is done already")
    parser.add_argument("--report", type=Path, help="folder of a report in Markdown with figures, too")
    args = parser.parse_args()
    if args.seeds < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--seeds and --steps: expected at least 1")
    size = SIZES[args.size].changed(args.steps, args.autocast)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for result in experiment(size, args.seeds, args.datasets, args.families, args.device, args.cache):
        replace_file(args.out, json.dumps({"size": args.size, **result}).encode())
    print(args.out)
    if args.report is not None:
        from benchmarks.pseudo_video.reporting import report_all

        (args.report / "figures").mkdir(parents=True, exist_ok=True)
        parts = report_all({"size": args.size, **result}, args.report / "figures")
        (args.report / "report.md").write_text("\n\n".join(parts) + "\n")
        print(args.report / "report.md")


if __name__ == "__main__":
    main()
