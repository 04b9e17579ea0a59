"""Makes what `tests/fixtures` and `benchmarks/data` commit: checkpoints of S1 and S2, the image subset, P1's head.

    python benchmarks/train_fixtures.py resnet      # S1, about 60 s an epoch on 2 cores
    python benchmarks/train_fixtures.py mobilenet   # S2, likewise
    python benchmarks/train_fixtures.py subset      # the committed images
    python benchmarks/train_fixtures.py p1-head     # the linear head of P1, on 4000 training images

All four need the whole Fashion-MNIST (`benchmarks/setup_env.sh`); the last one needs the data wheels as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import common  # noqa: F401  (puts tests/ on the path)
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fixtures import classifiers, fashion


def train(arch: str, epochs: int = 6, batch: int = 128, rate: float = 0.1, seed: int = 0) -> nn.Module:
    """SGD with Nesterov momentum and a one-cycle schedule; random shifts of 2 pixels and mirror images."""
    torch.manual_seed(seed)
    images, labels = fashion.load("train", full=True)
    test_images, test_labels = fashion.load("test", full=True)
    model = classifiers.ARCHITECTURES[arch]()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = len(labels)
    steps = epochs * -(-count // batch)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.25)
    start = time.time()
    padded = F.pad(images, (2, 2, 2, 2), value=float(images.min()))
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(count)
        for i in range(0, count, batch):
            chosen = order[i : i + batch]
            left, top = torch.randint(0, 5, (2,)).tolist()
            x = padded[chosen, :, top : top + 28, left : left + 28]
            mirrored = torch.rand(len(chosen)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = classifiers.accuracy(model.eval(), test_images, test_labels)
        print(
            f"{arch} epoch {epoch}: loss {loss.item():.3f}, accuracy {score:.4f}, {time.time() - start:.0f} s",
            flush=True,
        )
    return model


def write_subset(train_count: int = 512, test_count: int = 1000) -> None:
    """Writes `tests/fixtures/data/fashion_subset.npz`."""
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", train_count), ("test", test_count)):
        images, labels = fashion.load_uint8(split, full=True)  # type: ignore[arg-type]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[:count], labels[:count].astype(np.uint8)
    path = Path(fashion.__file__).parent / "data" / "fashion_subset.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    print(f"wrote {path}: {path.stat().st_size} bytes")


def fit_p1_head(train_count: int = 4000, test_count: int = 2000) -> None:
    """Fits a logistic regression on the backbone's pooled features; writes `benchmarks/data/p1_head.npz`."""
    import mobilenet_imagenet as p1
    from sklearn.linear_model import LogisticRegression

    model = p1.backbone()

    @torch.no_grad()
    def features(split: fashion.Split, count: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = fashion.load_uint8(split, full=True)
        parts = [model.pooled(p1.prepare(images[i : min(count, i + 100)])) for i in range(0, count, 100)]
        return torch.cat(parts).numpy(), labels[:count]

    x, y = features("train", train_count)
    test_x, test_y = features("test", test_count)
    spread = x.std(0) + 1e-6
    fit = LogisticRegression(max_iter=500, C=0.02).fit(x / spread, y)
    print(f"accuracy {fit.score(test_x / spread, test_y):.4f} ({train_count} training, {test_count} test images)")
    p1.HEAD.parent.mkdir(exist_ok=True)
    weight, bias = (fit.coef_ / spread).astype(np.float32), fit.intercept_.astype(np.float32)
    np.savez_compressed(p1.HEAD, weight=weight, bias=bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*classifiers.ARCHITECTURES, "subset", "p1-head"])
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    if options.what == "subset":
        write_subset()
    elif options.what == "p1-head":
        fit_p1_head()
    else:
        model = train(options.what, options.epochs)
        torch.save(model.state_dict(), classifiers.checkpoint_path(options.what))


if __name__ == "__main__":
    main()
