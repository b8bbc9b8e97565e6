"""The command `safeloader`: its help, its exit codes, and that bad input gets one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeloader.cli import COMMANDS, main
from safeloader.cli import install as install_command
from safeloader.errors import ConfigError, SafeLoaderError
from safeloader.nnunet.install import Change, Outcome


def test_help_lists_every_command_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for command in COMMANDS:
        assert f"{command.name} {command.summary()}" in shown


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_commands_help_is_its_docstring(
    command: type[install_command.Command], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    assert command.description() in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "--kill-every", "often"], ["install", "--now"]])
def test_a_wrong_call_ends_with_2_and_no_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def bad_folder_file(tmp_path: Path) -> tuple[list[str], str]:
    (tmp_path / "file").touch()
    return ["demo", "--folder", str(tmp_path / "file")], f"--folder {tmp_path / 'file'} is a file"


def bad_folder_not_empty(tmp_path: Path) -> tuple[list[str], str]:
    (tmp_path / "thesis.tex").touch()
    expected = f"--folder {tmp_path} has other files in it; name a new or empty folder"
    return ["demo", "--folder", str(tmp_path)], expected


def bad_interval(tmp_path: Path) -> tuple[list[str], str]:
    return ["demo", "--folder", str(tmp_path), "--kill-every", "0"], "--kill-every 0: at least 0.5 s"


def bad_interval_nan(tmp_path: Path) -> tuple[list[str], str]:
    return ["demo", "--folder", str(tmp_path), "--kill-every", "nan"], "--kill-every nan: at least 0.5 s"


def bad_folder_cannot_be_made(_tmp_path: Path) -> tuple[list[str], str]:
    expected = "--folder /proc/demo can't be made (No such file or directory); name one where you may write"
    return ["demo", "--folder", "/proc/demo"], expected


@pytest.mark.parametrize(
    "bad", [bad_folder_file, bad_folder_not_empty, bad_folder_cannot_be_made, bad_interval, bad_interval_nan]
)
def test_bad_input_is_one_line_and_touches_nothing(
    bad: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = bad(tmp_path)  # type: ignore[operator]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"safeloader demo: {expected}\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("no nnU-Net here"), 2, "safeloader install: no nnU-Net here\n"),
        (SafeLoaderError("it failed"), 1, "safeloader install: it failed\n"),
        (KeyboardInterrupt(), 130, "safeloader install: interrupted\n"),
    ],
)
def test_errors_are_mapped_to_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Change:
        raise error

    monkeypatch.setattr(install_command, "install", fail)
    assert main(["install"]) == code
    assert capsys.readouterr().err == line


def test_a_read_only_nnunet_gets_the_line_for_the_shell_alone_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Change(Outcome.READ_ONLY, Path("/nnunet/variants/safeloader_trainer.py"), "Read-only file system")
    monkeypatch.setattr(install_command, "install", lambda: refused)
    assert main(["install"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("export nnUNet_extTrainer=")
    assert shown.out.count("\n") == 1
    assert "Can't write /nnunet/variants/safeloader_trainer.py: Read-only file system." in shown.err
    monkeypatch.setattr(install_command, "uninstall", lambda: refused)
    assert main(["install", "--uninstall"]) == 1
    assert "can't remove /nnunet/variants/safeloader_trainer.py" in capsys.readouterr().err
