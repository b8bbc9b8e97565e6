"""The page about a training: one HTML file with its pictures in it, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from safeloader.cli.report.story import Story
from safeloader.faults.explain.incidents import text_of
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.words import counted

_MAX_RECORDS: Final = 200
"""Incidents that are shown in full; all are in the file that the page names."""
_CAPTIONS: Final = {
    "epochs": "Time of each epoch, and the part of it in which training waited for batches.",
    "throughput": "Batches that training and validation took, over nnU-Net's epoch time.",
    "dice": "nnU-Net's pseudo Dice in each epoch.",
    "memory": "Resident memory at the end of each epoch.",
}
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { color: #57606a; font-weight: 600; } td.number { text-align: right; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #57606a; font-size: .9rem; }
pre { background: #f6f8fa; padding: .7rem; overflow-x: auto; font-size: 12px; white-space: pre-wrap; }
details { margin: .2rem 0; } summary { cursor: pointer; } .muted { color: #57606a; }
"""


def page(story: Story, pictures: Mapping[str, bytes]) -> str:
    """All of it."""
    title = f"Training {escape(story.folder.resolve().parent.name)}, {escape(story.folder.resolve().name)}"
    body = "\n".join([f"<h1>{title}</h1>", *_outcome(story), *_pictures(pictures), *_incidents(story), *_runs(story)])
    head = f'<meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width">'
    style = f"<style>{_STYLE}</style>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}{style}</head>\n<body>\n{body}\n</body></html>\n'


def _outcome(story: Story) -> Iterator[str]:
    loaders = story.report.get("loaders", {})
    outcome = story.report.get("outcome", "unknown: it has not come to an end, or not to write its report")
    restarts = sum(sum(epoch.restarts.values()) for epoch in story.epochs)
    yield (
        f"<p>Outcome: <strong>{escape(str(outcome))}</strong>. {counted(len(story.epochs), 'epoch')}, "
        f"{counted(max(1, len(story.starts)), 'start')}, {counted(restarts, 'worker')} replaced, "
        f"{counted(story.summary.total, 'failure')}.</p>"
    )
    if not loaders:
        return
    rows = [
        (
            name,
            f"{loader.get('batches', 0):,}",
            f"{loader.get('wait_s', 0):,.1f} s",
            f"{loader.get('restarts', 0):,}",
            ", ".join(loader.get("quarantined", [])) or "none",
            str(loader.get("seed", "")),
        )
        for name, loader in loaders.items()
    ]
    yield _table(("loader", "batches", "waited", "replaced", "quarantined cases", "seed"), rows, numbers=(1, 2, 3))
    yield '<p class="muted">Of the last start; earlier ones are below.</p>' if len(story.starts) > 1 else ""


def _pictures(pictures: Mapping[str, bytes]) -> Iterator[str]:
    if pictures:
        yield "<h2>Epochs</h2>"
    for name, png in pictures.items():
        data = base64.b64encode(png).decode()
        caption = _CAPTIONS[name]
        yield (
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def _incidents(story: Story) -> Iterator[str]:
    yield "<h2>Incidents</h2>"
    if not story.records:
        yield "<p>None.</p>"
        return
    rows = [
        (f"{group.count:,}", group.title, _most(group.stages), _most(group.cases), " ".join(group.todo[:1]))
        for group in story.summary.groups
    ]
    yield _table(("times", "failure", "stage", "case", "what to do"), rows, numbers=(0,))
    if story.summary.reactions:
        did = ", ".join(f"{kind} ({count:,})" for kind, count in story.summary.reactions.most_common())
        yield f"<p>What SafeLoader did beyond replacing workers: {escape(did)}.</p>"
    if story.skipped:
        yield f"<p class='muted'>{counted(story.skipped, 'line')} left out: cut off by a crash.</p>"
    shown = list(story.records)[-_MAX_RECORDS:]
    if len(shown) < len(story.records):
        yield f"<p class='muted'>The last {len(shown)} of {len(story.records):,}; all are in {INCIDENTS_FILE}.</p>"
    for record in shown:
        yield _record(record)


def _record(record: Mapping[str, Any]) -> str:
    head = f"{_when(record)} {escape(text_of(record, 'message'))}"
    rest = "\n".join(
        f"{name}: {text_of(record, name)}"
        for name, value in record.items()
        if name not in ("at", "message") and value not in (None, "", {}, [])
    )
    return f"<details><summary>{head}</summary><pre>{escape(rest)}</pre></details>"


def _runs(story: Story) -> Iterator[str]:
    if not story.starts:
        return
    yield "<h2>Starts, machine and versions</h2>"
    for start in story.starts:
        facts = {**start.get("machine", {}), **start.get("versions", {})}
        yield f"<p>{_when(start)}, from epoch {escape(str(start.get('epoch', 0)))}</p>"
        yield _table(("", ""), [(str(name), str(value)) for name, value in facts.items()])


def _when(record: Mapping[str, Any]) -> str:
    """A record's time, to the second, in its own time zone."""
    return escape(text_of(record, "at")[:19].replace("T", " "))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        "<tr>"
        + "".join(
            f'<td class="number">{escape(cell)}</td>' if place in numbers else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _most(counts: Mapping[str, int]) -> str:
    named = sorted(counts.items(), key=lambda pair: -pair[1])[:3]
    return ", ".join(f"{name} ({count:,})" for name, count in named)
