# SPDX-License-Identifier: Apache-2.0
"""A folder for Ollama: its Modelfile makes the prompts that the tokenizer's own chat template makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import compressed, gguf_of, piece_tokenizer, tiny, tokenizer

from fleetune import api
from fleetune.deploy.export import export
from fleetune.deploy.formats import ollama
from fleetune.errors import UsageError
from fleetune.models import chat_template

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
LLAMA32 = (  # a system turn in any case, with a date in front of the text
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start|>system<|end|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
BRACE = "{% for m in messages %}{{ m['role'] + ': {' + m['content'] + '} {' }}{% endfor %}{% if add_generation_prompt %}{{ 'a: {' }}{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim"
    " + '<end>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LAST_END = CHATML.replace(
    "+ '<|im_end|>\\n' }}{% endfor %}",
    "}}{% if loop.last and m['role'] == 'assistant' and not "
    "add_generation_prompt %}{{ eos_token }}{% else %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}",
)
LAST_ONLY = CHATML.replace("in messages", "in messages[-1:]")
BRACES = "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '{{a}}' }}{% endif %}"
TALKS: tuple[tuple[str, ...], ...] = (
    ("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


def talk(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}\n  said, {{{{ {i} }}}}"} for i, role in enumerate(roles)]


def in_ollama(modelfile: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a Modelfile with these messages: its `range`, `if eq`, strings and fields."""
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.S)
    system = re.search(r'SYSTEM """(.*?)"""', modelfile, re.S)
    assert template
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    asked = any(m["role"] == "system" and m["content"] for m in messages)
    written = re.sub(
        r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", "" if asked else r"\1", template[1], flags=re.S
    )
    tokens = re.split(r"(\{\{.*?\}\})", written)  # Go takes the leftmost braces
    opened = next(i for i, t in enumerate(tokens) if t == "{{ range .Messages }}")
    closed = len(tokens) - 1 - next(i for i, t in enumerate(reversed(tokens)) if t == "{{ end }}")

    def said(parts: Sequence[str], message: Mapping[str, str]) -> str:
        out, active = "", True
        for part in parts:
            if case := re.fullmatch(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', part):
                active = message.get("role") == case[1]
            elif part == "{{ end }}":
                active = True
            elif active:
                text = re.fullmatch(r'\{\{ "(.*)" \}\}', part)
                out += message["content"] if part == "{{ .Content }}" else text[1] if text else part
        return out

    body = "".join(said(tokens[opened + 1 : closed], message) for message in messages)
    return said(tokens[:opened], {}) + body + said(tokens[closed + 1 :], {})


def of(template: str | None, *, pieces: bool = False) -> Any:
    made = piece_tokenizer() if pieces else tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "pieces", "system"),
    [
        (CHATML, False, True), (LAST_END, False, True), (LLAMA3, True, True), (LLAMA3, False, True), (LLAMA32, True, True), (LLAMA32, False, True), (BRACE, False, True), (GEMMA, True, False), (MISTRAL, True, False),
        (BRACES, False, True), (None, False, True), (None, True, True),
    ],
)  # fmt: skip
def test_prompts_are_those_of_the_chat_template(template: str | None, pieces: bool, system: bool) -> None:
    made = of(template, pieces=pieces)
    text, notes = ollama.modelfile(made)
    assert bool(notes) != system
    puts_bos = made("a")["input_ids"][0] == made.bos_token_id
    for roles in TALKS:
        if "system" in roles and not system:
            continue
        want = made.apply_chat_template(
            talk(roles),
            chat_template=template or chat_template.template(made),
            tokenize=False,
            add_generation_prompt=True,
        )
        assert in_ollama(text, talk(roles)) == want.removeprefix(made.bos_token if puts_bos else "")


def test_what_is_usual_is_the_system_message() -> None:
    assert 'SYSTEM """Be kind"""' in ollama.modelfile(of(CHATML))[0]
    assert "SYSTEM" not in ollama.modelfile(of(LLAMA3))[0]
    assert 'PARAMETER stop "<|im_end|>"' in ollama.modelfile(of(CHATML))[0]


@pytest.mark.parametrize(
    ("end", "shown"), [('<|"|>', "'<|\"|>'"), ("<\n>", r"'<\n>'"), ("<\x1b>", r"'<\x1b>'")]
)
def test_a_stop_token_that_a_modelfile_cannot_quote_is_said(end: str, shown: str) -> None:
    made = of(LLAMA3)
    usual = ollama.modelfile(made)[1]
    made.add_special_tokens({"eos_token": end})
    text, notes = ollama.modelfile(made)
    (more,) = [note for note in notes if note not in usual]
    assert more == f"a Modelfile cannot quote {shown}: answers that end so do not stop there"
    assert end not in text


@pytest.mark.parametrize("template", [LAST_ONLY, CHATML.replace("Be kind", '\\"\\"\\"')])
def test_a_template_without_that_form_is_left_to_ollama(template: str) -> None:
    text, notes = ollama.modelfile(of(template))
    assert "TEMPLATE" not in text
    assert text.startswith("FROM ./model.gguf\n")
    assert "PARAMETER stop" in text
    assert "no form in Ollama's language" in notes[0]


def test_the_folder_has_the_gguf_file_and_the_modelfile(tmp_path: Path) -> None:
    compressed(tiny(), tmp_path / "codes")
    export(tmp_path / "codes", "gguf", tmp_path / "m.gguf")
    report = export(tmp_path / "codes", "ollama", tmp_path / "out")
    assert sorted(p.name for p in report.path.iterdir()) == ["Modelfile", "model.gguf"]
    assert report.bytes == sum(p.stat().st_size for p in report.path.iterdir())
    assert "Q4_0" in report.types
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "codes", "ollama", tmp_path / "out")


@pytest.mark.usefixtures("own_cache")
def test_a_run_that_trained_scales_gives_its_own_file(tmp_path: Path) -> None:
    file = gguf_of(tmp_path)
    rows = [{"prompt": f"say {w}", "response": f"{w} it is"} for w in "abcdefghijklmnop"]
    run = api.tune(
        str(file), rows, method="fedpetuning", train="scales", settings={"steps": 1, "lr": 0.05}, clients=2, rounds=1,
        samples=0, client_rows=0, held_out=4, out=tmp_path / "runs",
    )  # fmt: skip
    whole = api.export(run, path=tmp_path / "tuned.gguf").path
    folder = api.export(run, to="ollama", path=tmp_path / "ollama").path
    assert sorted(p.name for p in folder.iterdir()) == ["Modelfile", "model.gguf"]
    assert (folder / "model.gguf").read_bytes() == whole.read_bytes()
    assert "TEMPLATE" in (folder / "Modelfile").read_text()


def test_a_template_that_refuses_every_conversation_leaves_a_modelfile(tmp_path: Path) -> None:
    (note,) = ollama.add_modelfile(of("{{ raise_exception('no') }}"), tmp_path)
    assert "no form" in note
    assert (tmp_path / "Modelfile").read_text() == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'
