"""The look of every report: a self-contained page, light or dark, also on a phone's width."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d5dae1;--back:#f6f7f9;--card:#fff;--mark:#fff3cf;
--c0:#2f6fb3;--c1:#b8501f;--c2:#2b8456;--c3:#7a4fb3;--c4:#94730f;--c5:#b32f6f}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--line:#3a424d;
--back:#171b21;--card:#1f252d;--mark:#4a3f1c;--c0:#6fb0f0;--c1:#f0955f;--c2:#62c792;--c3:#b795ec;
--c4:#d9b84e;--c5:#f07fb0}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;
max-width:76rem;margin:0 auto;padding:1.25rem 1rem 3rem;color:var(--ink);background:var(--back)}
h1{font-size:1.35rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .5rem;overflow-wrap:anywhere}
p{margin:.25rem 0 .75rem}.soft{color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:.5rem 0 1.25rem;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}
th{color:var(--soft);font-weight:600}td{font-variant-numeric:tabular-nums}code{font-size:.85em}
img{max-width:100%;background:#fff}tr.differs td{background:var(--mark)}
summary{cursor:pointer;color:var(--soft);margin:.5rem 0}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0;padding:.6rem .6rem .2rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem}
figcaption{font-weight:600;font-size:.95rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}svg .grid{stroke:var(--line);stroke-width:1}
svg .restart{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
svg .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
.bar{display:grid;grid-template-columns:6.5rem 1fr auto;align-items:center;gap:.5rem;
font-size:.85rem;margin:.15rem 0;font-variant-numeric:tabular-nums}.bar b{font-weight:400}
.bar span{color:var(--soft);text-align:right}.bar i{height:.8rem;background:var(--c0);
min-width:1px;border-radius:2px}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.75rem 0}
.legend i{display:inline-block;width:1.4rem;height:.25rem;border-radius:2px;margin-right:.4rem;
vertical-align:middle}
"""


def page(title: str, body: str) -> str:
    """A whole page with this title and content (HTML)."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], differs: Sequence[bool] = ()
) -> str:
    """A table of texts; the rows of which `differs` is true are marked."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = []
    for number, row in enumerate(rows):
        mark = ' class="differs"' if number < len(differs) and differs[number] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell(text)}</td>" for text in row) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def cell(text: str) -> str:
    """A cell with hashes in small type and possible line breaks after the slashes of paths."""
    escaped = html.escape(text)
    return f"<code>{escaped}</code>" if len(text) == 64 else escaped.replace("/", "/<wbr>")
