"""One prompt and many answers as one row: the prompt once, the answers as branches behind it.

Every branch sees the prompt and itself, and starts at the position after the prompt, so it is
computed as if it stood alone while the prompt and its pictures are paid for once. Layout only: no
sampling and no loss.

Suffixes: B rows, S tokens of a row, T predicted tokens, N predicted tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.errors import UsageError
from medmo_edge.train.attention import NAME, additive
from medmo_edge.train.collator import PREFIX, pad, visible
from medmo_edge.train.packed_attention import NAME as PACKED
from medmo_edge.train.packing import Encoded

if TYPE_CHECKING:
    import torch

PADDING = -1  # branch number of tokens that are not there

Ints = NDArray[np.int64]
Parts = list[NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BranchRow:
    """Ids and branch numbers [S], positions [3, S]; what is predicted [T] from which place [T].

    ``owners`` [T] are the callers' numbers of the answers that the predicted tokens belong to.
    """

    prompt: Encoded
    ids: Ints
    branches: Ints
    positions: Ints
    sources: Ints
    targets: Ints
    owners: Ints


def branch_row(
    prompt: Encoded, answers: Sequence[Sequence[int]] = (), owners: Sequence[int] = ()
) -> BranchRow:
    """The row of ``prompt`` with its ``answers``, each of at least one token.

    The first token of every answer is predicted from the prompt's last one; the last token of an
    answer predicts nothing and is left out.
    """
    length, start = prompt.tokens, int(prompt.positions.max()) + 1
    ids: Parts = [prompt.ids]
    branches: Parts = [np.full(length, PREFIX)]
    positions: Parts = [prompt.positions]
    sources: Parts = [np.zeros(0)]
    targets: Parts = [np.zeros(0)]
    numbers: Parts = [np.zeros(0)]
    at = length
    for branch, (answer, owner) in enumerate(zip(answers, owners, strict=True), start=1):
        told = np.asarray(answer, np.int64)
        fed = len(told) - 1
        ids.append(told[:-1])
        branches.append(np.full(fed, branch))
        positions.append(np.tile(np.arange(start, start + fed), (3, 1)))
        sources.append(np.concatenate([[length - 1], np.arange(at, at + fed)]))
        targets.append(told)
        numbers.append(np.full(len(told), owner))
        at += fed
    return BranchRow(
        prompt=prompt,
        ids=_joined(ids),
        branches=_joined(branches),
        positions=np.concatenate(positions, axis=1),
        sources=_joined(sources),
        targets=_joined(targets),
        owners=_joined(numbers),
    )


def _joined(parts: Sequence[NDArray[Any]]) -> Ints:
    return np.concatenate(parts).astype(np.int64)


def split_rows(
    prompt: Encoded, answers: Sequence[Sequence[int]], owners: Sequence[int], row_tokens: int
) -> list[BranchRow]:
    """As few rows as hold all answers with at most ``row_tokens`` tokens each, in their order.

    A row holds at least one answer, however long.
    """
    rows: list[BranchRow] = []
    first, used = 0, prompt.tokens
    for index, answer in enumerate(answers):
        if index > first and used + len(answer) - 1 > row_tokens:
            rows.append(branch_row(prompt, answers[first:index], owners[first:index]))
            first, used = index, prompt.tokens
        used += len(answer) - 1
    return [*rows, branch_row(prompt, answers[first:], owners[first:])]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BranchBatch:
    """Rows for the model: its arguments, and where in them the predicted tokens are.

    ``columns`` are the places whose logits are wanted; ``rows`` and ``picks`` [N] find each
    predicted token's logits in [B, columns], ``targets`` and ``owners`` are [N].
    """

    inputs: dict[str, "torch.Tensor"]
    columns: "torch.Tensor"
    rows: "torch.Tensor"
    picks: "torch.Tensor"
    targets: "torch.Tensor"
    owners: Ints


def collate_branches(rows: Sequence[BranchRow], model: Any) -> BranchBatch:
    """Rows padded on the right, with the mask that ``model``'s attention takes, on its device.

    Without any picture, one of a single vision token that nothing sees is put behind the first row:
    the vision tower runs in every call of every process.
    """
    import torch

    if not any(row.prompt.grids for row in rows):
        rows = [_with_picture(rows[0]), *rows[1:]]
    length = max(len(row.ids) for row in rows)
    branches = np.stack([pad(row.branches, length, PADDING) for row in rows])
    positions = np.stack([pad(row.positions, length, 0) for row in rows], axis=1)
    columns = np.unique(np.concatenate([row.sources for row in rows]))
    device = next(model.parameters()).device
    inputs = {
        "input_ids": torch.from_numpy(np.stack([pad(row.ids, length, 0) for row in rows])),
        "position_ids": torch.from_numpy(np.concatenate([positions[:1], positions])),
        "attention_mask": mask_for(model, torch.from_numpy(visible(branches))),
        **_pictures([row.prompt for row in rows]),
    }
    places = np.searchsorted(columns, np.concatenate([row.sources for row in rows]))
    return BranchBatch(
        inputs={name: value.to(device) for name, value in inputs.items()},
        columns=torch.from_numpy(columns).to(device),
        rows=torch.tensor(np.repeat(range(len(rows)), [len(row.targets) for row in rows])),
        picks=torch.from_numpy(places).to(device),
        targets=torch.from_numpy(np.concatenate([row.targets for row in rows])).to(device),
        owners=np.concatenate([row.owners for row in rows]),
    )


def _with_picture(row: BranchRow) -> BranchRow:
    merge, width = row.prompt.merge_size, row.prompt.patches.shape[1]
    patches = np.zeros((merge**2, width), np.float32)
    return replace(
        row,
        prompt=replace(row.prompt, patches=patches, grids=((1, merge, merge),)),
        ids=np.append(row.ids, row.prompt.image_token),
        branches=np.append(row.branches, PADDING),
        positions=pad(row.positions, len(row.ids) + 1, 0),
    )


def _pictures(prompts: Sequence[Encoded]) -> dict[str, "torch.Tensor"]:
    import torch

    grids = [grid for prompt in prompts for grid in prompt.grids]
    patches = np.concatenate([prompt.patches for prompt in prompts])
    return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor(grids)}


def mask_for(model: Any, seen: "torch.Tensor") -> "torch.Tensor":
    """The boolean mask ``seen`` [B, 1, Q, K] in the form that the model's attention takes.

    Errors: UsageError for an attention that takes no mask of this kind.
    """
    import torch

    model = getattr(model, "module", model)  # within DDP's wrapper
    kind = model.config.text_config._attn_implementation
    if kind in ("sdpa", PACKED):  # which is sdpa where it is given a mask
        return seen
    if kind in (NAME, "eager"):
        return additive(seen, torch.bfloat16 if kind == NAME else model.dtype)
    raise UsageError(
        f"attention {kind!r} cannot share a prompt between answers: load the model with sdpa"
    )
