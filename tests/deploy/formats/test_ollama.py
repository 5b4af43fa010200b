"""A folder for Ollama: the GGUF file, and a Modelfile with the tokens that end an answer."""

from pathlib import Path

import pytest
from deploy_harness import compressed, tiny, tokenizer

from fleetune.deploy.export import write as export
from fleetune.deploy.formats import ollama
from fleetune.errors import UsageError

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def modelfile(template: str, folder: Path, end: str = "") -> tuple[str, list[str]]:
    made = tokenizer()
    made.chat_template = template
    if end:
        made.add_special_tokens({"eos_token": end})
    notes = ollama.add_modelfile(made, folder)
    return (folder / "Modelfile").read_text(), notes


def test_the_tokens_that_end_an_answer_stop_it(tmp_path: Path) -> None:
    """Of a template that ends turns otherwise than texts, and of one that refuses every conversation."""
    for template in (CHATML, "{{ raise_exception('no') }}"):
        want = 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'
        assert modelfile(template, tmp_path) == (want, [])


@pytest.mark.parametrize(
    ("end", "shown"), [('<|"|>', "'<|\"|>'"), ("<\n>", r"'<\n>'"), ("<\x1b>", r"'<\x1b>'")]
)
def test_a_stop_token_that_a_modelfile_cannot_quote_is_said(end: str, shown: str, tmp_path: Path) -> None:
    text, notes = modelfile(CHATML, tmp_path, end)
    assert notes == [f"a Modelfile cannot quote {shown}: answers that end so do not stop there"]
    assert end not in text


def test_the_folder_has_the_gguf_file_and_the_modelfile(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "codes")
    export(tmp_path / "codes", "gguf", tmp_path / "m.gguf")
    report = export(tmp_path / "codes", "ollama", tmp_path / "out")
    assert sorted(p.name for p in report.path.iterdir()) == ["Modelfile", "model.gguf"]
    assert report.bytes == sum(p.stat().st_size for p in report.path.iterdir())
    assert "Q4_0" in report.types
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "codes", "ollama", tmp_path / "out")
