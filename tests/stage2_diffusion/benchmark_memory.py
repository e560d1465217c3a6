"""What a training step on pixels of 150 x 150 keeps in memory at once, by what is done about it.

python -m tests.stage2_diffusion.benchmark_memory --data data/quickstart

The network of configs/baselines/pixel-ddpm-150.yaml, batch 16. Counted are the bytes of all tensors that a step makes and that
are alive at once, the optimiser's among them, and not the weights (12 MB): what a GPU would need, near enough.
"""

import argparse
import contextlib
import itertools
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.config import load_config
from shared.files import markdown
from shared.schema import Stage2
from stage2_diffusion.baselines.contest import Trial, try_out
from tests.shared.test_memory import Peak

ATTENTION = {
    "none": [],
    "on 19 and 10 pixels": [3, 4],
    "on 38, 19 and 10": [2, 3, 4],
    "the same, all weights kept": [2, 3, 4],
}


class OneStep(Callback):
    def __init__(self) -> None:
        self.mode = Peak()

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.mode.__exit__(None, None, None)
        raise Trial.Over


def peak(data: str, kind: str, precision: str, checkpoint: bool, accumulate: int) -> float:
    """GB of a step."""
    trainer = {
        "precision": precision,
        "checkpoint_gradients": checkpoint,
        "accumulate": accumulate,
        "accelerator": "cpu",
    }
    backbone = {"attention": ATTENTION[kind]}
    changes = {"data": {"path": data, "augment": "none"}, "trainer": trainer, "backbone": backbone}
    step = OneStep()
    plain = sdpa_kernel(SDPBackend.MATH) if "weights" in kind else contextlib.nullcontext()
    with plain:
        try_out(load_config(Stage2, ["baselines/pixel-ddpm-150.yaml"], changes), step)
    return step.mode.peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/quickstart")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], help="bf16 is slow where no hardware has it"
    )
    a = parser.parse_args()
    rows = [["attention", "precision", "as it is", "4 parts", "checkpointed", "both"]]
    for kind, precision in itertools.product(ATTENTION, a.precision):
        found = [peak(a.data, kind, precision, *how) for how in ((False, 1), (False, 4), (True, 1), (True, 4))]
        rows.append([kind, precision, *(f"{gigabytes:.2f} GB" for gigabytes in found)])
        print(rows[-1], flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
