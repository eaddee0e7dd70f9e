"""Greedy answers of an f16 artifact against transformers in fp32, over real images of every shape.

    python benchmarks/greedy_agreement.py CHECKPOINT ARTIFACT --data DIR [--answers FILE]

DIR holds bccd/, vqa-rad/ and dicom/. transformers uses its own image processor and positions; both
sides get the same pixels and prompt ids, and answer freely. Per answer: whether the tokens agree;
at the first that does not, how close transformers' two best logits were; the largest difference of
any logit up to there. Not compared: sampling, and how good the answers are.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medmo_edge.checkpoint import open_checkpoint
from medmo_edge.images import Frame, read_image
from medmo_edge.phantoms import draw
from medmo_edge.runtime.prefixes import Cost, Prefix
from medmo_edge.runtime.session import Session, load

MAX_TOKENS = 96
# Sizes every fourth picture is stretched to: (name, width, height).
SHAPES = (
    ("square", 384, 384),
    ("wide", 960, 200),
    ("tall", 180, 900),
    ("tiny", 40, 30),
    ("odd", 333, 277),
    ("half", 208, 432),
    ("large", 2000, 1600),
)
DICOM = (
    "torchxrayvision/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm",
    "torchxrayvision/Fake_MONOHR1.dcm",
    "highdicom/ct_image.dcm",
    "highdicom/dx_image.dcm",
    "pydicom-data/MR-SIEMENS-DICOM-WithOverlays.dcm",
    "pydicom-data/US1_UNCR.dcm",
    "pydicom-data/vlut_04.dcm",
    "pydicom-data/JPEG2000_UNC.dcm",
)
QUESTIONS = {
    "blood": ("Locate the white blood cell.", "How many white blood cells are there?"),
    "chest": ("Locate the nodule.", "Is there a nodule?", "Describe this medical image."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One image with one question."""

    name: str
    shape: str
    frame: Frame
    question: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both answers to one case; ``margin`` is transformers' at the first differing token."""

    name: str
    shape: str
    question: str
    vision_tokens: int
    new_tokens: int
    text: str
    reference_text: str
    agrees: bool
    first_difference: int | None
    margin: float | None
    max_logit_difference: float


def cases(data: Path, count: int) -> Iterator[Case]:
    """``count`` pictures of each source, in their own size and stretched."""
    sources = [
        ("blood", "bccd", _blood(data, count)),
        ("chest", "vqa-rad", sorted((data / "vqa-rad/images").iterdir())[::7][:count]),
        ("chest", "dicom", [data / "dicom" / name for name in DICOM][:count]),
    ]
    for kind, source, paths in sources:
        for index, path in enumerate(paths):
            frame = read_image(path)
            yield from _shapes(kind, f"{source}/{path.name}", frame, index)
    for seed in range(count):
        pixels = draw(900_000 + seed, nodule=seed % 2 == 0).pixels
        yield from _shapes("chest", f"phantom/{seed}", Frame.from_pixels(pixels), seed)


def _blood(data: Path, count: int) -> list[Path]:
    names = (data / "bccd/val.txt").read_text().split()[:count]
    images = {path.stem: path for path in (data / "bccd/images").iterdir()}
    return [images[Path(name).stem] for name in names]


def _shapes(kind: str, name: str, frame: Frame, index: int) -> Iterator[Case]:
    question = QUESTIONS[kind][index % len(QUESTIONS[kind])]
    yield Case(name=name, shape="own", frame=frame, question=question)
    shape, width, height = SHAPES[index % len(SHAPES)]
    stretched = np.asarray(Image.fromarray(frame.pixels).resize((width, height)))
    frame = Frame.from_pixels(stretched, path=name)
    yield Case(name=name, shape=shape, frame=frame, question=QUESTIONS[kind][0])


class Reference:
    """transformers in fp32 on the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        # Untyped on purpose: transformers' own annotations stop at half of what is called here.
        self.torch: Any = import_module("torch")
        self.transformers: Any = import_module("transformers")
        self.model = self.transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=self.torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = self.transformers.AutoImageProcessor.from_pretrained(checkpoint)

    def answer(
        self, frame: Frame, ids: list[int], eos: tuple[int, ...], length: int
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Greedy tokens and the logits [T, V] that each was taken from."""
        seen = self.processor(images=[frame.pixels], return_tensors="pt")
        prompt = self.torch.tensor([ids])
        settings = self.transformers.GenerationConfig(
            do_sample=False,  # nothing of the checkpoint's own sampling settings
            pad_token_id=0,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=list(eos),
            suppress_tokens=list(range(length, self.model.config.text_config.vocab_size)) or None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with self.torch.no_grad():
            result = self.model.generate(
                input_ids=prompt,
                mm_token_type_ids=(prompt == self.model.config.image_token_id).int(),
                **seen,
                generation_config=settings,
            )
        tokens = result.sequences[0, len(ids) :].tolist()
        return tokens, self.torch.cat(result.logits).numpy()[:, :length]


def our_answer(
    session: Session, frame: Frame, question: str
) -> tuple[list[int], list[int], NDArray[np.float32]]:
    """Prompt ids, greedy tokens (end of text included) and the logits [T, V] they came from."""
    chat, backend = session._chat, session.backend
    picture = chat.picture(frame)
    kept, rest = chat.prompt(question, [picture])
    prefix = Prefix(kept, chat.segments(kept, [picture]))
    session._stage.prefixes.bring(prefix, Cost())
    scores = [backend.decode_tokens(rest)[: chat.tokenizer.length]]
    tokens = [int(scores[-1].argmax())]
    while tokens[-1] not in chat.eos_token_ids and len(tokens) < MAX_TOKENS:
        scores.append(backend.decode_tokens(tokens[-1:])[: chat.tokenizer.length])
        tokens.append(int(scores[-1].argmax()))
    session._stage.prefixes.forget(prefix)
    return kept + rest, tokens, np.stack(scores)


def compare(session: Session, reference: Reference, case: Case) -> Comparison:
    """Answer one case twice."""
    tokenizer = session._chat.tokenizer
    ids, ours, our_scores = our_answer(session, case.frame, case.question)
    eos = session._chat.eos_token_ids
    theirs, their_scores = reference.answer(case.frame, ids, eos, tokenizer.length)
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    common = min(len(ours), len(theirs)) if first is None else first + 1
    best = np.sort(their_scores[common - 1])[-2:]
    return Comparison(
        name=case.name,
        shape=case.shape,
        question=case.question,
        vision_tokens=ids.count(session._chat.image_token_id),
        new_tokens=len(ours),
        text=tokenizer.decode(ours),
        reference_text=tokenizer.decode(theirs),
        agrees=ours == theirs,
        first_difference=first,
        margin=None if first is None else float(best[1] - best[0]),
        max_logit_difference=float(np.abs(our_scores[:common] - their_scores[:common]).max()),
    )


def main() -> None:
    """Compare all cases and print a summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder, or nano")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=14, help="pictures of each source")
    parser.add_argument("--answers", type=Path, help="write every comparison here, JSON lines")
    arguments = parser.parse_args()
    start = time.perf_counter()
    reference = Reference(open_checkpoint(arguments.checkpoint).path)
    with load(arguments.artifact) as session:
        found = [
            compare(session, reference, case) for case in cases(arguments.data, arguments.count)
        ]
    if arguments.answers:
        lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in found)
        arguments.answers.write_text("".join(lines), encoding="utf-8")
    print(json.dumps(_summary(found) | {"seconds": round(time.perf_counter() - start)}, indent=1))


def _summary(found: list[Comparison]) -> dict[str, Any]:
    shapes = sorted({each.shape for each in found})
    differing = [each for each in found if not each.agrees]
    return {
        "answers": len(found),
        "agree": sum(each.agrees for each in found),
        "tokens": sum(each.new_tokens for each in found),
        "different_texts": len({each.text for each in found}),
        "by_shape": {
            shape: [
                sum(each.agrees for each in found if each.shape == shape),
                sum(each.shape == shape for each in found),
            ]
            for shape in shapes
        },
        "max_logit_difference": max(each.max_logit_difference for each in found),
        "median_max_logit_difference": float(
            np.median([each.max_logit_difference for each in found])
        ),
        "differing": [asdict(each) for each in differing],
    }


if __name__ == "__main__":
    main()
