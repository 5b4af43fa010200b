# SPDX-License-Identifier: Apache-2.0
"""Conversations with a model whose tokenizer has no chat template: every turn is a line of its own.

    {system}\\n{user}\\n{assistant}\\n{user}\\n...

after the tokens that the tokenizer puts at the start of a text.  So such a model is tuned and asked (`data/encode.py`).
A runtime would put a template of its own there (llama.cpp ChatML), so exports carry this form as a chat template, and
a tokenizer that has it counts as one without: its rows have the same tokens, and it is the same tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINE: Final = "{}\n"
LINES: Final = r"{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
# the second where a text has a start mark: transformers adds none to what a template wrote, llama.cpp takes the
# template's away and puts its own in front
TEMPLATES: Final = (LINES, "{{ bos_token }}" + LINES)


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has no chat template, or only this form as one."""
    return tokenizer.chat_template is None or tokenizer.chat_template in TEMPLATES


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """This form as a chat template for the tokenizer."""
    ids = tokenizer("a")["input_ids"]
    return TEMPLATES[bool(ids) and ids[0] == tokenizer.bos_token_id]
