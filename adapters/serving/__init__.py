"""The same choices before the LLM inside vLLM, as a plugin: see README.md beside this file.

vLLM is imported by the files in `families/`, which vLLM itself loads when a model asks for one.
"""
