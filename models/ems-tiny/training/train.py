# SPDX-License-Identifier: Apache-2.0
"""Train the small model.

Usage (in models/ems-tiny): python -m training.train \\
    --novels FOLDER --out FOLDER [--preset cpu] [--minutes 90]

Run it again with the same --out to go on from the last checkpoint. --minutes ends the run by the
clock: the learning rate falls in the last part of that time.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from training import parallel
from training.corpus import Corpus, clean, common_words, held_out_word, training_files
from training.data.batches import Batch, Batches
from training.data.names import Names
from training.data.writer import ANSWER, TEXT
from training.init import initialise
from training.model import Llama
from training.presets import PRESETS, Preset, Stage
from training.schedule import Schedule
from training.tokenizer import train_tokenizer


def prepare(novels: Path, out: Path, preset: Preset) -> tuple[Any, Corpus, Names]:
    """Tokenizer, corpus and words; made once, then read from `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = training_files(novels)
    if not (out / "tokenizer" / "tokenizer.json").is_file():
        texts = (clean(path.read_text("utf-8")) for path in files)
        made = train_tokenizer(texts, preset.model.vocab, preset.model.context)
        made.save_pretrained(out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    corpus = Corpus.build(files, tokenizer, out / "corpus.npz")
    if not (out / "words.json").is_file():
        (out / "words.json").write_text(json.dumps(common_words(files)))
    words = json.loads((out / "words.json").read_text())
    return tokenizer, corpus, Names([w for w in words if not held_out_word(w)])


class Trainer:
    """Model, optimisers and counters; everything that a checkpoint holds.

    Args:
        preset: What to train.
        batches: Where batches come from.
        device: "cpu" or "cuda".
    """

    def __init__(self, preset: Preset, batches: Batches, device: str) -> None:
        self.preset, self.batches, self.device = preset, batches, device
        self.model = Llama(preset.model)
        initialise(self.model, preset.seed)
        self.model.to(device)
        named = list(self.model.named_parameters())
        hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimisers = [
            torch.optim.Muon(
                hidden, lr=preset.muon_lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=preset.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [preset.muon_lr, preset.adam_lr]
        self.schedule = Schedule(preset.warmup)
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def stage(self) -> Stage:
        for stage in self.preset.stages:
            if self.tokens < stage.tokens:
                return stage
        return self.preset.stages[-1]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over answers plus the weighted one over (a part of the) text.

        Returns:
            This process's part of the loss, and float [3]: its parts of the loss over answers, of
            the one over text, and of the share of answer tokens that are right.
        """
        kind = batch.marks[:, 1:]
        every = torch.arange(kind.numel()).view(kind.shape)
        text = (kind == TEXT) & ((every + self.step) % self.preset.text_every == 0)
        answer = kind == ANSWER
        # Counted over all rows, so that the parts of all processes sum up to the means.
        n_answer, n_text = int(answer.sum().clamp(min=1)), int(text.sum().clamp(min=1))
        mine = slice(parallel.rank(), None, parallel.world())
        chosen = (text | answer)[mine].to(self.device)
        is_answer = answer[mine].to(self.device)[chosen]
        ids = batch.ids[mine].to(self.device)
        # bf16 is faster than fp32 on CPUs with AVX512-BF16, and on every recent GPU.
        with torch.autocast(self.device, torch.bfloat16):
            hidden = self.model(ids, batch.positions[mine].to(self.device))[:, :-1]
            logits = self.model.logits(hidden[chosen]).float()
        targets = ids[:, 1:][chosen]
        losses = F.cross_entropy(logits, targets, reduction="none")
        of_answers = losses[is_answer].sum() / n_answer
        of_text = losses[~is_answer].sum() / n_text
        right = (logits.argmax(-1) == targets)[is_answer].sum() / n_answer
        found = torch.stack([of_answers.detach(), of_text.detach(), right])
        return of_answers + self.preset.text_weight * of_text, found

    def train_step(self) -> dict[str, float]:
        """One batch, one update."""
        began = time.monotonic()
        stage = self.stage()
        rng = random.Random(f"length {self.preset.seed} {self.step}")
        length = rng.choices(list(stage.lengths), list(stage.lengths.values()))[0]
        self.batches.stretched = stage.stretched
        batch = self.batches.batch(self.step, length, self.preset.batch, stage.mix)
        factor = self.schedule.factor(self.step)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            optimiser.param_groups[0]["lr"] = peak * factor
        loss, found = self.loss(batch)
        loss.backward()
        found = parallel.sum_gradients(self.model, found)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel()
        self.seconds += time.monotonic() - began
        numbers = dict(zip(("answer", "text", "right"), found.tolist(), strict=True))
        return numbers | {"length": length, "lr": factor}

    def save(self, path: Path) -> None:
        """Write a checkpoint; the old one stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "schedule": vars(self.schedule),
            "counters": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.schedule = Schedule(**state["schedule"])
        self.step, self.tokens, self.seconds = state["counters"]

    def plan_decay(self, begun: float, first: int, minutes: float | None) -> None:
        """Set the begin of the decay as soon as it is due, by tokens or by the clock."""
        if self.schedule.begin is not None:
            return
        share = self.preset.decay
        steps_left = (self.preset.tokens - self.tokens) / self.preset.batch
        total = self.preset.tokens / self.preset.batch
        if minutes is not None and self.step > first:
            spent = time.monotonic() - begun
            pace = spent / (self.step - first)
            steps_left = min(steps_left, (minutes * 60 - spent) / pace)
            total = min(total, self.step + steps_left)
        if parallel.agree(steps_left <= share * total):
            length = parallel.agree(max(1, int(steps_left)))
            self.schedule.begin, self.schedule.length = self.step, length


def run(trainer: Trainer, out: Path, minutes: float | None) -> None:
    """Train to the end of the decay, with a log line every 20 steps and regular checkpoints."""
    main = parallel.rank() == 0
    begun, first, saved = time.monotonic(), trainer.step, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    sums: dict[str, list[float]] = {}
    with (
        Progress(*columns, TimeElapsedColumn(), disable=not main) as bar,
        (out / "log.jsonl").open("a", encoding="utf-8") as log,
    ):
        task = bar.add_task("training", total=trainer.preset.tokens, completed=trainer.tokens)
        while not trainer.schedule.finished(trainer.step):
            found = trainer.train_step()
            for key in ("answer", "text", "right"):
                sums.setdefault(key, []).append(found[key])
            sums.setdefault(f"right@{found['length']}", []).append(found["right"])
            if trainer.step % 10 == 0:
                trainer.plan_decay(begun, first, minutes)
            bar.update(task, completed=trainer.tokens)
            if main and trainer.step % 20 == 0:
                means = {k: round(sum(v) / len(v), 4) for k, v in sorted(sums.items())}
                pace = trainer.tokens / trainer.seconds
                line = {"step": trainer.step, "tokens": trainer.tokens, "lr": found["lr"]}
                line |= {"s": round(trainer.seconds), "tok/s": round(pace)} | means
                print(json.dumps(line), file=log, flush=True)
                bar.update(task, description=f"answers {means['right']:.1%} right")
                sums = {}
            if main and time.monotonic() - saved > 60:
                trainer.save(out / "checkpoint.pt")
                saved = time.monotonic()
    if main:
        trainer.save(out / "checkpoint.pt")


def start(args: argparse.Namespace) -> None:
    """What every process does."""
    preset = PRESETS[args.preset]
    tokenizer, corpus, names = prepare(args.novels, args.out, preset)
    batches = Batches(tokenizer, corpus, names, preset.seed, preset.model.context, 0.0)
    trainer = Trainer(preset, batches, args.device)
    if (args.out / "checkpoint.pt").is_file():
        trainer.load(args.out / "checkpoint.pt")
    run(trainer, args.out, args.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--novels", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log, tokenizer")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--minutes", type=float, help="end by the clock instead of by tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    args = parser.parse_args()
    # Here once, before several processes would make them at the same time.
    prepare(args.novels, args.out, PRESETS[args.preset])
    parallel.launch(args.workers, args.out, start, (args,))


if __name__ == "__main__":
    main()
