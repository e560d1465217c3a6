"""A class of the user's own: found and tried, or refused in one line; never imported because a file says so."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import load_config, to_yaml
from shared.errors import UserError
from shared.registry import build
from shared.schema import Custom, Stage2
from stage2_diffusion.backbones import custom

CODE = """
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, latent_shape, cond_dim, width=4, fault=""):
        super().__init__()
        self.conv = nn.Conv2d(latent_shape[0] + cond_dim, latent_shape[0], 1)
        self.norm, self.fault, self.width = nn.BatchNorm2d(latent_shape[0]), fault, width
        if fault == "built":
            raise TypeError("not like this")

    def forward(self, x, t, cond):
        if self.fault == "called":
            raise RuntimeError("not with these")
        if self.fault == "shape":
            return x[:, :1]
        if self.fault == "tuple":
            return x, t
        there = [] if cond is None else [cond[..., None, None].expand(-1, -1, *x.shape[-2:])]
        return self.norm(self.conv(torch.cat([x, *there], 1))) * torch.rand(())


class NoNet:
    pass
"""
SHAPE = (3, 5, 4)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """my_package.nets, where Python finds it, of which nothing is imported or trusted yet."""
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(CODE)
    (folder / "broken.py").write_text("import torch\n\nimport no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(custom, "TRUSTED", set())
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def made(path: str = "my_package.nets.Net", cond_dim: int = 0, **options: Any) -> Any:
    spec = {"name": "custom", "class_path": path, "options": options}
    return build("backbone", spec, latent_shape=SHAPE, cond_dim=cond_dim)


def test_a_class_of_a_trusted_package_is_built_and_tried_without_a_trace(package: Path) -> None:
    custom.trust("my_package")
    torch.manual_seed(0)
    net = made(cond_dim=2, width=8)
    after = torch.rand(1)
    torch.manual_seed(0)
    again = sys.modules["my_package.nets"].Net(SHAPE, 2, 8)
    assert torch.equal(torch.rand(1), after)
    assert (net.width, net.cond_dim, net.training) == (8, 2, True)
    assert net.norm.num_batches_tracked == 0
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("trusted", ["my_package", "my_package.nets", "my_package.nets.Net"])
def test_a_package_a_module_or_a_class_is_trusted(package: Path, trusted: str) -> None:
    custom.trust(trusted)
    assert made()(torch.zeros(1, *SHAPE), torch.zeros(1), None).shape == (1, *SHAPE)


@pytest.mark.parametrize("trusted", ["", "my", "my_package.net", "my_package.nets.Ne", "my_package.nets.Net.x", "nets"])
def test_what_is_not_trusted_is_not_imported(package: Path, trusted: str) -> None:
    custom.trust(trusted)
    with pytest.raises(
        UserError, match=r"author's own, my_package\.nets\.Net, .* --trust my_package, .*trust=\"my_pa"
    ) as told:
        made()
    assert "\n" not in str(told.value)
    assert not (package / "imported").exists()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("my_package.nest.Net", {}, r"my_package\.nest cannot be imported .*No module named 'my_package\.nest'"),
        ("my_package.broken.Net", {}, r"No module named 'no_such_library' \(line 3 of .*broken\.py\)"),
        ("my_package.nets.Nett", {}, r"has no torch\.nn\.Module Nett; did you mean 'Net'\? \(known: Net\)"),
        ("my_package.nets.NoNet", {}, r"has no torch\.nn\.Module NoNet"),
        (
            "my_package.nets.Net",
            {"depth": 2},
            "unexpected keyword argument 'depth'; it is given latent_shape, cond_dim",
        ),
        (
            "my_package.nets.Net",
            {"fault": "built"},
            r"cannot be built: TypeError: not like this \(line 16 of .*nets\.py",
        ),
        (
            "my_package.nets.Net",
            {"fault": "called"},
            r"fails on latents of zeros: RuntimeError: not with .*\(line 20 of",
        ),
        ("my_package.nets.Net", {"fault": "shape"}, r"makes \(2, 1, 5, 4\) of latents \(2, 3, 5, 4\)"),
        ("my_package.nets.Net", {"fault": "tuple"}, "makes tuple of latents"),
    ],
)
def test_a_mistake_is_one_line(package: Path, path: str, options: dict[str, Any], message: str) -> None:
    custom.trust("my_package")
    with pytest.raises(UserError, match=message) as told:
        made(path, **options)
    assert str(told.value).startswith(f"backbone {path}")
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------ in a config


def test_a_class_path_is_all_that_a_config_says(package: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "base: stage2/dit.yaml\nbackbone: {class_path: my_package.nets.Net, options: {width: 8}}\n"
    )
    config = load_config(Stage2, [tmp_path / "a.yaml"])
    assert config.backbone == Custom(class_path="my_package.nets.Net", options={"width": 8})
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(Stage2, [tmp_path / "b.yaml"]) == config
    more = load_config(Stage2, [tmp_path / "a.yaml"], ["--backbone.options.fault", "shape"])
    assert more.backbone.options == {"width": 8, "fault": "shape"}  # type: ignore[union-attr]
    other = ["--backbone.options.depth=2", "--backbone.class_path=my_package.broken.Net"]
    assert load_config(Stage2, [tmp_path / "a.yaml"], other).backbone.options == {"depth": 2}  # type: ignore[union-attr]
    assert load_config(Stage2, ["stage2/unet"], other).backbone.name == "custom"
    assert load_config(Stage2, [tmp_path / "a.yaml"], ["--backbone.name=unet"]).backbone.name == "unet"
    assert not (package / "imported").exists()


@pytest.mark.parametrize("path", ["MyNet", "my_package.2.Net", "my_package..Net", "my-package.Net", ""])
def test_what_is_no_dotted_path_is_refused(path: str) -> None:
    with pytest.raises(
        UserError, match=r"^command line: backbone\.class_path: must be the dotted path of a class, my_pack"
    ):
        load_config(Stage2, ["stage2/unet"], {"backbone": {"class_path": path}})


def test_a_package_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone\.class_path: there is no module 'no_such_package': .* PYTHONPATH$"):
        load_config(Stage2, ["stage2/unet"], ["--backbone.class_path", "no_such_package.Net"])
