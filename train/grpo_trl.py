"""The same reinforcement stage in TRL's GRPOTrainer: same recipe, samples, prompts and rewards.

For large models whose answers vLLM should write (``engine`` vllm-colocate or vllm-server); without
vLLM installed it samples with transformers. Pictures go through our own preprocessing, so
torchvision is not needed. Our own loop (``grpo``) is the default: it computes a prompt once for its
group, and saves and resumes as all our stages do; here that is TRL's.

Where the rewards of a sample do not weigh 1 in all, TRL's sum differs from our mean by a factor,
which scaling by the group takes out again.
"""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.models import geometry_of
from medmo_edge.images import Frame, read_image
from medmo_edge.preprocess import Preprocessing, grid_thw, num_vision_tokens, patchify, resize
from medmo_edge.prompts import ChatTemplate
from medmo_edge.samples import Sample
from medmo_edge.train.base_model import Base, copy_files, save_checkpoint, set_trainable
from medmo_edge.train.lora import adapter_config
from medmo_edge.train.mixture import Mixture
from medmo_edge.train.packing import conversation
from medmo_edge.train.rewards import columns, trl_reward
from medmo_edge.train.stages import RlStage
from medmo_edge.train.vocabulary import IMAGE

Conversation = Sequence[Mapping[str, Any]]


def make_processor(base: Base, limits: Preprocessing, max_prompt_tokens: int) -> Any:
    """TRL's ``processing_class`` from our tokenizer, template and preprocessing.

    Its calls raise SampleError for a prompt of more than ``max_prompt_tokens``.
    """
    from transformers import AutoTokenizer, ProcessorMixin

    mixin: Any = ProcessorMixin

    class Processor(mixin):  # type: ignore[misc]
        """What TRL asks of a Qwen3-VL processor, without its video half."""

        def __init__(self, tokenizer: Any) -> None:
            super().__init__(tokenizer, chat_template=base.template.source)

        def apply_chat_template(
            self, conversation: Any, *, tokenize: bool = False, **options: Any
        ) -> Any:
            """Texts, or with ``tokenize`` the model's inputs; of one conversation or several."""
            several = isinstance(conversation[0], list)
            chats = conversation if several else [conversation]
            wanted = options.get("add_generation_prompt", False)
            texts = [render(base.template, chat, wanted) for chat in chats]
            if not tokenize:
                return texts if several else texts[0]
            return encoder.encode(texts, [pictures_of(chat) for chat in chats])

        def __call__(self, images: Any = None, text: Any = None, **_: Any) -> dict[str, Any]:
            """The model's inputs for texts with one image token per picture, padded on the left."""
            return encoder.padded(encoder.encode(text, images or [[] for _ in text]))

        def save_pretrained(self, save_directory: str, **_: Any) -> list[str]:
            """Copy the base's files, which every version of transformers reads."""
            copy_files(base.path, Path(save_directory))
            return []

    tokenizer = AutoTokenizer.from_pretrained(base.path, padding_side="left")
    encoder = _Encoder(base, limits, max_prompt_tokens)
    return Processor(tokenizer)


def render(template: ChatTemplate, chat: Conversation, add_generation_prompt: bool) -> str:
    """The text of a conversation whose image parts may hold their pictures."""
    plain = [{**message, "content": _without_pictures(message["content"])} for message in chat]
    return template.render(plain, add_generation_prompt=add_generation_prompt)


def _without_pictures(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def pictures_of(chat: Conversation) -> list[Any]:
    """The pictures in a conversation's image parts, in order."""
    contents = [message["content"] for message in chat if not isinstance(message["content"], str)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


class _Encoder:
    """Texts and pictures as the model's inputs."""

    def __init__(self, base: Base, limits: Preprocessing, max_prompt_tokens: int) -> None:
        self._base, self._limits, self._max = base, limits, max_prompt_tokens

    def encode(self, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Lists of ids, masks and token types; patches and grids of all pictures as tensors."""
        import torch

        ids, resized = [], []
        for text, shown in zip(texts, images, strict=True):
            pixels = [resize(np.asarray(one.convert("RGB")), self._limits) for one in shown or []]
            ids.append(self._ids(text, [self._grid(one) for one in pixels]))
            resized += pixels
        image_id = self._base.config.image_token_id
        values: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "mm_token_type_ids": [[int(id == image_id) for id in row] for row in ids],
        }
        if resized:
            patches = [patchify(pixels, self._limits) for pixels in resized]
            values["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            values["image_grid_thw"] = torch.tensor([self._grid(pixels) for pixels in resized])
        return values

    def padded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Lists as tensors, filled up on the left."""
        import torch

        longest = max(map(len, values["input_ids"]))
        fillers = {"input_ids": self._base.config.pad_token_id or 0}
        return {
            name: value
            if isinstance(value, torch.Tensor)
            else torch.tensor(
                [[fillers.get(name, 0)] * (longest - len(row)) + row for row in value]
            )
            for name, value in values.items()
        }

    def _grid(self, pixels: Any) -> tuple[int, int, int]:
        return grid_thw(pixels.shape[0], pixels.shape[1], self._limits)

    def _ids(self, text: str, grids: Sequence[tuple[int, int, int]]) -> list[int]:
        first, *others = text.split(IMAGE)
        if len(others) != len(grids):
            raise SampleError(f"prompt shows {len(others)} images of {len(grids)}")
        for grid, piece in zip(grids, others, strict=True):
            first += IMAGE * num_vision_tokens(grid, self._limits) + piece
        ids = self._base.tokenizer.encode(first)
        if len(ids) > self._max:
            raise SampleError(
                f"a prompt needs {len(ids)} tokens, max_prompt_tokens is {self._max}: raise it or "
                "lower max_pixels in the recipe"
            )
        return ids


def make_rows(mixture: Mixture, base: Base, steps: int) -> Any:
    """A data set whose rows are read when they are asked for, in the mixture's own order."""
    dataset = _library("datasets").Dataset

    @lru_cache(maxsize=2)
    def drawn(step: int) -> list[Sample]:
        return mixture.samples(step, 0, 1)

    def read(batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        rows = []
        for number in batch["draw"]:
            samples = drawn(number // mixture.batch)
            sample = samples[number % mixture.batch % len(samples)]
            rows.append(make_row(sample, base, mixture.limits))
        return {name: [row[name] for row in rows] for name in rows[0]}

    return dataset.from_dict({"draw": list(range(steps * mixture.batch))}).with_transform(read)


def make_row(sample: Sample, base: Base, limits: Preprocessing) -> dict[str, Any]:
    """One row as GRPOTrainer wants it: prompt, pictures, and the columns that rewards read."""
    from PIL import Image

    frames: list[Frame] = [read_image(path) for path in sample.images]
    geometries = [geometry_of(frame, limits) for frame in frames]
    return {
        "prompt": conversation(sample, None),
        "images": [Image.fromarray(frame.pixels) for frame in frames],
        **columns(sample, geometries, base.coords),
    }


def engine_of(stage: RlStage) -> str:
    """The engine that writes answers: the recipe's, or transformers where vLLM is missing."""
    engine = stage.rollouts.engine
    if engine != "generate" and importlib.util.find_spec("vllm") is None:
        print(
            f"{stage.name}: vllm is not installed, answers are sampled with transformers",
            file=sys.stderr,
        )
        return "generate"
    return engine


def make_config(stage: RlStage, folder: Path, *, seed: int, max_steps: int, base: Base) -> Any:
    """GRPOConfig of a stage. Errors: UsageError without trl."""
    import torch

    tuning = stage.tuning
    return _library("trl").GRPOConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=max_steps,
        per_device_train_batch_size=stage.rows,
        gradient_accumulation_steps=stage.accumulation,
        gradient_checkpointing=stage.gradient_checkpointing,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type=tuning.schedule,
        warmup_steps=math.ceil(tuning.warmup_ratio * max_steps),
        adam_beta1=tuning.betas[0],
        adam_beta2=tuning.betas[1],
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip_norm,
        shuffle_dataset=False,
        bf16=base.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        logging_steps=1,
        **_objective(stage),
        **_sampling(stage, base),
    )


def _objective(stage: RlStage) -> dict[str, Any]:
    names = ("loss_type", "epsilon", "epsilon_high", "beta", "scale_rewards", "num_iterations")
    values = {name: getattr(stage.objective, name) for name in names}
    return values | {
        "mask_truncated_completions": stage.objective.mask_truncated_completions,
        "reward_weights": [weight for weight in stage.rewards.values() if weight > 0],
    }


def _sampling(stage: RlStage, base: Base) -> dict[str, Any]:
    rollouts, config = stage.rollouts, base.config
    values: dict[str, Any] = {
        "num_generations": rollouts.num_generations,
        "max_completion_length": rollouts.max_completion_tokens,
        "temperature": rollouts.temperature,
        "top_k": 0,
    }
    engine = engine_of(stage)
    if engine == "generate":
        silent = [config.image_token_id, config.video_token_id]
        return values | {"generation_kwargs": {"suppress_tokens": silent}}
    return values | {
        "use_vllm": True,
        "vllm_mode": engine.removeprefix("vllm-"),
        "vllm_gpu_memory_utilization": rollouts.engine_memory,
        "vllm_max_model_length": rollouts.max_prompt_tokens + rollouts.max_completion_tokens,
    }


def _library(name: str) -> Any:
    """trl or datasets, untyped: their annotations stop at half of what is called."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "TRL's trainer needs trl and datasets: install medmo-edge[train]"
        ) from error


def stay_offline() -> None:
    """Keep the Hugging Face libraries of this process and its children off the network.

    TRL reports each trainer it makes to its authors unless it is told that there is no network.
    """
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def make_trainer(
    base: Base, stage: RlStage, mixture: Mixture, folder: Path, *, seed: int, steps: int
) -> Any:
    """GRPOTrainer ready to ``train``. Errors: UsageError without trl."""
    stay_offline()
    config = make_config(
        stage, folder, seed=seed, max_steps=steps * stage.objective.num_iterations, base=base
    )
    lora = adapter_config(stage.trainable, stage.lora_rank) if stage.lora_rank else None
    if lora is None:
        set_trainable(base, stage.trainable)
    return _library("trl").GRPOTrainer(
        model=base.model,
        reward_funcs=[
            trl_reward({name: 1.0}, iou_threshold=stage.curriculum.threshold)
            for name, weight in stage.rewards.items()
            if weight > 0
        ],
        args=config,
        train_dataset=make_rows(mixture, base, steps),
        processing_class=make_processor(base, mixture.limits, stage.rollouts.max_prompt_tokens),
        peft_config=lora,
    )


def run_trl(
    base: Base,
    stage: RlStage,
    mixture: Mixture,
    folder: Path,
    *,
    seed: int,
    notes: Mapping[str, Any],
    steps: int | None = None,
    resume: bool = False,
) -> Path:
    """Run the stage in TRL; gives the folder of the checkpoint, its adapters merged.

    Errors: UsageError without trl, SampleError for a reward that fails or a prompt too long.
    """
    trainer = make_trainer(base, stage, mixture, folder, seed=seed, steps=steps or mixture.steps)
    saved = resume and any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if saved else None)
    whole = trainer.accelerator.unwrap_model(trainer.model)
    model = whole.merge_and_unload() if stage.lora_rank else whole
    weights = trainer.accelerator.get_state_dict(trainer.model) if not stage.lora_rank else None
    if trainer.accelerator.is_main_process:
        save_checkpoint(base, folder / "checkpoint", notes, weights or model.state_dict())
    return folder / "checkpoint"
