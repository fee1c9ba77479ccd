"""Pages: one file each, without network. What comes from files is escaped wherever it stands.

`html(template, ...)` escapes every argument that is not itself made by it (markupsafe).
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from detkernel.errors import printable
from markupsafe import Markup


def html(template: str, *arguments: Any, **named: Any) -> Markup:
    """A template of the program's own, filled in."""
    return Markup(template).format(*map(_shown, arguments), **{name: _shown(value) for name, value in named.items()})


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _shown(value: Any) -> Any:
    """Text without what a browser might obey, such as characters that turn the direction of writing."""
    return value if isinstance(value, (Markup, int, float)) else printable(str(value), keep="\n\t")


def coded(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return html("{}", text)
    return joined(html("<code>{}</code>" if at % 2 else "{}", part) for at, part in enumerate(parts))


def number(value: float | None, digits: int = 3) -> str:
    """A number for a reader; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def cut(name: str, most: int = 40) -> str:
    """A name for a table, an axis or a box: at most so many characters of it."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def signed(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numeric: int = 1, kind: str = ""
) -> Markup:
    """A table whose rows begin with their heading. Columns from number `numeric` on are numbers."""
    head = joined(
        html('<th scope="col"{}>{}</th>', _class(at >= numeric), name) if name else Markup("<td></td>")
        for at, name in enumerate(columns)
    )
    body = joined(
        html(
            '<tr><th scope="row"{}>{}</th>{}</tr>',
            _class(numeric == 0),
            row[0],
            joined(html("<td{}>{}</td>", _class(at >= numeric), cell) for at, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    )
    return html(
        '<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table class="{kind}"><caption>'
        "<span>{caption}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
        caption=caption, head=head, body=body, kind=kind,
    )  # fmt: skip


def _class(is_number: bool) -> Markup:
    return Markup(' class="n"') if is_number else Markup("")


def bar(share: float) -> Markup:
    """A bar in a cell, of a share of 0..1; the number beside it says the same."""
    return html(
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.1f}" height="8"/></svg>',
        100 * min(max(share, 0.0), 1.0),
    )


def section(name: str, title: str, *parts: Markup) -> Markup:
    return html('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>{2}</section>', name, title, joined(parts))


def details(summary: str, content: Markup, *, opened: bool = False) -> Markup:
    shown = Markup(" open") if opened else Markup("")
    return html("<details{}><summary>{}</summary>{}</details>", shown, summary, content)


def paragraph(text: str | Markup, kind: str = "") -> Markup:
    return html('<p class="{}">{}</p>', kind, text) if kind else html("<p>{}</p>", text)


def jpeg_source(data: bytes) -> Markup:
    """What an image's `href` says of a JPEG inside the page."""
    return Markup("data:image/jpeg;base64," + base64.b64encode(data).decode())


@cache
def asset(name: str) -> str:
    return (resources.files("detkernel_report") / "assets" / name).read_text(encoding="utf-8")


def policy(style: str, scripts: Sequence[str], *, live: bool) -> str:
    """The content security policy: nothing is loaded, and no script runs but the page's own."""
    allowed = " ".join(_hash(script) for script in scripts) or "'none'"
    connect = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; img-src data:; {connect}style-src {_hash(style)}; script-src {allowed}; base-uri 'none'; "
        "form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page(title: str, header: Markup, main: Markup, *, scripts: Sequence[str] = ("page.js",), version: str = "") -> str:
    """A whole page. `scripts`: assets; `live.js` asks the server that the page came from whether there is another
    `version`."""
    style, sources = asset("page.css"), [asset(name) for name in scripts]
    made = html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body data-version=\"{version}\">\n"
        '<a class="skip" href="#main">Skip to the content</a>\n<header>{header}</header>\n'
        '<main id="main" tabindex="-1">{main}</main>\n{scripts}\n</body>\n</html>\n',
        policy=policy(style, sources, live="live.js" in scripts), title=title, version=version, style=Markup(style),
        header=header,
        main=main, scripts=joined(Markup(f"<script>{source}</script>") for source in sources),
    )  # fmt: skip
    return str(made)
