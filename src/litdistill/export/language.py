"""Runs an exported language model on a .txt file: its perplexity, the most probable next tokens, and a continuation.

It needs numpy and `tokenizers`, and the `tokenizer.json` beside the exported file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from litdistill.data.text.reading import read_text
from litdistill.data.text.tokenizing import NAME, opened
from litdistill.data.text.windows import END_ID, ids_of, windows
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import ExportMetadata, companion
from litdistill.utils.modality import PADDING
from litdistill.utils.text import one_line

BATCH = 64  # sequences
Run = Callable[[np.ndarray], np.ndarray]  # (N, T) int64 -> (N, T, V)


def continuation(
    run: Run, facts: ExportMetadata, folder: Path, path: str | Path, top: int, more: int
) -> dict[str, Any]:
    """Returns `{"text": path, "tokens", "perplexity", "top"}` of a text, with `more` also its greedy `continuation`.

    The perplexity is over all tokens of the text, in sequences as in training: each sequence starts without what came
    before. `top`: the most probable tokens behind its end, with as much of the text before them as a sequence holds.
    Raises `UserError` for an empty text, another kind of file or another encoding, and for outputs that are not finite.
    """
    (length,), names = facts.input_shape, facts.classes
    encoding = str(facts.modality.get("encoding", "utf-8"))
    tokenizer = opened(companion(folder, facts, NAME), folder / NAME)
    if Path(path).suffix.lower() != ".txt":
        raise UserError(f"{one_line(path)}: a language model reads .txt files.")
    text = read_text(Path(path), encoding, "exporting a student of data.encoding=<its encoding>")
    if not text.strip():
        raise UserError(f"{one_line(path)} is empty: give a text with a word at least.")
    (ids,) = ids_of(tokenizer, [text.rstrip("\n")], ends=False)
    if len(bad := ids[ids >= len(names)]):
        raise UserError(
            f"{folder / NAME} gives the token {int(bad[0])}, and the student has {len(names)}: fetch both files anew, or "
            "export again."
        )
    inputs, targets = windows([ids], length)
    nll = [_surprise(run(inputs[i : i + BATCH]), targets[i : i + BATCH], path) for i in range(0, len(inputs), BATCH)]
    p = _next(run, ids, length)
    best = np.argsort(-p, kind="stable")[:top].tolist()
    found: dict[str, Any] = {
        "text": str(path),
        "tokens": len(ids) - 1,
        "perplexity": float(np.exp(np.concatenate(nll).mean())),
        "top": [{"class": names[i], "index": i, "probability": float(p[i])} for i in best],
    }
    if more:
        found["continuation"] = tokenizer.decode(_greedy(run, ids, length, p, more), skip_special_tokens=True)
    return found


def _surprise(logits: np.ndarray, targets: np.ndarray, path: str | Path) -> np.ndarray:
    """Returns −log p of each target in nats, (P,)."""
    there = targets != PADDING
    x, y = logits[there].astype(np.float64), targets[there]
    if not np.isfinite(x).all():
        raise UserError(
            f"The student's outputs for {one_line(path)} are no finite numbers, so that it predicts nothing. Its weights are "
            "damaged, or its training diverged: export another run."
        )
    x -= x.max(1, keepdims=True)
    return np.log(np.exp(x).sum(1)) - x[np.arange(len(y)), y]


def _next(run: Run, ids: np.ndarray, length: int) -> np.ndarray:
    """Returns the probabilities (V,) of the token behind the last `length` of these."""
    context = ids[-length:]
    inputs = np.zeros((1, length), np.int64)
    inputs[0, : len(context)] = context
    x = run(inputs)[0, len(context) - 1].astype(np.float64)
    odds = np.exp(x - x.max())
    return odds / odds.sum()


def _greedy(run: Run, ids: np.ndarray, length: int, p: np.ndarray, more: int) -> list[int]:
    """Returns the most probable next token, `more` times, each behind the former ones; fewer where a text ends."""
    found: list[int] = []
    while len(found) < more and (token := int(p.argmax())) != END_ID:
        found.append(token)
        p = _next(run, np.concatenate([ids, found]).astype(np.int64), length)
    return found
