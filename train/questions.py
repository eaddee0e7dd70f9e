"""Questions a user would ask about a scene, in many words, with the answers that its boxes imply.

Wording is data here: a small model understands only what it has read. No answer is stored; each is
written from the scene after augmentation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from medmo_edge.boxes import Coords, Geometry, render_boxes
from medmo_edge.evaluation.cases import JUDGE_TAIL, OPEN_TAIL
from medmo_edge.prompts import TASK_PROMPTS, locate_prompt
from medmo_edge.train.scenes import Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that can be asked about: the box label and its names, the usual name first."""

    label: str
    singular: tuple[str, ...]
    plural: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str


WBC = Target(
    label="WBC",
    singular=("white blood cell", "WBC", "leukocyte", "white cell"),
    plural=("white blood cells", "WBCs", "leukocytes", "white cells"),
)
RBC = Target(
    label="RBC",
    singular=("red blood cell", "RBC", "erythrocyte", "red cell"),
    plural=("red blood cells", "RBCs", "erythrocytes", "red cells"),
)
PLATELET = Target(
    label="Platelets",
    singular=("platelet", "thrombocyte"),
    plural=("platelets", "thrombocytes"),
)
NODULE = Target(
    label="nodule",
    singular=("nodule", "lung nodule", "pulmonary nodule"),
    plural=("nodules", "lung nodules", "pulmonary nodules"),
)
EFFUSION = Target(
    label="effusion",
    singular=("pleural effusion", "effusion"),
    plural=("pleural effusions", "effusions"),
)
HEART = Target(label="heart", singular=("heart", "cardiac silhouette"), plural=("heart",))
TARGETS = (WBC, RBC, PLATELET, NODULE, EFFUSION, HEART)

LOCATE = (
    "Where is the {one}?",
    "Find the {one}.",
    "Detect the {one}.",
    "Show me the {one}.",
    "Locate the {many}.",
    "Locate all {many}.",
    "Find all {many}.",
    "Where are the {many}?",
    "Detect and localize the {many}.",
    "Localize the {one}.",
    "Mark the {one}.",
    "Give the bounding box of the {one}.",
    "Give the bounding boxes of the {many}.",
    "Locate the {one} in this image.",
    "Please locate the {one}.",
)
PRESENCE = (
    "Is there any {one}?",
    "Are there any {many}?",
    "Are there {many}?",
    "Do you see {a_one}?",
    "Do you see any {many}?",
    "Does the image show {a_one}?",
    "Does this image contain {a_one}?",
    "Is {a_one} present?",
    "Is {a_one} visible?",
    "Is there {a_one} in this image?",
    "Can you see {a_one}?",
)
COUNT = (
    "How many {many} do you see?",
    "How many {many} are in this image?",
    "How many {many} are visible?",
    "Count the {many}.",
    "What is the number of {many}?",
)
ENLARGED = (
    "Is the heart enlarged?",
    "Is there cardiomegaly?",
    "Is the heart too big?",
    "Is the heart size increased?",
    "Does the image show an enlarged heart?",
    "Is the cardiac silhouette enlarged?",
)
DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "What does the image show?",
    "What do you see?",
    "What is in this image?",
    TASK_PROMPTS["caption"],
    TASK_PROMPTS["report"],
)
ABNORMAL = (
    TASK_PROMPTS["detect"],
    "Locate the findings.",
    "Locate all abnormalities.",
    "Find all abnormalities.",
)
MODALITY = ("What kind of image is this?", "What modality is this?", "What type of image is this?")
CANONICAL = 0.4  # how often the plainest wording is used
FORMAL = 0.4  # how often a given question ends as benchmarks end theirs


def sample_turns(
    scene: Scene,
    geometry: Geometry,
    coords: Coords,
    rng: np.random.Generator,
    *,
    of_platelets: bool = False,
) -> Iterator[Turn]:
    """Questions about one view, the ones that matter most first; the caller takes what fits.

    ``of_platelets`` asks about platelets alone.
    """
    if scene.kind == "radiology":
        yield from (_given(scene.turns[i], rng) for i in rng.permutation(len(scene.turns)))
        return
    plan = _BLOOD_PLAN if scene.kind == "blood" else _CHEST_PLAN
    if of_platelets:
        plan = _PLATELET_PLAN
    asked = [task for task, chance in plan if rng.random() < chance]
    first, rest = asked[:1], asked[1:]
    for index in [0, *(1 + rng.permutation(len(rest)))] if first else []:
        yield asked[index](scene, geometry, coords, rng)


def _given(turn: tuple[str, str], rng: np.random.Generator) -> Turn:
    """A question that came with the picture, now and then with a benchmark's request for form."""
    question, answer = turn
    if rng.random() < FORMAL:
        question += f"\n{JUDGE_TAIL if answer in ('Yes.', 'No.') else OPEN_TAIL}"
    return Turn(question, answer)


def _locate(target: Target) -> "Task":
    def task(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
        name = target.plural[0] if target in (RBC, PLATELET) else target.singular[0]
        question = _word(locate_prompt(name), LOCATE, target, rng)
        return Turn(question, located(scene, target, geometry, coords))

    return task


def _presence(target: Target) -> "Task":
    def task(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
        question = _word(f"Is there {_article(target.singular[0])}?", PRESENCE, target, rng)
        return Turn(question, yes_no(scene.count(target.label) > 0))

    return task


def _count(target: Target) -> "Task":
    def task(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
        question = _word(f"How many {target.plural[0]} are there?", COUNT, target, rng)
        return Turn(question, str(scene.count(target.label)))

    return task


def _enlarged(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
    question = _casual(ENLARGED[0] if rng.random() < CANONICAL else _pick(ENLARGED, rng), rng)
    return Turn(question, yes_no(bool(scene.facts["heart_enlarged"])))


def _describe(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
    question = _casual(DESCRIBE[0] if rng.random() < CANONICAL else _pick(DESCRIBE, rng), rng)
    return Turn(question, described(scene))


def _abnormal(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
    boxes = scene.labelled(NODULE.label) + scene.labelled(EFFUSION.label)
    answer = render_boxes(boxes, geometry, coords) if boxes else "No abnormality found."
    return Turn(_casual(_pick(ABNORMAL, rng), rng), answer)


def _modality(scene: Scene, geometry: Geometry, coords: Coords, rng: np.random.Generator) -> Turn:
    answer = "Blood smear." if scene.kind == "blood" else "Chest radiograph."
    return Turn(_casual(_pick(MODALITY, rng), rng), answer)


Task = Callable[[Scene, Geometry, Coords, np.random.Generator], Turn]

_BLOOD_PLAN: tuple[tuple[Task, float], ...] = (
    (_locate(WBC), 1.0),
    (_presence(WBC), 0.6),
    (_presence(PLATELET), 0.4),
    (_count(WBC), 0.3),
    (_count(RBC), 0.35),
    (_count(PLATELET), 0.3),
    (_locate(PLATELET), 0.35),
    (_locate(RBC), 0.25),
    (_locate(NODULE), 0.05),
    (_presence(NODULE), 0.05),
    (_presence(EFFUSION), 0.03),
    (_describe, 0.25),
    (_modality, 0.06),
)
_PLATELET_PLAN: tuple[tuple[Task, float], ...] = (
    (_locate(PLATELET), 1.0),
    (_presence(PLATELET), 0.6),
    (_count(PLATELET), 0.5),
)
_CHEST_PLAN: tuple[tuple[Task, float], ...] = (
    (_locate(NODULE), 1.0),
    (_presence(NODULE), 0.6),
    (_presence(EFFUSION), 0.6),
    (_locate(EFFUSION), 0.5),
    (_locate(HEART), 0.4),
    (_enlarged, 0.5),
    (_count(NODULE), 0.2),
    (_locate(WBC), 0.05),
    (_presence(WBC), 0.05),
    (_abnormal, 0.2),
    (_describe, 0.3),
    (_modality, 0.06),
)


def located(scene: Scene, target: Target, geometry: Geometry, coords: Coords) -> str:
    """The answer to "Locate the ...": boxes, or that there is none."""
    boxes = scene.labelled(target.label)
    return render_boxes(boxes, geometry, coords) if boxes else f"No {target.singular[0]} found."


def yes_no(value: bool) -> str:
    """The answer to a question of presence."""
    return "Yes." if value else "No."


def described(scene: Scene) -> str:
    """The answer to "Describe the image."."""
    if scene.kind == "blood":
        white, red, platelets = (_number(scene, target) for target in (WBC, RBC, PLATELET))
        return f"Blood smear with {white}, {red} and {platelets}."
    nodules = "One nodule." if scene.count(NODULE.label) else "No nodule."
    fluid = "Pleural effusion." if scene.count(EFFUSION.label) else "No pleural effusion."
    heart = "The heart is enlarged." if scene.facts["heart_enlarged"] else "Normal heart size."
    return f"Chest radiograph. {nodules} {fluid} {heart}"


def _number(scene: Scene, target: Target) -> str:
    count = scene.count(target.label)
    return f"{count} {target.singular[0] if count == 1 else target.plural[0]}"


def _word(plain: str, others: tuple[str, ...], target: Target, rng: np.random.Generator) -> str:
    """The plain question, or another wording with another name of the target."""
    if rng.random() < CANONICAL:
        return _casual(plain, rng)
    known = 0 if rng.random() < 0.6 else int(rng.integers(len(target.singular)))
    one, many = target.singular[known], target.plural[min(known, len(target.plural) - 1)]
    text = _pick(others, rng).format(one=one, many=many, a_one=_article(one))
    return _casual(text, rng)


def _casual(question: str, rng: np.random.Generator) -> str:
    """Now and then without capital or full stop, as people type."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    return question[:-1] if rng.random() < 0.1 else question


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" or name.startswith("RBC") else f"a {name}"


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
