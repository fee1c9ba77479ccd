"""The page of `detkernel browse`: a gallery with filters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detkernel_detection.drawing import jpeg
from markupsafe import Markup

from detkernel_report.browse import Shown, Split, counted
from detkernel_report.html import cut, html, joined, jpeg_source, page, paragraph, section

QUALITY = 82
FINDING = 80
"""Characters of a finding in a filter."""


def gallery(title: str, splits: Sequence[Split], *, raw: bool) -> str:
    """A self-contained page with all images of some splits."""
    images = [image for split in splits for image in split.images]
    filters = {
        "split": [split.name for split in splits],
        "class": sorted({name for image in images for name in image.classes}),
        "size": sorted({size for image in images for size in image.sizes}, reverse=True),
        "finding": sorted({finding for image in images for finding in image.findings}),
    }
    seen = (
        "Images and annotations as the files have them"
        if raw
        else "Samples as the network sees them, behind transforms"
    )
    counts = ", ".join(f"{len(split.images)} of {split.total:,} of {split.name}" for split in splits)
    header = html("<h1>{}</h1>{}", title, paragraph(f"{seen}: {counts}.", "dim"))
    figures = joined(_figure(image, filters) for image in images)
    main = section("images", "Images", _filters(filters, len(images)), html('<div class="gallery">{}</div>', figures))
    return page(f"{title} – detkernel browse", header, main, scripts=("browse.js",))


def _filters(filters: dict[str, list[str]], count: int) -> Markup:
    """Shown by the script, without which they could do nothing."""
    choices = joined(
        html(
            '<label>{}<select name="{}"><option value="">any</option>{}</select></label>',
            name, name,
            joined(html('<option value="{}">{}</option>', at, cut(value, FINDING)) for at, value in enumerate(values)),
        )
        for name, values in filters.items()
        if values
    )  # fmt: skip
    return html(
        '<form class="filters" hidden>{}<button type="reset">Reset</button></form>'
        '<p class="dim" role="status" aria-live="polite">{} images</p>',
        choices, count,
    )  # fmt: skip


def _figure(image: Shown, filters: dict[str, list[str]]) -> Markup:
    def places(name: str, values: Iterable[str]) -> str:
        return " ".join(str(filters[name].index(value)) for value in sorted(values))

    name = image.name.rpartition("/")[2]
    said = counted(image.objects)
    classes = ", ".join(cut(each) for each in sorted(image.classes)[:8]) + ", …" * (len(image.classes) > 8)
    found = joined(html("<li>{}</li>", finding) for finding in image.findings)
    return html(
        '<figure data-split="{}" data-class="{}" data-size="{}" data-finding="{}">'
        '<img src="{}" width="{}" height="{}" loading="lazy" alt="{}: {}{}">'
        "<figcaption><b>{}</b> <span>{}, {}x{}, {}</span>{}</figcaption></figure>",
        places("split", [image.split]), places("class", image.classes), places("size", image.sizes),
        places("finding", image.findings), jpeg_source(jpeg(image.drawn, QUALITY)),
        image.drawn.width, image.drawn.height, cut(name), said, f" of {classes}" if classes else "",
        cut(name), image.split, image.size[1], image.size[0], said,
        html("<ul>{}</ul>", found) if image.findings else "",
    )  # fmt: skip
