"""Simulate strong lenses into a data set.

    lens-ldm simulate --preset deeplense --count 6000 --seed 0 --out data/deeplense

Image i of a seed depends on (seed, i) alone, whatever the batch, the chunks and the number of workers.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shared.data.cache import CacheWriter
from shared.errors import UserError
from shared.simulate.images import simulate
from shared.simulate.preset import UNITS, Preset, draw_parameters

CHUNK = 128  # images a worker hands over at once


def simulate_to(
    folder: Path, preset: Preset, count: int, seed: int, workers: int | None = None, progress: bool = True
) -> None:
    """Simulate images 0 ... count - 1 of a seed into a data set folder; an interrupted one goes on.

    workers  processes of one thread each; None: one for each core this process may use

    Raises UserError if the folder holds something else, or if a worker is killed.
    """
    # Enough to simulate the same images again, with the clean ones beside them: Preset(**source["preset"]).
    source = {"kind": "simulation", "preset": preset.model_dump(mode="json"), "seed": seed}
    writer = CacheWriter(folder, count, (1, preset.pixels, preset.pixels), source, chunk=CHUNK)
    if writer.complete:
        return
    pending = writer.pending()
    todo = sum(map(len, pending))
    bar = tqdm(total=count, initial=count - todo, unit=" images", disable=not progress, smoothing=0.1)
    with bar, closing(_simulated(preset, seed, pending, min(workers or _cores(), len(pending)))) as chunks:
        for indices, images in chunks:
            writer.write(indices, images)
            bar.update(len(indices))
    parameters = draw_parameters(preset, seed, range(count))
    # Numbers that the preset fixes stay in `source`: a column without scatter cannot be a condition.
    varying = {name: values for name, values in parameters.items() if np.ptp(values) > 0}
    columns = {name: {"unit": UNITS[name], "values": values} for name, values in varying.items()}
    writer.finish(value_range=(0.0, 1.0), parameters=columns)


def _simulated(
    preset: Preset, seed: int, chunks: list[range], workers: int
) -> Generator[tuple[range, np.ndarray], None, None]:
    if workers < 2:
        for indices in chunks:
            yield indices, _simulate_chunk(preset, seed, indices)
        return
    # Where fork is safe it saves each worker the seconds of importing torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    reader, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reader, lifeline))
    waiting: deque[tuple[range, Future[np.ndarray]]] = deque()
    try:
        for indices in chunks:
            waiting.append((indices, pool.submit(_simulate_chunk, preset, seed, indices)))
            if len(waiting) > 2 * workers:  # bounds the memory where the disk is slower than the workers
                first, images = waiting.popleft()
                yield first, images.result()
        for first, images in waiting:
            yield first, images.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UserError("a worker was killed (out of memory?): run the same command with fewer --workers") from error
    finally:
        lifeline.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _simulate_chunk(preset: Preset, seed: int, indices: range) -> np.ndarray:
    return simulate(preset, seed, indices)[0].numpy()


def _start_worker(reader: Connection, lifeline: Connection) -> None:
    # Ctrl-C reaches the whole process group: the parent alone answers it. Its end of the lifeline closes when it gives
    # up and also when it is killed, and then its workers end at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline.close()
    threading.Thread(target=lambda: reader.poll(None) and os._exit(1), daemon=True).start()
    torch.set_num_threads(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> None:
    """Run `lens-ldm simulate`."""
    parser = argparse.ArgumentParser(prog="lens-ldm simulate", description="Simulate a data set of strong lenses.")
    parser.add_argument("--preset", default="deeplense", help="name in configs/simulate, or a .yaml file")
    parser.add_argument("--count", type=_at_least(1), required=True, help="number of images")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="image i depends on (seed, i) only")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set, e.g. data/deeplense")
    parser.add_argument("--workers", type=_at_least(1), help="processes of one thread each (default: all cores)")
    options = parser.parse_args(argv)
    simulate_to(options.out, Preset.load(options.preset), options.count, options.seed, options.workers)
    print(f"{options.out}: {options.count} images")


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return int(text)

    return number
