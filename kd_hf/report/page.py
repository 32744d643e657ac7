"""The page: one HTML file with everything in it, for light and dark screens, wide and narrow."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

from kd_hf.report.figures import Picture


@dataclass
class Page:
    """What the page shows, as plain text; it is escaped here."""

    title: str
    outcome: str
    notes: list[str] = field(default_factory=list)
    tiles: Sequence[tuple[str, str]] = ()
    networks: Sequence[Sequence[str]] = ()  # a table, its head first
    metrics: Sequence[tuple[str, str]] = ()
    pictures: list[Picture] = field(default_factory=list)
    pairs: Sequence[Sequence[str]] = ()  # a table, its head first; below the picture of disagreements
    facts: Sequence[tuple[str, str]] = ()
    recipe: str = ""
    load: Sequence[str] = ()
    version: str = ""


def render(page: Page) -> str:
    """The HTML of a page."""
    return _TEMPLATE.substitute(
        title=escape(page.title),
        outcome=escape(page.outcome),
        notes=_notes(page.notes),
        tiles="".join(f"<li><b>{escape(n)}</b><span>{escape(what)}</span></li>" for n, what in page.tiles),
        networks=_table(page.networks),
        metrics=_list(page.metrics),
        contents="".join(f'<a href="#{p.name}">{escape(p.title)}</a>' for p in page.pictures),
        pictures="".join(_figure(picture, page) for picture in page.pictures),
        load=_code("Load the student", "\n".join(page.load)),
        facts=_list(page.facts),
        recipe=escape(page.recipe),
        version=escape(page.version),
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _table(lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)


def _code(title: str, text: str) -> str:
    return f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" if text else ""


def _figure(picture: Picture, page: Page) -> str:
    table = _table(page.pairs) if picture.name == "disagreements" else ""
    return (
        f'<figure id="{picture.name}"><h2>{escape(picture.title)}</h2>'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_embedded(picture.dark)}">'
        f'<img src="{_embedded(picture.light)}" alt="{escape(picture.title)}: {escape(picture.caption)}"></picture>'
        f"<figcaption>{escape(picture.caption)}</figcaption>{table}</figure>"
    )


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# its policy forbids the browser to load anything from elsewhere
_TEMPLATE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #f4f6f8; --card: #ffffff; --ink: #1c2128; --faint: #57606a;
  --line: #dde2e8; --accent: #0072b2; --warn: #fff4d6; --warn-line: #d9a400; }
@media (prefers-color-scheme: dark) { :root { --paper: #0e1116; --card: #161a20; --ink: #e8ebef; --faint: #9aa4b0;
  --line: #2b323b; --accent: #56b4e9; --warn: #2b2411; --warn-line: #b58900; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--faint); overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.1rem; }
.outcome { margin: .2rem 0 1.4rem; font-size: 1.55rem; line-height: 1.3; font-weight: 600; text-wrap: balance; }
.notes { margin: 0 0 1.4rem; padding: .7rem 1rem .7rem 2rem; background: var(--warn); border-radius: 8px;
  border-left: 4px solid var(--warn-line); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; padding: 0;
  margin: 0 0 1rem; list-style: none; }
.tiles li, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles li { padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: .85rem; }
.card { padding: 1rem 1.2rem; margin: 0 0 1rem; }
figure { margin: 0 0 1rem; padding: 1rem 1.2rem 1.1rem; scroll-margin-top: 1rem; }
picture { display: block; overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 600px; height: auto; border-radius: 4px; }
figcaption { margin-top: .6rem; color: var(--faint); font-size: .92rem; max-width: 46rem; }
figure .wide { margin-top: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.4rem 0 1rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--faint); font-weight: 500; font-size: .85rem; }
td:nth-child(n+3), th:nth-child(n+3) { text-align: right; white-space: nowrap; }
dl { margin: 0; } dl div { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; padding: .18rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
dl.metrics { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 0 2rem;
  margin-top: .9rem; padding-top: .7rem; border-top: 1px solid var(--line); font-size: .92rem; }
dl.metrics div { grid-template-columns: 1fr auto; } dl.metrics dd { font-variant-numeric: tabular-nums; }
pre { margin: 0; padding: .8rem 1rem; overflow-x: auto; border-radius: 8px; background: var(--paper);
  font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; font-weight: 600; } details pre { margin-top: .8rem; }
.facts { margin-bottom: 1.2rem; } .load:empty { display: none; } .metrics:empty { display: none; }
footer { color: var(--faint); font-size: .85rem; margin-top: 1.6rem; }
@media (max-width: 640px) { .outcome { font-size: 1.25rem; } figure, .card { padding: .9rem; }
  dl div { grid-template-columns: 1fr; gap: 0; padding: .35rem 0; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="outcome">$outcome</p>
$notes
<ul class="tiles">$tiles</ul>
<section class="card">$networks<dl class="metrics">$metrics</dl></section>
<nav>$contents<a href="#run">The run</a></nav>
$pictures
<section class="card load">$load</section>
<section class="card" id="run"><h2>The run</h2><dl class="facts">$facts</dl>
<details><summary>What the recipe says beyond the defaults</summary><pre>$recipe</pre></details></section>
<footer>Written by kd_hf $version from the run's log, its networks and its evaluation images.</footer>
</main>
</body>
</html>
""")
