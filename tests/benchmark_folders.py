"""Tiny folders of every benchmark in its publisher's form, two or three items each.

File names, columns and quirks are the publishers'; the questions and pictures are made up.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from published_files import write_parquet


def png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """A noise picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _image(seed: int = 0) -> dict[str, Any]:
    return {"bytes": png(seed=seed), "path": None}


def mmmu(folder: Path) -> None:
    """Five subjects; one open item, one whose options are images."""
    subjects = (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    )
    for number, subject in enumerate(subjects):
        rows = [
            {
                "id": f"validation_{subject}_1",
                "question": "What does <image 1> show?",
                "options": "['heart', 'lung', \"the patient's liver\"]",
                "answer": "B",
                "question_type": "multiple-choice",
                "image_1": _image(number),
            }
        ]
        if number == 0:
            rows.append(
                rows[0] | {"id": "v2", "options": "[]", "answer": "3.5", "question_type": "open"}
            )
            options = "['<image 1>', '<image 2>']"
            rows.append(rows[0] | {"id": "v3", "options": options, "answer": "A"})
        write_parquet(folder / subject / "validation-00000-of-00001.parquet", rows)


def vqa_rad(folder: Path) -> None:
    """The Hugging Face copy."""
    rows = [
        {"image": _image(1), "question": "Is there an effusion?", "answer": "Yes"},
        {"image": _image(2), "question": "Which organ?", "answer": "lung"},
    ]
    write_parquet(folder / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", rows)
    write_parquet(folder / "data" / "train-00000-of-00001-eb8844602202be60.parquet", rows[:1])


def slake(folder: Path) -> None:
    """test.json with both languages."""
    row = {
        "img_id": 1,
        "img_name": "xmlab1/source.jpg",
        "question": "Does the picture contain lung?",
        "answer": "Yes",
        "q_lang": "en",
        "location": "Chest",
        "modality": "X-Ray",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "content_type": "Organ",
        "triple": ["vhead", "_", "_"],
        "qid": 1,
    }
    more = row | {"qid": 2, "q_lang": "zh", "question": "\u662f\u4ec0\u4e48?", "answer": "\u80ba"}
    more["answer_type"] = "OPEN"
    _write(folder / "test.json", json.dumps([row, more], ensure_ascii=False))
    _write(folder / "imgs" / "xmlab1" / "source.jpg", png())


def pmc_vqa(folder: Path) -> None:
    """test_2.csv and figures/."""
    header = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split"
    row = '0,PMC1_F1.jpg,"A caption, long",What?, A: Lung , B: Liver , C: Heart , D: Bone ,B,test'
    _write(folder / "test_2.csv", f"{header}\n{row}\n")
    _write(folder / "figures" / "PMC1_F1.jpg", png())


def omnimedvqa(folder: Path) -> None:
    """Two options in one item, four in another."""
    row = {
        "dataset": "ACRIMA",
        "question_id": "ACRIMA_0000",
        "question_type": "Modality Recognition",
        "question": "What modality is it?",
        "gt_answer": "Fundus",
        "image_path": "Images/ACRIMA/Im1.png",
        "option_A": "CT",
        "option_B": "Fundus",
        "option_C": "MRI",
        "option_D": "X-ray",
        "modality_type": "Fundus Photography",
    }
    short = {key: row[key] for key in row if key not in ("option_C", "option_D")}
    rows = [row, short | {"question_id": "ACRIMA_0001"}]
    _write(folder / "QA_information" / "Open-access" / "ACRIMA.json", json.dumps(rows))
    _write(folder / "Images" / "ACRIMA" / "Im1.png", png())


def medxpertqa(folder: Path) -> None:
    """Text and MM, options inside the question and as an object."""
    text = {
        "id": "Text-1",
        "question": "What next?\nAnswer Choices: (A) Wait (B) Operate (C) Both",
        "options": {"A": "Wait", "B": "Operate", "C": "Both"},
        "label": "C",
        "medical_task": "Treatment",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
    }
    _jsonl(folder / "Text" / "test.jsonl", [text])
    mm = text | {"id": "MM-1", "images": ["MM-1-a.jpeg", "MM-1-b.jpeg"], "label": "A"}
    _jsonl(folder / "MM" / "test.jsonl", [mm])
    for name in mm["images"]:
        _write(folder / "images" / str(name), png())


def mmlu(folder: Path) -> None:
    """Hugging Face's "all" config; one row is not medical."""
    row = {"question": "Which bone?", "subject": "anatomy", "choices": list("wxyz"), "answer": 2}
    write_parquet(
        folder / "all" / "test-00000-of-00001.parquet",
        [row, row | {"subject": "virology", "answer": 0}, row | {"subject": "astronomy"}],
    )


def mmlu_csv(folder: Path) -> None:
    """The original release."""
    lines = io.StringIO()
    csv.writer(lines).writerow(["Which, bone?", "w", "x", "y", "z", "D"])
    _write(folder / "test" / "anatomy_test.csv", lines.getvalue())


def pubmedqa(folder: Path) -> None:
    """The original release: all labelled items, and the test ids."""
    row = {"QUESTION": "Does it help?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"}
    _write(folder / "ori_pqal.json", json.dumps({"1": row, "2": row | {"final_decision": "no"}}))
    _write(folder / "test_ground_truth.json", json.dumps({"1": "maybe"}))


def pubmedqa_copy(folder: Path) -> None:
    """openlifescienceai/pubmedqa."""
    data = {
        "Question": "Does it help?",
        "Context": ["One.", "Two."],
        "Options": {"A": "yes", "B": "no", "C": "maybe"},
        "Correct Option": "C",
    }
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [{"id": "1", "data": data}])


def medmcqa(folder: Path) -> None:
    """openlifescienceai/medmcqa: answers from 0."""
    row: dict[str, Any] = {"id": "a", "question": "Which?", "subject_name": "Anatomy"}
    row |= {"opa": "w", "opb": "x", "opc": "y", "opd": "z", "choice_type": "single"}
    rows = [row | {"cop": 0}, row | {"id": "b", "cop": 3}]
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows)


def medmcqa_original(folder: Path) -> None:
    """dev.json of the original release: one object a line, answers from 1."""
    row = {"id": "a", "question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z"}
    _jsonl(folder / "dev.json", [{**row, "cop": 1}, {**row, "id": "b", "cop": 4}])


def medqa(folder: Path) -> None:
    """GBaker/MedQA-USMLE-4-options."""
    row = {
        "question": "Which drug?",
        "answer": "x",
        "options": {"A": "w", "B": "x", "C": "y", "D": "z"},
        "meta_info": "step1",
        "answer_idx": "B",
    }
    _jsonl(folder / "phrases_no_exclude_test.jsonl", [row])


def medbullets_4(folder: Path) -> None:
    """tuenguyen/Medical-Eval-MedBullets_op4."""
    options = {"A": "w", "B": "x", "C": "y", "D": "z"}
    row = {"question": "Which drug?", "options": options, "answer_idx": "D", "answer": "z"}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [row])


def medbullets_5(folder: Path) -> None:
    """LangAGI-Lab/medbullets_op5."""
    row = {f"op{letter}": letter for letter in "abcde"}
    row |= {"question": "Which drug?", "answer_idx": "E", "answer": "e"}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [row])


def supergpqa(folder: Path) -> None:
    """m-a-p/SuperGPQA: other disciplines are left out."""
    row = {
        "uuid": "u",
        "question": "Which?",
        "options": list("klmnopqrst"),
        "answer": "t",
        "answer_letter": "J",
        "discipline": "Medicine",
        "field": "Clinical Medicine",
        "difficulty": "hard",
    }
    _jsonl(folder / "SuperGPQA-all.jsonl", [row, row | {"discipline": "Law"}])


def reports(folder: Path) -> None:
    """MedEvalKit's test.json; one entry is empty and left out."""
    row = {"image": ["p1/a.jpg", "p1/b.jpg"], "findings": "Left effusion.", "impression": ""}
    empty = {"image": ["p1/a.jpg"], "findings": " ", "impression": ""}
    _write(folder / "test.json", json.dumps([row, empty]))
    for name in ("a", "b"):
        _write(folder / "images" / "p1" / f"{name}.jpg", png())


def chexpert(folder: Path) -> None:
    """The same with one image a study."""
    row = {"image": "a.jpg", "findings": "Normal.", "impression": "No finding."}
    _write(folder / "test.json", json.dumps([row]))
    _write(folder / "images" / "a.jpg", png())


def iu_xray(folder: Path) -> None:
    """MedEvalKit's test.json."""
    row = {
        "id": "CXR1",
        "image": ["CXR1/0.png", "CXR1/1.png"],
        "findings": "Clear.",
        "impression": "",
    }
    _write(folder / "test.json", json.dumps([row]))
    for name in ("0", "1"):
        _write(folder / "images" / "CXR1" / f"{name}.png", png())


def medtrinity(folder: Path) -> None:
    """25M_demo."""
    rows = [{"image": _image(), "id": "a.jpg", "caption": "A chest CT with a nodule."}]
    write_parquet(folder / "25M_demo" / "train-00000-of-00001.parquet", rows)


def medsg(folder: Path) -> None:
    """Two tasks as JSON; a box in the question of one."""
    row = {
        "task": "referring",
        "images": ["a.png", "b.png"],
        "question": "Find in the second image what <|box_start|>(10,10),(20,20)<|box_end|> marks.",
        "answer": [16, 12, 32, 24],
    }
    _write(folder / "Task8.json", json.dumps([row]))
    _write(folder / "Task3.json", json.dumps([row | {"task": "multi_view", "size": [64, 48]}]))
    for name in ("a", "b"):
        _write(folder / "images" / f"{name}.png", png())


def nih(folder: Path) -> None:
    """The published header."""
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    row = "00000001_000.png,Nodule,512.0,256.0,128.0,128.0,,,"
    _write(folder / "BBox_List_2017.csv", f"{header}\n{row}\n")
    _write(folder / "images" / "00000001_000.png", png(1024, 1024))


def deeplesion(folder: Path) -> None:
    """One test slice, stored with its offset."""
    header = (
        "File_name,Patient_index,Bounding_boxes,Coarse_lesion_type,DICOM_windows,Train_Val_Test"
    )
    row = '000001_01_01_109.png,1,"226.1, 90.0, 241.6, 111.9",3,"-175, 275",3'
    _write(folder / "DL_info.csv", f"{header}\n{row}\n")
    path = folder / "Images_png" / "000001_01_01" / "109.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((512, 512), 32768 + 40, np.uint16)).save(path)


def voc(folder: Path) -> None:
    """Two labels on one picture."""
    node = (
        "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>4</ymin><xmax>{}</xmax>"
        "<ymax>20</ymax></bndbox></object>"
    )
    objects = node.format("cell", 2, 10) + node.format("cell", 20, 30) + node.format("dust", 40, 50)
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    _write(folder / "Annotations" / "a.xml", f"<annotation>{size}{objects}</annotation>")
    _write(folder / "JPEGImages" / "a.png", png())


def coco(folder: Path) -> None:
    """One picture with three annotations of two categories."""
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "cell"}, {"id": 4, "name": "dust"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [2, 4, 8, 16], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 4, 10, 16], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 4, "bbox": [40, 4, 10, 16], "iscrowd": 0},
        ],
    }
    _write(folder / "annotations.json", json.dumps(document))
    _write(folder / "images" / "a.png", png())


def yolo(folder: Path) -> None:
    """Darknet's form: classes.txt and a text file beside the picture."""
    _write(folder / "classes.txt", "cell\ndust\n")
    _write(folder / "a.png", png())
    _write(folder / "a.txt", "0 0.1 0.25 0.125 0.33\n1 0.7 0.25 0.16 0.33\n")


def path_vqa(folder: Path) -> None:
    """The Hugging Face copy."""
    rows = [
        {"image": _image(1), "question": "is necrosis present?", "answer": "no"},
        {"image": _image(1), "question": "what is present?", "answer": "spleen"},
    ]
    write_parquet(folder / "data" / "test-00000-of-00003.parquet", rows)


def medsg_tasks(folder: Path) -> None:
    """Every task by its number."""
    row = {"images": ["a.png", "a.png"], "question": "What differs?", "answer": [16, 12, 32, 24]}
    for number in range(1, 9):
        _write(folder / f"Task{number}.json", json.dumps([row] * number))
    _write(folder / "a.png", png())


#: benchmark -> (writer, items, questions, gold of the first question)
FOLDERS: dict[str, tuple[Callable[[Path], None], int, int, str]] = {
    "mmmu-med": (mmmu, 7, 7, "B"),
    "vqa-rad": (vqa_rad, 2, 2, "yes"),
    "slake": (slake, 2, 2, "yes"),
    "pmc-vqa": (pmc_vqa, 1, 1, "B"),
    "omnimedvqa": (omnimedvqa, 2, 2, "B"),
    "medxpertqa-mm": (medxpertqa, 1, 1, "A"),
    "medxpertqa-text": (medxpertqa, 1, 1, "C"),
    "mmlu-med": (mmlu, 2, 2, "C"),
    "pubmedqa": (pubmedqa, 1, 1, "C"),
    "medmcqa": (medmcqa, 2, 2, "A"),
    "medqa": (medqa, 1, 1, "B"),
    "medbullets-op4": (medbullets_4, 1, 1, "D"),
    "medbullets-op5": (medbullets_5, 1, 1, "E"),
    "supergpqa-medicine": (supergpqa, 1, 1, "J"),
    "mimic-cxr": (reports, 1, 1, "Findings: Left effusion. Impression: ."),
    "chexpert-plus": (chexpert, 1, 1, "Findings: Normal. Impression: No finding.."),
    "iu-xray": (iu_xray, 1, 1, "Findings: Clear. Impression: ."),
    "medtrinity": (medtrinity, 1, 1, "A chest CT with a nodule."),
    "medsg-referring": (medsg, 1, 1, ""),
    "medsg-multi-view": (medsg, 1, 1, ""),
    "medsg": (medsg, 2, 2, ""),
    "nih": (nih, 1, 1, ""),
    "deeplesion": (deeplesion, 1, 1, ""),
    "voc": (voc, 1, 2, ""),
    "coco": (coco, 1, 2, ""),
    "yolo": (yolo, 1, 2, ""),
    "path-vqa": (path_vqa, 2, 2, "no"),
    "medsg-registered-diff": (medsg_tasks, 1, 1, ""),
    "medsg-non-registered-diff": (medsg_tasks, 2, 2, ""),
    "medsg-object-tracking": (medsg_tasks, 4, 4, ""),
    "medsg-concept": (medsg_tasks, 5, 5, ""),
    "medsg-patch": (medsg_tasks, 6, 6, ""),
    "medsg-crossmodal": (medsg_tasks, 7, 7, ""),
}
