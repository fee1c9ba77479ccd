"""A data set from a database: images as blobs, boxes as rows."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path
from typing import Any

from detkernel import DataError, option, plugin, state
from detkernel_detection import Annotations, Dataset


@plugin
class SqliteDataset(Dataset):
    """Images and boxes of an SQLite file.

    Its tables: images(id, data, width, height) and boxes(image, x1, y1, x2, y2, class).
    """

    file: Path = option(help="the SQLite file")
    _images: list[tuple[int, int, int]] = state(factory=list)

    def load(self) -> None:
        try:
            self._images = self._query("select id, width, height from images order by id")
            self.classes = tuple(row[0] for row in self._query("select distinct class from boxes order by class"))
        except sqlite3.Error as error:
            raise DataError(f"{self.file}: {error}; expected tables images and boxes") from None

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        [(data,)] = self._query("select data from images where id = ?", self._images[index][0])
        return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)

    def annotations(self, index: int) -> Annotations:
        import numpy as np

        key, width, height = self._images[index]
        rows = self._query("select x1, y1, x2, y2, class from boxes where image = ? order by rowid", key)
        boxes = np.array([row[:4] for row in rows], dtype=np.float64).reshape(-1, 4)
        labels = np.array([self.classes.index(row[4]) for row in rows], dtype=np.int64)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        none = np.zeros(len(rows), dtype=bool)
        return Annotations(key, f"{self.file}#{key}", height, width, boxes, labels, area, none, none)

    def _query(self, sql: str, *values: Any) -> list[Any]:
        connection = sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)  # one a call: workers share none
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()
