"""Simulated data sets: workers, accelerators, parts for the machines of a cluster and their merge.

Image i of a seed depends on (seed, i) alone, whatever the batch, the chunks, the parts and the number of workers.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shared.data.cache import INDEX, CacheWriter, LensImages
from shared.errors import UserError
from shared.simulate.images import ACCELERATOR_BATCH, observe, render, simulate
from shared.simulate.preset import UNITS, Preset, draw_parameters

CHUNK = 128  # images a worker hands over at once
SLICE = 16  # images a thread adds noise to at once


def simulate_to(
    folder: Path,
    preset: Preset,
    count: int,
    seed: int,
    workers: int | None = None,
    progress: bool = True,
    *,
    device: str | None = None,
    part: tuple[int, int] | None = None,
) -> None:
    """Simulate images 0 ... count - 1 of a seed into a data set folder; an interrupted one goes on.

    workers  processes of one thread each; None: one for each core this process may use
    device   render in this process on a device of torch instead, in batches; workers are then threads that add noise
    part     (k, n): only the k-th of n parts, counted from 1, into the data set `part_folder(folder, k, n)`

    Raises UserError if the folder holds something else, if there is no such device, or if a worker is killed.
    """
    accelerator = None if device is None else _device(device)
    indices, folder, source = _task(folder, preset, count, seed, part)
    chunk = CHUNK if accelerator is None else ACCELERATOR_BATCH
    writer = CacheWriter(folder, len(indices), (1, preset.pixels, preset.pixels), source, chunk=chunk)
    if writer.complete:
        return
    places = writer.pending()
    pending = [indices[place.start : place.stop] for place in places]
    bar = tqdm(
        total=len(indices),
        initial=len(indices) - sum(map(len, pending)),
        unit=" images",
        disable=None if progress else True,
        smoothing=0.1,
    )
    cores = workers or _cores()
    if accelerator is None:
        simulated = _simulated(preset, seed, pending, min(cores, len(pending)))
    else:
        simulated = _rendered(preset, seed, pending, cores, accelerator)
    with bar, closing(simulated) as chunks:
        for place, images in zip(places, chunks, strict=True):
            writer.write(place, images)
            bar.update(len(place))
    _finish(writer, preset, seed, indices)


def merge(folder: Path, preset: Preset, count: int, seed: int, parts: int, progress: bool = True) -> None:
    """Copy the parts of a data set into one: the same as if it had been simulated at once; an interrupted copy goes on.

    Raises UserError if a part is missing, unfinished or of another request, or if a copied image has another hash than
    its part says.
    """
    shape = (1, preset.pixels, preset.pixels)
    _, _, source = _task(folder, preset, count, seed, None)
    if (folder / INDEX).is_file() and CacheWriter(folder, count, shape, source).complete:
        return
    tasks = [_task(folder, preset, count, seed, (k, parts)) for k in range(1, parts + 1)]
    if lacking := [k for k, (_, path, _) in enumerate(tasks, 1) if not (path / INDEX).is_file()]:
        some = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
        raise UserError(
            f"{len(lacking)} of the {parts} parts of {folder} are missing or unfinished ({some}): run each with the same "
            f"options and --shard, e.g. --shard {lacking[0]}/{parts}"
        )
    for indices, path, request in tasks:
        CacheWriter(path, len(indices), shape, request)  # refuses another request
    writer = CacheWriter(folder, count, shape, source, chunk=CHUNK)
    data = [LensImages(path) for _, path, _ in tasks]
    starts = [indices.start for indices, _, _ in tasks]
    with tqdm(total=count, unit=" images", disable=None if progress else True, desc="merging") as bar:
        pending = writer.pending()
        bar.update(count - sum(map(len, pending)))
        for place in pending:
            owner = [bisect_right(starts, i) - 1 for i in place]
            images = np.stack([data[k].images[i - starts[k]] for i, k in zip(place, owner, strict=True)])
            writer.write(place, images)
            bar.update(len(place))
    _finish(writer, preset, seed, range(count), hashes=[h for part in data for h in part.index["hashes"]])


def part_folder(folder: Path, k: int, n: int) -> Path:
    """The folder of the k-th of n parts of a data set."""
    whole = folder if folder.name else folder.resolve()  # `.` has a name, too
    if not whole.name:
        raise UserError(f"--out {folder} cannot be a data set: name a folder")
    return whole.with_name(f"{whole.name}.shard-{k}-of-{n}")


def _task(
    folder: Path, preset: Preset, count: int, seed: int, part: tuple[int, int] | None
) -> tuple[range, Path, dict[str, Any]]:
    """The images to make, where, and what identifies the request."""
    # Enough to simulate the same images again, with the clean ones beside them: Preset(**source["preset"]).
    source: dict[str, Any] = {"kind": "simulation", "preset": preset.request(), "seed": seed}
    if preset.classes:
        source["classes"] = list(preset.classes)  # their order decides who is who, and a mapping has none in JSON
    if part is None:
        return range(count), folder, source
    k, n = part
    if n > count:
        raise UserError(f"{count} images do not make {n} parts: raise --count or use at most {count} parts")
    indices = range(count * (k - 1) // n, count * k // n)
    return indices, part_folder(folder, k, n), source | {"part": {"of": count, "start": indices.start}}


def _finish(writer: CacheWriter, preset: Preset, seed: int, indices: range, hashes: list[str] | None = None) -> None:
    parameters: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(indices), 4096):  # the single point masses of all images would fill the memory
        chunk = indices[start : start + 4096]
        drawn = draw_parameters(preset, seed, chunk)
        for name in UNITS:
            parameters.setdefault(name, []).append(drawn.get(name, np.full(len(chunk), np.nan)))
    columns, constants = {}, {}
    for name, parts in parameters.items():
        values = np.concatenate(parts)
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        # A column without scatter cannot be a condition; one that only some classes have can.
        if len(known) == len(values) and np.ptp(known) == 0:
            constants[name] = {"unit": UNITS[name], "value": float(known[0])}
        else:
            columns[name] = {"unit": UNITS[name], "values": values}
    writer.finish(
        value_range=(0.0, 1.0) if preset.scaling == "min-max" else None,
        parameters=columns,
        classes=list(preset.classes) or None,
        labels=preset.labels(indices) if preset.classes else None,
        about={"unit": preset.pixel_unit, "constants": constants},
        hashes=hashes,
    )


# --- workers ----------------------------------------------------------------------------------------------------------


def _simulated(preset: Preset, seed: int, chunks: list[range], workers: int) -> Generator[np.ndarray, None, None]:
    if workers < 2:
        for indices in chunks:
            yield _simulate_chunk(preset, seed, indices)
        return
    # Where fork is safe it saves each worker the seconds of importing torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    reader, lifeline = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reader, lifeline))
    waiting: deque[Future[np.ndarray]] = deque()
    try:
        for indices in chunks:
            waiting.append(pool.submit(_simulate_chunk, preset, seed, indices))
            if len(waiting) > 2 * workers:  # bounds the memory where the disk is slower than the workers
                yield waiting.popleft().result()
        for images in waiting:
            yield images.result()
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


# --- accelerators -----------------------------------------------------------------------------------------------------


def _rendered(
    preset: Preset, seed: int, chunks: list[range], threads: int, device: torch.device
) -> Generator[np.ndarray, None, None]:
    with ThreadPoolExecutor(threads) as pool:  # numpy draws its noise without holding up other threads
        for indices in chunks:
            parameters = draw_parameters(preset, seed, indices)
            clean, exposure = render(preset, parameters, device=device), parameters.get("exposure")

            def noisy(
                start: int,
                indices: range = indices,
                clean: torch.Tensor = clean,
                exposure: np.ndarray | None = exposure,
            ) -> torch.Tensor:
                one = slice(start, start + SLICE)
                return observe(preset, clean[one], seed, indices[one], None if exposure is None else exposure[one])[0]

            yield torch.cat(list(pool.map(noisy, range(0, len(indices), SLICE)))).numpy()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used here ({reason}): leave it out to use the CPU") from None
    return device
