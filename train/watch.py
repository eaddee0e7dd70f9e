"""Look at a model in training: ask it about held-out pictures in plain words, score the answers.

The figures steer nothing: no step is chosen by them. A finished checkpoint or artifact is measured
by ``medmo-edge eval`` with the benchmarks bccd and phantoms, which ask the same questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmo_edge.boxes import Coords, parse_boxes
from medmo_edge.evaluation.scores import answer_score, box_score, match_image
from medmo_edge.preprocess import Preprocessing
from medmo_edge.train.asked import with_yes_or_no
from medmo_edge.train.collator import Picture, encode, prompt_text, question_text, see
from medmo_edge.train.questions import EFFUSION, NODULE, PLATELET, WBC, yes_no
from medmo_edge.train.scenes import Scene
from medmo_edge.train.vocabulary import SpecialIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3VLForConditionalGeneration

BATCH = 32
BOX_TOKENS = 112  # enough for four boxes


@dataclass(frozen=True, slots=True)
class Asker:
    """A model with what is needed to ask it about pictures, greedily."""

    model: "Qwen3VLForConditionalGeneration"
    tokenizer: "Tokenizer"
    ids: SpecialIds
    limits: Preprocessing

    def ask(self, scenes: Sequence[Scene], question: str, max_new_tokens: int) -> list[str]:
        """One answer per scene; pictures of one grid share a batch."""
        pictures = [see(scene.pixels, self.limits) for scene in scenes]
        answers = [""] * len(scenes)
        grids = sorted({picture.grid for picture in pictures})
        for grid in grids:
            same = [i for i, picture in enumerate(pictures) if picture.grid == grid]
            for start in range(0, len(same), BATCH):
                chunk = same[start : start + BATCH]
                texts = self._generate([pictures[i] for i in chunk], question, max_new_tokens)
                for index, text in zip(chunk, texts, strict=True):
                    answers[index] = text
        return answers

    def _generate(
        self, pictures: Sequence[Picture], question: str, max_new_tokens: int
    ) -> list[str]:
        import numpy as np
        import torch

        text = prompt_text(pictures[0].vision_tokens) + question_text(question)
        prompt = torch.from_numpy(encode(self.tokenizer, text)).expand(len(pictures), -1)
        patches = np.concatenate([picture.patches for picture in pictures])
        with torch.inference_mode():
            model: Any = self.model
            tokens = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                mm_token_type_ids=(prompt == self.ids.image).int(),
                pixel_values=torch.from_numpy(patches),
                image_grid_thw=torch.tensor([picture.grid for picture in pictures]),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.ids.turn_end,
                pad_token_id=self.ids.end_of_text,
            )
        return [
            self.tokenizer.decode(row.tolist(), skip_special_tokens=True)
            for row in tokens[:, prompt.shape[1] :]
        ]


def look(
    asker: Asker, blood: Sequence[Scene], chests: Sequence[Scene], radiology: Sequence[Scene]
) -> dict[str, float]:
    """The figures of one moment: IoU of boxes, accuracy of yes and no."""
    training = asker.model.training
    asker.model.train(False)
    figures: dict[str, float] = {}
    if blood:
        figures["wbc_iou"] = _locate(asker, blood, "Locate the white blood cell.", WBC.label)
        figures["platelet_iou"] = _locate(asker, blood, "Locate the platelets.", PLATELET.label)
    figures["nodule_iou"] = _locate(asker, chests, "Locate the nodule.", NODULE.label)
    figures["effusion_iou"] = _locate(asker, chests, "Locate the pleural effusion.", EFFUSION.label)
    for name, question, label in (
        ("nodule_yes_no", "Is there a nodule?", NODULE.label),
        ("effusion_yes_no", "Is there a pleural effusion?", EFFUSION.label),
    ):
        truth = [yes_no(scene.count(label) > 0) for scene in chests]
        figures[name] = answer_score(truth, asker.ask(chests, question, 8)).accuracy
    if radiology:
        figures["radiology_yes_no"] = _given_yes_no(asker, radiology)
    asker.model.train(training)
    return figures


def _given_yes_no(asker: Asker, scenes: Sequence[Scene]) -> float:
    """Accuracy on the yes-or-no questions that came with the pictures."""
    asked = [(scene, turn) for scene in with_yes_or_no(scenes) for turn in scene.turns]
    told = [asker.ask([scene], turn[0], 8)[0] for scene, turn in asked]
    return answer_score([turn[1] for _, turn in asked], told).accuracy


def _locate(asker: Asker, scenes: Sequence[Scene], question: str, label: str) -> float:
    answers = asker.ask(scenes, question, BOX_TOKENS)
    matches = []
    for scene, text in zip(scenes, answers, strict=True):
        predicted = boxes_of(text, scene, asker.limits, label)
        matches.append(match_image([box.xyxy for box in scene.labelled(label)], predicted))
    return box_score(matches).mean_iou


def boxes_of(
    text: str, scene: Scene, limits: Preprocessing, label: str, coords: Coords = "norm1000"
) -> list[tuple[float, float, float, float]]:
    """The boxes of ``label`` in an answer, in the scene's pixels."""
    geometry = see(scene.pixels, limits).geometry
    found = parse_boxes(text, [geometry], coords).boxes
    return [box.xyxy for box in found if box.label == label]
