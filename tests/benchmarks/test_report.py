"""The report shows what the files say, names what is missing, and says what comes from another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as command
from benchmarks import BENCHMARKS
from benchmarks.report import Result, differences, found, markdown, usual_machine

MACHINE = {"cpu": "Abacus 9", "cores": 2, "memory_gib": 4.0, "gpu": None, "python": "3.11.7", "commit": "abc1234"}
TABLE = {"title": "Who is faster", "header": ["", "GB/s"], "lines": [["stock", "2.00"], ["safeloader", "1.00"]]}
TITLES = {"speed": "How fast", "size": "How large"}


def _about(**machine: Any) -> dict[str, Any]:
    return {
        "machine": {**MACHINE, "load_at_the_end": 0.5, **machine},
        "command": "python -m benchmarks.speed --rounds 3",
        "sizes": {"rounds": 3},
        "tables": [TABLE],
    }


def _result(name: str = "speed", *, picture: bool = False, **machine: Any) -> Result:
    return Result(name, TITLES.get(name, name), _about(**machine), picture)


def test_shows_title_command_sizes_table_and_picture() -> None:
    text = markdown([_result(picture=True)], TITLES)
    for part in (
        "## How fast\n",
        "`python -m benchmarks.speed --rounds 3` (rounds 3)",
        "Who is faster\n\n|            | GB/s |",
        "| safeloader | 1.00 |",  # a loss, shown as it is
        "![How fast](speed.png)",
    ):
        assert part in text


def test_names_the_machine_once_and_says_that_there_is_no_gpu() -> None:
    text = markdown([_result(), _result("size", load_at_the_end=7.0)], TITLES)
    assert text.count("Abacus 9") == 1
    assert "* GPU: none\n" in text and "* versions: python 3.11.7" in text
    assert "Not as above" not in text  # the load differs in each run


def test_results_of_another_machine_say_so() -> None:
    text = markdown([_result(), _result("size", gpu="Colossus", python="3.12.1"), _result("third")], TITLES)
    assert text.count("**Not as above:** GPU Colossus, python 3.12.1.") == 1
    assert text.index("## How large") < text.index("Colossus") < text.index("## third")


def test_the_usual_machine_is_that_of_most_results() -> None:
    results = [_result(cpu="once"), _result(), _result()]
    assert usual_machine(results)["cpu"] == "Abacus 9"


def test_a_version_that_only_one_has_is_a_difference() -> None:
    assert differences({"ray": "2.0"}, {"numpy": "1.0"}) == {"ray": "2.0", "numpy": None}


def test_names_the_benchmarks_without_results() -> None:
    assert "## Not run\n\n* How large (`size`)\n" in markdown([_result()], TITLES)
    assert "Not run" not in markdown([_result(), _result("size")], TITLES)
    assert "* How fast (`speed`)" in markdown([], TITLES)


def test_shows_further_numbers_but_not_further_lists() -> None:
    result = Result("speed", "How fast", {**_about(), "bound_gb_per_s": 13.5, "histogram": [1, 2]}, False)
    assert "Also: bound_gb_per_s 13.5." in markdown([result], TITLES)


def test_ends_with_what_did_not_help() -> None:
    assert markdown([_result()], TITLES, "* prayer\n").endswith("## What was tried and did not help\n\n* prayer\n")
    assert "did not help" not in markdown([_result()], TITLES)


def test_finds_results_in_their_order_and_leaves_out_those_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / "size.json").write_text(json.dumps(_about()))
    (tmp_path / "speed.json").write_text(json.dumps(_about()))
    (tmp_path / "speed.png").touch()
    (tmp_path / "old.json").write_text(json.dumps({"cpu": "Abacus 9"}))
    results = found(tmp_path, {"old": "", **TITLES})
    assert [(result.name, result.picture) for result in results] == [("speed", True), ("size", False)]


def test_every_benchmark_is_in_the_list() -> None:
    folder = Path(command.__file__).parent
    there = {path.stem for path in folder.glob("*.py") if "(Benchmark[" in path.read_text()}
    assert there == set(BENCHMARKS)


def test_the_readme_has_a_line_for_each() -> None:
    readme = Path(command.__file__).with_name("README.md").read_text()
    assert [name for name in BENCHMARKS if f"\n| `{name}` | " not in readme] == []


def test_each_has_a_title_of_its_own(tmp_path: Path) -> None:
    text = command.report(tmp_path)
    lines = text.partition("## Not run\n\n")[2].splitlines()[: len(BENCHMARKS)]
    assert len({line.partition(" (`")[0] for line in lines}) == len(BENCHMARKS)


def test_one_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_names", lambda text: tuple(text.split(",")))
    code = command.main(["--tiny", "--only", "not_there,neither", "--out", str(tmp_path)])
    assert code == 1
    assert "failed: not_there, neither" in capfd.readouterr().err
    assert "Not run" in (tmp_path / "REPORT.md").read_text()


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "transport,transprot"])
    assert "there is no transprot, only" in capsys.readouterr().err
