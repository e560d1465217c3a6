"""The folder of a run, checkpoints/<name>/: config.yaml, metrics.csv, samples/*.png, last.ckpt and model/."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shared.checkpoint import read_config, require_intact
from shared.config import load_config, to_dict, to_yaml
from shared.errors import UserError
from shared.files import claimed, write_atomically

# What may differ between a run and its continuation without making it another run.
HARMLESS = ("output", "logger", "trainer.log_every", "trainer.checkpoint_every", "trainer.validate_every",
            "trainer.progress", "trainer.compile", "trainer.checkpoint_gradients", "trainer.score", "trainer.watched",
            "trainer.previews", "sampling")  # fmt: skip


class Run:
    """A run that is new, or the continuation of one with the same config.

    resume      auto: go on with what is there; never: refuse a folder that holds a run
    UserError   if the folder cannot be written, or holds a run of another config; it lists the differences
    """

    def __init__(self, config: Any, resume: str = "auto") -> None:
        self.config = config
        self.folder = Path(config.output) / config.name
        self.last, self.model = self.folder / "last.ckpt", self.folder / "model"
        self._saved = self.folder / "config.yaml"
        if resume == "never" and self.has_begun:
            raise UserError(f"{self.folder} holds a run: choose another name (--name), or drop --resume never")
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._same_run()

    @property
    def has_begun(self) -> bool:
        return self.last.exists() or self.model.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The run is this process's alone meanwhile, and its folder has this config.

        UserError if it is another's, or if another process has begun a run of another config there since this one looked.
        """
        with contextlib.ExitStack() as stack:
            with self._writable():
                mine = stack.enter_context(claimed(self.folder / ".lock"))
                if mine:
                    self._same_run()
                    # Not before: the config that is there may be that of a run which another process has just begun.
                    write_atomically(self._saved, to_yaml(self.config).encode())
            if not mine:
                raise UserError(
                    f"another process is training {self.folder}: wait for it, stop it, or choose another name (--name)"
                )
            yield

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write the run's folder {self.folder}: {error.strerror or error}") from error

    def is_complete(self, fingerprint: dict[str, str]) -> bool:
        """Whether the model is published. UserError if it was made from something else.

        fingerprint   what must not change between a run and its continuation, beyond the config: the data, the autoencoder
        """
        if not (self.model / "config.json").exists():
            return False
        try:
            published = read_config(self.model)
            require_intact(self.model, published)
        except UserError:
            if self.last.exists():  # which publishes it again
                return False
            raise
        self.compare(published.get("fingerprint", {}), fingerprint)
        # How to sample may be changed afterwards: the same weights are then published again.
        same = published.get("training", {}).get("sampling") == to_dict(self.config).get("sampling")
        return same or not self.last.exists()

    def compare(self, found: dict[str, str], fingerprint: dict[str, str]) -> None:
        for what in {**fingerprint, **found}:  # what was there and is gone is another one, too
            if found.get(what) != fingerprint.get(what):
                raise UserError(
                    f"{self.folder} was trained with another {what}: choose another name (--name) or delete {self.folder}"
                )

    def _same_run(self) -> None:
        """UserError if a run of another config has begun in the folder."""
        saved = self._saved
        if not self.has_begun:
            return
        try:
            tree = yaml.safe_load(saved.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, FileNotFoundError) as error:
            raise UserError(f"{saved} is damaged: delete {self.folder} or choose another name (--name)") from error
        if isinstance(tree, dict):
            with contextlib.suppress(UserError):  # a key that this version has added has its default in older runs
                tree = to_dict(load_config(type(self.config), [], tree))
        if changed := differences(tree, to_dict(self.config)):
            raise UserError(
                f"{self.folder} is a run with another configuration ({changed}): "
                "choose another name (--name NEW), delete the folder, or keep its settings to go on with it"
            )


def differences(before: Any, after: Any) -> str:
    """What makes two resolved configs of a stage those of two runs, in words; empty if they are those of one."""
    old, new = dict(flatten(before)), dict(flatten(after))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith(HARMLESS)]
    more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
    return "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed[:6]) + more


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
