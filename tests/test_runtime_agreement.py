"""Every backend against transformers in fp32, and against itself after every detour.

The checkpoints are tiny and random: agreement means that the whole road (export, resize, prompt,
vision tower, DeepStack, positions) is right, not that the answers are.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medmo_edge.errors import GenerationError
from medmo_edge.images import Frame
from medmo_edge.runtime.backends import START, Interrupted
from medmo_edge.runtime.prefixes import Cost, Prefix, PrefixCache
from medmo_edge.runtime.session import Session, Study, load

# Largest difference of a logit (their standard deviation is about 3) to transformers in fp32.
LOGIT_BOUNDS = {"gguf-f16": 0.02, "onnx-fp32": 1e-4}
LIBRARIES = {"gguf-f16": "llama_cpp", "onnx-fp32": "onnxruntime"}
# (width, height): square, wide, tall, tiny (enlarged), huge (shrunk), sides that are no multiples.
LAYOUTS = {
    "square": [(224, 224)],
    "wide": [(640, 96)],
    "tall": [(130, 700)],
    "tiny": [(20, 9)],
    "huge": [(1900, 1100)],
    "odd": [(333, 277)],
    "half": [(208, 432)],  # 208 / 32 = 6.5: C++ would round it up, Python rounds to even
    "two": [(448, 320), (160, 256)],
}


def _frame(width: int, height: int, seed: int = 0) -> Frame:
    """Smooth waves and a bright rectangle: no two regions alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * a + y * b) / (9 + seed)) for a, b in ((1, 0.3), (0.2, 1), (0.7, -0.5))]
    pixels = np.stack(waves, axis=2) * 90 + 128
    pixels[height // 4 : height // 2, width // 3 : width // 2] = 240
    return Frame.from_pixels(pixels.astype(np.uint8))


@pytest.fixture(scope="module", params=LOGIT_BOUNDS)
def target(request: pytest.FixtureRequest) -> str:
    """Each target in turn, if its library is installed."""
    name: str = request.param
    pytest.importorskip(LIBRARIES[name], reason="needs its backend's extra")
    return name


@pytest.fixture(scope="module")
def artifact(target: str, tiny_artifacts: Callable[[str], Path]) -> Path:
    """The tiny checkpoint exported to the target."""
    return tiny_artifacts(target)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[Session]:
    """One loaded session of the tiny artifact."""
    with load(artifact, threads=1) as opened:
        yield opened


@pytest.fixture
def fresh_logits(session: Session) -> Callable[[Study, str], NDArray[np.float32]]:
    """Logits after a question when nothing is reused."""

    def compute(study: Study, question: str) -> NDArray[np.float32]:
        ids, rest = session._chat.prompt(question, study._pictures)
        prefix = Prefix(ids, session._chat.segments(ids, study._pictures))
        session._stage.prefixes._residents.clear()
        PrefixCache(session.backend, 0).bring(prefix, Cost())
        return session.backend.decode_tokens(rest)

    return compute


class _Logits:
    """Collects the logits after each prompt of a session, i.e. of calls with several tokens."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after_prompt: list[NDArray[np.float32]] = []
        self.tokens, self.images = 0, 0
        backend = session.backend
        decode, append = backend.decode_tokens, backend.append_image

        def decode_tokens(ids: list[int]) -> NDArray[np.float32]:
            logits = decode(ids)
            self.tokens += len(ids)
            self.after_prompt += [logits] if len(ids) > 1 else []
            return logits

        def append_image(pixels: NDArray[np.uint8]) -> None:
            append(pixels)
            self.images += 1

        monkeypatch.setattr(backend, "decode_tokens", decode_tokens)
        monkeypatch.setattr(backend, "append_image", append_image)

    @property
    def last(self) -> NDArray[np.float32]:
        return self.after_prompt[-1]


class Reference:
    """transformers in fp32 on the checkpoint, with its own processor, template and positions."""

    def __init__(self, checkpoint: Path) -> None:
        torch = pytest.importorskip("torch", reason="the reference is transformers")
        transformers = pytest.importorskip("transformers")
        self.torch = torch
        self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.quiet = transformers.GenerationConfig(
            do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )

    def inputs(self, frames: Sequence[Frame], question: str) -> dict[str, Any]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in frames]
        content.append({"type": "text", "text": question})
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        seen = self.processor(images=[frame.pixels for frame in frames], return_tensors="pt")
        pieces = text.split("<|image_pad|>")
        text = pieces[0]
        for grid, piece in zip(seen["image_grid_thw"], pieces[1:], strict=True):
            text += "<|image_pad|>" * (int(grid.prod()) // 4) + piece
        ids = self.torch.tensor([self.tokenizer(text)["input_ids"]])
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": types, **seen}

    def logits(self, frames: Sequence[Frame], question: str) -> NDArray[np.float32]:
        with self.torch.no_grad():
            found = self.model(**self.inputs(frames, question)).logits[0, -1]
        return np.asarray(found.numpy())

    def greedy(self, frames: Sequence[Frame], question: str, tokens: int) -> str:
        inputs = self.inputs(frames, question)
        padding = range(len(self.tokenizer), self.model.config.text_config.vocab_size)
        with self.torch.no_grad():
            ids = self.model.generate(
                **inputs,
                generation_config=self.quiet,
                max_new_tokens=tokens,
                suppress_tokens=list(padding),
                eos_token_id=self.model.generation_config.eos_token_id,
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        text: str = self.tokenizer.decode(new, skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    """transformers on the tiny checkpoint."""
    return Reference(tiny_checkpoint)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_agree_with_transformers(
    layout: str,
    target: str,
    session: Session,
    reference: Reference,
    fresh_logits: Callable[[Study, str], NDArray[np.float32]],
) -> None:
    frames = [_frame(*size, seed) for seed, size in enumerate(LAYOUTS[layout])]
    expected = reference.logits(frames, "Locate the nodule.")
    found = fresh_logits(session.study(frames), "Locate the nodule.")
    assert np.abs(found - expected).max() < LOGIT_BOUNDS[target]
    assert expected.std() > 1  # else the bound would mean nothing


def test_logits_agree_with_three_deepstack_levels_and_an_untied_head(
    target: str,
    tiny_untied_checkpoint: Path,
    tiny_artifacts: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = [_frame(333, 277), _frame(96, 200, 1)]
    expected = Reference(tiny_untied_checkpoint).logits(frames, "Is there a mass?")
    with load(tiny_artifacts(target, "tiny_untied_checkpoint"), threads=1) as opened:
        seen = _Logits(opened, monkeypatch)
        opened.ask(frames, "Is there a mass?", max_new_tokens=1)
    assert np.abs(seen.last - expected).max() < LOGIT_BOUNDS[target]


def test_an_image_moved_by_one_token_would_break_the_bound(
    target: str,
    session: Session,
    reference: Reference,
    fresh_logits: Callable[[Study, str], NDArray[np.float32]],
) -> None:
    """The bound is tight enough to see what goes wrong in other runtimes."""
    frame = _frame(448, 320)
    moved = Frame.from_pixels(np.roll(frame.pixels, 32, axis=1))
    expected = reference.logits([moved], "Locate the nodule.")
    found = fresh_logits(session.study(frame), "Locate the nodule.")
    assert np.abs(found - expected).max() > 5 * LOGIT_BOUNDS[target]


@pytest.mark.parametrize("layout", ["square", "wide", "two"])
def test_greedy_text_equals_transformers(
    layout: str, session: Session, reference: Reference
) -> None:
    frames = [_frame(*size, seed) for seed, size in enumerate(LAYOUTS[layout])]
    question = "Generate a detailed radiology report for this image."
    answer = session.ask(frames, question, max_new_tokens=24)
    assert answer.text == reference.greedy(frames, question, 24)
    assert answer.timings.new_tokens == 24


def test_a_second_question_costs_only_its_own_tokens(
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    fresh_logits: Callable[[Study, str], NDArray[np.float32]],
) -> None:
    study = session.study(_frame(448, 320))
    expected = fresh_logits(study, "Is there a mass?")
    seen = _Logits(session, monkeypatch)
    study.ask("Locate the nodule.", max_new_tokens=5)
    assert seen.images == 1
    seen.tokens = 0
    second = study.ask("Is there a mass?", max_new_tokens=1)
    assert np.array_equal(seen.last, expected)
    assert seen.images == 1
    assert seen.tokens == second.timings.prompt_tokens - second.timings.reused_tokens < 25


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_interleaved_studies_do_not_disturb_each_other(
    budget: int,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    fresh_logits: Callable[[Study, str], NDArray[np.float32]],
) -> None:
    monkeypatch.setattr(session._stage.prefixes, "_budget_bytes", budget)
    sizes = [[(224, 224)], [(448, 96), (64, 64)], [(100, 300)]]
    studies = [
        session.study([_frame(*size, seed) for size in group]) for seed, group in enumerate(sizes)
    ]
    expected = [fresh_logits(study, "What is it?") for study in studies]
    seen = _Logits(session, monkeypatch)
    for index in (0, 1, 0, 2, 1, 0, 2, 2):
        studies[index].ask("What is it?", max_new_tokens=3)
        assert np.array_equal(seen.last, expected[index])
    # Parked studies are copied back; without a budget each return evaluates its images again.
    assert seen.images == (4 if budget else 1 + 2 + 1 + 1 + 2 + 1 + 1)


@pytest.mark.parametrize("looks", [0, 1, 3])
@pytest.mark.parametrize("work", ["text", "image"])
def test_native_work_stops_in_the_middle_and_rolls_back(
    work: str,
    looks: int,
    session: Session,
    fresh_logits: Callable[[Study, str], NDArray[np.float32]],
) -> None:
    study = session.study(_frame(448, 320))
    expected = fresh_logits(study, "Is it?")
    backend = session.backend
    backend.rewind(START)
    backend.decode_tokens([5, 6, 7])
    before = backend.mark()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > looks

    backend.set_interrupt(stop)
    with pytest.raises(Interrupted):
        if work == "text":
            backend.decode_tokens(list(range(200)) * 5)
        else:
            backend.append_image(study._pictures[0].resized_HWC)
    backend.set_interrupt(None)
    assert asked > looks
    assert backend.mark() == before
    assert np.array_equal(fresh_logits(study, "Is it?"), expected)


@pytest.mark.parametrize("seconds", [1e-6, 0.01])
def test_a_timeout_during_the_prompt_and_then_a_normal_answer(
    seconds: float, session: Session
) -> None:
    study = session.study(_frame(512, 512))
    late = study.ask("What is it?", timeout_seconds=seconds)
    assert (late.text, late.finish_reason) == ("", "timeout")
    answer = study.ask("What is it?", max_new_tokens=4)
    assert answer.finish_reason == "length"
    assert answer.text == session.ask(_frame(512, 512), "What is it?", max_new_tokens=4).text


def test_cancelling_from_another_thread(session: Session) -> None:
    event = threading.Event()
    timer = threading.Timer(0.3, event.set)
    timer.start()
    answer = session.ask(_frame(96, 96), "What is it?", cancel=event, max_new_tokens=3000)
    timer.join()
    assert answer.finish_reason == "cancelled"
    assert 0 < answer.timings.new_tokens < 3000


@pytest.mark.parametrize("work", ["text", "image"])
def test_ctrl_c_during_native_work_is_delivered_afterwards(work: str, session: Session) -> None:
    backend = session.backend
    backend.rewind(START)

    def press() -> bool:
        signal.raise_signal(signal.SIGINT)
        return False

    backend.set_interrupt(press)
    with pytest.raises(KeyboardInterrupt):
        if work == "text":
            backend.decode_tokens([1, 2, 3])
        else:
            backend.append_image(np.zeros((224, 224, 3), np.uint8))
    backend.set_interrupt(None)
    backend.rewind(START)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert session.ask(_frame(96, 96), "Is it?", max_new_tokens=2).timings.new_tokens == 2


def test_a_full_context_ends_the_answer_and_a_long_prompt_is_refused(artifact: Path) -> None:
    with load(artifact, threads=1, max_context=120) as opened:
        study = opened.study(_frame(96, 96))
        answer = study.ask("Is it?", max_new_tokens=500)
        assert answer.finish_reason == "length"
        # The last token said is not evaluated, so it needs no cell.
        assert answer.timings.prompt_tokens + answer.timings.new_tokens == 121
        with pytest.raises(GenerationError, match="tokens, the context holds 120"):
            opened.ask(_frame(500, 500), "Is it?")


def test_nothing_is_printed(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with load(artifact, threads=1) as opened:
        opened.ask(_frame(300, 200), "Is it?", max_new_tokens=3)
    assert capfd.readouterr() == ("", "")


def test_open_and_close_again_and_again(artifact: Path) -> None:
    texts = set()
    for _ in range(3):
        opened = load(artifact, threads=1)
        study = opened.study(_frame(96, 96))
        texts.add(study.ask("Is it?", max_new_tokens=4).text)
        opened.close()
        opened.close()
        with pytest.raises(GenerationError, match="closed"):
            opened.backend.decode_tokens([1])
    assert len(texts) == 1
