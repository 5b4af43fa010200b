"""Rows, written as a file of each type that is read."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DOLLY = {"instruction": "Name a bird", "context": "", "response": "A wren", "category": "open_qa"}


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_rows(path: Path, *rows: object) -> str:
    path.write_bytes(jsonl(*rows))
    return str(path)


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = path.suffix.lower() == ".jsonl"
        path.write_bytes(jsonl(*rows) if lines else json.dumps(rows, indent=1).encode())
    return str(path)
