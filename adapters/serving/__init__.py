"""The same choices before the LLM inside vLLM, as a plugin: see README.md beside this file.

vLLM is imported by `llava.py` alone, which vLLM itself loads when a model asks for it.
"""
