"""Fail unless a wheel holds `vlmprune/` and its metadata, and nothing else."""

import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
roots = {name.split("/")[0] for name in names}
foreign = {root for root in roots if root != "vlmprune" and not root.endswith(".dist-info")}
wanted = {
    "vlmprune/py.typed",
    "vlmprune/ERRORS.md",
    "vlmprune/eval/embedded/model/model.safetensors",
    "vlmprune/eval/embedded/data/questions.jsonl",
    "vlmprune/eval/embedded/data/objects.jsonl",
    "vlmprune/eval/embedded/head.safetensors",
    "vlmprune/eval/presets/llava-1.5.yaml",
    "vlmprune/adapters/families/llava.py",
    "vlmprune/prune/methods/before_llm/divprune.py",
}
missing = wanted - set(names)
tests = [name for name in names if name.startswith(("vlmprune/tests", "vlmprune/notebooks"))]
if foreign or missing or tests:
    sys.exit(f"bad wheel: foreign {foreign}, missing {missing}, not for users {tests}")
sys.stdout.write(f"{len(names)} files, all under vlmprune/\n")
