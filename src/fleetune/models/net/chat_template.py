r"""Give tokenizers without a chat template a plain one: every turn is a line of its own.

    {system}\\n{user}\\n{assistant}\\n{user}\\n...

after the tokens that the tokenizer puts at the start of a text.  Exports carry it as a chat template, since a runtime would use
one of its own (llama.cpp: ChatML); an answer that ends a conversation has the end-of-text token for its line break, as in tuning.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from fleetune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINE: Final = "{}\n"
LINES: Final = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}{{ eos_token }}"
    r"{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
# transformers adds no start mark to what a template wrote; llama.cpp takes the template's away and puts its own in front
START: Final = "{{ bos_token }}"
TEMPLATES: Final = (LINES, START + LINES)


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has no chat template, or only the plain one."""
    return tokenizer.chat_template is None or tokenizer.chat_template in TEMPLATES


def own_system(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the system sentence that a chat template writes where a conversation has none; "" for none."""
    mark, user = "a system turn", {"role": "user", "content": "a user's turn"}
    try:
        without, given = (
            str(tokenizer.apply_chat_template([*turns, user], tokenize=False))
            for turns in ([], [{"role": "system", "content": mark}])
        )
    except Exception:  # a template is a program: rows that it refuses are told of when they are written by it
        return ""
    before, _, after = given.partition(mark)
    fits = after and without.startswith(before) and without.endswith(after)
    return without[len(before) : -len(after)].strip() if fits else ""


def begin_with(tokenizer: PreTrainedTokenizerBase, text: str | None) -> None:
    """Have a chat template begin with the system's turn `text` where a conversation has none; ModelError for the plain form."""
    if text is None:
        return
    if is_plain(tokenizer) or not isinstance(tokenizer.chat_template, str):
        raise ModelError(
            "the model has no chat template with a place for a system sentence",
            hint="leave out system='..', and write it into the prompts",
        )
    turn = f"{{'role': 'system', 'content': {json.dumps(text, ensure_ascii=False)}}}"
    lacks = "not messages or messages[0]['role'] != 'system'"
    before = f"{{% if {lacks} %}}{{% set messages = [{turn}] + messages %}}{{% endif %}}\n"
    tokenizer.chat_template = before + tokenizer.chat_template


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the plain form as a chat template for the tokenizer, with the start mark that its texts have."""
    ids = tokenizer("a")["input_ids"]
    return START + LINES if ids and ids[0] == tokenizer.bos_token_id else LINES
