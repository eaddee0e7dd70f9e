"""From a recipe to a checkpoint: scenes, questions, rows, the dense loss, the loop, the writer.

    recipe.toml -> run.train -> step-* (resumable) -> checkpoint (config, weights, tokenizer, ...)

Importing this package imports nothing heavy; torch and transformers load when a run starts.
"""
