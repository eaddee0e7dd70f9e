"""Conversions as a user runs them: what is written, split, skipped, and never half done."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from published_files import png, write_parquet

from medmo_edge.cli import cli
from medmo_edge.errors import SampleError, UsageError
from medmo_edge.evaluation.convert import BrokenItems, Wishes, convert
from medmo_edge.evaluation.items import Embedded, Item
from medmo_edge.evaluation.retrieval import retrieval_samples
from medmo_edge.evaluation.splitting import Groups, choose, item_keys, parse_fractions
from medmo_edge.samples import Sample, question_of, read_samples, target_text


def captioned(folder: Path, count: int, *, same: int = 0) -> Path:
    """A plain folder of ``count`` pictures with texts, of which ``same`` share their pixels."""
    folder.mkdir(parents=True)
    for number in range(count):
        grey = np.full((8, 8), 0 if number < same else number, np.uint8)
        Image.fromarray(grey).save(folder / f"p{number:03d}.png")
        (folder / f"p{number:03d}.txt").write_text(f"Text number {number}.")
    return folder


def parquet(path: Path, pictures: list[int]) -> Path:
    """PathVQA rows, one question per entry, on pictures of that grey level."""
    rows = []
    for number, grey in enumerate(pictures):
        image = {"bytes": png(8, 8, grey), "path": None}
        rows.append({"image": image, "question": f"question {number}?", "answer": "yes"})
    return write_parquet(path, rows).parent


def test_embedded_pictures_are_written_once_each(tmp_path: Path) -> None:
    source = parquet(tmp_path / "source" / "test-0.parquet", [1, 2, 1, 1])
    output = tmp_path / "out.jsonl"
    report = convert("path-vqa", source, output)
    assert report.files == {str(output): 4} and report.images_written == 2
    samples = list(read_samples(output))
    assert [sample.line for sample in samples] == [1, 2, 3, 4]
    assert samples[0].images == samples[2].images != samples[1].images
    assert samples[0].images[0].parent == tmp_path / "out.images"
    assert np.asarray(Image.open(samples[1].images[0]))[0, 0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.images", "out.jsonl", "source"]
    moved = tmp_path / "elsewhere"  # the samples and their pictures move together
    moved.mkdir()
    for name in ("out.jsonl", "out.images"):
        (tmp_path / name).rename(moved / name)
    assert all(sample.images[0].is_file() for sample in read_samples(moved / "out.jsonl"))


def test_no_question_of_a_picture_is_in_another_split(tmp_path: Path) -> None:
    pictures = [number % 23 for number in range(200)]
    source = parquet(tmp_path / "source" / "train-0.parquet", pictures)
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2}
    convert("path-vqa", source, tmp_path / "a.jsonl", Wishes(fractions=fractions))
    seen = {
        split: {
            path for sample in read_samples(tmp_path / f"a-{split}.jsonl") for path in sample.images
        }
        for split in fractions
    }
    assert all(not seen[a] & seen[b] for a, b in combinations(seen, 2))
    assert sum(map(len, seen.values())) == 23 and all(seen.values())
    convert("path-vqa", source, tmp_path / "b.jsonl", Wishes(fractions=fractions))
    for split in fractions:
        ids = [[s.id for s in read_samples(tmp_path / f"{name}-{split}.jsonl")] for name in "ab"]
        assert ids[0] == ids[1]


def test_copies_of_a_picture_stay_together(tmp_path: Path) -> None:
    source = captioned(tmp_path / "source", 40, same=20)
    wishes = Wishes(fractions={"train": 0.5, "test": 0.5})
    convert("folder", source, tmp_path / "a.jsonl", wishes)
    where = Counter(
        split
        for split in ("train", "test")
        for sample in read_samples(tmp_path / f"a-{split}.jsonl")
        if sample.id < "p020"
    )
    assert list(where.values()) == [20]


def test_broken_items_stop_or_are_skipped_and_listed(tmp_path: Path) -> None:
    source = captioned(tmp_path / "source", 3)
    (source / "p001.txt").write_text("")
    output = tmp_path / "out.jsonl"
    with pytest.raises(BrokenItems, match=r"1 broken item: .*p001.txt is empty .*--skip-broken"):
        convert("folder", source, output)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (source / "p002.txt").unlink()
    with pytest.raises(BrokenItems, match="2 broken items of which the first is"):
        convert("folder", source, output)
    report = convert("folder", source, output, Wishes(skip_broken=True))
    assert [sample.id for sample in read_samples(output)] == ["p000.png"]
    assert [reason.rpartition("/")[2] for reason in report.broken] == [
        "p001.txt is empty",
        "p002.png has no text: p002.txt is missing",
    ]


def test_nothing_is_overwritten_and_an_empty_set_is_an_error(tmp_path: Path) -> None:
    source = captioned(tmp_path / "source", 2)
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert("folder", source, output)
    assert output.read_text() == "mine"
    with pytest.raises(UsageError, match="is not a folder: create it first"):
        convert("folder", source, tmp_path / "no" / "out.jsonl")
    for path in source.glob("*.txt"):
        path.write_text("")
    with pytest.raises(SampleError, match="the set is empty or all of it broken"):
        convert("folder", source, tmp_path / "b.jsonl", Wishes(skip_broken=True))
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    (tmp_path / "one").mkdir()
    with pytest.raises(SampleError, match="split '.*' would be empty"):
        convert(
            "folder",
            captioned(tmp_path / "two", 1),
            tmp_path / "c.jsonl",
            Wishes(fractions=fractions),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out.jsonl", "source", "two"]


def test_locate_questions_by_label_and_for_what_is_absent(tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "bccd"
    output = tmp_path / "a.jsonl"
    report = convert("voc", source, output, Wishes(split="val", absent=True))
    samples = list(read_samples(output))
    assert report.tasks == {"locate": 3 * 87} and len(samples) == 261
    empty = [sample for sample in samples if not sample.boxes]
    assert empty and {target_text(sample, [None]) for sample in empty} == {"None."}  # type: ignore[list-item]
    assert all({box.label for box in s.boxes} <= {s.id.rpartition("/")[2]} for s in samples)
    assert question_of(samples[0]) == "Locate the WBC."
    whole = convert("voc", source, tmp_path / "b.jsonl", Wishes(split="val", by_label=False))
    assert whole.files == {str(tmp_path / "b.jsonl"): 87}


def test_the_command_prints_lists_and_exit_codes(tmp_path: Path) -> None:
    source = captioned(tmp_path / "source", 6)
    run = CliRunner().invoke
    done = run(cli, ["samples", "folder", str(source), "-o", str(tmp_path / "a.jsonl")])
    assert done.exit_code == 0 and f"{tmp_path}/a.jsonl (6): 6 caption" in done.output
    (source / "p001.txt").write_text("")
    (source / "p002.txt").write_text("")
    output = str(tmp_path / "b.jsonl")
    failed = run(cli, ["samples", "folder", str(source), "-o", output])
    assert isinstance(failed.exception, BrokenItems) and "broken: " in failed.stderr
    done = run(cli, ["samples", "folder", str(source), "-o", output, "--skip-broken", "--json"])
    report = json.loads(done.stdout)
    assert report["files"] == {output: 4} and len(report["broken"]) == 2
    assert report["tasks"] == {"caption": 4}


def test_our_own_files_are_checked_and_split(tmp_path: Path) -> None:
    """A second conversion changes nothing but the split; broken lines are named."""
    convert("folder", captioned(tmp_path / "source", 30), tmp_path / "a.jsonl")
    fractions = {"train": 0.5, "val": 0.5}
    convert("jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl", Wishes(fractions=fractions))
    parts = [(tmp_path / f"b-{name}.jsonl").read_text().splitlines() for name in fractions]
    assert sorted(parts[0] + parts[1]) == sorted((tmp_path / "a.jsonl").read_text().splitlines())
    box = {"label": "WBC", "image": 0, "xyxy": [1, 1, 900, 900]}
    bad: list[dict[str, object]] = [
        {"images": ["source/p001.png"], "boxes": [box], "id": "far"},
        {"images": ["source/none.png"], "id": "gone"},
        {"images": ["source/p001.png"], "id": ""},
    ]
    rest = {"task": "locate", "messages": [{"role": "user", "content": "Where?"}]}
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(one | rest) for one in bad))
    with pytest.raises(BrokenItems) as caught:
        convert("jsonl", path, tmp_path / "c.jsonl")
    for number, (reason, message) in enumerate(
        zip(
            caught.value.reasons,
            ("lies mostly outside its picture of 8 x 8", "No such file", "'id' must be a text"),
            strict=True,
        ),
        start=1,
    ):
        assert f"bad.jsonl:{number}: " in reason and message in reason


def test_an_id_used_twice_is_broken(tmp_path: Path) -> None:
    line = {"id": "a", "task": "text_qa", "messages": [{"role": "user", "content": "?"}]}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n{json.dumps(line | {'id': 'b'})}\n")
    with pytest.raises(BrokenItems, match="a.jsonl:2: id 'a' was used before"):
        convert("jsonl", path, tmp_path / "b.jsonl")
    convert("jsonl", path, tmp_path / "b.jsonl", Wishes(skip_broken=True))
    assert [sample.id for sample in read_samples(tmp_path / "b.jsonl")] == ["a", "b"]


def test_conversations_and_locate_questions_of_our_own_pass_as_they_are(tmp_path: Path) -> None:
    captioned(tmp_path / "source", 1)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "And the cells?"},
    ]
    boxes = [{"label": name, "image": 0, "xyxy": [1.0, 1.0, 5.0, 5.0]} for name in ("WBC", "RBC")]
    line = {"id": "a", "task": "locate", "images": ["source/p000.png"], "messages": turns}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line | {"boxes": boxes}) + "\n")
    convert("jsonl", path, tmp_path / "b.jsonl", Wishes(absent=True))
    assert (tmp_path / "b.jsonl").read_text() == path.read_text()


# Splits ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20), st.randoms())
def test_what_belongs_together_does_not_depend_on_the_order(
    pairs: list[tuple[int, int]], random: "object"
) -> None:
    """Against connected components found by repeated merging of sets."""
    keys = [(bytes([a]), bytes([b])) for a, b in pairs]
    components = [set(pair) for pair in keys]
    for _ in keys:
        for pair in keys:
            touching = [part for part in components if part & set(pair)]
            components = [part for part in components if part not in touching]
            components.append(set().union(*touching))
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    groups = Groups()
    for pair in shuffled:
        assert groups.join(pair) in pair
    for part in components:
        assert {groups.root(key) for key in part} == {min(part)}


def test_patients_tie_pictures_together() -> None:
    def item(name: str, group: str | None, *pictures: bytes) -> Item:
        images = tuple(Embedded("a.png", data) for data in pictures)
        return Item(id=name, task="vqa", question=name, where="", images=images, group=group)

    groups = Groups()
    keys = [
        groups.join(item_keys(one, {}))
        for one in (
            item("a", "p1", b"1"),
            item("b", "p1", b"2"),
            item("c", None, b"2", b"3"),
            item("d", "p2", b"4"),
            item("text", None),
        )
    ]
    roots = [groups.root(key) for key in keys]
    assert roots[0] == roots[1] == roots[2] and len(set(roots)) == 3


def test_fractions_are_met_on_average() -> None:
    keys = [number.to_bytes(4, "big") for number in range(4000)]
    drawn = Counter(choose(key, {"a": 0.7, "b": 0.2, "c": 0.1}) for key in keys)
    for name, part in (("a", 0.7), ("b", 0.2), ("c", 0.1)):
        deviation = (part * (1 - part) * len(keys)) ** 0.5
        assert abs(drawn[name] - part * len(keys)) < 4 * deviation
    other = [choose(key, {"a": 0.7, "b": 0.3}, seed=1) for key in keys]
    assert other != [choose(key, {"a": 0.7, "b": 0.3}) for key in keys]


@pytest.mark.parametrize(
    "text", ["", "train", "train=1.2,val=-0.2", "train=0.5", "a/b=1", "a=0.5,a=0.5", "train=x"]
)
def test_impossible_fractions(text: str) -> None:
    with pytest.raises(UsageError, match="fraction"):
        parse_fractions(text)
    assert parse_fractions("train=0.9, val=0.1") == {"train": 0.9, "val": 0.1}


# Retrieval -------------------------------------------------------------------------------------


def report(name: str, text: str, *pictures: str) -> Sample:
    return Sample(
        id=name,
        task="report",
        images=tuple(Path("/x") / picture for picture in pictures),
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}],
    )


def test_retrieval_shows_the_right_candidate_and_no_twin() -> None:
    samples = [report(f"r{n}", f"Text {n // 2}.", f"a{n}", f"b{n}") for n in range(20)]
    found = list(retrieval_samples(samples, candidates=4))
    assert len(found) == 40
    by_id = {sample.id: sample for sample in samples}
    for sample in found:
        right = by_id[sample.meta["of"]]
        assert sample.answer is not None and len(sample.choices) == 4
        place = "ABCD".index(sample.answer)
        if sample.id.endswith("which-text"):
            assert sample.choices[place] == target_text(right) and sample.images == right.images
            assert len(set(sample.choices)) == 4  # neighbours share a text
        else:
            assert sample.images[place] == right.images[0] and len(set(sample.images)) == 4
            assert target_text(right) in question_of(sample)
        assert question_of(sample).count("\n") == 6 and target_text(sample) == sample.answer
    assert len({sample.answer for sample in found}) == 4
    assert found == list(retrieval_samples(samples, candidates=4))
    assert found != list(retrieval_samples(samples, candidates=4, seed=1))


def test_retrieval_needs_enough_that_differs() -> None:
    same = [report(f"r{n}", "Normal chest.", f"a{n}") for n in range(9)]
    with pytest.raises(SampleError, match="needs as many different texts and pictures"):
        list(retrieval_samples(same, candidates=2))
    with pytest.raises(SampleError, match="a choice has 2 to 26"):
        list(retrieval_samples(same, candidates=1))
    with pytest.raises(SampleError, match="needs captioned samples"):
        list(retrieval_samples([], candidates=2))


def test_retrieval_is_added_within_each_split(tmp_path: Path) -> None:
    source = captioned(tmp_path / "source", 60)
    fractions = {"train": 0.5, "val": 0.5}
    report = convert(
        "folder", source, tmp_path / "a.jsonl", Wishes(fractions=fractions, retrieval=3)
    )
    assert report.tasks == {"caption": 60, "retrieval": 120}
    shown = {
        split: {image for s in read_samples(tmp_path / f"a-{split}.jsonl") for image in s.images}
        for split in fractions
    }
    assert not shown["train"] & shown["val"]
    assert sum(report.files.values()) == 180
