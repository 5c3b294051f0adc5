"""Models on disk.

A model is a folder: `config.json`, `model.safetensors` and the tokenizer's files.

    save:  models.py -> folder.py -> files.folders.write_folder: staged, fsynced, swapped in
    load:  models.py <- folder.py <- safetensors.py: validated, then allocated
"""
