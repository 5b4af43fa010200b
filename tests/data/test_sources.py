"""A limit of rows is shared by the clients of a folder, and few rows have few clients."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tables import DOLLY, write, write_rows

from fleetune import data
from fleetune.data import partition, read, sources
from fleetune.data.partition import RowsSpec, split
from fleetune.data.read_rows import digests
from fleetune.errors import DataError
from fleetune.tuning import methods
from fleetune.tuning.recipe import recipe as recipes


@pytest.fixture
def devices(tmp_path: Path) -> str:
    for client, count in (("a", 5), ("b", 1), ("c", 9)):
        rows = [{"instruction": f"{client}{i}", "response": "x"} for i in range(count)]
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


SHARES = {1: "a", 3: "abc", 4: "aabc", 7: "aaabccc", 8: "aaaabccc", 11: "aaaaabccccc", 99: "aaaaabccccccccc"}


@pytest.mark.parametrize(("limit", "shares"), SHARES.items())
def test_every_client_gives_as_many_rows_as_the_others(devices: str, limit: int, shares: str) -> None:
    told: list[str] = []
    found = data.read(devices, limit=limit, note=told.append)
    assert "".join(e.meta["client"] for e in found) == shares
    first = [e.messages[0][1] for e in found if e.meta["client"] == "c"]
    assert first == [f"c{i}" for i in range(len(first))]
    assert told == (["the limit of 1 row leaves 2 of 3 clients without any"] if limit == 1 else [])


USUAL = [(120, 100, 13), (40, 100, 8), (40, 8, 8), (4000, 100, 100), (40, 1, 1), (1780, 200, 200)]


@pytest.mark.parametrize(("rows", "usual", "clients"), USUAL)
def test_a_methods_usual_clients_follow_the_rows(tmp_path: Path, rows: int, usual: int, clients: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"{i}", "response": "x"}) + "\n" for i in range(rows)))
    parts = partition.split(partition.RowsSpec(str(file)), usual)
    assert len(parts.clients) == clients
    assert bool(parts.notes) == (clients < usual)
    asked = partition.split(partition.RowsSpec(str(file), clients=20), usual)
    assert (len(asked.clients), asked.notes) == (20, ())
    assert methods.entry("fwdllm").clients == 100


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data sets are folders under tmp_path/hub, and an empty cache."""
    root = tmp_path / "hub"
    state = SimpleNamespace(root=root, asked=[], failure=None)

    def dataset_info(self, repo, *, timeout):
        state.asked.append(repo)
        assert timeout <= 30
        if state.failure is not None:
            raise state.failure
        files = sorted(p for p in (root / repo).rglob("*") if p.is_file())
        names = [str(p.relative_to(root / repo)) for p in files]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(repo, name, *, repo_type):
        assert repo_type == "dataset"
        return str(root / repo / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return state


def put(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{**DOLLY, "file": f"{number}"}])


@pytest.mark.parametrize(
    ("names", "source", "expected"),
    [
        (["README.json", "set-15k.jsonl"], "o/s:set-15k.jsonl", ["1"]),
        (["dataset_info.json", ".meta.json", "set-15k.jsonl"], "o/s", ["2"]),
        (["data/test-00000-of-00001.parquet", "data/train-00000-of-00001-a09b.parquet"], "o/s", ["1"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "o/s", ["0", "1"]),
        (["train.csv", "train.jsonl", "test.jsonl"], "o/s", ["1"]),
        (["validation.jsonl", "data.jsonl", "dev.csv"], "o/s", ["1"]),
        (["train/a.jsonl", "train/test.jsonl"], "s", ["0"]),
        (["constrain.jsonl"], "o/s", ["0"]),
        (["a-00000-of-00002.parquet", "b.parquet", "a-00001-of-00002.parquet"], "o/s:a.parquet", ["0", "2"]),
    ],
)
def test_the_training_files_of_a_hub_set(hub, names, source, expected):
    put(hub.root / source.split(":")[0], *names)
    assert [example.meta["file"] for example in read(source)] == expected


@pytest.mark.parametrize(
    ("names", "source", "says"),
    [
        (["a.jsonl", "b.jsonl"], "o/s", "several training files"),
        (["test.jsonl"], "o/s", "no training file"),
        (["dataset_infos.json"], "o/s", "no training file"),
        (["train.jsonl"], "o/s:trian.jsonl", "has no file 'trian.jsonl'"),
        (["train-00000-of-00002.parquet"], "o/s", "1 of the 2 parts"),
    ],
)
def test_hub_sets_without_clear_training_files(hub, names, source, says):
    put(hub.root / "o/s", *names)
    with pytest.raises(DataError, match=says):
        read(source)


def cache(tmp_path: Path, *names: str) -> None:
    folder = tmp_path / "cache/datasets--o--s"
    put(folder / "snapshots/abc", *names)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")


def test_offline_uses_the_cache_alone(hub, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="working offline") as caught:
        read("o/s", offline=True)
    assert "demo" in (caught.value.hint or "")
    cache(tmp_path, "train.jsonl")
    assert len(read("o/s", offline=True)) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(read("o/s")) == 1
    assert hub.asked == []


def test_an_unreachable_hub_is_one_clear_error_or_the_cache(hub, tmp_path, caplog):
    hub.failure = ConnectionError("Name or service not known\nand forty more lines")
    with pytest.raises(DataError, match="cannot be asked for it: Name or service not known") as caught:
        read("o/s")
    assert "forty" not in caught.value.message
    assert "file's path" in (caught.value.hint or "")
    cache(tmp_path, "train.jsonl")
    assert len(read("o/s")) == 1
    assert "data set o/s comes from the cache: Name or service not known" in caplog.text


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_sets_that_the_hub_refuses(hub, kind):
    hub.failure = kind.__new__(kind)  # their constructors want the response of one HTTP library or another
    with pytest.raises(DataError) as caught:
        read("o/s")
    assert "hf auth login" in (caught.value.hint or "")


@pytest.fixture
def shops(tmp_path: Path) -> Path:
    folder = tmp_path / "devices"
    folder.mkdir()
    for name, count in (("oslo", 3), ("bonn", 5), ("dev-1", 4)):
        write_rows(folder / f"{name}.jsonl", *[{"q": f"{name} {i}", "a": "x"} for i in range(count)])
    (folder / "README.md").write_text("not rows")
    (folder / ".hidden.jsonl").write_text("not read")
    return folder


def test_a_file_of_a_folder_is_a_client(shops: Path) -> None:
    rows = read(str(shops), columns="prompt=q,response=a")
    texts = ["bonn 0", "bonn 4", "dev-1 3"]
    assert [e.messages[0][1] for e in rows[::4]] == texts
    assert [e.meta["client"] for e in rows[::4]] == [text.split()[0] for text in texts]
    parts = split(RowsSpec(str(shops), "prompt=q,response=a", held_out=1), 8)
    assert (parts.partition, len(parts.clients)) == ("column:client", 3)
    assert {len({rows[i].meta["client"] for i in part}) for part in parts.clients} == {1}


def test_a_folder_of_something_else_is_refused(shops: Path, tmp_path: Path) -> None:
    write_rows(shops / "oslo.json", {"q": "q", "a": "a"})
    with pytest.raises(DataError, match="two files of client 'oslo'"):
        read(str(shops), columns="prompt=q,response=a")
    (shops / "config.json").write_text("{}")
    with pytest.raises(DataError, match="is the folder of a model"):
        read(str(shops))
    (tmp_path / "set").mkdir()
    for name in ("demo_train", "demo_eval"):
        write_rows(tmp_path / "set" / f"{name}.jsonl", {"prompt": "q", "completion": "a"})
    with pytest.raises(DataError, match="the splits of one data set") as failed:
        read(str(tmp_path / "set"))
    assert failed.value.hint == f"give one of them, such as {tmp_path}/set/demo_train.jsonl"


SPLITS = {
    "train valid test": ("train", "valid"),
    "train test": ("train", ""),
    "train": ("train", ""),
    "a-train a-dev": ("a-train", "a-dev"),
    "train1 train2 test": None,
    "train oslo": None,
    "valid test": None,
}


@pytest.mark.parametrize("names", SPLITS)
def test_a_folder_of_splits_is_measured_on_its_validation_file(tmp_path: Path, names: str) -> None:
    for name in names.split():
        write_rows(tmp_path / f"{name}.jsonl", {"prompt": name, "completion": "a"})
    (tmp_path / "README.txt").write_text("what these are")
    wanted = SPLITS[names]
    files = wanted and tuple(name and str(tmp_path / f"{name}.jsonl") for name in wanted)
    assert sources.splits(str(tmp_path)) == files
    recipe = recipes.make({"model": "m", "data": str(tmp_path), "method": "fedit"})
    assert (recipe.data, recipe.eval_data) == (files or (str(tmp_path), ""))
    other = recipes.make({"model": "m", "data": str(tmp_path), "method": "fedit", "eval_data": "x.jsonl"})
    assert other.eval_data == "x.jsonl"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_a_file_whose_name_is_no_utf8_is_a_client_too(shops: Path) -> None:
    write_rows(shops / os.fsdecode(b"caf\xe9.jsonl"), {"q": "q", "a": "a"})
    clients = {example.meta["client"] for example in read(str(shops), columns="prompt=q,response=a")}
    assert "caf\\udce9" in clients
    assert "".join(digests(str(shops))).encode()
