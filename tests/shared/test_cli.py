import errno

import pytest

from shared.cli import guard, main
from shared.errors import UserError


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and stderr of a script that raises."""

    def script() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        guard(script)
    return stopped.value.code, capsys.readouterr().err


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(UserError("no data set at x"), capsys) == (2, "lens-ldm: error: no data set at x\n")


def test_ctrl_c_says_that_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "the same command goes on" in text


def test_a_full_disk_is_one_line_that_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(OSError(errno.ENOSPC, "No space left on device", "samples/grid.png"), capsys)
    assert code == 2
    assert text.startswith("lens-ldm: error: the disk is full while writing samples/grid.png")
    assert text.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(OSError, match="Input/output"):
        guard(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))


def test_an_unknown_command_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quickstrat"])
    assert stopped.value.code == 2
    assert "quickstart" in capsys.readouterr().err
