"""One self-contained HTML page of a run: numbers against what was demanded, pictures, curves, lineage.

Pictures are data URIs, curves inline SVG, the style is inline: the file can be mailed. Nothing in it loads anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

import numpy as np
import torch

from pipeline import storage
from pipeline.evaluation import charts, pictures
from pipeline.evaluation.charts import Curve
from pipeline.evaluation.config import EvaluationConfig
from pipeline.evaluation.features import Labelled
from pipeline.evaluation.measure import Evaluation, Row, passed, rows, title_of

EACH = 10  # images of a class in a grid
PAIRS = 10  # samples beside their nearest training image
CLASSES_IN_BARS = 40


@dataclass(frozen=True)
class Link:
    """A link of the lineage, shards -> run -> version -> endpoint: its facts, name and value."""

    name: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Stage:
    """What a stage of the run took. memory_bytes: its peak, None where it was not measured."""

    name: str
    seconds: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """What the page shows. losses and likelihoods: curves over images seen; commands: (what for, command)."""

    title: str
    subtitle: str
    evaluation: Evaluation
    config: EvaluationConfig
    train: Labelled
    held_out: Labelled
    class_names: Sequence[str] = ()
    losses: Sequence[Curve] = ()
    likelihoods: Sequence[Curve] = ()
    lineage: Sequence[Link] = ()
    stages: Sequence[Stage] = ()
    seconds: float | None = None  # of the whole run, what lies between its stages included; None: their sum
    commands: Sequence[tuple[str, str]] = field(default_factory=tuple)


def plain(table: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """The result table for a terminal: (mark, name, value, detail)."""
    marks = {True: "ok", False: "MISSED", None: ""}
    return [(marks[row.ok], row.name, row.value, row.detail) for row in table]


def write(url: str, report: Report) -> None:
    """The page at `url`, a local file or s3:// object."""
    storage.write_bytes(url, html(report).encode())


def html(report: Report) -> str:
    """The whole page."""
    table = rows(report.evaluation, report.config)
    style = files("pipeline.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        [
            _header(report, table),
            _tiles(report.evaluation),
            _pair(*_samples(report)),
            _section("Results", _results(table)),
            _pair(*_training(report)),
            _pair(*_likelihood(report)),
            _pair(*_copies(report)),
            _section("Where it comes from", _lineage(report.lineage)) if report.lineage else "",
            _pair(*_ending(report)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _pair(*sections: str) -> str:
    shown = [section for section in sections if section]
    return f'<div class="pair">\n{"".join(shown)}\n</div>' if shown else ""


def _figure(content: str, caption: str) -> str:
    return f"<figure>\n{content}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _image(picture: torch.Tensor, alt: str, width: int | None = None) -> str:
    style = f' style="max-width: {width}px"' if width else ""
    return f'<img src="{pictures.data_uri(picture)}" alt="{escape(alt)}"{style}>'


def _header(report: Report, table: list[Row]) -> str:
    demanded = [row for row in table if row.ok is not None]
    missed = [row.name for row in demanded if not row.ok]
    all_met = f"meets all {len(demanded)} demands" if len(demanded) > 1 else "meets what is demanded"
    text = f"misses: {', '.join(missed)}" if missed else all_met
    mark = "good" if passed(table) else "bad"
    subtitle = f"<p>{escape(report.subtitle)}</p>" if report.subtitle else ""
    return (
        f"<header>\n<h1>{escape(report.title)}</h1>\n{subtitle}\n"
        f'<span class="verdict {mark}">{escape(text)}</span>\n</header>'
    )


def _tiles(found: Evaluation) -> str:
    tiles = [
        (f"{scores.mean:.3f}", f"bits/dim, {title_of(name)} (± {scores.standard_error:.3f})")
        for name, scores in found.scores.items()
    ]
    if found.agreement is not None:
        tiles.append((f"{found.agreement.share.value:.1%}", f"of {len(found.samples):,} samples show the asked class"))
    tiles.append((f"{found.frechet.ratio.value:.2f} ×", "the Fréchet floor of real images"))
    tiles.append((f"{found.copies.share.value:.1%}", f"near-copies (held-out {found.copies.held_out_share.value:.1%})"))
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">\n{"".join(cells)}\n</div>'


def _samples(report: Report) -> tuple[str, str]:
    found, classes = report.evaluation, len(report.class_names)
    made, columns = pictures.by_class(found.samples, found.asked, classes, EACH)
    real, real_columns = pictures.by_class(report.held_out.images, report.held_out.labels, classes, EACH)
    how = report.config.sampling
    what = "The first ones" if found.asked is None or not classes else "One class a row, the first ones of each"
    ours = f"{what}: nothing is picked. {how.sampler}, {how.steps} steps, no guidance."
    return (
        _section("Samples", _figure(_image(pictures.grid(made, columns), "grid of samples"), ours)),
        _section(
            "Held-out images",
            _figure(_image(pictures.grid(real, real_columns), "grid of real images"), "Never seen in training."),
        ),
    )


def _results(table: list[Row]) -> str:
    marks = {True: '<span class="good">✓</span>', False: '<span class="bad">✗</span>', None: ""}
    lines = [
        "<tr><th></th><th>measure</th><th>value</th><th></th></tr>",
        *(
            f'<tr><td>{marks[row.ok]}</td><td>{escape(row.name)}</td><td class="value">{escape(row.value)}</td>'
            f'<td class="detail">{escape(row.detail)}</td></tr>'
            for row in table
        ),
    ]
    return f'<table class="results">\n{"".join(lines)}\n</table>'


def _training(report: Report) -> tuple[str, str]:
    loss = likelihood = ""
    losses, scores = ([curve for curve in curves if len(curve.x)] for curves in (report.losses, report.likelihoods))
    if losses:
        loss = _section("Training loss", charts.lines(losses, "images seen", "loss"))
    if scores:
        likelihood = _section("Held-out bits/dim in training", charts.lines(scores, "images seen", "bits/dim"))
    return loss, likelihood


def _likelihood(report: Report) -> tuple[str, str]:
    found = report.evaluation
    if not found.scores:
        return "", ""
    parts = [
        (title_of(name), np.asarray(scores.bits_per_dim, dtype=np.float64)) for name, scores in found.scores.items()
    ]
    bits = torch.tensor(next(iter(found.scores.values())).bits_per_dim)
    order, images = bits.argsort(), report.held_out.images[: len(bits)]
    ends = [
        _figure(_image(pictures.grid(images[rows], EACH), f"held-out images of {what} bits/dim"), text)
        for rows, what, text in (
            (order[:EACH], "least", f"Likeliest, {float(bits[order[0]]):.2f} bits/dim and up"),
            (order[-EACH:].flip(0), "most", f"Least likely, {float(bits[order[-1]]):.2f} bits/dim and down"),
        )
    ]
    return (
        _section("Held-out bits/dim, image by image", charts.histograms(parts, "bits/dim")),
        _section("The likeliest and the least likely", "".join(ends)),
    )


def _copies(report: Report) -> tuple[str, str]:
    copies, found = report.evaluation.copies, report.evaluation
    chart = charts.histograms(
        [("samples", copies.distances), ("held-out images", copies.held_out_distances)],
        "distance to the nearest training image, grey levels (rms)",
        (copies.threshold, "near-copy"),
    )
    order = np.argsort(copies.distances, kind="stable")[:PAIRS]
    pairs = torch.cat([found.samples[order], report.train.images[copies.index[order]]])
    picture = _figure(
        _image(pictures.grid(pairs, len(order)), "samples and their nearest training images"),
        f"The {len(order)} samples closest to a training image (above) and that image (below).",
    )
    by_class = ""
    if found.agreement is not None and len(found.agreement.by_class) <= CLASSES_IN_BARS:
        names = report.class_names or [str(c) for c in range(len(found.agreement.by_class))]
        by_class = charts.bars(names, found.agreement.by_class, report.config.min_agreement)
        by_class = _section("Class by class", by_class)
    return _section("Does it copy?", chart + picture), by_class


def _lineage(links: Sequence[Link]) -> str:
    boxes = [
        f"<div><h3>{escape(link.name)}</h3><dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in link.facts)
        + "</dl></div>"
        for link in links
    ]
    return f'<div class="lineage">{"<i>→</i>".join(boxes)}</div>'


def _ending(report: Report) -> tuple[str, str]:
    stages = commands = ""
    if report.stages:
        lines = [
            f'<tr><td>{escape(stage.name)}</td><td class="number">{stage.seconds:.0f} s</td><td class="number">'
            f"{'–' if stage.memory_bytes is None else f'{stage.memory_bytes / 2**30:.2f} GiB'}</td></tr>"
            for stage in report.stages
        ]
        seconds = sum(s.seconds for s in report.stages) if report.seconds is None else report.seconds
        whole = f'<tr><td><b>all</b></td><td class="number"><b>{seconds:.0f} s</b></td>'
        head = "<tr><th>stage</th><th></th><th>peak memory</th></tr>"
        stages = _section("What it took", f'<table class="took">{head}{"".join(lines)}{whole}<td></td></tr></table>')
    if report.commands:
        listed = (f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for what, command in report.commands)
        commands = _section("Go on", "".join(listed))
    return stages, commands
