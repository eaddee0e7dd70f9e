"""One step of reinforcement learning on verifiable rewards: GRPO with DAPO's settings.

A group of answers to each question is drawn, judged by rules, and learned from by how its answers
differ. The update runs on rows of branches, so a prompt and its pictures are paid for once in
sampling and once in learning, not once per answer. The same step and seed give the same answers, so
a resumed run goes on as it would have. Schedules, saving and stages are in ``grpo``.

Suffixes: P questions, G answers of a question, N tokens of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmo_edge.boxes import Coords
from medmo_edge.images import Frame
from medmo_edge.model_config import ModelConfig
from medmo_edge.preprocess import Preprocessing
from medmo_edge.samples import Sample
from medmo_edge.train.branches import (
    BranchBatch,
    BranchRow,
    branch_row,
    collate_branches,
    split_rows,
)
from medmo_edge.train.grpo_figures import FIGURES, figures, ratios
from medmo_edge.train.grpo_loss import Terms, advantages, policy_loss, token_weights
from medmo_edge.train.packing import IGNORE, Chat, Encoded, encode_sample
from medmo_edge.train.parallel import without_exchange
from medmo_edge.train.reinforcement import Groups, Objective
from medmo_edge.train.rewards import Case, case_of, judge
from medmo_edge.train.rollouts import (
    Answer,
    Decoding,
    Precision,
    sample_groups,
    scaled_log_probs,
    uniforms,
)

if TYPE_CHECKING:
    import torch

CHUNK = 16  # prompts that are sampled at a time
_NOTHING = 1e-8  # an advantage below it is rounding
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """A prompt as numbers, and what its sample says of the truth (``case``, without a text).

    ``truth`` are the token ids of the wanted answer with its end, where learning is guided.
    """

    prompt: Encoded
    case: Case
    truth: tuple[int, ...] = ()


def question_of(
    sample: Sample,
    chat: Chat,
    limits: Preprocessing,
    coords: Coords,
    *,
    guided: bool,
    frames: Sequence[Frame] | None = None,
) -> Question:
    """The question that a sample asks; ``guided`` with its wanted answer.

    ``frames`` are its pictures where they are read already. Errors: SampleError.
    """
    encoded = encode_sample(sample, chat, limits, coords, frames=frames, answered=guided)
    case = case_of(sample, encoded.geometries, coords)
    return guided_question(encoded, case) if guided else Question(prompt=encoded, case=case)


def guided_question(whole: Encoded, case: Case) -> Question:
    """The question of an encoded sample whose last answer is given: prompt and truth, cut apart."""
    asked = int(np.flatnonzero(whole.labels == IGNORE)[-1]) + 1
    prompt = replace(
        whole,
        ids=whole.ids[:asked],
        labels=np.full(asked, IGNORE),
        positions=whole.positions[:, :asked],
        tokens=asked,
    )
    return Question(prompt=prompt, case=case, truth=tuple(whole.ids[asked:].tolist()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experience:
    """What one step has to learn from: ``answers`` and advantages [P, G], and how they scored.

    ``values`` are the single rewards [P, G], nan where one does not apply; ``rewards`` their
    weighted means. Where learning is guided, ``guides`` are the wanted answers, and their
    advantages [P] those of one answer more in each group.
    """

    questions: Sequence[Question]
    answers: Sequence[Sequence[Answer]]
    values: Mapping[str, Floats]
    rewards_PG: Floats
    advantages_PG: Floats
    guides: Sequence[Answer] = ()
    guide_advantages_P: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def all_answers(self) -> list[Answer]:
        """The answers of all groups [P * G], then the guides."""
        return [answer for group in (*self.answers, self.guides) for answer in group]

    def owners(self, place: int) -> list[int]:
        """Where in ``all_answers`` the answers of one question are, its guide last."""
        size = len(self.answers[place])
        own = list(range(place * size, (place + 1) * size))
        return [*own, len(self.answers) * size + place] if self.guides else own


@dataclass(slots=True, kw_only=True)
class Learner:
    """A model that learns from its own answers, judged by ``rewards`` and their weights.

    ``decode`` turns token ids into text. ``reference`` is the frozen model that beta > 0 holds the
    policy to. ``row_tokens`` bound a row of branches, ``batch_tokens`` the rows of one call of the
    model, ``chunk`` the prompts that are sampled at a time. ``precision`` opens the arithmetic,
    such as autocast. ``guided`` puts the wanted answer into every group, as one that was drawn: it
    is what groups without a good answer learn from.
    """

    model: Any
    objective: Objective
    rewards: Mapping[str, float]
    decoding: Decoding
    decode: Callable[[Sequence[int]], str]
    seed: int
    row_tokens: int
    batch_tokens: int
    chunk: int = CHUNK
    reference: Any = None
    precision: Precision = nullcontext
    rank: int = 0
    processes: int = 1
    guided: bool = False

    def collect(self, step: int, questions: Sequence[Question], threshold: float) -> Experience:
        """Answers to ``questions`` and their worth; IoU below ``threshold`` earns nothing.

        Errors: SampleError naming reward and sample when a reward fails.
        """
        answers = sample_groups(
            self.model,
            [question.prompt for question in questions],
            self.decoding,
            uniforms(self.seed, step, self.rank, len(questions), self.decoding),
            chunk=self.chunk,
            precision=self.precision,
        )
        values = self._score(questions, answers, threshold)
        rewards_PG = weighted_mean(values, self.rewards)
        guides = [_guide(question) for question in questions] if self.guided else []
        judged_PA = rewards_PG
        if guides:
            best = self._score(questions, [[guide] for guide in guides], threshold)
            judged_PA = np.append(rewards_PG, weighted_mean(best, self.rewards), axis=1)
        advantages_PA = advantages(judged_PA, self.objective.scale_rewards)
        return Experience(
            questions=questions,
            answers=answers,
            values=values,
            rewards_PG=rewards_PG,
            advantages_PG=advantages_PA[:, : rewards_PG.shape[1]],
            guides=guides,
            guide_advantages_P=advantages_PA[:, rewards_PG.shape[1] :].reshape(-1),
        )

    def _score(
        self, questions: Sequence[Question], answers: Sequence[Sequence[Answer]], threshold: float
    ) -> dict[str, Floats]:
        return score(questions, answers, self.decode, self.rewards, threshold)

    def learn(self, experience: Experience, update: Callable[[], float]) -> dict[str, float]:
        """Learn from ``experience`` in ``num_iterations`` updates; gives the figures of the step.

        ``update`` takes the gradients that have been summed up, moves the weights and clears them;
        the mean of the norms that it returns is the figure "norm".
        """
        plan = _Plan.of(experience, self)
        sums: dict[str, float] = {}
        norms: list[float] = []
        for iteration in range(self.objective.num_iterations):
            for index, batch in enumerate(plan.batches):
                for name, value in self._backward(plan, index, batch, iteration).items():
                    sums[name] = sums.get(name, 0.0) + value
            norms.append(update())
        own = [answer for group in experience.answers for answer in group]
        found = figures(own, experience.values, experience.rewards_PG)
        means = ratios(sums, self.objective.num_iterations)
        return found | means | {"norm": sum(norms) / len(norms)}

    def _backward(
        self, plan: "_Plan", index: int, rows: Sequence[BranchRow], iteration: int
    ) -> Mapping[str, float]:
        """Add one batch's gradients; what it was before the first update is kept in the plan."""
        import torch

        batch = collate_branches(rows, self.model)
        owners = torch.from_numpy(batch.owners)
        with without_exchange(self.model, index == len(plan.batches) - 1):
            with self.precision():
                now = self.log_probs(self.model, batch)
                if iteration == 0:
                    plan.drawn.append(now.detach())
                    plan.reference.append(self._reference(batch))
                terms = Terms(now=now, drawn=plan.drawn[index], reference=plan.reference[index])
                loss, sums = policy_loss(
                    terms,
                    plan.advantages[owners].to(now.device),
                    plan.weights[owners].to(now.device),
                    self.objective,
                )
            torch.autograd.backward(loss)
        return {**sums, "loss": float(loss.detach())}

    def _reference(self, batch: BranchBatch) -> "torch.Tensor | None":
        import torch

        if self.reference is None:
            return None
        with torch.no_grad():
            return self.log_probs(self.reference, batch)

    def log_probs(self, model: Any, batch: BranchBatch) -> "torch.Tensor":
        """Log-probabilities [N] of the batch's tokens under the policy that answers are drawn from.

        One call of the whole model, as sharded models need.
        """
        output = model(**batch.inputs, logits_to_keep=batch.columns, use_cache=False)
        logits = output.logits[batch.rows, batch.picks]
        known = scaled_log_probs(logits, self.decoding.temperature, self.decoding.suppressed)
        picked: torch.Tensor = known.gather(-1, batch.targets[:, None])[:, 0]
        return picked

    def names(self) -> tuple[str, ...]:
        """Every figure that ``learn`` can give."""
        rewards = [name for name, weight in self.rewards.items() if weight > 0]
        means = [f"rewards/{name}/{what}" for name in rewards for what in ("mean", "std")]
        return (*FIGURES, *means, *(("kl",) if self.reference is not None else ()), "norm")


def decoding_of(config: ModelConfig, tokens: int, groups: Groups) -> Decoding:
    """How answers are drawn from a model whose tokenizer has ``tokens`` ids.

    Picture tokens and ids without a token are never drawn.
    """
    picture = (
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    )
    return Decoding(
        num_generations=groups.num_generations,
        max_new_tokens=groups.max_completion_tokens,
        temperature=groups.temperature,
        ends=tuple(config.eos_token_ids),
        suppressed=(*picture, *range(tokens, config.text.vocab_size)),
    )


def _guide(question: Question) -> Answer:
    """The wanted answer as if it had been drawn."""
    none = np.zeros(len(question.truth), np.float32)
    return Answer(ids=question.truth, log_probs=none, entropy=0.0, truncated=False)


def score(
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    decode: Callable[[Sequence[int]], str],
    weights: Mapping[str, float],
    threshold: float = 0.0,
) -> dict[str, Floats]:
    """Every reward of weight above 0 for every answer [P, G]; nan where it does not apply.

    Errors: SampleError naming reward and sample when a reward fails.
    """
    cases = [
        [replace(q.case, text=decode(answer.ids), iou_threshold=threshold) for answer in group]
        for q, group in zip(questions, answers, strict=True)
    ]
    return {
        name: np.array([[_number(judge(name, case)) for case in group] for group in cases])
        for name, weight in weights.items()
        if weight > 0
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def weighted_mean(values: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """The weighted mean [P, G] of the rewards that apply, as ``rewards.combine``; nan if none."""
    stacked = np.stack(list(values.values()))
    shares = np.array([weights[name] for name in values])[:, None, None] * ~np.isnan(stacked)
    total = shares.sum(axis=0)
    summed = (shares * np.nan_to_num(stacked)).sum(axis=0)
    return np.where(total > 0, summed / np.where(total > 0, total, 1), np.nan)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """One step's rows in batches; advantages and weights of all answers, [P * G]."""

    batches: list[list[BranchRow]]
    advantages: "torch.Tensor"
    weights: "torch.Tensor"
    drawn: "list[torch.Tensor]" = field(default_factory=list)
    reference: "list[torch.Tensor | None]" = field(default_factory=list)

    @classmethod
    def of(cls, experience: Experience, learner: Learner) -> "_Plan":
        """Leaves out what nothing is learned from, in as many batches as every process has."""
        import torch

        objective = learner.objective
        answers = experience.all_answers
        lengths = [len(answer.ids) for answer in answers]
        masked = objective.mask_truncated_completions
        kept = [not (masked and answer.truncated) for answer in answers]
        tokens = sum(length for length, keep in zip(lengths, kept, strict=True) if keep)
        weights = token_weights(
            lengths,
            kept,
            objective,
            learner.decoding.max_new_tokens,
            tokens_everywhere=_over_processes(tokens, "SUM"),
            processes=learner.processes,
        )
        batches = list(_batches(_rows(experience, weights, learner), learner.batch_tokens))
        # The others wait for this process in every call of a sharded model: one answer more, which
        # weighs nothing, for it to call with.
        idle = [branch_row(experience.questions[0].prompt, [answers[0].ids], [len(answers)])]
        batches += [idle] * (_over_processes(len(batches), "MAX") - len(batches))
        own, guides = experience.advantages_PG.reshape(-1), experience.guide_advantages_P
        return cls(
            batches=batches,
            advantages=torch.from_numpy(np.concatenate([own, guides, np.zeros(1)])).float(),
            weights=torch.from_numpy(np.append(weights, 0.0)).float(),
        )


def _rows(experience: Experience, weights: Floats, learner: Learner) -> Iterator[BranchRow]:
    """The rows of answers that can move the model."""
    answers = experience.all_answers
    for place, question in enumerate(experience.questions):
        owners = [owner for owner in experience.owners(place) if weights[owner] > 0]
        if owners and (learner.objective.beta or _moves(experience, place)):
            told = [answers[owner].ids for owner in owners]
            yield from split_rows(question.prompt, told, owners, learner.row_tokens)


def _moves(experience: Experience, place: int) -> bool:
    """Whether the answers to a question differ in what they are worth."""
    guide = experience.guide_advantages_P[place : place + 1]
    return bool(np.abs(np.append(experience.advantages_PG[place], guide)).max() > _NOTHING)


def _batches(rows: Iterator[BranchRow], batch_tokens: int) -> Iterator[list[BranchRow]]:
    """Rows of like length together, at most ``batch_tokens`` with their padding, or one row."""
    waiting: list[BranchRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if waiting and (len(waiting) + 1) * len(row.ids) > batch_tokens:
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def _over_processes(value: int, how: str) -> int:
    """``value`` summed ("SUM") or its largest ("MAX") over all processes."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, getattr(torch.distributed.ReduceOp, how))
    return int(shared)
