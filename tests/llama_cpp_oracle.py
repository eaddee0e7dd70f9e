"""Runs llama.cpp itself in a process of its own, as the reference of the export tests.

    python tests/llama_cpp_oracle.py < jobs.json

Jobs are a JSON list: {"quantise": source, "to": file, "ftype": number, "imatrix": npz or null} or
{"load": artifact folder}. Prints a JSON list of what each gave. A process of its own, because the
log callback of the library is global and other tests set theirs.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np


def quantise(job: dict[str, Any]) -> bool:
    """llama_model_quantize with an optional importance matrix in memory; True when it worked."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = job["ftype"], 1
    kept = []
    if job.get("imatrix"):
        entries = np.load(job["imatrix"])
        array = (llama.llama_model_imatrix_data * (len(entries.files) + 1))()
        for entry, name in zip(array, entries.files, strict=False):
            values = np.ascontiguousarray(entries[name], np.float32)
            kept.append(values)
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = array
    source, target = str(job["quantise"]).encode(), str(job["to"]).encode()
    return bool(llama.llama_model_quantize(source, target, ctypes.byref(params)) == 0)


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load both files of an artifact and read back what llama.cpp understood."""
    folder = Path(job["load"])
    model = llama.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama.llama_model_default_params()
    )
    if not model:
        return {"language": False}
    vocab = llama.llama_model_get_vocab(model)
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.warmup = False, False
    vision = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), model, params)
    facts = {
        "language": True,
        "vision": bool(vision) and bool(mtmd.mtmd_support_vision(vision)),
        "parameters": llama.llama_model_n_params(model),
        "layers": llama.llama_model_n_layer(model),
        "width": llama.llama_model_n_embd(model),
        "input_width": llama.llama_model_n_embd_inp(model),
        "vocab_size": llama.llama_vocab_n_tokens(vocab),
        "eos": llama.llama_vocab_eos(vocab),
        "ids": _tokenise(vocab, job["text"].encode()) if "text" in job else None,
    }
    if vision:
        mtmd.mtmd_free(vision)
    llama.llama_model_free(model)
    return facts


def _tokenise(vocab: Any, text: bytes) -> list[int]:
    room = len(text) + 8
    ids = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocab, text, len(text), ids, room, True, True)
    return list(ids[:count])


def main() -> None:
    """Run the jobs of stdin."""
    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda level, text, data: None)
    for set_log in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        set_log(silent, ctypes.c_void_p(0))
    jobs = json.load(sys.stdin)
    print(json.dumps([quantise(job) if "quantise" in job else load(job) for job in jobs]))


if __name__ == "__main__":
    main()
