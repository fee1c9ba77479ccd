import io
import sqlite3

import pytest
from detkernel import DataError
from detkernel_detection.testing import DatasetContract, TinyData, tiny_run
from PIL import Image
from sqlite_dataset import SqliteDataset


@pytest.fixture
def file(tmp_path):
    connection = sqlite3.connect(tmp_path / "data.sqlite")
    connection.execute("create table images (id integer, data blob, width integer, height integer)")
    connection.execute("create table boxes (image integer, x1, y1, x2, y2, class text)")
    for key in range(4):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (10 * key, 0, 0)).save(stream, "PNG")
        connection.execute("insert into images values (?, ?, 32, 32)", (key, stream.getvalue()))
        connection.execute("insert into boxes values (?, 4, 4, 20, 24, ?)", (key, ["cat", "dog"][key % 2]))
    connection.commit()
    connection.close()
    return tmp_path / "data.sqlite"


class TestContract(DatasetContract):
    @pytest.fixture(autouse=True)
    def _file(self, file):
        self.file = file

    def dataset(self):
        return SqliteDataset(file=self.file)


def test_a_run_trains_on_it(file, tmp_path):
    run = tiny_run({"data": TinyData(dataset=SqliteDataset(file=file))}, work_dir=tmp_path / "work")
    assert run.classes == ("cat", "dog")
    assert run.iter == 4


def test_a_missing_table_is_one_clear_line(tmp_path):
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    with pytest.raises(DataError, match="expected tables images and boxes"):
        SqliteDataset(file=tmp_path / "empty.sqlite").load()
