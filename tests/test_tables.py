"""Tables: what is read, how it is split and standardised, and what is said of bad files."""

import itertools
import random
import sys
import zipfile

import numpy as np
import pytest
import torch

from startsparse.errors import OptionError, UserError
from startsparse.tabular import tables

# Columns of psam_p01.csv (2018), with others between those that are read; 80 replicate weights end
# it, as they do there.
HEADER = """
RT SERIALNO DIVISION SPORDER PUMA REGION ST ADJINC PWGTP AGEP CIT CITWP COW DDRS DEAR DEYE
DOUT DPHY DRAT DRATX DREM ENG FER GCL INTP JWMNP JWTR LANX MAR MIG MIL OIP PAP RELP RETP
SCH SCHG SCHL SEMP SEX SSIP SSP WAGP WKHP WKL WKW WRK YOEP ANC ANC1P DECADE DIS ESP ESR
HISP INDP JWAP NAICSP NATIVITY NOP OC OCCP PERNP PINCP POBP POVPIP PRIVCOV PUBCOV RAC1P
SOCP FAGEP FESRP
"""
COLUMNS = [*HEADER.split(), *(f"PWGTP{number}" for number in range(1, 81))]


def person(number, draw):
    """A row as the Census Bureau writes it: leading zeros, blanks for what does not apply."""
    age = draw.randrange(0, 96)
    adult = age > 15
    row = dict.fromkeys(COLUMNS, "")
    row |= {
        "RT": "P", "SERIALNO": f"2018HU{number:07d}", "SPORDER": "01", "PUMA": "02100", "ST": "01",
        "ADJINC": "1013097", "PWGTP": f"{draw.randrange(1, 300):05d}", "AGEP": f"{age:02d}",
        "CIT": draw.choice("12345"), "MAR": draw.choice("12345"), "SEX": draw.choice("12"),
        "RELP": f"{draw.randrange(0, 18):02d}", "RAC1P": draw.choice("1236"),
        "NATIVITY": draw.choice("12"), "ANC": draw.choice("1234"), "DIS": draw.choice("12"),
        "DEAR": draw.choice("12"), "DEYE": draw.choice("12"), "NAICSP": "62M1",
        "SOCP": "29-1141" if draw.random() < 0.5 else "411XXX", "POBP": "001",
        "SCHL": f"{draw.randrange(1, 25):02d}" if age > 2 else "",
        "DREM": draw.choice("12") if age > 4 else "", "MIG": draw.choice("13") if age else "",
        "ESP": draw.choice("12345678") if age < 18 else "",
    }  # fmt: skip
    if adult:
        row |= {
            "MIL": draw.choice("1234"), "ESR": draw.choice("1136"), "COW": draw.choice("12345"),
            "OCCP": f"{draw.randrange(10, 9800):04d}", "WKHP": f"{draw.randrange(1, 99):02d}",
            "PINCP": f"{draw.randrange(-5000, 150_000):07d}",
        }  # fmt: skip
    return row


def people(count, seed=1):
    draw = random.Random(seed)
    return [person(number, draw) for number in range(count)]


def text(rows, columns=COLUMNS):
    return "\n".join([",".join(columns), *(",".join(row[c] for c in columns) for row in rows)])


def write(root, content, year=2018, name="psam_p01.csv"):
    path = root / str(year) / "1-Year" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n")
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Nobody listens there."""
    monkeypatch.setattr(tables, "URL", "http://127.0.0.1:9")


def test_bundled_tables():
    cancer, digits = tables.load("breast-cancer"), tables.load("digits")
    assert cancer.features.shape == (569, 30) and cancer.features.dtype == torch.float64
    assert cancer.class_names == ("malignant", "benign")
    assert cancer.feature_names[:2] == ("mean radius", "mean texture")
    assert cancer.labels.bincount().tolist() == [212, 357] and cancer.labels.dtype == torch.int64
    assert digits.features.shape == (1797, 64) and len(digits.class_names) == 10
    assert digits.features.max() == 16
    # as in committed results, which began from float32
    assert torch.equal(cancer.features, cancer.features.float().double())


def test_employment_is_what_the_file_says(tmp_path):
    rows = people(50)
    write(tmp_path, text(rows))
    table = tables.load("ACSEmployment", root=tmp_path, state="al", year=2018)
    assert table.feature_names[:4] == ("AGEP", "SCHL", "MAR", "RELP")
    assert table.class_names == ("not employed", "employed")
    wanted = [[float(row[name] or 0) for name in table.feature_names] for row in rows]
    assert table.features.tolist() == wanted  # folktables writes 0 for a blank
    assert table.labels.tolist() == [int(row["ESR"] == "1") for row in rows]


def test_income_has_only_adults_who_work(tmp_path):
    rows = people(200)
    write(tmp_path, text(rows))
    table = tables.load("ACSIncome", root=tmp_path, state="AL", year=2018)
    own = [
        row
        for row in rows
        if int(row["AGEP"]) > 16 and int(row["PINCP"]) > 100 and int(row["WKHP"]) > 0
    ]
    assert 50 < len(own) == len(table.labels) < 200
    assert table.labels.tolist() == [int(int(row["PINCP"]) > 50_000) for row in own]
    assert table.features[:, 0].tolist() == [float(row["AGEP"]) for row in own]


@pytest.mark.parametrize("year", [2019, 2021])
def test_the_relationship_has_another_name_since_2019(tmp_path, year):
    columns = ["RELSHIPP" if name == "RELP" else name for name in COLUMNS]
    rows = [{**row, "RELSHIPP": str(20 + int(row["RELP"]))} for row in people(20)]
    write(tmp_path, text(rows, columns), year)
    table = tables.load("ACSEmployment", root=tmp_path, state="AL", year=year)
    assert table.feature_names[3] == "RELSHIPP"
    assert table.features[:, 3].tolist() == [float(row["RELSHIPP"]) for row in rows]


def test_files_before_2017_have_other_names_and_spaces(tmp_path):
    write(tmp_path, text(people(20)).replace(",", ", "), 2015, "ss15pwy.csv")
    spaced = tables.load("ACSEmployment", root=tmp_path, state="WY", year=2015)
    write(tmp_path, text(people(20)), 2018, "psam_p56.csv")
    plain = tables.load("ACSEmployment", root=tmp_path, state="WY", year=2018)
    assert torch.equal(spaced.features, plain.features)


def test_what_is_missing_is_fetched_once(tmp_path, monkeypatch):
    folder = tmp_path / "site/2018/1-Year"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "csv_pal.zip", "w") as archive:
        archive.writestr("psam_p01.csv", text(people(30)))
        archive.writestr("ACS2018_PUMS_README.pdf", "")
    monkeypatch.setattr(tables, "URL", (tmp_path / "site").as_uri())
    first = tables.load("ACSEmployment", root=tmp_path / "data", state="AL", year=2018)
    (folder / "csv_pal.zip").unlink()
    again = tables.load("ACSEmployment", root=tmp_path / "data", state="AL", year=2018)
    assert len(first.labels) == 30 and torch.equal(first.features, again.features)
    assert [p.name for p in (tmp_path / "data").rglob("*.*")] == ["psam_p01.csv"]


def test_a_damaged_archive_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "site/2018/1-Year"
    folder.mkdir(parents=True)
    (folder / "csv_pal.zip").write_bytes(b"PK\x03\x04 half of an archive")
    monkeypatch.setattr(tables, "URL", (tmp_path / "site").as_uri())
    with pytest.raises(UserError, match=r"psam_p01.csv: missing, and fetching it .* failed"):
        tables.load("ACSEmployment", root=tmp_path / "data", state="AL", year=2018)
    assert not list((tmp_path / "data").rglob("*.*"))


def one_cell(name, value, row=2):
    rows = people(10)
    rows[row][name] = value
    return text(rows)


def without(name):
    return text(people(10), [c for c in COLUMNS if c != name])


WRONG = {
    "column": (without("MIL"), r"has no column 'MIL', which ACSEmployment needs"),
    "cell": (one_cell("SCHL", "n/k"), r"line 4, column 'SCHL': 'n/k' is not a number"),
    "label": (one_cell("ESR", "yes"), r"line 4, column 'ESR': 'yes' is not a number"),
    "no rows": (text([]), "has no rows"),
    "nothing": ("", "is empty"),
    "one class": (
        text([{**row, "ESR": "6"} for row in people(10)]),
        r"ACSEmployment: all 10 rows have the label 'not employed'",
    ),
    "too many fields": (
        text(people(10)) + "\n" + "1," * 400,
        r"line 12 has 401 cells, but line 1 names \d+ col",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_bad_census_files(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        tables.load("ACSEmployment", root=tmp_path, state="AL", year=2018)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_income_without_a_row_that_counts(tmp_path):
    write(tmp_path, text([{**row, "AGEP": "09"} for row in people(10)]))
    with pytest.raises(UserError, match=r"psam_p01.csv, ACSIncome: no rows are left"):
        tables.load("ACSIncome", root=tmp_path, state="AL", year=2018)


def test_bytes_that_are_no_text(tmp_path):
    path = write(tmp_path, "")
    path.write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(UserError, match=r"psam_p01.csv: line 1: byte 0x80 is no UTF-8"):
        tables.load("ACSEmployment", root=tmp_path, state="AL", year=2018)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"state": "XX"}, r"^--state: 'XX' is none of AL, AK, AZ"),
        ({"year": 2013}, r"^--year: 2013 has no 1-year survey"),
        ({"year": 2020}, r"^--year: 2020 has no 1-year survey"),
        ({"year": 3000}, r"^--year: 3000 has no 1-year survey"),
    ],
)
def test_unknown_states_and_years(tmp_path, where, message):
    with pytest.raises(OptionError, match=message):
        tables.load("ACSIncome", root=tmp_path, **where)


def test_no_network(tmp_path):
    with pytest.raises(
        UserError, match=r"psam_p06.csv: missing, and fetching it from .* failed"
    ) as e:
        tables.load("ACSIncome", root=tmp_path, state="CA", year=2018)
    assert "put it there yourself" in str(e.value) and "\n" not in str(e.value)


def test_folktables_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "folktables", None)
    with pytest.raises(UserError, match="pip install folktables"):
        tables.load("ACSIncome", root=tmp_path)
    assert len(tables.load("breast-cancer").labels) == 569


def test_state_codes_are_those_of_folktables():
    pytest.importorskip("folktables")
    theirs = sys.modules["folktables.load_acs"]._STATE_CODES
    assert {name: f"{code:02}" for name, code in tables.STATES.items() if name != "DC"} == theirs


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "wine.csv"
    path.write_text("acid,kind,sugar\n1.5,red,2\n-1,white,3e1\n0,red,4\n.5,white,0.1\n")
    table = tables.load(str(path), label="kind")
    assert table.features.tolist() == [[1.5, 2], [-1, 30], [0, 4], [0.5, 0.1]]
    assert table.labels.tolist() == [0, 1, 0, 1]
    assert (table.feature_names, table.class_names) == (("acid", "sugar"), ("red", "white"))
    with pytest.raises(OptionError, match=r"^--label: name the column"):
        tables.load(str(path))
    with pytest.raises(UserError, match="has no column 'Kind'"):
        tables.load(str(path), label="Kind")
    for content, message in (
        ("a,b\n1,x\n,y\n", "line 3, column 'a': is empty"),
        ("a,b\n1,x\n2,\n", "line 3, column 'b': is empty"),
        ("a,b\n1,x\n2,x\n", "all 2 rows have the label 'x'"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            tables.load(str(path), label="b")
    with pytest.raises(OptionError, match=r"^--tables: 'iris' is none of breast-cancer, digits"):
        tables.load("iris")
    with pytest.raises(UserError, match="none.csv: cannot be read as CSV"):
        tables.load(str(tmp_path / "none.csv"), label="b")


def numbered(classes, features=None):
    labels = torch.tensor(classes)
    if features is None:
        features = torch.arange(len(labels), dtype=torch.float32).unsqueeze(1)
    names = tuple(f"f{i}" for i in range(features.shape[1]))
    return tables.Table(features, labels, names, tuple(map(str, labels.unique().tolist())))


def rows_of(split):
    """The row numbers of each part, from a standardised column that held them."""
    return [
        (x[:, 0].double() * split.scale[0] + split.mean[0]).round().int().tolist()
        for x, _ in (split.train, split.valid, split.test)
    ]


def test_parts_share_no_row_and_have_every_class_alike():
    table = numbered([0] * 700 + [1] * 200 + [2] * 100)
    split = tables.split(table, 3)
    parts = rows_of(split)
    assert sorted(itertools.chain(*parts)) == list(range(1000))
    assert [len(part) for part in parts] == [700, 100, 200]
    for part, (_, labels) in zip(parts, (split.train, split.valid, split.test)):
        assert labels.tolist() == table.labels[part].tolist()
        shares = labels.bincount(minlength=3) / len(labels)
        assert shares.tolist() == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    assert rows_of(tables.split(table, 3)) == parts
    other = rows_of(tables.split(table, 4))
    assert len(set(other[2]) & set(parts[2])) < 80  # 40 expected by chance


def test_every_row_is_tested_as_often():
    table, times = numbered([0] * 30 + [1] * 10), np.zeros(40)
    for seed in range(400):
        times[rows_of(tables.split(table, seed))[2]] += 1
    assert times.sum() == 400 * 8
    assert (abs(times - 80) < 4.5 * np.sqrt(400 * 0.2 * 0.8)).all()


def test_only_the_training_part_is_looked_at():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(500, 3, generator=draw) * torch.tensor([1.0, 1e-3, 1e4]) + 7
    features[:, 0] = torch.arange(500.0)
    classes = [0, 1] * 250
    split = tables.split(numbered(classes, features), 1)
    train = split.train[0].double()
    assert train.mean(0).abs().max() < 1e-5
    assert train.std(0, correction=0).tolist() == pytest.approx([1] * 3, abs=1e-5)
    changed = features.clone()
    _, valid, test = rows_of(split)
    changed[valid + test, 1:] += 1e6
    again = tables.split(numbered(classes, changed), 1)
    assert torch.equal(again.train[0], split.train[0])
    assert (again.test[0][:, 1] > 1e6).all()


def test_a_constant_column_is_only_centred():
    features = torch.full((100, 3), 0.1)
    features[:, 1] = 0
    features[:, 2] = torch.arange(100) * 1e-4 + 1000.0  # varies by little, but varies
    split = tables.split(numbered([0, 1] * 50, features), 1)
    for part, _ in (split.train, split.valid, split.test):
        assert part[:, :2].abs().max() < 1e-6
    assert split.scale[:2].tolist() == [1, 1]
    assert split.train[0][:, 2].std() == pytest.approx(1, abs=0.02)


def test_too_few_rows():
    with pytest.raises(UserError, match="3 rows are too few"):
        tables.split(numbered([0, 1, 1]), 1)
