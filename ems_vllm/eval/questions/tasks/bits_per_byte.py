# SPDX-License-Identifier: Apache-2.0
"""How well a compressed prefix predicts what follows: bits per byte of long documents.

A prompt alone cannot measure this: its log probabilities (`prompt_logprobs`) come from the prefill,
which attends to everything, and the cache is compressed only afterwards. Here the prefix is the
prompt, and the server is made to *generate* the document's own continuation
(engine/measuring/forced_tokens.py): each of its tokens but the first is predicted from the
compressed cache, and vLLM reports its log probability before the other tokens were masked. With a
budget of at least the length this equals what `prompt_logprobs` gives for the same tokens
(tests/e2e/test_eval.py).

Bits per byte, unlike perplexity, compares models with different tokenizers.
"""

from __future__ import annotations

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.questions.haystack import read_texts
from ems_vllm.eval.questions.protocol import LAST
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_CONTINUATION = 256


@TASKS.register("bits_per_byte")
class BitsPerByte(Task):
    """The last tokens of a passage, a quarter of it and at most 256, after the tokens before."""

    metric = "bits_per_byte"
    higher_is_better = False
    max_tokens = _CONTINUATION
    protocols = (LAST,)

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        special = tokenizer.encode_special()
        num_continued = min(self.max_tokens, max(key.length // 4, 1))
        passage = self._passage(key, tokenizer, key.length - len(special))
        prompt, continued = passage[:-num_continued], passage[-num_continued:]
        before, all_of_it = tokenizer.decode(prompt), tokenizer.decode(passage)
        return Sample(
            task=key.task,
            length=key.length,
            depth=None,
            seed=key.seed,
            index=key.index,
            prompt=before,
            prompt_token_ids=(*special, *prompt),
            max_tokens=num_continued,
            references=(),
            continuation_token_ids=tuple(continued),
            continuation_bytes=max(len(all_of_it.encode()) - len(before.encode()), 1),
        )

    def _passage(self, key: Key, tokenizer: Tokenizer, num_tokens: int) -> list[int]:
        """Consecutive tokens of one of the texts, from a random word on."""
        rng = generator(key)
        texts = read_texts(self.options.text_path)
        for text in rng.sample(texts, len(texts)):
            # Eight characters a token are more than tokenizers reach; a shorter text is tried from
            # its beginning.
            start = rng.randrange(max(len(text) - 8 * num_tokens, 1))
            start = text.find(" ", start) + 1 if start else 0
            token_ids = tokenizer.encode_plain(text[start : start + 16 * num_tokens])
            if len(token_ids) >= num_tokens:
                return token_ids[:num_tokens]
        raise ConfigError(
            f"lengths={key.length} is too long for tasks={key.task!r}: no text has so many tokens; "
            "give longer ones with text_path."
        )
