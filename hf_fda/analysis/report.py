"""A report as one HTML file that needs no other: pictures and numbers lie in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hf_fda.analysis.charts import Chart
from hf_fda.drawing import Picture
from hf_fda.printing import html_table

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: auto; background: white; border: 1px solid #8888; border-radius: 4px; }
figcaption { font-size: 0.9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884; }
td:first-child { white-space: nowrap; } td { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """Charts under one heading, with what is to be said of them."""

    title: str
    text: str
    charts: tuple[Chart, ...]


def write_report(folder: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> Path:
    """Write all pictures and numbers into a folder, and `report.html`, which holds them too.

    Args:
        folder: where.
        title: of the report.
        facts: what was looked at, as names and values.
        sections: what is shown; those without charts are left out.

    Returns:
        the report's file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = [section for section in sections if section.charts]
    parts = [_section(section, folder) for section in shown]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
    )
    body = f'<h1>{escape(title)}</h1><div class="scroll">{html_table("", facts)}</div>{"".join(parts)}'
    path = folder / "report.html"
    path.write_text(f"{head}\n<body>{body}</body></html>\n", encoding="utf-8")
    return path


def _section(section: Section, folder: Path) -> str:
    figures = "".join(_figure(chart, chart.write(folder), folder) for chart in section.charts)
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    return f'\n<h2>{escape(section.title)}</h2>{text}<div class="charts">{figures}</div>'


def _figure(chart: Chart, picture: Picture, folder: Path) -> str:
    image = _embedded("image/svg+xml", picture.svg)
    numbers = _embedded("text/csv", folder / f"{chart.name}.csv")
    return (
        f'<figure><img alt="{escape(chart.title)}" src="{image}"><figcaption>{escape(chart.caption)} '
        f'<a download="{chart.name}.csv" href="{numbers}">Numbers (CSV)</a></figcaption></figure>'
    )


def _embedded(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
